"""Models with a value head: their outputs, how they are saved, and which folders they load."""

import json

import pytest
import torch
from helpers.tiny_ppo import make_policy
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from sandan.legacy import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    create_reference_model,
)


IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def with_head(model=None, **kwargs):
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead.from_pretrained(make_policy() if model is None else model, **kwargs)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=64))


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))


def test_a_forward_gives_logits_loss_and_one_value_a_token():
    model = with_head().eval()
    logits, loss, values = model(IDS, attention_mask=torch.ones_like(IDS))
    inside = model.pretrained_model(IDS, output_hidden_states=True)
    assert torch.equal(logits, inside.logits)
    assert loss is None
    head = model.v_head.summary
    torch.testing.assert_close(values, (inside.hidden_states[-1] @ head.weight.T).squeeze(-1) + head.bias)
    assert model(IDS, labels=IDS)[1].item() > 0
    assert len(model(IDS, return_past_key_values=True)) == 4
    assert {name for name, _ in model.named_parameters() if "v_head" in name} == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    assert model.config is model.pretrained_model.config
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 6)


def test_a_head_on_bfloat16_keeps_float32():
    logits, _, values = with_head(make_policy().bfloat16())(IDS)
    assert logits.dtype == values.dtype == torch.float32


def test_the_head_may_be_drawn_from_a_normal_distribution():
    head = with_head(v_head_init_strategy="normal", v_head_initializer_range=0.01).v_head.summary
    assert 0.003 < head.weight.std() < 0.03
    assert head.bias.item() == 0
    with pytest.raises(ValueError, match="v_head_init_strategy: expected 'normal'"):
        with_head(v_head_init_strategy="uniform")


@pytest.mark.parametrize("make", [make_policy, gpt2])
def test_a_saved_model_is_loaded_with_its_head_and_without(tmp_path, make):
    model = with_head(make()).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    assert {"v_head.summary.weight", "v_head.summary.bias"} <= set(load_file(tmp_path / "model.safetensors"))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval()
    for one, other in zip(model(IDS)[::2], again(IDS)[::2], strict=True):
        assert torch.equal(one, other)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(IDS).logits, model(IDS)[0])


def test_a_sharded_folder_keeps_its_head(tmp_path):
    model = with_head()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)


def test_a_model_saved_in_bfloat16_is_loaded_in_float32(tmp_path):
    make_policy().bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).dtype == torch.float32
    half = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.v_head.summary.weight.dtype == torch.float32


def test_an_adapter_is_saved_with_its_head_and_loaded_again(tmp_path):
    make_policy().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=lora()).eval()
    assert model.is_peft_model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora" in name or "v_head" in name for name in trained)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*.bin"))
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter", is_trainable=True).eval()
    for one, other in zip(model(IDS)[::2], again(IDS)[::2], strict=True):
        assert torch.equal(one, other)
    assert any(parameter.requires_grad for name, parameter in again.named_parameters() if "lora" in name)
    with pytest.raises(ValueError, match="peft_config: the model has an adapter already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter", peft_config=lora())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(plain(IDS).logits, model(IDS)[0])
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(direct(IDS).logits, model(IDS)[0])


def test_pickles_are_refused_in_one_line(tmp_path):
    make_policy().save_pretrained(tmp_path / "base")
    torch.save(make_policy().state_dict(), tmp_path / "base" / "pytorch_model.bin")
    AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=lora())
    # An adapter as TRL wrote it: the head is in a pickle.
    adapter = tmp_path / "adapter"
    model.pretrained_model.save_pretrained(adapter)
    torch.save({"v_head.summary.weight": torch.ones(1, 32)}, adapter / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: a pickle, which can run code, is not read") as error:
        AutoModelForCausalLMWithValueHead.from_pretrained(adapter)
    assert "\n" not in str(error.value)
    # The line's own advice.
    (adapter / "pytorch_model.bin").unlink()
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file(head, adapter / "model.safetensors")
    assert AutoModelForCausalLMWithValueHead.from_pretrained(adapter).v_head.summary.bias.item() == 1
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"base: no model.safetensors in it; only safetensors"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors in it; only safetensors"):
        AutoModelForCausalLMWithValueHead.from_pretrained(adapter)
    with pytest.raises(ValueError, match="safe_serialization=False: would write a pickle"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)


@pytest.mark.parametrize(
    ("name", "advice"), [("load_in_8bit", "give quantization_config"), ("reward_adapter", "a model of its own")]
)
def test_what_is_not_supported_is_said(name, advice):
    with pytest.raises(ValueError, match=f"{name}: not in sandan.legacy; .*{advice}"):
        with_head(**{name: "yes"})


def test_a_model_without_a_language_model_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(make_policy().model)


def test_push_to_hub_uploads_what_is_saved(monkeypatch):
    import sandan.legacy.value_head as module

    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["private"] = private
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **kwargs):
            seen["repo_id"] = repo_id
            seen["tensors"] = set(load_file(f"{folder_path}/model.safetensors"))

    monkeypatch.setattr(module, "HfApi", Api)
    with_head().push_to_hub("toy", private=True, token="t")
    assert (seen["repo_id"], seen["private"], seen["token"]) == ("me/toy", True, "t")
    assert "v_head.summary.weight" in seen["tensors"]


# ---- The reference ----


def test_a_reference_is_a_frozen_copy():
    model = with_head()
    reference = create_reference_model(model)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not reference.training
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.parameters()}


@pytest.mark.parametrize("pattern", [None, "transformer.h.{layer}"])
def test_shared_layers_are_shared_and_frozen(pattern):
    model = with_head(gpt2())
    reference = create_reference_model(model, num_shared_layers=2, pattern=pattern)
    shared = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert shared == {
        name
        for name, _ in model.named_parameters()
        if name.split(".h.")[-1][:2] in ("0.", "1.") or "wte" in name or "wpe" in name
    }
    for name, parameter in model.named_parameters():
        assert (reference.get_parameter(name) is parameter) == (name in shared)
    assert reference.lm_head.weight is reference.transformer.wte.weight
    with pytest.raises(ValueError, match="has no layer 9"):
        create_reference_model(model, num_shared_layers=9)


def test_an_encoder_decoder_has_a_head_on_its_decoder(tmp_path):
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(t5()).eval()
    _, _, values = model(IDS, decoder_input_ids=IDS[:, :3])
    assert values.shape == (2, 3)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS, decoder_input_ids=IDS[:, :3])[2], values)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "t5"
