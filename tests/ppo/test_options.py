"""PPOTrainer's options beyond TRL's, its guards, its memory and its resume after a kill."""

import json
import os
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import doomed_ppo
from helpers import tiny_ppo as base
from helpers.doomed_ppo import MOMENTS, resumable, timeless
from helpers.scripts import run_on_two_ranks, run_processes
from helpers.tiny_ppo import ONE, assert_equal_weights, share_of_w5, updates, weights
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from sandan import PPOConfig, PPOTrainer
from sandan.core import signals
from sandan.core.errors import GateError, Interrupted
from sandan.models import layer_compilation as compilation
from sandan.models.sampling import Completion
from sandan.ppo import watch
from sandan.ppo.diagnosis import Finding, findings
from sandan.ppo.evaluation import samples_table
from sandan.training.checkpoints import newest_whole


def steps_that_moved(trainer):
    """A list that gets, at every optimizer step, whether any gradient was there."""
    optimizer, moved = trainer.create_optimizer(), []
    step = optimizer.step

    def counted(*args, **kwargs):
        moved.append(any(p.grad is not None for group in optimizer.param_groups for p in group["params"]))
        return step(*args, **kwargs)

    optimizer.step = counted
    return moved


# ---- Update options ----


def test_options_out_of_range_are_refused():
    for bad in (
        {"dual_clip": 1.0},
        {"policy_ema_decay": 1.0},
        {"max_approx_kl": -0.1},
        {"length_penalty": -1.0},
        {"critic_learning_rate": 0.0},
        {"max_approx_kl": 0.1, "fp16": True},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PPOConfig("unused", use_cpu=True, **bad)


@pytest.mark.slow
def test_dual_clip_bounds_the_loss(tiny):
    def final(**kwargs):
        trainer = tiny(num_ppo_epochs=4, learning_rate=3e-2, **kwargs)
        trainer.train()
        return weights(trainer)

    free, far, near = final(), final(dual_clip=1e6), final(dual_clip=1.01)
    assert_equal_weights(free, far)
    assert not torch.equal(free["policy.lm_head.weight"], near["policy.lm_head.weight"])


@pytest.mark.slow
def test_an_update_ends_early_above_the_approximate_kl(tiny):
    settings = {"num_ppo_epochs": 4, "num_mini_batches": 2, "learning_rate": 1e-2, "total_episodes": 24}
    trainer = tiny(max_approx_kl=0.005, **settings)
    moved, output = steps_that_moved(trainer), trainer.train()
    used = [int(log["policy/epochs_used"] * 2) for log in updates(trainer)]
    assert output.global_step == len(moved) == 3 * 8  # skipped steps count: the schedule and the resume stay right
    assert [moved[start : start + 8] for start in (0, 8, 16)] == [[True] * n + [False] * (8 - n) for n in used]
    assert all(1 <= n for n in used)
    assert min(used) < 8

    always, never = tiny(**settings), tiny(max_approx_kl=1e6, **settings)
    always.train()
    never.train()
    assert_equal_weights(weights(always), weights(never))
    assert [log["policy/epochs_used"] for log in updates(never)] == [4, 4, 4]
    rates = [[log["lr"] for log in updates(one)] for one in (always, trainer)]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(("given", "bound"), [(None, 0.1), (0.0, 0.0), (0.02, 0.02)])
def test_an_update_that_goes_too_far_is_cut_short_by_default(tiny, given, bound):
    trainer = tiny(max_approx_kl=given, learning_rate=3e-2, num_ppo_epochs=8)
    trainer.train()
    assert trainer.args.max_approx_kl == bound
    used = [log.get("policy/epochs_used", 8) for log in updates(trainer)]
    assert (min(used) < 8) == (bound > 0)


def test_skipped_steps_leave_weights_and_moments_alone(tiny):
    trainer = tiny(**ONE | {"num_ppo_epochs": 8}, learning_rate=3e-2, max_approx_kl=1e-9, weight_decay=0.1)
    states = []
    trainer.add_callback(Recorder(lambda: states.append(weights(trainer))))
    trainer.train()
    assert len(states) == trainer.state.max_steps
    for later in states[1:]:  # the second step is the first that has a KL to the rollout's policy
        assert_equal_weights(states[0], later)


class Recorder(TrainerCallback):
    def __init__(self, record):
        self.record = record

    def on_step_end(self, args, state, control, **kwargs):
        self.record()


def test_every_token_of_an_answer_may_cost(tiny):
    trainer = tiny(reward=lambda prompts, completions: [1.0] * len(prompts), length_penalty=0.25, **ONE)
    trainer.train()
    (log,) = updates(trainer)
    assert log["objective/scores"] == pytest.approx(1 - 0.25 * log["val/response_tokens"])
    assert log["objective/scores_before_penalty"] == log["rewards/<lambda>"] == 1
    held_out = trainer.evaluate()
    assert held_out["eval_objective/scores"] == pytest.approx(1 - 0.25 * held_out["eval_val/response_tokens"])


def test_scores_are_scaled_by_all_that_came_before(tiny):
    seen = []

    def reward(prompts, completions):
        seen.append(torch.randn(len(prompts), generator=torch.Generator().manual_seed(len(seen))) * 50 + 7)
        return seen[-1].tolist()

    trainer = tiny(reward=reward, scale_scores=True, total_episodes=24)
    trainer.train()
    for count, log in enumerate(updates(trainer), start=1):
        scale = torch.cat(seen[:count]).std().item()
        assert log["objective/scores"] == pytest.approx(seen[count - 1].mean().item() / scale, rel=1e-4)
    moments = trainer.score_shaping.moments
    trainer.evaluate()
    assert trainer.score_shaping.moments == moments


def test_the_critic_may_have_a_learning_rate_of_its_own(tiny):
    trainer = tiny(critic_learning_rate=1e-2, weight_decay=0.1)
    before = weights(trainer)
    optimizer = trainer.create_optimizer()
    critic = {id(parameter) for parameter in trainer.value_model.parameters()}
    for group in optimizer.param_groups:
        assert {id(parameter) in critic for parameter in group["params"]} == {group["lr"] == 1e-2}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(trainer.model.parameters()))
    assert {group["weight_decay"] for group in optimizer.param_groups if group["lr"] == 1e-2} == {0.0, 0.1}
    trainer.train()
    rates = {group["lr"] / group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {0}  # the schedule reached its end in all groups

    frozen = tiny(critic_learning_rate=1e-20)
    frozen.train()
    after = weights(frozen)
    for name in before:
        assert torch.equal(before[name], after[name]) is (name.startswith("value_model.") or "rotary" in name)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_average_policy_is_the_decayed_sum_of_all_steps(tiny, tmp_path, adapters):
    extra = {"peft_config": LoraConfig(task_type="CAUSAL_LM")} if adapters else {}
    trainer = tiny(policy_ema_decay=0.5, learning_rate=1e-2, trainer=extra)
    name = next(name for name, parameter in trainer.policy_model.named_parameters() if parameter.requires_grad)
    weight = trainer.policy_model.get_parameter(name)
    expected, states = weight.detach().clone(), []
    trainer.add_callback(Recorder(lambda: states.append(weight.detach().clone())))
    trainer.train()
    for state in states:
        expected = 0.5 * expected + 0.5 * state
    live = weights(trainer)
    trainer.save_model(tmp_path / "out")
    assert_equal_weights(live, weights(trainer))
    with trainer.models.average.in_policy() as policy:
        assert torch.allclose(policy.get_parameter(name), expected, atol=1e-7)
        averaged = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    if not adapters:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "ema_policy")
        assert_equal_weights(averaged, loaded.state_dict())
        assert not torch.equal(loaded.lm_head.weight, trainer.policy_model.lm_head.weight)
    assert (tmp_path / "out" / "ema_policy" / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="float32"):
        tiny(policy_ema_decay=0.5, model=base.make_policy().bfloat16())


