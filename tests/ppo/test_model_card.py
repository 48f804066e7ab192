"""PPOTrainer's model card and what it pushes: the calls that reach the Hub's client, and the files that they carry."""

import inspect
from pathlib import Path

import pytest
from helpers import tiny_ppo as base
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sandan import PPOConfig


PICKLES = {".bin", ".pt", ".pth", ".pkl"}


class Done:
    """A finished upload."""

    def done(self):
        return True


@pytest.fixture
def uploads(monkeypatch):
    """Keywords of every upload, with the files that it carries under `files`."""
    made = []
    signature = inspect.signature(HfApi.upload_folder)

    def upload_folder(self, **kwargs):
        signature.bind(self, **kwargs)
        folder = Path(kwargs["folder_path"])
        paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        files = list(filter_repo_objects(paths, ignore_patterns=kwargs["ignore_patterns"]))
        made.append(kwargs | {"files": files})
        return Done()

    class Repository:
        repo_id = "someone/policy"

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: Repository())
    return made


def test_the_card_says_what_was_trained_with_which_method(tiny, tmp_path):
    policy = base.make_policy()
    policy.config._name_or_path = "someone/base"
    trainer = tiny(model=policy)
    trainer.create_model_card(model_name="Polite", dataset_name="someone/prompts", tags=["chat"])
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "someone/base"
    assert card.data.datasets == "someone/prompts"
    assert card.data.library_name == "transformers"
    assert set(card.data.tags) == {"generated_from_trainer", "sandan", "ppo", "chat"}
    assert "# Model Card for Polite" in card.text
    assert "[someone/base](https://huggingface.co/someone/base) on the [someone/prompts]" in card.text
    assert "https://huggingface.co/papers/1909.08593" in card.text
    assert "eprint = {arXiv:1909.08593}" in card.text
    assert "None" not in card.text


def test_a_card_of_local_models_names_no_folder_of_this_machine(tiny, tmp_path):
    base.make_policy().save_pretrained(tmp_path / "sft")
    trainer = tiny(model=AutoModelForCausalLM.from_pretrained(tmp_path / "sft"))
    trainer.create_model_card(tags="chat")
    card = (tmp_path / "run" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "None" not in card
    assert "# Model Card for run" in card


def test_push_to_hub_takes_trl_keywords_and_uploads_nothing_pickled(tiny, tmp_path, uploads):
    trainer = tiny(save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/prompts", tags="chat")
    (upload,) = uploads
    assert upload["repo_id"] == "someone/policy"
    assert {"README.md", "model.safetensors", "value_model/model.safetensors", "tokenizer.json"} <= set(
        upload["files"]
    )
    assert not [name for name in upload["files"] if Path(name).suffix in PICKLES or "checkpoint" in name]
    assert ModelCard.load(tmp_path / "run" / "README.md").data.datasets == "someone/prompts"


def test_every_save_pushes_a_policy_and_critic_that_load(tiny, tmp_path, uploads):
    trainer = tiny(
        save_strategy="steps", save_steps=2, push_to_hub=True, hub_strategy="every_save", hub_always_push=True
    )
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "code.py").touch()
    trainer.train()
    assert [upload["commit_message"] for upload in uploads] == [
        "Training in progress, step 2",
        "Training in progress, step 4",
    ]
    for upload in uploads:
        assert {"README.md", "model.safetensors", "value_model/model.safetensors"} <= set(upload["files"])
        assert not [name for name in upload["files"] if Path(name).suffix in PICKLES or "checkpoint" in name]
        assert not {"trainer_state.json", "code.py"} & set(upload["files"])
    pushed = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    base.assert_equal_weights(pushed.state_dict(), trainer.policy_model.state_dict())
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "value_model")
    base.assert_equal_weights(critic.state_dict(), trainer.value_model.state_dict())


def test_pushing_whole_checkpoints_is_refused():
    with pytest.raises(ValueError, match="hub_strategy: 'checkpoint' would upload pickled .* use 'every_save'"):
        PPOConfig("unused", use_cpu=True, push_to_hub=True, hub_strategy="checkpoint")
