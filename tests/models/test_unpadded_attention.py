"""SFT and reward batches without padding: the same losses, gradients and metrics as with it."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from helpers import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from sandan.models import unpadded_attention as varlen
from sandan.models.layer_compilation import compile_layers
from sandan.models.scoring import score_last_tokens
from sandan.models.unpadded_attention import obstacle, segments, use_varlen
from sandan.reward.rows import tokenized as reward_rows
from sandan.reward.trainer import GroupedRewardTrainer, prompt_weights
from sandan.sft.rows import tokenized as sft_rows
from sandan.sft.trainer import GuardedSFTTrainer


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "max_position_embeddings": 128,
    "num_labels": 1,
}
OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "bert": {
        "num_labels": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "mistral": SIZES | {"sliding_window": 8},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "nemotron": SIZES | {"head_dim": 8},
}
TEXTS = ["a", "The cow eats grass.", "The frog", "牛は草を食べます。", "lives in the pond."]
ROWS = [{"prompt": f"Q{number}: ", "completion": TEXTS[number % 5] * (1 + number % 3)} for number in range(12)]
PAIRS = [
    {
        "prompt": f"Q{number // 4}: ",
        "chosen": TEXTS[number % 3],
        "rejected": TEXTS[3 + number % 2],
        "margin": number % 3 + 1,
        "weight": weight,
    }
    for number, weight in enumerate(prompt_weights([number // 4 for number in range(10)]))
]


def make_model(kind, tokenizer, auto=AutoModelForCausalLM):
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = OTHERS.get(kind, SIZES)
    return auto.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, **ids))


def make(trainer_class, model, rows, folder, tokenizer, **settings):
    config = RewardConfig if issubclass(trainer_class, RewardTrainer) else SFTConfig
    options = {"per_device_train_batch_size": 4, "gradient_checkpointing": False, "report_to": "none"}
    options |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    args = config(str(folder), **options | {"learning_rate": 1e-2, "max_steps": 3} | settings)
    # The same tokens for both: TRL draws the border between prompt and answer elsewhere.
    tokenized = reward_rows if config is RewardConfig else sft_rows
    return trainer_class(
        copy.deepcopy(model),
        args,
        train_dataset=tokenized(Dataset.from_list(rows), tokenizer, args),
        eval_dataset=tokenized(Dataset.from_list(rows[:7]), tokenizer, args),
        processing_class=tokenizer,
    )


def logged(trainer):
    """What was logged of training and a held-out set, times aside."""
    trainer.train()
    trainer.evaluate()
    times = ("runtime", "per_second", "preparation_time", "flos")
    return [
        {name: value for name, value in entry.items() if not name.endswith(times)}
        for entry in trainer.state.log_history
    ]


def assert_same(found, expected):
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_segments_give_what_each_row_gives_alone(kind, tokenizer):
    model = make_model(kind, tokenizer)
    ids = torch.randint(4, len(tokenizer), (15,), generator=torch.Generator().manual_seed(0))
    lengths = [5, 1, 9]
    alone = torch.cat([model(input_ids=row[None]).logits[0] for row in ids.split(lengths)])
    alone.square().sum().backward()
    expected = {name: one.grad.clone() for name, one in model.named_parameters()}
    assert obstacle(model) is None
    use_varlen(model)
    model.zero_grad()
    flat = model(input_ids=ids[None], use_cache=False, **segments(lengths)).logits[0]
    flat.square().sum().backward()
    torch.testing.assert_close(flat, alone, rtol=1e-4, atol=1e-4)
    for name, one in model.named_parameters():
        torch.testing.assert_close(one.grad, expected[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for GPUs")
@pytest.mark.parametrize("lengths", [[70, 1, 200, 33], [304], [1] * 304])
def test_the_kernel_gives_what_padding_gives(lengths):
    generator = torch.Generator("cuda").manual_seed(0)
    bounds = segments(lengths)["cu_seq_lens_q"].cuda()
    tensors = [torch.randn(304, heads, 64, device="cuda", generator=generator) for heads in (14, 2, 2, 14)]
    found = []
    for attend, dtype in ((varlen._by_padding, torch.float32), (varlen._by_kernel, torch.bfloat16)):
        query, key, value = (one.detach().to(dtype).requires_grad_() for one in tensors[:3])
        output = attend(query, key, value, bounds, max(lengths), 0.125, 0.0)
        output.backward(tensors[3].to(dtype))
        found.append([output, query.grad, key.grad, value.grad])
    for exact, low in zip(*found, strict=True):
        torch.testing.assert_close(low.float(), exact, rtol=0.03, atol=0.1)


def test_a_model_for_segments_still_takes_padded_rows(tokenizer):
    model = make_model("llama", tokenizer)
    ids = torch.randint(4, len(tokenizer), (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(input_ids=ids, attention_mask=mask).logits
    use_varlen(model)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()])


def test_a_model_for_segments_goes_on_from_a_cache_without_a_mask(tokenizer):
    model = make_model("llama", tokenizer)
    ids = torch.randint(4, len(tokenizer), (2, 6))
    expected = model(input_ids=ids).logits[:, 2:]
    use_varlen(model)
    cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
    torch.testing.assert_close(model(input_ids=ids[:, 2:], past_key_values=cache).logits, expected)


def test_a_model_for_segments_is_saved_as_any_other(tokenizer, tmp_path):
    model = make_model("llama", tokenizer)
    model.save_pretrained(tmp_path / "before")
    use_varlen(model)
    model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "config.json").read_text() for name in ("before", "after"))
    assert before == after


def test_a_copy_of_a_reward_model_for_segments_runs_its_own_weights(tokenizer):
    model = make_model("llama", tokenizer, AutoModelForSequenceClassification)
    use_varlen(model)
    score_last_tokens(model)
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.score.weight)
    ids = torch.randint(4, len(tokenizer), (1, 8))
    for inputs in ({}, segments([5, 3])):
        assert model(input_ids=ids, **inputs).logits.any()
        assert not other(input_ids=ids, **inputs).logits.any()


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("bert", "no decoder"),
        ("mistral", "see the whole row"),
        ("bloom", "not sdpa"),
        ("nemotron", "do not tell attention"),
    ],
)
def test_other_models_are_told_apart(kind, reason, tokenizer):
    assert reason in obstacle(make_model(kind, tokenizer))


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_sizes(tokenizer):
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph.forward

    model = make_model("qwen2", tokenizer).train()
    use_varlen(model)
    original = torch.nn.Module.compile
    try:
        torch.nn.Module.compile = lambda self, backend, **kwargs: original(
            self, backend=note, fullgraph=True, **kwargs
        )
        compile_layers(model, dynamic=True)
    finally:
        torch.nn.Module.compile = original
    for lengths in ([3, 4], [2, 2, 9], [1, 7, 5, 11]):
        ids = torch.randint(4, len(tokenizer), (1, sum(lengths)))
        model(input_ids=ids, use_cache=False, **segments(lengths)).logits.sum().backward()
    # The first layer's input has another history than the others'.
    assert len(graphs) <= 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_without_padding_learns_what_it_learns_with_it(accumulation, tmp_path, tokenizer):
    model = make_model("qwen2", tokenizer)
    settings = {"max_length": 24, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2}
    ours, stock = (
        make(one, model, ROWS, tmp_path / one.__name__, tokenizer, **settings)
        for one in (GuardedSFTTrainer, SFTTrainer)
    )
    batch = ours.data_collator([ours.train_dataset[index] for index in range(4)])
    assert batch["input_ids"].shape == (1, sum(len(ids) for ids in ours.train_dataset["input_ids"][:4]))
    assert_same(logged(ours), logged(stock))


def test_packed_rows_do_not_see_each_other(tmp_path, tokenizer):
    model = make_model("llama", tokenizer)
    settings = {"max_length": 64, "per_device_train_batch_size": 1, "max_steps": 1}
    packed = make(GuardedSFTTrainer, model, ROWS, tmp_path / "packed", tokenizer, packing=True, **settings)
    assert len(packed.train_dataset) < len(ROWS)
    losses = []
    for trainer, rows in ((packed, 4), (make(SFTTrainer, model, ROWS, tmp_path / "one", tokenizer, **settings), 12)):
        batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        assert len(batches) <= rows
        losses.append(
            sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens) for batch in batches).item()
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sft_of_another_model_is_padded_and_says_why(tmp_path, tokenizer, caplog):
    with caplog.at_level(logging.INFO, "sandan"):
        trainer = make(GuardedSFTTrainer, make_model("mistral", tokenizer), ROWS, tmp_path, tokenizer)
    assert "attention_mask" in trainer.data_collator([trainer.train_dataset[0]])
    assert [record.getMessage() for record in caplog.records if record.name.startswith("sandan")] == [
        "batches are padded, which is slower: not all of its layers see the whole row"
    ]


@pytest.mark.parametrize("layout", ["flat", "tree"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_reward_model_without_padding_learns_what_it_learns_with_it(kind, layout, tmp_path, tokenizer):
    model = make_model(kind, tokenizer, AutoModelForSequenceClassification)
    rows = [{name: value for name, value in row.items() if name != "weight"} for row in PAIRS]
    ours, stock = (
        make(one, model, rows, tmp_path / one.__name__, tokenizer, center_rewards_coefficient=0.1)
        for one in (GroupedRewardTrainer, RewardTrainer)
    )
    assert ours.data_collator.layout == "tree"  # on a CPU
    ours.data_collator.layout = layout
    batch = ours.data_collator([ours.train_dataset[index] for index in range(4)])
    assert len(batch["row_tokens"]) < 8 and len(batch["place"]) == 8
    assert (batch["input_ids"].numel() == int(batch["row_tokens"].sum())) is (layout == "flat")
    assert_same(logged(ours), logged(stock))


def test_weights_and_margins_count_the_same_without_padding(tmp_path, tokenizer, monkeypatch):
    model = make_model("llama", tokenizer, AutoModelForSequenceClassification)
    flat = make(GroupedRewardTrainer, model, PAIRS, tmp_path / "flat", tokenizer)
    monkeypatch.setattr("sandan.training.unpadded_trainer.obstacle", lambda model: "it is asked for here")
    padded = make(GroupedRewardTrainer, model, PAIRS, tmp_path / "padded", tokenizer)
    assert flat.flat and not padded.flat
    assert_same(logged(flat), logged(padded))


def test_an_encoder_is_a_reward_model_too(tmp_path, tokenizer):
    model = make_model("bert", tokenizer, AutoModelForSequenceClassification)
    trainer = make(GroupedRewardTrainer, model, PAIRS, tmp_path, tokenizer)
    assert not trainer.flat
    assert trainer.train().global_step == 3


def test_adapters_are_trained_without_padding(tmp_path, tokenizer):
    from peft import LoraConfig

    for auto, trainer_class, rows, task in (
        (AutoModelForCausalLM, GuardedSFTTrainer, ROWS, "CAUSAL_LM"),
        (AutoModelForSequenceClassification, GroupedRewardTrainer, PAIRS, "SEQ_CLS"),
    ):
        config = RewardConfig if task == "SEQ_CLS" else SFTConfig
        trainer = trainer_class(
            make_model("llama", tokenizer, auto),
            config(
                str(tmp_path / task), max_steps=2, use_cpu=True, bf16=False, report_to="none", learning_rate=0.1,
                gradient_checkpointing=True, save_strategy="no",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type=task, r=2, target_modules=["q_proj"]),
        )  # fmt: skip
        before = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
        trainer.train()
        assert trainer.flat
        assert any(
            not torch.equal(before[name], one) for name, one in trainer.model.named_parameters() if name in before
        )


@pytest.mark.launch
@pytest.mark.parametrize("stage, measure", [("sft", "held_out_loss"), ("reward", "held_out_accuracy")])
def test_speed_is_measured_at_the_same_quality(stage, measure):
    script = str(ROOT / "benchmarks" / "finetuning.py")
    command = [sys.executable, script, stage, "--shape", "tiny", "--no-compile", "--sides", "stock_16", "sandan"]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=300)
    stock, ours = json.loads(done.stdout)["sides"].values()
    assert ours["tokens_per_second"] > 0 and ours["steps"] == stock["steps"]
    assert ours[measure] == pytest.approx(stock[measure], abs=1e-3 if stage == "sft" else 0.2)
