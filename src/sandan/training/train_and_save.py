"""Train, evaluate and save: the steps shared by pretraining, SFT, reward model and PPO."""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import ProgressCallback
from trl import get_peft_config

from ..core import signals
from ..core.errors import Interrupted, UserError
from ..core.stage import Stage, is_main_process
from ..models.loading import first_line, load_model, model_init_kwargs, quantization, unquantized
from ..models.memory import checkpoint_bytes, model_bytes, readable_bytes
from .checkpoints import choose, comparable
from .trainer import on_any_rank
from .trial import check_sizes


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.trainer_utils import TrainOutput
    from trl import ModelConfig, RewardConfig, SFTConfig

    from .trainer import ReliableTrainer

logger = logging.getLogger(__name__)

# Entries of `Trainer.evaluate` that are not metrics.
NOT_METRICS = ("_runtime", "_per_second", "_preparation_time", "epoch")


class ShortProgress(ProgressCallback):
    """Progress bar that prints only the values in `shown`.

    `trainer_state.json` and the loggers of `report_to` get all values.
    """

    def __init__(self, shown: Sequence[str]):
        super().__init__()
        self.shown = shown

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs) -> None:
        shown = {name: logs[name] for name in self.shown if name in logs}
        if shown:
            super().on_log(args, state, control, logs=shown, **kwargs)


