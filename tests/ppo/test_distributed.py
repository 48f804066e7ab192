"""PPOTrainer on two processes of the CPU (gloo): sharded by FSDP2, and killed and resumed under DDP."""

import json
import os
import sys
import unittest.mock
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from helpers import ROOT
from helpers import doomed_ppo as options
from helpers import tiny_ppo as base
from helpers.doomed_ppo import timeless
from helpers.scripts import environment_of, run_on_two_ranks
from helpers.tiny_ppo import assert_equal_weights
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sandan import PPOConfig, PPOTrainer
from sandan.models.cuda_graph_sampling import Decoder
from sandan.models.loading import load_reward_model
from sandan.training.checkpoints import newest_whole


FSDP2 = ROOT / "recipes" / "accelerate_configs" / "fsdp2.yaml"
KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
LAYERS = 2
SAVED = {
    "response_length": 48,  # answers end on the ranks at different times
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "objective/kl",
}


def make(folder, trainer_class=PPOTrainer, processes=2, **kwargs):
    """A run of three updates of two steps, eight answers each."""
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // processes,
        "total_episodes": 24,
        "num_ppo_epochs": 2,
        "response_length": 8,
        "num_sample_generations": 0,
        "logging_steps": 2,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "critic_learning_rate": 2e-3,
        "whiten_rewards": True,
        "target_kl": 1.0,
        "scale_scores": True,
        "max_approx_kl": 1.0,
    }
    args = PPOConfig(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **settings | kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        # accelerate 1.15 leaves FSDP off where all processes are on the CPU (`AcceleratorState.__init__` asks for
        # MULTI_GPU and the like): here it is told that they are not. Device and backend stay the CPU and gloo.
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return trainer_class(
        *make_models(folder.parent),
        args,
        train_dataset=base.make_dataset(12),
        eval_dataset=base.make_dataset(5),
        processing_class=base.make_tokenizer(),
    )


def make_models(folder):
    """Policy, with tied embeddings as most real models have, and reward model: of the folder's files, if there are."""
    if not (folder / "policy").is_dir():
        return base.make_policy(tie_word_embeddings=True), base.make_classifier()
    # Under `fsdp_cpu_ram_efficient_loading` these have weights on the first process only.
    return (
        AutoModelForCausalLM.from_pretrained(folder / "policy"),
        AutoModelForSequenceClassification.from_pretrained(folder / "classifier"),
    )


def on_two_processes(task, folder, check=True, **environment):
    """Run a function of this file, by its name, on two processes."""
    done = run_on_two_ranks(__file__, task, folder, **environment)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


# ---- FSDP2 ----


def sharded():
    return environment_of("--config_file", FSDP2, "--num_processes", 2, "--mixed_precision", "no")


class Gathers(TorchDispatchMode):
    """Counts collective gathers."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "allgather" in str(function)
        return function(*args, **kwargs or {})


def train_in_shards(folder):
    """Fixed answers; for each kind of checkpoint a run, and the run resumed after its first update; bf16."""
    fixed = make(folder / "fixed", base.FixedAnswers)
    assert fixed.accelerator.is_fsdp2
    with pytest.raises(ValueError, match="FSDP2 shards the model in train"):
        PPOTrainer.sample(fixed, [fixed.train_dataset[0]], seed=0)
    fixed.train()
    for model in (fixed.policy_model, fixed.value_model, fixed.ref_model):
        assert all(isinstance(layer, FSDPModule) for layer in model.model.layers)
    fixed.save_model(folder / "fixed")
    found = {"fixed": timeless(fixed)}
    for kind in KINDS:
        os.environ["FSDP_STATE_DICT_TYPE"] = kind
        whole, resumed = (make(folder / kind, **SAVED) for _ in "wr")
        whole.train()
        found[kind] = {"whole": timeless(whole), "evaluations": evaluations(whole)}
        found[kind]["best"] = gather_object([whole.state.best_model_checkpoint])
        found[kind]["after"] = whole.evaluate()["eval_objective/kl"]
        whole.save_model(folder / kind / "whole")
        resumed.train(resume_from_checkpoint=str(folder / kind / "checkpoint-2"))
        found[kind] |= {"resumed": timeless(resumed), "again": resumed.evaluate()["eval_objective/kl"]}
        resumed.save_model(folder / kind / "resumed")
    mixed = make(folder / "bf16", bf16=True, total_episodes=8, num_ppo_epochs=1, num_mini_batches=1, logging_steps=1)
    mixed.train()
    found["bf16"] = timeless(mixed)
    judge = load_reward_model(str(folder / "classifier"))
    found["loaded"] = gather_object([float(sum(one.sum() for one in judge.parameters()))])
    found["decoded"] = decoded(whole)
    found["gathers"], found["answers"] = zip(*(count_gathers(whole, gather) for gather in (True, False)), strict=True)
    if fixed.accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))


def evaluations(trainer):
    return [log["eval_objective/kl"] for log in trainer.state.log_history if "eval_objective/kl" in log]


def decoded(trainer):
    """Greedy answers of the decoder, which has gathered the weights, and of `generate`."""
    decoder = Decoder(base.make_policy(tie_word_embeddings=True), 4, trainer.args.response_length, torch.float32)
    found = [trainer.sample(trainer.train_dataset.select(range(3)).to_list(), seed=0, greedy=True)]
    with unittest.mock.patch.object(trainer.sampler, "decoder", decoder):
        found.append(trainer.sample(trainer.train_dataset.select(range(3)).to_list(), seed=0, greedy=True))
    assert found[1].gather_seconds is not None
    return [[one.token_ids for one in rollout.completions] for rollout in found]


def count_gathers(trainer, gather):
    """Gathers of a rollout, and its tokens; the weights are in shards before and after."""
    trainer.args.ds3_gather_for_generation = gather
    assert all(isinstance(one, DTensor) for one in trainer.policy_model.model.layers.parameters())
    rank = trainer.accelerator.process_index
    with Gathers() as gathers:
        rollout = trainer.sample([trainer.train_dataset[rank]], seed=rank)
    assert all(isinstance(one, DTensor) for one in trainer.policy_model.model.layers.parameters())
    return gathers.count, rollout.completions[0].token_ids


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for name, model in zip(("policy", "classifier"), make_models(folder), strict=True):
        model.save_pretrained(folder / name)
    on_two_processes("train_in_shards", folder, **sharded())
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_shards_make_the_run_of_one_process(shards):
    folder, found = shards
    one = make(folder / "one", base.FixedAnswers, processes=1)
    one.train()
    assert len(found["fixed"]) == len(timeless(one)) == 3
    for first, second in zip(timeless(one), found["fixed"], strict=True):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-5)
    policy = AutoModelForCausalLM.from_pretrained(folder / "fixed")
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "fixed" / "value_model")
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    for loaded, trained in ((policy, one.policy_model), (critic, one.value_model)):
        for name, tensor in trained.state_dict().items():
            assert torch.allclose(loaded.state_dict()[name], tensor, atol=1e-4), name


@pytest.mark.slow
def test_every_rank_has_the_weights_of_a_model_that_is_not_sharded(shards):
    first, second = shards[1]["loaded"]
    assert first == second != 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_sharded_run_equals_an_uninterrupted_one(shards, kind):
    folder, found = shards
    assert (folder / kind / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir() is (kind == "SHARDED_STATE_DICT")
    assert len(found[kind]["whole"]) == 3
    assert found[kind]["whole"] == found[kind]["resumed"]
    assert found[kind]["after"] == found[kind]["again"]
    for name in ("model.safetensors", "value_model/model.safetensors"):
        assert_equal_weights(*(load_file(folder / kind / run / name) for run in ("whole", "resumed")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_load_the_best_shards(shards, kind):
    found = shards[1][kind]
    best = max(found["evaluations"])
    assert found["evaluations"].index(best) == 2  # the last: its folder is made while Trainer asks for it
    assert [Path(one).name for one in found["best"]] == ["checkpoint-6"] * 2
    assert found["after"] == best


@pytest.mark.slow
def test_log_probs_are_not_rounded_to_bf16_by_the_wrapper(shards):
    (log,) = shards[1]["bf16"]
    assert (log["objective/kl"], log["val/ratio"], log["policy/approxkl_avg"]) == (0, 1, 0)


@pytest.mark.slow
def test_sharded_sampling_gathers_each_layer_once_or_for_every_token(shards):
    (once, always), (answer, same) = shards[1]["gathers"], shards[1]["answers"]
    assert answer == same
    assert once <= LAYERS + 1
    assert always >= LAYERS * len(answer)


@pytest.mark.slow
def test_the_decoder_gathers_the_weights_that_generate_reads(shards):
    generated, decoded = shards[1]["decoded"]
    assert len(generated) == 3
    assert generated == decoded


# ---- The critic's warm-up ----


def warm_up(folder):
    """A warm-up of one update, in two micro-batches a step; each rank's policy after it, and the critic's metrics."""
    trainer = make(folder / "run", base.FixedAnswers, critic_warmup_updates=1, total_episodes=8, weight_decay=0.1)
    trainer.train()
    trainer.save_model(folder / "run")
    if trainer.accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(timeless(trainer)))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, sharded()], ids=["DDP", "FSDP2"])
def test_a_warm_up_on_two_processes_is_that_of_one(tmp_path, environment):
    on_two_processes("warm_up", tmp_path, **environment)
    one = make(
        tmp_path / "one", base.FixedAnswers, processes=1, critic_warmup_updates=1, total_episodes=8, weight_decay=0.1
    )
    before = {name: tensor.clone() for name, tensor in one.policy_model.state_dict().items()}
    one.train()
    assert_equal_weights(before, one.policy_model.state_dict())
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "value_model")
    assert_equal_weights(before, policy.state_dict())
    for name, tensor in one.value_model.state_dict().items():
        assert torch.allclose(critic.state_dict()[name], tensor, atol=1e-4), name
    (found,), (expected,) = json.loads((tmp_path / "found.json").read_text()), timeless(one)
    assert expected == pytest.approx(found, rel=1e-3, abs=1e-5)


# ---- DDP ----


def die_in_a_save(folder):
    options.Doomed.moment = "save"
    options.resumable(folder / "killed", trainer_class=options.Doomed, gradient_accumulation_steps=2).train()


def resume_and_compare(folder):
    whole = options.resumable(folder / "whole", gradient_accumulation_steps=2)
    whole.train()
    resumed = options.resumable(folder / "killed", gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert timeless(whole) == timeless(resumed)
    assert_equal_weights(base.weights(whole), base.weights(resumed))
    for one, other in zip(whole.models.average.average, resumed.models.average.average, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_two_ranks_killed_in_a_save_go_on_as_if_they_had_not_been(tmp_path):
    assert on_two_processes("die_in_a_save", tmp_path, check=False).returncode != 0
    assert {path.name for path in (tmp_path / "killed").glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-8",
    }
    assert (tmp_path / "killed" / ".saving" / "checkpoint-12").is_dir()
    assert newest_whole(tmp_path / "killed").name == "checkpoint-8"
    on_two_processes("resume_and_compare", tmp_path)


if __name__ == "__main__":  # started on two processes by the tests
    globals()[sys.argv[1]](Path(sys.argv[2]))
