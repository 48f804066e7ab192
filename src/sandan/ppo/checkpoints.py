"""What a checkpoint of PPO holds beside Trainer's, and which one a run goes on from."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from .ema import EMA_FOLDER
from .modules import load_weights, mark_special_tokens, save_policy


VALUE_MODEL_FOLDER = "value_model"
STATE_FILE = "ppo_state.json"


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-*` that was written to its end, or None.

    Trainer writes its state last of all, so a save that was killed lacks it or has half of it.
    """
    numbered = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and all(_is_json(folder / name) for name in (STATE_FILE, TRAINER_STATE_NAME)):
            numbered.append((int(number[1]), folder))
    return str(max(numbered)[1]) if numbered else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


class ResumableTrainer(Trainer):
    """The part of `PPOTrainer` that saves, and goes on exactly where a checkpoint was saved."""

    # Means of the updates since the last log, and what a checkpoint says of them; `PPOTrainer` fills the first.
    _history: list[dict[str, float]]
    _unlogged: dict[str, Any]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Trainer's; `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: no whole checkpoint to resume from")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, which leaves out sharded weights: they are gathered here, but for checkpoints, which keep shards."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "SHARDED" in str(plugin.state_dict_type):
            if _internal_call and output_dir is not None:
                # A checkpoint. Trainer asks whether its folder is there before it writes the shards: ranks would differ
                # about which checkpoint is the best.
                Path(output_dir).mkdir(parents=True, exist_ok=True)
            else:
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """The policy at the root, the critic in `value_model/`, both plain `from_pretrained` folders.

        No `training_args.bin`: it is a pickle, holds `hub_token` in clear, and nothing reads it.

        Args:
            state_dict: of the wrapper, where the weights had to be gathered from shards.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        wrapper = self.accelerator.unwrap_model(self.model)
        mark_special_tokens(wrapper.policy, self.processing_class, self.stop_token_id)

        def part(name: str) -> dict[str, torch.Tensor] | None:
            return state_dict and {
                key.removeprefix(name): value for key, value in state_dict.items() if key.startswith(name)
            }

        save_policy(wrapper.policy, folder, part("policy."))
        wrapper.value_model.save_pretrained(folder / VALUE_MODEL_FOLDER, state_dict=part("value_model."))
        self.processing_class.save_pretrained(folder)
        if self.policy_average is not None:
            self.policy_average.save(folder)
            self.processing_class.save_pretrained(folder / EMA_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not self.is_deepspeed_enabled:
            load_weights(self.policy_model, Path(resume_from_checkpoint))
            load_weights(self.value_model, Path(resume_from_checkpoint, VALUE_MODEL_FOLDER))
            if self.policy_average is not None:
                self.policy_average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
        if self.vllm is not None:
            self.vllm.synced_step = None  # other weights, at the same step

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        centers = {"reward_center": self.reward_center, "value_center": self.value_center}
        state: dict[str, Any] = {"kl_coef": self.kl_coef, **centers}
        if self.args.scale_scores:
            state["score_moments"] = self.score_moments
        if self.state.global_step > self._globalstep_last_logged:
            # Trainer forgets what it has not logged yet: without this the next log of a resumed run is another one.
            loss = self._reduce(self._tr_loss).item() / self.accelerator.num_processes
            state["unlogged"] = {"loss": loss, "since_step": self._globalstep_last_logged, "updates": self._history}
        if self.args.should_save:
            Path(output_dir, STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
            self.kl_coef, self.reward_center = state["kl_coef"], state["reward_center"]
            self.value_center = state["value_center"]
            self.score_moments = tuple(state.get("score_moments", self.score_moments))
            self._unlogged = state.get("unlogged", {})

    def restore_unlogged(self) -> None:
        """Go on with the means that the next log is made of where the checkpoint left them."""
        if self._unlogged:
            self._tr_loss += self._unlogged["loss"]
            # The loss of this call, which ends in `train_loss`, is not to contain it.
            self._total_loss_scalar -= self._unlogged["loss"]
            self._globalstep_last_logged = self._unlogged["since_step"]
            self._history = self._unlogged["updates"]
            self._unlogged = {}
