"""A two-layer Llama, its tokenizer and a PPOTrainer on it, small enough for a second a run."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from sandan import PPOConfig, PPOTrainer
from sandan.models.sampling import Completion
from sandan.ppo.rollout import Rollout


# A single update with a single optimizer step.
ONE = {"total_episodes": 8, "num_ppo_epochs": 1}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def make_tokenizer(pad="[PAD]", side="left"):
    vocab = {"[PAD]": 0, "</s>": 1, "[UNK]": 2} | {f"w{i}": 3 + i for i in range(61)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token="</s>", unk_token="[UNK]", padding_side=side
    )


def make_policy(**kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | kwargs))


def make_classifier(seed=1, **kwargs):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**{"num_labels": 1} | SIZES | kwargs))


def make_dataset(rows=64):
    return Dataset.from_dict({"input_ids": [[3 + (i * 7 + j) % 61 for j in range(4 + i % 3)] for i in range(rows)]})


def share_of_w5(prompts, completions):
    return [completion.split().count("w5") / 8 for completion in completions]


@pytest.fixture
def tiny(tmp_path):
    """Make a small trainer; keywords not listed go to [`PPOConfig`]."""

    def make(
        rows=64,
        pad="[PAD]",
        side="left",
        gen=None,
        reward=None,
        dataset=None,
        model=None,
        trainer=None,
        trainer_class=PPOTrainer,
        **kwargs,
    ):
        lm = model or make_policy()
        for name, value in (gen or {}).items():
            setattr(lm.generation_config, name, value)
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "total_episodes": 16,
            "num_ppo_epochs": 2,
            "response_length": 8,
            "num_sample_generations": 0,
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            # Every step is made, however far it goes: these tests count and compare steps.
            "max_approx_kl": 0,
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 1,
        }
        return trainer_class(
            lm,
            reward or make_classifier(),
            PPOConfig(**settings | kwargs),
            train_dataset=make_dataset(rows) if dataset is None else dataset,
            eval_dataset=make_dataset(rows) if dataset is None else dataset,
            processing_class=make_tokenizer(pad, side),
            **trainer or {},
        )

    return make


def updates(trainer):
    """The training logs."""
    return [entry for entry in trainer.state.log_history if "objective/kl" in entry]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


class FixedAnswers(PPOTrainer):
    """Its answers follow from the prompts, so that every number of ranks sees the same."""

    def sample(self, rows, seed, greedy=False):
        completions = []
        for row in rows:
            generator = torch.Generator().manual_seed(sum(row["input_ids"]))
            length = int(torch.randint(1, 9, (1,), generator=generator))
            ids = torch.randint(3, 64, (length,), generator=generator).tolist()
            completions.append(Completion("", (*ids[:-1], 1), True))
        return Rollout(rows, completions)
