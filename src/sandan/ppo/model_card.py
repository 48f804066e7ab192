"""Write the model card of a PPO run, and push its checkpoints to the Hub."""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer, is_wandb_available
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress
from trl.trainer.utils import get_comet_experiment_url, get_config_model_id, get_trackio_space_url

from ..hub.cards import ppo_card
from ..training.checkpoints import ASIDE, MANIFEST


PAPER = {
    "title": "Fine-Tuning Language Models from Human Preferences",
    "id": "1909.08593",
    "citation": """\
@article{ziegler2019fine-tuning,
    title  = {{Fine-Tuning Language Models from Human Preferences}},
    author = {Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and Dario Amodei and
              Paul F. Christiano and Geoffrey Irving},
    year   = 2019,
    eprint = {arXiv:1909.08593}
}""",
}
# Pickles (of optimizer, schedule and random states) and other files that only a resumed run reads.
STAYS_HOME = (
    "*.py",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.distcp",
    ".metadata",
    "ppo_state.json",
    "trainer_state.json",
    MANIFEST,
)


def write_model_card(
    trainer: Trainer, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> None:
    """Write `README.md` into the trainer's output folder, on the main process (`PPOTrainer.create_model_card`)."""
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    base_model = get_config_model_id(trainer.model.config)
    base_model = base_model if base_model and not os.path.isdir(base_model) else None
    repository = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).name
    model_name = model_name or repository.split("/")[-1]
    given = [tags] if isinstance(tags, str) else list(tags or [])
    card = ppo_card(
        base_model,
        dataset_name,
        model_name,
        sorted({"generated_from_trainer", *given, *trainer._tag_names}),
        paper=PAPER,
        repository=repository,
        response_length=args.response_length,
        run_urls=_run_urls(),
        trainer_name=trainer._name,
    )
    card.save(Path(args.output_dir, "README.md"))


def push_checkpoint(trainer: Trainer, folder: str) -> None:
    """Push a checkpoint: policy, critic and card, but no pickled files and no code.

    Only `hub_strategy="every_save"` is supported; with "end" nothing is pushed here.
    """
    args, job = trainer.args, trainer.push_in_progress
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if job is not None and not job.is_done() and not args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    # Upload from a copy, as Trainer does, because `save_total_limit` may remove the checkpoint during the upload.
    shutil.copytree(folder, args.output_dir, ignore=shutil.ignore_patterns(*STAYS_HOME), dirs_exist_ok=True)
    trainer.create_model_card()
    job = HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=args.output_dir,
        commit_message=f"Training in progress, step {trainer.state.global_step}",
        token=args.hub_token,
        run_as_future=True,
        ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{ASIDE}/*", *STAYS_HOME],
        revision=args.hub_revision,
    )
    trainer.push_in_progress = PushInProgress([job])


def _run_urls() -> list[tuple[str, Any]]:
    """Return the names and URLs of the loggers of this process."""
    urls = [("Comet", get_comet_experiment_url()), ("Trackio", get_trackio_space_url())]
    if is_wandb_available():
        import wandb

        urls.append(("Weights & Biases", wandb.run.url if wandb.run is not None else None))
    return [(name, url) for name, url in urls if url is not None]
