"""Pretraining on full blocks: the same losses as `Trainer`, without a mask in the compiled graph."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, DefaultDataCollator, Trainer, TrainingArguments

from sandan.pretrain.trainer import BlockTrainer


SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {"llama": LLAMA | {"num_hidden_layers": 2}, "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4}}


def make_model(kind):
    torch.manual_seed(0)
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if kind == "gpt2" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **MODELS[kind], **dropout))


def trained(trainer_class, kind, folder):
    ids = torch.randint(3, 64, (24, 16), generator=torch.Generator().manual_seed(1)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trainer_class(make_model(kind), args, DefaultDataCollator(), rows, rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", list(MODELS))
def test_learns_what_trainer_learns(kind, tmp_path):
    ours, stock = (trained(one, kind, tmp_path / one.__name__) for one in (BlockTrainer, Trainer))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-5)
    assert [entry["tokens_per_second"] > 0 for entry in ours.state.log_history if "tokens_per_second" in entry]


@pytest.mark.slow
def test_a_compiled_step_has_no_mask(tmp_path):
    model = make_model("llama")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    BlockTrainer(model, args, DefaultDataCollator(), Dataset.from_dict({"input_ids": [[1, 2]]}))
    attention = []

    def note(graph, _):
        attention.extend(node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph.forward

    ids = torch.randint(3, 64, (2, 16))
    torch.compile(model, backend=note)(input_ids=ids, labels=ids)
    assert attention and all(node.kwargs.get("attn_mask") is None for node in attention)
    assert all(node.kwargs["is_causal"] for node in attention)


def test_the_residual_stream_is_narrow_under_autocast_alone(tmp_path):
    model = make_model("llama")
    BlockTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), DefaultDataCollator())
    ids, seen = torch.randint(3, 64, (2, 16)), []
    model.model.layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    model(input_ids=ids)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
    assert seen == [torch.float32, torch.bfloat16]
