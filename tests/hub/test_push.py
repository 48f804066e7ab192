"""Pushing to a Hub on the loopback: what goes there, what never does, what happens when it fails."""

import json
import os
import pickle
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import yaml
from helpers import ROOT
from helpers import loopback_hub as loopback

from sandan.core.errors import UserError
from sandan.core.stage import RECIPE, RESULT
from sandan.hub import push as publish
from sandan.hub.push import check_rights, plan, push


SECRET = "hf_" + "Ab3" * 12


@pytest.fixture(scope="module")
def outputs_once(tmp_path_factory, tokenizer, tiny_config):
    """Stage folders of a toy's size, as a finished chain leaves them."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("push") / "outputs" / "tiny"
    torch.manual_seed(0)
    kinds = {"tokenizer": None, "pretrain": LlamaForCausalLM, "sft": LlamaForCausalLM, "ppo": LlamaForCausalLM}
    for stage, kind in (kinds | {"reward": LlamaForSequenceClassification, "preferences": None}).items():
        place = folder / stage
        place.mkdir(parents=True)
        if kind is not None:
            kind(tiny_config).save_pretrained(place)
            torch.save({"hub_token": SECRET}, place / "training_args.bin")
            (place / "checkpoint-4").mkdir()
            (place / "checkpoint-4" / "optimizer.pt").write_bytes(b"x")
        if stage == "ppo":
            LlamaForSequenceClassification(tiny_config).save_pretrained(place / "value_model")
        if stage == "preferences":
            for name in ("train", "eval"):
                rows = [{"prompt": "Q", "chosen": f"{name} {index}", "rejected": "B"} for index in range(3)]
                (place / f"preferences_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            splits = [{"split": "train", "path": "preferences_train.jsonl"}]
            splits.append({"split": "test", "path": "preferences_eval.jsonl"})
            configs = [{"config_name": "default", "data_files": splits}]
            (place / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n# Preferences\n")
            (place / "agreement.json").write_text("{}")
        else:
            tokenizer.save_pretrained(place)
        finish(place, stage)
    finish(folder / "evaluate", "evaluate", {"sft/oracle/score": 0.756789, "ppo/oracle/score": 0.97})
    return folder


def finish(place, stage, metrics=None):
    place.mkdir(exist_ok=True)
    result = {
        "stage": stage,
        "recipe": "tiny",
        "seed": 1,
        "metrics": metrics or {"eval_loss": 0.123456, "train_steps": 7},
        "wall_seconds": 3.5,
        "device": "cpu",
        "versions": {"sandan": "0.1.0", "torch": "2.13.0"},
        "inputs": {"data/sft.jsonl": "ab" * 32},
        "config": {"output_dir": f"{os.path.expanduser('~')}/outputs/tiny/{stage}"},
    }
    (place / RESULT).write_text(json.dumps(result))
    (place / RECIPE).write_text(yaml.safe_dump({"stage": stage, "output_dir": f"{os.path.expanduser('~')}/x"}))


@pytest.fixture
def outputs(outputs_once, tmp_path):
    import shutil

    return shutil.copytree(outputs_once, tmp_path / "outputs" / "tiny")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(publish, "WAIT_SECONDS", 0.0)
    # The client waits between its own attempts too.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    huggingface_hub.utils._http.close_session()
    with loopback.serve() as server:
        yield server
    huggingface_hub.utils._http.close_session()


@pytest.fixture
def send(hub, outputs):
    """Push everything as alice; returns what was said."""

    def run(token="hf_alice", public=False):
        said = []
        push(plan(outputs, "alice/tiny", None), public, huggingface_hub.HfApi(hub.url, token=token), said.append)
        return said

    return run


NAMES = {"tokenizer", "base", "sft", "reward", "ppo"}


def test_everything_is_pushed_private_with_cards_and_without_pickles(send, hub):
    assert len(send()) == 6
    assert set(hub.repos) == {("models", f"alice/tiny-{name}") for name in NAMES} | {
        ("datasets", "alice/tiny-preferences")
    }
    assert all(repo["private"] for repo in hub.repos.values())
    names = {path for repo in hub.repos.values() for path in repo["files"]}
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl")) or "checkpoint" in name}
    assert {"model.safetensors", "tokenizer.json", "README.md", RECIPE, RESULT} <= set(hub.files("alice/tiny-sft"))
    assert "value_model/model.safetensors" in hub.files("alice/tiny-ppo")
    everything = b"".join(content for repo in hub.repos.values() for content in repo["files"].values())
    assert SECRET.encode() not in everything and os.path.expanduser("~").encode() not in everything


def test_cards_hold_the_measured_numbers_as_table_and_as_model_index(send, hub):
    send()
    card = hub.files("alice/tiny-sft")["README.md"].decode()
    assert "| `eval_loss` | 0.1235 |" in card and "| `evaluate/sft/oracle/score` | 0.7568 |" in card
    assert "`data/sft.jsonl` | `" + "ab" * 32 in card and 'from_pretrained("alice/tiny-sft")' in card
    assert "None was chosen." in card
    data = huggingface_hub.ModelCard(card).data
    assert data.base_model == "alice/tiny-base" and data.pipeline_tag == "text-generation"
    values = {one.metric_type: one.metric_value for one in data.eval_results}
    assert values == {"eval_loss": 0.1235, "evaluate/sft/oracle/score": 0.7568}
    reward = huggingface_hub.ModelCard(hub.files("alice/tiny-reward")["README.md"].decode()).data
    assert reward.base_model == "alice/tiny-sft" and reward.datasets == ["alice/tiny-preferences"]


LOAD = """
import sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
AutoTokenizer.from_pretrained("alice/tiny-tokenizer")
sft = AutoModelForCausalLM.from_pretrained("alice/tiny-sft", use_safetensors=True)
critic = AutoModelForSequenceClassification.from_pretrained("alice/tiny-ppo", subfolder="value_model")
pairs = load_dataset("alice/tiny-preferences", token="hf_alice")
print(sft.num_parameters(), critic.num_labels, {name: len(part) for name, part in pairs.items()})
"""


def environment(hub, home, token="hf_alice"):
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**os.environ, **settings, "HF_HUB_OFFLINE": "0", "HF_DATASETS_CACHE": str(home / "datasets")}


def run(hub, home, *arguments, token="hf_alice"):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=environment(hub, home, token),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.slow
def test_the_command_pushes_and_others_load_what_it_pushed(hub, outputs, tmp_path):
    done = run(hub, tmp_path, "scripts/push.py", "--recipe_dir", str(outputs), "--hub_id", "alice/tiny")
    assert done.returncode == 0, done.stderr
    assert f"pushed 9 files to {hub.url}/alice/tiny-sft" in done.stdout
    done = run(hub, tmp_path, "-c", LOAD)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("1 {'train': 3, 'test': 3}\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--hub_token", SECRET], ["--token", SECRET]])
def test_a_token_on_the_command_line_is_refused(hub, outputs, tmp_path, arguments):
    done = run(hub, tmp_path, "scripts/push.py", "--recipe_dir", str(outputs), "--hub_id", "alice/x", *arguments)
    assert done.returncode == 2 and SECRET not in done.stderr and "HF_TOKEN" in done.stderr
    assert hub.requests == []


# ---- What never leaves ----


@pytest.mark.parametrize("name", ["thesis.txt", "model.bin", "weights.pt", "model.pkl", "id_rsa", "extra/a.txt"])
def test_a_file_that_is_not_on_the_list_ends_the_push(send, hub, outputs, name):
    path = outputs / "sft" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="is not a file that is pushed"):
        send()
    assert hub.requests == []


def test_links_and_files_elsewhere_end_the_push(send, hub, outputs, tmp_path):
    (tmp_path / "private").write_text("x")
    (outputs / "sft" / "merges.txt").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="is a link"):
        send()
    (outputs / "sft" / "merges.txt").unlink()
    config = outputs / "sft" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_file": "../../.env"}))
    with pytest.raises(UserError, match=r"vocab_file: ../../.env: names a file outside"):
        send()
    assert hub.requests == []


def test_a_linked_stage_folder_ends_the_push(send, hub, outputs, tmp_path):
    (outputs / "sft").rename(tmp_path / "elsewhere")
    (outputs / "sft").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="sft: is a link"):
        send()
    assert hub.requests == []


def test_code_and_what_names_it_stay_at_home(send, hub, outputs):
    names = ("config.json", "tokenizer_config.json", "generation_config.json", "value_model/config.json")
    for name in names:
        config = outputs / "ppo" / name
        text = {"auto_map": {"AutoConfig": "code.Config"}, "custom_pipelines": {"a": {"impl": "code.Pipe"}}}
        config.write_text(json.dumps(json.loads(config.read_text()) | text | {"sub_config": text}))
    send()
    for name in names:
        pushed = hub.files("alice/tiny-ppo")[name]
        assert b"code." not in pushed and json.loads(pushed)["sub_config"] == {}
    (outputs / "ppo" / "code.py").write_text("")
    with pytest.raises(UserError, match="code.py: is not a file that is pushed"):
        send()


def flawed_weights(content):
    """Headers of safetensors that are none, by what is wrong with them."""
    length = int.from_bytes(content[:8], "little")
    return {
        "empty": b"",
        "a length beyond the file": (1 << 62).to_bytes(8, "little") + content[8:],
        "a length beyond the limit": (1 << 30).to_bytes(8, "little") + content[8:],
        "no JSON": content[:8] + b"x" * length + content[8 + length :],
        "truncated": content[:-9],
        "a pickle": pickle.dumps([1]),
    }


@pytest.mark.parametrize("flaw", flawed_weights(bytes(8)))
def test_broken_weights_end_the_push_in_one_line(send, hub, outputs, flaw):
    path = outputs / "sft" / "model.safetensors"
    path.write_bytes(flawed_weights(path.read_bytes())[flaw])
    with pytest.raises(UserError, match="alice/tiny-sft: model.safetensors: no valid safetensors file: ") as caught:
        send()
    assert "\n" not in str(caught.value) and hub.requests == []


@pytest.mark.parametrize("text", ["{", "[" * 5000, "{a: \0}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "recipe.yaml"])
def test_a_file_that_cannot_be_read_ends_the_push_in_one_line(send, hub, outputs, name, text):
    (outputs / "sft" / name).write_text(text[:200] if name == "recipe.yaml" else text)
    with pytest.raises(UserError, match=f"{name}: no valid") as caught:
        send()
    assert "\n" not in str(caught.value) and hub.requests == []


def test_weights_that_lead_to_a_pickle_end_the_push(send, hub, outputs):
    index = {"metadata": {}, "weight_map": {"a": "training_args.bin"}}
    (outputs / "sft" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: weight_map: 'training_args.bin': only safetensors"):
        send()
    assert hub.requests == []


@pytest.mark.parametrize(
    "secret",
    [
        SECRET,
        "sk-" + "a1" * 15,
        "AKIA" + "A" * 16,
        "ghp_" + "a" * 36,
        "-----BEGIN RSA PRIVATE KEY-----",
        "AIza" + "b" * 35,
        "https://alice:correct-horse@example.org/data",
        "s3://:correct-horse@example.org/data",
        "https://example.org/x?X-Amz-Date=1&X-Amz-Signature=" + "ab" * 32,
        "https://example.org/x?sv=2024&sig=" + "aB%2F" * 9,
        "https://example.org/x?next=https%3A%2F%2Fexample.com%3Ftoken%3D" + "a1" * 10,
    ],
)
@pytest.mark.parametrize("place", ["preferences/preferences_train.jsonl", "sft/recipe.yaml"])
def test_a_secret_ends_the_push_and_is_not_repeated(send, hub, outputs, secret, place):
    with (outputs / place).open("a") as stream:
        stream.write(f"\nnote: {secret}\n")
    with pytest.raises(UserError) as caught:
        send()
    assert "nothing was pushed" in str(caught.value) and secret not in str(caught.value)
    assert hub.requests == []


ESCAPED = "".join(f"\\u{ord(letter):04x}" for letter in SECRET[:3]) + SECRET[3:]
# Ways to write a token in which its own letters do not follow each other.
HIDDEN = {
    "preferences/preferences_train.jsonl": [f'{{"prompt": "{ESCAPED}"}}', f'{{"{ESCAPED}": 1, "{ESCAPED}": 2}}'],
    "sft/recipe.yaml": [
        f'note: "{ESCAPED}"',
        f"note: {SECRET[:20]}\n  {SECRET[20:]}",
        f"note: >-\n  {SECRET[:20]}\n  {SECRET[20:]}",
        f'note: "{SECRET[:20]}\\\n  {SECRET[20:]}"',
        f'note: "\\x68{SECRET[1:]}"',
        f'? "{ESCAPED}"',
    ],
    "preferences/README.md": [f'---\nnote: "{ESCAPED}"\n---\n'],
    "sft/config.json": [f'{{"model_type": "llama", "note": [["{ESCAPED}"]]}}'],
}


@pytest.mark.parametrize("place, text", [(place, text) for place, texts in HIDDEN.items() for text in texts])
def test_an_escaped_or_folded_token_ends_the_push(send, hub, outputs, place, text):
    (outputs / place).write_text(text + "\n")
    with pytest.raises(UserError, match="holds a Hugging Face token; nothing was pushed") as caught:
        send()
    assert SECRET not in str(caught.value) and hub.requests == []


def test_text_that_only_looks_like_a_secret_is_pushed(outputs):
    (outputs / "sft" / "recipe.yaml").write_text("base_url: http://127.0.0.1:8000/v1?n=1\nnote: git@example.org:a/b\n")
    assert len(plan(outputs, "alice/tiny", None)) == 6


def test_the_users_own_token_is_a_secret_whatever_it_looks_like(send, outputs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    (outputs / "sft" / "recipe.yaml").write_text("note: hf_alice")
    with pytest.raises(UserError, match="holds your own token"):
        send()


def test_a_public_repository_is_not_filled_unasked(send, hub):
    hub.repos["models", "alice/tiny-tokenizer"] = {"private": False, "files": {}, "commits": 0}
    with pytest.raises(UserError, match="alice/tiny-tokenizer: is public already"):
        send()
    assert hub.files("alice/tiny-tokenizer") == {}
    send(public=True)
    assert hub.files("alice/tiny-tokenizer")


# ---- Faults ----


@pytest.mark.parametrize(
    "token, wanted",
    [("nonsense", "no valid token"), ("hf_bob", "may not write there"), ("hf_alice:read", "may not write there")],
)
def test_missing_rights_are_one_line(send, hub, token, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        send(token)
    assert "\n" not in str(caught.value) and not any(repo["files"] for repo in hub.repos.values())


@pytest.mark.parametrize(
    "token, wanted", [("hf_bob", "may not write"), ("hf_alice:read", "may not write"), ("x", "no valid token")]
)
def test_rights_are_known_before_anything_is_sent(hub, token, wanted):
    with pytest.raises(UserError, match=wanted):
        check_rights("alice/tiny-sft", huggingface_hub.HfApi(hub.url, token=token))
    assert check_rights("alice/x", huggingface_hub.HfApi(hub.url, token="hf_alice")) == "alice may write to alice/x"


def test_without_a_login_the_rights_are_one_line(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(UserError, match="alice/x: nobody is logged in; set HF_TOKEN") as caught:
        check_rights("alice/x", huggingface_hub.HfApi(hub.url, token=None))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [500, "drop"])
@pytest.mark.parametrize("request_", ["PUT /_lfs", "POST .*/commit", "POST .*/preupload", "POST /api/repos/create"])
def test_a_fault_that_passes_is_waited_out(send, hub, fault, request_):
    hub.fail(request_, fault)
    assert len(send()) == 6
    assert hub.files("alice/tiny-sft")["model.safetensors"]


@pytest.mark.slow
def test_a_push_that_failed_goes_on_where_it_stopped(send, hub):
    hub.fail("PUT /_lfs", "drop", times=40)
    with pytest.raises(UserError, match=r"alice/tiny-base \(2 of 6\): .*run the same command again"):
        send()
    assert hub.files("alice/tiny-tokenizer") and hub.files("alice/tiny-base") == {}
    hub.faults.clear()
    send()
    uploaded = [one for one in hub.requests if one.startswith("PUT")]
    hub.requests.clear()
    # Once more: nothing has changed, nothing is uploaded and there is no new commit.
    send()
    assert uploaded and not [one for one in hub.requests if one.startswith("PUT") or "/commit/" in one]


@pytest.mark.parametrize("hub_id", ["tiny", "alice/", "/tiny", "a/b/c", "alice/../x", "alice/ti ny"])
def test_a_name_that_is_none(outputs, hub_id):
    with pytest.raises(UserError, match="expected OWNER/NAME"):
        plan(outputs, hub_id, None)


def test_a_recipe_without_results(tmp_path):
    with pytest.raises(UserError, match="no finished stage in it; run `make chain"):
        plan(tmp_path, "alice/tiny", None)
