"""What the stages that train share: run the trainer, save a standard Hugging Face folder, report the held-out loss."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import ProgressCallback

from .errors import UserError
from .stage import Stage, is_main_process


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

logger = logging.getLogger(__name__)

# What Trainer.evaluate reports besides metrics.
NOT_METRICS = ("_runtime", "_per_second", "_preparation_time", "epoch")


class ShortProgress(ProgressCallback):
    """Trainer's progress bar, printing only the logged values that one watches.

    `trainer_state.json` and the loggers of `report_to` get all of them.
    """

    def __init__(self, shown: Sequence[str]):
        super().__init__()
        self.shown = shown

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        shown = {name: logs[name] for name in self.shown if name in logs}
        if shown:
            super().on_log(args, state, control, logs=shown, **kwargs)


def train_and_save(trainer: "Trainer", stage: Stage) -> dict[str, float]:
    """Train, evaluate before and after (where there are held-out rows), save model, tokenizer and training curve.

    Returns:
        `train_loss`, `train_seconds`, `train_steps`, and `eval_*` after training, `eval_loss_before` among them.
    """
    before = trainer.evaluate()["eval_loss"] if trainer.eval_dataset is not None else None
    stage.begin_writing()
    output = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    metrics = {
        "train_loss": output.training_loss,
        "train_steps": output.global_step,
        "train_seconds": round(output.metrics["train_runtime"], 2),
    }
    if before is not None:
        measured = trainer.evaluate()
        metrics |= {key: value for key, value in measured.items() if not key.endswith(NOT_METRICS)}
        metrics["eval_loss_before"] = before
    trainer.save_model()
    merge_adapters(trainer.accelerator.unwrap_model(trainer.model), stage)
    trainer.save_state()
    logger.info("saved to %s", stage.output_dir)
    return metrics


def merge_adapters(model: "PreTrainedModel | PeftModel", stage: Stage) -> None:
    """Save a LoRA model merged, so that its folder is a plain model folder for every later stage and user.

    The adapters alone are kept in `adapter/`. A model without adapters is left as it is.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not is_main_process():
        return
    model.save_pretrained(stage.output_dir / "adapter", selected_adapters=model.active_adapters)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (stage.output_dir / name).unlink(missing_ok=True)
    model.merge_and_unload().save_pretrained(stage.output_dir)


def set_stop_token(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write the tokenizer's special tokens into the model's generation config, so that every loader stops where we do."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def count_dropped(before: "Dataset", after: "Dataset", max_length: int | None, what: str) -> int:
    """How many rows a trainer left out as too long.

    Raises:
        UserError: if none is left.
    """
    dropped = len(before) - len(after)
    if not len(after):
        raise UserError(
            f"max_length: all {len(before):,} {what} are longer than {max_length} tokens; raise max_length"
        )
    if dropped:
        logger.warning(
            "%s of %s %s are longer than %s tokens and were dropped",
            f"{dropped:,}",
            f"{len(before):,}",
            what,
            max_length,
        )
    return dropped
