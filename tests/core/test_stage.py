"""The contract of a stage folder: owned by one recipe, complete when result.json is there, traceable, without secrets."""

import hashlib
import json
import os

import pytest
import yaml

from sandan.core.chain import CHAIN
from sandan.core.errors import UserError
from sandan.core.stage import RECIPE, RESULT, Stage, effective_config, read_result, require_whole
from sandan.core.stage_folder import LOCK
from sandan.models.loading import load_causal_lm, load_tokenizer, require_model


@pytest.fixture
def stage(tmp_path):
    return Stage("sft", "tiny", tmp_path / "tiny" / "sft", 3, {"learning_rate": 0.1})


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_folder_holds_recipe_then_result(stage):
    stage.open()
    assert sorted(os.listdir(stage.output_dir)) == [LOCK, RECIPE]
    (stage.output_dir / "model.safetensors").write_bytes(b"x")
    stage.finish({"score": 0.5})
    stage.close()
    assert sorted(os.listdir(stage.output_dir)) == ["model.safetensors", RECIPE, RESULT]
    result = read_result(stage.output_dir)
    assert (result["stage"], result["recipe"], result["seed"]) == ("sft", "tiny", 3)
    assert result["metrics"] == {"score": 0.5} and result["config"] == {"learning_rate": 0.1}
    assert result["versions"]["trl"] and result["device"] and result["wall_seconds"] >= 0
    assert yaml.safe_load((stage.output_dir / RECIPE).read_text())["learning_rate"] == 0.1


def test_a_rerun_changes_nothing_before_it_begins_to_write(stage):
    stage.open().finish({})
    before = snapshot(stage.output_dir)
    stage.open()
    assert snapshot(stage.output_dir) == before
    stage.begin_writing()
    assert not (stage.output_dir / RESULT).exists()


@pytest.mark.parametrize(
    "recipe, name, holds",
    [("other", "sft", "recipe 'tiny', stage 'sft'"), ("tiny", "ppo", "recipe 'tiny', stage 'sft'")],
)
def test_folder_of_another_recipe_or_stage_is_left_alone(recipe, name, holds, stage):
    stage.open().finish({})
    before = snapshot(stage.output_dir)
    with pytest.raises(UserError) as caught:
        Stage(name, recipe, stage.output_dir, 0, {}).open()
    assert holds in str(caught.value) and "nothing was changed" in str(caught.value)
    assert snapshot(stage.output_dir) == before


@pytest.mark.parametrize("content", [None, "", "- a", "a: [", "stage: sft", b"\xff"])
def test_folder_with_other_files_is_left_alone(content, stage):
    stage.output_dir.mkdir(parents=True)
    (stage.output_dir / "thesis.txt").write_text("years of work")
    if content is not None:
        (stage.output_dir / RECIPE).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(stage.output_dir)
    with pytest.raises(UserError, match="nothing was changed"):
        stage.open()
    assert snapshot(stage.output_dir) == before


def test_output_dir_that_cannot_be_made(stage):
    stage.output_dir.parent.write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        stage.open()
    with pytest.raises(UserError, match="is a file"):
        Stage("sft", "tiny", stage.output_dir.parent, 0, {}).open()


def test_other_ranks_write_nothing_and_do_not_mind_a_folder_half_made(stage, monkeypatch):
    stage.output_dir.mkdir(parents=True)
    (stage.output_dir / ".recipe.yaml.tmp").write_text("")
    monkeypatch.setenv("RANK", "1")
    stage.open().finish({})
    assert os.listdir(stage.output_dir) == [".recipe.yaml.tmp"]


def test_lineage_is_the_sha256_of_files_and_results(stage, tmp_path):
    data = tmp_path / "a.jsonl"
    data.write_text("{}\n")
    earlier = Stage("pretrain", "tiny", tmp_path / "tiny" / "pretrain", 0, {}).open()
    earlier.finish({})
    stage.add_input(data)
    stage.add_input(earlier.output_dir)
    result = earlier.output_dir / RESULT
    assert stage.inputs == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in (data, result)}
    with pytest.raises(UserError, match="no such file"):
        stage.add_input(tmp_path / "missing.jsonl")


def test_lineage_of_a_folder_without_result_follows_its_weights(stage, tmp_path):
    digests = []
    for weights in (b"1", b"2", b"1"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        stage.add_input(tmp_path)
        digests.append(stage.inputs[str(tmp_path)])
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    "content, wanted",
    [(None, "run `make sft RECIPE=tiny` first"), ("{", "broken"), ("[1]", "broken"), (b"\xff", "broken")],
)
def test_earlier_result_missing_or_broken(content, wanted, stage):
    if content is not None:
        stage.output_dir.mkdir(parents=True)
        (stage.output_dir / RESULT).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_result(stage.output_dir)
    assert wanted in str(caught.value)


def test_tokens_are_not_recorded_but_special_tokens_are(stage):
    from trl import SFTConfig

    config = SFTConfig("out", use_cpu=True, bf16=False, hub_token="hf_secret", eos_token="<|end|>")
    stage.config = effective_config((config,))
    stage.open().finish({})
    require_whole(stage.output_dir)
    for name in (RECIPE, RESULT):
        text = (stage.output_dir / name).read_text()
        assert "hf_secret" not in text and "hub_token" not in text and "<|end|>" in text


def test_next_command_follows_the_chain():
    following = [Stage(name, "tiny", None, 0, {}).next_command() for name in CHAIN]
    assert following == [f"make {name} RECIPE=tiny" for name in CHAIN[1:]] + [None]
    assert Stage("mine", "tiny", None, 0, {}).next_command() is None


@pytest.mark.parametrize(
    "path, wanted",
    [
        (None, "model_name_or_path: missing"),
        ("outputs/tiny/pretrain", "run `make pretrain RECIPE=tiny` first"),
        ("/nowhere/model", "no such folder"),
        ("./model", "no such folder"),
        ("empty", "no config.json in it"),
        ("tokenizer", "no config.json in it"),
    ],
)
def test_model_paths(path, wanted, stage, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    tokenizer.save_pretrained("tokenizer")
    with pytest.raises(UserError) as caught:
        require_model(path, stage)
    assert wanted in str(caught.value)
    assert require_model("tokenizer", stage, "tokenizer_name_or_path") == "tokenizer"
    assert require_model("org/model", stage) == "org/model" and "hub:org/model" in stage.inputs


def test_broken_model_folder(tmp_path, model, tokenizer):
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="no model can be loaded"):
        load_causal_lm(str(tmp_path))
    weights.unlink()
    with pytest.raises(UserError, match="no model.safetensors in it"):
        load_causal_lm(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(tokenizer)