def make_trl_trainer(
    trainer_class: "type[ReliableTrainer]",
    path: str,
    config: "SFTConfig | RewardConfig",
    model_args: "ModelConfig",
    datasets: "tuple[Dataset, Dataset | None]",
    tokenizer: "PreTrainedTokenizerBase",
) -> "ReliableTrainer":
    """Make a trainer of TRL that loads its model from `path`.

    Args:
        datasets: training and held-out rows.

    Raises:
        UserError: if the model cannot be loaded, or rows and settings do not fit.
    """
    extra = quantization(model_args) | (config.model_init_kwargs or {})
    config.model_init_kwargs = model_init_kwargs(model_args, extra)
    try:
        trainer = trainer_class(
            path,
            config,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be trained: {first_line(error)}") from error
    check_sizes(trainer.model.config, path)
    return trainer


def train(trainer: "ReliableTrainer", stage: Stage) -> "TrainOutput":
    """Train, from the checkpoint that `--resume` selects.

    Raises:
        UserError: if that checkpoint is of another run, or the disk has no room for a checkpoint.
        Interrupted: after a signal, once a checkpoint has been saved.
    """
    trainer.identity = {"settings": comparable(stage.config), "inputs": dict(stage.inputs)}
    start = _agreed_start(trainer, stage)
    check_room(trainer, stage)
    trainer.before_writing = stage.begin_writing
    if start is not None:
        logger.info("going on from %s", start)
    return trainer.train(resume_from_checkpoint=start)


def _agreed_start(trainer: "ReliableTrainer", stage: Stage) -> str | None:
    """Return the checkpoint that rank 0 chooses, on all ranks."""
    found: list = [None, None]
    if trainer.accelerator.is_main_process:
        try:
            options = stage.run
            found[0] = choose(
                stage.output_dir,
                options.resume,
                trainer.run_identity(),
                stage.was_finished(),
                options.resume_with_changes,
            )
        except UserError as error:
            found[1] = str(error)
    start, error = broadcast_object_list(found)
    if error is not None:
        raise UserError(error)
    return None if start is None else str(start)


def check_room(trainer: "ReliableTrainer", stage: Stage) -> None:
    """Raise [`UserError`] if the disk has no room for one checkpoint and the final model."""
    needed = checkpoint_bytes(trainer.model) + model_bytes(trainer.model)
    free = shutil.disk_usage(stage.output_dir).free if is_main_process() else needed
    if on_any_rank(trainer.accelerator, free < needed):
        raise UserError(
            f"{stage.output_dir}: a checkpoint and the final model take about {readable_bytes(needed)}, but only "
            f"{readable_bytes(free)} are free; make room or give another --output_dir"
        )


@contextlib.contextmanager
def kept_if_interrupted(trainer: "ReliableTrainer") -> Iterator[None]:
    """Save a checkpoint if a signal arrives after training has finished, so the next run resumes there.

    With several ranks the signal is deferred, because a rank that exits alone would block the others. An evaluation
    still stops at once, because all ranks leave it together.
    """
    alone = trainer.accelerator.num_processes == 1
    try:
        with contextlib.nullcontext() if alone else signals.deferred():
            yield
    except Interrupted:
        with signals.deferred():
            trainer.save_checkpoint()
        raise


def train_and_save(trainer: "ReliableTrainer", stage: Stage) -> dict[str, float]:
    """Train, evaluate before and after (if there are held-out rows), save model, tokenizer and training curve.

    Returns:
        `train_loss`, `train_seconds`, `train_steps`, the `eval_*` after training, and `eval_loss_before`.
    """
    watched = trainer.eval_dataset is not None
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if watched and sharded:
        # Model and optimizer are sharded together when training begins, so the first evaluation is made then.
        trainer.args.eval_on_start = True
    elif watched:
        measured = trainer.evaluate()
        _check_best_metric(trainer, measured)
        before = measured["eval_loss"]
    output = train(trainer, stage)
    metrics = {
        "train_loss": trainer.mean_train_loss(),
        "train_steps": output.global_step,
        "train_seconds": round(output.metrics["train_runtime"], 2),
    }
    if watched and sharded:
        before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    with saved_first(trainer, stage, trainer.accelerator.unwrap_model(trainer.model)):
        if watched:
            metrics |= {key: value for key, value in trainer.evaluate().items() if not key.endswith(NOT_METRICS)}
            metrics["eval_loss_before"] = before
    return metrics


def _check_best_metric(trainer: "ReliableTrainer", measured: Mapping[str, float]) -> None:
    """Refuse the name of a metric that no evaluation measures; `Trainer` looks for it when it has trained for a while."""
    name = trainer.args.metric_for_best_model
    if name is not None and name not in measured and f"eval_{name}" not in measured:
        names = ", ".join(key.removeprefix("eval_") for key in measured if not key.endswith(NOT_METRICS))
        raise UserError(f"metric_for_best_model: {name}: not measured here; take one of {names}")


@contextlib.contextmanager
def saved_first(trainer: "ReliableTrainer", stage: Stage, model: "PreTrainedModel | PeftModel") -> Iterator[None]:
    """Save the trained model before the block, so that no failure in it loses the model; merge adapters after it.

    The block evaluates, which needs the adapters apart: switched off, they give the reference of PPO.

    Args:
        model: the trained model without wrappers.
    """
    with kept_if_interrupted(trainer):
        trainer.save_model()
        trainer.save_state()
        logger.info("saved to %s", stage.output_dir)
        yield
        merge_adapters(model, stage)
        trainer.save_state()


def merge_adapters(model: "PreTrainedModel | PeftModel", stage: Stage) -> None:
    """Merge a LoRA model and save it, so that its folder is a plain model folder for every later stage and user.

    The adapters are also kept separately, in `adapter/`. A model without adapters is left unchanged.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not is_main_process():
        return
    model.save_pretrained(stage.output_dir / "adapter", selected_adapters=model.active_adapters)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (stage.output_dir / name).unlink(missing_ok=True)
    if getattr(model.get_base_model(), "is_quantized", False):
        model = on_whole_weights(model, str(stage.output_dir / "adapter"))
    model.merge_and_unload().save_pretrained(stage.output_dir)


def on_whole_weights(model: "PeftModel", adapter: str) -> "PeftModel":
    """Return the adapters of a quantized model on its weights as they were before: merged into rounded ones they differ.

    Args:
        adapter: the folder in which the adapters are saved.
    """
    from peft import PeftModel

    base = model.get_base_model()
    config = unquantized(base.config)
    whole = load_model(type(base), base.config.name_or_path, config=config, dtype=torch.float32)
    return PeftModel.from_pretrained(whole, adapter)


def count_dropped(before: "Dataset", after: "Dataset", max_length: int | None, what: str) -> int:
    """Return the number of rows that a trainer left out as too long, and log it.

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
