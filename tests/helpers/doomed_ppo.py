"""PPO runs that die at a chosen moment, as if their machine had failed.

PYTHONPATH=tests python -m helpers.doomed_ppo FOLDER        # a run for each moment
"""

import os
import signal
import sys
from pathlib import Path

from helpers import tiny_ppo as base
from helpers.tiny_ppo import share_of_w5, updates
from sandan import PPOConfig, PPOTrainer


# Every option that holds state or changes the number of steps that are made.
STATEFUL = {
    "scale_scores": True,
    "policy_ema_decay": 0.9,
    "critic_learning_rate": 1e-2,
    "max_approx_kl": 0.005,
    "dual_clip": 3.0,
    "length_penalty": 0.01,
    "learning_rate": 1e-2,
}


def resumable(folder, reward=share_of_w5, trainer_class=PPOTrainer, **kwargs):
    """A run of four updates of four steps with every option that holds state; checkpoints after each update."""
    settings = STATEFUL | {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "total_episodes": 32,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "response_length": 8,
        "num_sample_generations": 0,
        "target_kl": 1.0,
        "center_rewards": True,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 8,  # every second checkpoint lies between two logs
        "seed": 1,
    }
    return trainer_class(
        base.make_policy(),
        reward,
        PPOConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings | kwargs),
        train_dataset=base.make_dataset(12),
        eval_dataset=base.make_dataset(6),
        processing_class=base.make_tokenizer(),
    )


def timeless(trainer):
    """Logs without what a clock says."""
    return [
        {name: value for name, value in log.items() if name != "eps" and not name.startswith("time/")}
        for log in updates(trainer)
    ]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Doomed(PPOTrainer):
    """Dies in the third update, at `moment`, as if its machine had failed."""

    moment = ""

    def sample(self, rows, seed, greedy=False):
        if self.moment == "rollout" and self.state.global_step == 8:
            super().sample(rows[:4], seed, greedy)
            die()
        return super().sample(rows, seed, greedy)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.moment == "update" and self.state.global_step == 10:
            die()
        return loss

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.moment == "save" and self.state.global_step == 12:
            die()  # after the weights, before everything else
        super()._save_optimizer_and_scheduler(output_dir)


class DoomedReward:
    __name__ = "share_of_w5"

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, completions):
        self.calls += 1
        if self.calls == 3:
            die()
        return share_of_w5(prompts, completions)


MOMENTS = ("rollout", "reward", "update", "save")


def die_at_every_moment(folder):
    """Fork a run for each moment (before torch has started any thread) and let it die there."""
    for moment in MOMENTS:
        child = os.fork()
        if child == 0:
            Doomed.moment = moment
            resumable(folder / moment, DoomedReward() if moment == "reward" else share_of_w5, Doomed).train()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{moment}: the run went through"


if __name__ == "__main__":
    die_at_every_moment(Path(sys.argv[1]))