@pytest.mark.slow
def test_compiled_layers_of_one_kind_share_what_is_compiled(tiny, monkeypatch):
    """Sampling and rewards too: with a cache each layer would be a case of its own, and past a limit none is compiled."""

    def graphs(layers):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = tiny(
            model=base.make_policy(num_hidden_layers=layers),
            reward=base.make_classifier(num_hidden_layers=layers),
            torch_compile=True,
        )
        trainer.train()
        assert updates(trainer)[0]["val/ratio"] == pytest.approx(1, abs=0.1)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    monkeypatch.setattr(compilation, "BACKEND", "eager")
    assert 0 < graphs(2) == graphs(5)


class LengthsFrom(PPOTrainer):
    """Samples answers of the full length at first, and of all lengths from update `changes_at` on."""

    changes_at = 0

    def sample(self, rows, seed, greedy=False):
        rollout = super().sample(rows, seed, greedy)
        rng = random.Random(seed)
        lengths = [rng.randint(1, 24) if self.state.global_step >= self.changes_at else 24 for _ in rows]
        completions = [Completion("", tuple(rng.choices(range(3, 64), k=length)), False) for length in lengths]
        return replace(rollout, completions=completions)


@pytest.mark.slow
@pytest.mark.parametrize("changes_at", [1, 4])
def test_nothing_is_compiled_after_the_second_update_whatever_the_lengths(tiny, monkeypatch, changes_at):
    """An answer that ended early once cost 40 s on a GPU: the layers were compiled again for another width."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(LengthsFrom, "changes_at", changes_at)
    trainer = tiny(
        dataset=Dataset.from_dict({"input_ids": [[3 + row % 61] * 10 for row in range(64)]}),
        model=base.make_policy(max_position_embeddings=128),
        trainer_class=LengthsFrom,
        torch_compile=True,
        response_length=24,
        total_episodes=56,
        num_ppo_epochs=1,
    )
    graphs = []
    trainer.add_callback(Recorder(lambda: graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])))
    trainer.train()
    assert len(updates(trainer)) == 7
    assert graphs[0] > 0 and len(set(graphs[1:])) == 1, graphs


# ---- Samples and guards ----


def test_the_table_of_samples_is_aligned_for_wide_characters_and_stays_on_its_lines():
    completions = [Completion("東京\nです", (1, 2, 3), True), Completion("x" * 500, (1,) * 12, False)]
    conversation = [{"role": "user", "content": "日本の首都は"}]
    header, first, second = samples_table(["a", conversation], completions, [0.5, -12.25]).splitlines()
    assert header == "score    tokens  ended  prompt        answer"
    assert first == "0.500    3       yes    a             東京\\nです"
    assert second == f"-12.250  12      no     日本の首都は  {'x' * 119}…"


def test_a_gradient_that_is_not_finite_stops_before_the_step(tiny):
    trainer = tiny()
    states = [weights(trainer)]
    trainer.add_callback(Recorder(lambda: states.append(weights(trainer))))
    weight = trainer.policy_model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * (float("nan") if trainer.state.global_step == 2 else 1))
    with pytest.raises(FloatingPointError, match=r"step 3 \(update 2\): not finite: .* gradient norm nan"):
        trainer.train()
    assert len(states) == 3
    assert_equal_weights(states[-1], weights(trainer))


def test_a_model_that_is_not_finite_is_named_before_the_step(tiny):
    trainer = tiny()
    before = weights(trainer)
    before["value_model.score.weight"][:] = float("nan")
    trainer.model.load_state_dict(before)
    with pytest.raises(FloatingPointError, match=r"step 1 \(update 1\): values not finite in 8 of 8 answers"):
        trainer.train()


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_ends_all_ranks(tmp_path):
    done = run_on_two_ranks(__file__, tmp_path)
    assert done.returncode != 0
    errors = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert errors["1.txt"].startswith("step 1 (update 1): reward by_rank: raised OSError: no connection on 4")
    assert errors["0.txt"] == "step 1 (update 1): rewards failed in 1 other processes"


def fail_on_one_rank(folder):
    def by_rank(prompts, completions):
        if os.environ["RANK"] == "1":
            raise OSError("no connection")
        return [0.0] * len(prompts)

    try:
        resumable(folder / "run", by_rank, gradient_accumulation_steps=2).train()
    except ValueError as error:
        (folder / f"{os.environ['RANK']}.txt").write_text(str(error))
        raise


def history(entries=30, **trends):
    """A healthy log history, but for metrics given as (first, last), which go from one to the other."""
    healthy = {
        "objective/scores": (0.0, 1.0),
        "objective/kl": (0.0, 6.0),
        "val/response_tokens": (24.0, 26.0),
        "val/repeated_share": (0.05, 0.06),
        "val/stopped_share": (0.9, 0.95),
        "val/explained_variance": (-0.5, 0.6),
        "policy/entropy_avg": (2.0, 1.2),
    }
    ends = healthy | {name.replace("__", "/"): ends for name, ends in trends.items()}
    return [
        {name: first + (last - first) * step / (entries - 1) for name, (first, last) in ends.items()}
        for step in range(entries)
    ]


@pytest.mark.parametrize(
    ("trends", "kind", "collapse", "words"),
    [
        ({"objective__kl": (0, 40)}, "kl", False, "score rises .* runs away from its reference"),
        ({"objective__kl": (0, 40), "objective__scores": (0, -1)}, "kl", True, "left its reference"),
        ({"objective__kl": (0, 200)}, "kl", True, "ran away from its reference .* broken_answer_share"),
        ({"val__response_tokens": (20, 35)}, "length", False, "score rises .* answers get longer"),
        ({"val__response_tokens": (20, 60)}, "length", True, "more than twice .* at a score of"),
        (
            {"val__response_tokens": (21, 2), "objective__kl": (0, 2)},
            "length",
            True,
            r"less than half .*mean answer length in tokens: 20.* → 2.* \(at least 10.*, at most 4.*length_penalty",
        ),
        ({"val__repeated_share": (0, 0.27)}, "repetition", False, "score rises .* repeat themselves"),
        ({"val__repeated_share": (0, 0.6)}, "repetition", True, "answers repeat themselves, at a score"),
        ({"val__distinct_2": (0.8, 0.1)}, "variety", True, "same few phrases"),
        ({"val__commonest_share": (0.01, 0.9)}, "sameness", True, "different prompts get the same answer"),
        ({"val__stopped_share": (0.9, 0.3)}, "endless", False, "answers stop ending"),
        ({"val__stopped_share": (0.9, 0.0)}, "endless", True, "answers stop ending"),
        ({"val__explained_variance": (-0.5, -0.1)}, "critic", False, "critic explains nothing"),
        ({"policy__entropy_avg": (2, 0.01)}, "entropy", False, "entropy fell"),
        ({"policy__entropy_avg": (2, 0.01), "objective__scores": (1, 0)}, "entropy", True, "entropy fell"),
    ],
)
def test_the_watch_says_what_runs_away(trends, kind, collapse, words):
    (finding,) = findings([{"eval_loss": 1.0}, *history(**trends)])
    assert (finding.kind, finding.collapse) == (kind, collapse)
    assert re.search(words, finding.text)


def test_the_watch_is_silent_on_a_healthy_or_a_young_run():
    assert findings(history()) == []
    assert findings(history(entries=5, objective__kl=(0, 600))) == []


def test_the_budget_of_the_kl_is_the_users():
    assert findings(history(objective__kl=(0, 6)), max_kl_nats=6.0) == []
    (finding,) = findings(history(objective__kl=(0, 6)), max_kl_nats=5.0)
    assert (finding.kind, finding.collapse) == ("kl_budget", True)
    assert "max_kl_nats" in finding.text and "(at most 5)" in finding.text


def lose_the_policy(entries, max_kl_nats=None):
    bad = len([one for one in entries if "objective/kl" in one]) >= 2
    return [Finding("endless", "answers stop ending", collapse=True)] if bad else []


@pytest.mark.slow
def test_a_finding_is_logged_once_and_a_collapse_can_stop_the_run(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watch, "findings", lose_the_policy)
    settings = {"total_episodes": 24, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    tiny(**settings).train()
    assert [one.getMessage() for one in caplog.records if one.name == "sandan.ppo.watch"] == [
        "step 4: answers stop ending"
    ]
    trainer = tiny(stop_on_collapse=True, output_dir=str(tmp_path / "stopped"), **settings)
    with pytest.raises(GateError, match=r"step 4: .*answers stop ending\. .*last checkpoint is .*checkpoint-2"):
        trainer.train()
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
def test_a_collapse_keeps_the_best_checkpoint_if_there_is_one(tiny, monkeypatch, caplog):
    monkeypatch.setattr(watch, "findings", lose_the_policy)
    both = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny(
        total_episodes=24,
        stop_on_collapse=True,
        load_best_model_at_end=True,
        metric_for_best_model="objective/scores",
        learning_rate=5e-2,
        **both,
    )
    trainer.train()
    assert trainer.watch.stopped and trainer.state.global_step == 4
    assert "step 4: stopped by stop_on_collapse: answers stop ending. The best checkpoint is kept: " in caplog.text
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert [log["step"] for log in trainer.state.log_history if "eval_objective/scores" in log] == [2]
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert_equal_weights(best.state_dict(), trainer.policy_model.state_dict())


# ---- Memory ----


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.slow
def test_logits_of_a_whole_rollout_are_never_held(tiny):
    answers, width, vocabulary = 16, 32, 1024
    largest = {}
    for rows in (2, 16):
        trainer = tiny(
            model=base.make_policy(vocab_size=vocabulary),
            reward=share_of_w5,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=answers // rows,
            local_rollout_forward_batch_size=rows,
            response_length=width,
            total_episodes=answers,
        )
        with Largest() as measured:
            trainer.train()  # rollout, forward and update
        largest[rows] = measured.elements
    assert largest[2] <= 2 * width * vocabulary
    assert largest[16] > answers // 2 * width * vocabulary  # the measure does see logits


# ---- Resume ----


@pytest.mark.slow
def test_a_run_killed_anywhere_goes_on_as_if_it_had_not_been(tmp_path):
    run_processes([{}], doomed_ppo.__file__, tmp_path, timeout=180).check_returncode()
    whole = resumable(tmp_path / "whole")
    whole.train()
    assert {log["policy/epochs_used"] for log in updates(whole)} != {2}  # some steps were skipped
    for moment in MOMENTS:
        checkpoint = newest_whole(tmp_path / moment)
        assert Path(checkpoint).name == "checkpoint-8"
        assert (tmp_path / moment / ".saving" / "checkpoint-12").exists() is (moment == "save")
        resumed = resumable(tmp_path / moment)
        resumed.train(resume_from_checkpoint=True)
        assert_equal_weights(weights(whole), weights(resumed))
        assert timeless(whole) == timeless(resumed)
        for one, other in zip(whole.models.average.average, resumed.models.average.average, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8, 12])
def test_every_option_resumes_exactly(tmp_path, step):
    whole, resumed = resumable(tmp_path / "run"), resumable(tmp_path / "run")
    whole.train()
    state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "ppo_state.json").read_text())
    assert ("unlogged" in state) is (step != 8)
    assert len(state["score_moments"]) == 3
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert_equal_weights(weights(whole), weights(resumed))
    assert timeless(whole) == timeless(resumed)
    for one, other in zip(whole.models.average.average, resumed.models.average.average, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["rollout", "evaluation"])
def test_a_signal_ends_a_rollout_or_an_evaluation_at_once_and_nothing_is_lost(tmp_path, moment):
    options = {"eval_strategy": "steps", "eval_steps": 4, "local_rollout_forward_batch_size": 2}
    whole = resumable(tmp_path / "whole", **options)
    whole.train()
    stopped = resumable(tmp_path / "run", **options)
    evaluate, sample, phase = stopped.evaluation_loop, stopped.sample, ["rollout"]

    def evaluation_loop(*args, **kwargs):
        phase[0] = "evaluation"
        output = evaluate(*args, **kwargs)
        phase[0] = "rollout"
        return output

    def interrupted(*args, **kwargs):
        if phase[0] == moment and stopped.state.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    stopped.evaluation_loop, stopped.sample = evaluation_loop, interrupted
    with signals.handled(), pytest.raises(Interrupted):
        stopped.train()
    assert newest_whole(tmp_path / "run").name == "checkpoint-8"
    resumed = resumable(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights(whole), weights(resumed))
    assert timeless(whole) == timeless(resumed)


def test_a_run_without_a_whole_checkpoint_says_so(tiny, tmp_path):
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        tiny().train(resume_from_checkpoint=True)


if __name__ == "__main__":  # started by the tests that need processes of their own
    fail_on_one_rank(Path(sys.argv[1]))
