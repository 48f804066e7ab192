"""Base classes of all trainers: complete checkpoints, exact resumption, an orderly stop, checks for finite numbers.

1. A checkpoint is written to a temporary folder and renamed when it is complete ([`checkpoints`](checkpoints.py)).
2. Values that Trainer would lose between two logs (the loss so far, TRL's means) are saved in the checkpoint, so that
   a resumed run logs the same as an uninterrupted one.
3. On SIGTERM or SIGINT the current step is finished, then saved. Long phases without steps stop at once, because the
   state does not change in them ([`signals`](../core/signals.py)).
4. A loss or gradient that is not finite ends the run before the optimizer uses it.
"""

import json
import logging
import math
import pickle
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from ..core import signals
from ..core.errors import Interrupted, UserError
from ..models.attention_kernels import avoid_cudnn_attention
from ..models.memory import keep_freed_memory
from . import checkpoints


logger = logging.getLogger(__name__)

SHOWN_TOKENS = 24


def on_any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether `flag` is set in any process. Every process must call this."""
    if accelerator.num_processes == 1:
        return flag
    return accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum").item() > 0


def leave_if_asked(accelerator: Accelerator) -> None:
    """Raise [`Interrupted`] on all ranks if any was asked to stop. For phases in which the state does not change."""
    if on_any_rank(accelerator, signals.requested() is not None):
        raise Interrupted(signals.requested() or "a signal to another rank")


class StopWhenAsked(TrainerCallback):
    """Callback that ends training after the step in which a signal came, with a checkpoint, on all ranks."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if on_any_rank(self.accelerator, signals.requested() is not None):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args, state, control, **kwargs):
        """Stop the evaluation if a signal came; the resumed run repeats it."""
        leave_if_asked(self.accelerator)


class BeginWriting(TrainerCallback):
    """Callback that prepares the output folder when the first step is certain: the gradients are there."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.begin()


class ReliableTrainer(Trainer):
    """Mixin of every trainer. It stands before the trainer class that it extends.

    Attributes:
        identity (`dict`, *optional*): `settings` and `inputs` that are recorded in a checkpoint; by default the
            training arguments.
        before_writing (`Callable`, *optional*): called once, before this run changes anything in the output folder.
    """

    # The file of a checkpoint for the state that Trainer itself does not save.
    state_file = "run_state.json"
    identity: dict[str, Any] | None = None
    before_writing: Callable[[], Any] | None = None

    _start: Path | None = None
    _writes = True
    _aside: Path | None = None
    _unlogged: dict[str, Any]
    _earlier_loss = 0.0
    _evaluation_due = False
    _goes_on = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._unlogged = {}
        # This filter would hide NaN in the logs, and the log must agree with the checks here.
        self.args.logging_nan_inf_filter = False
        avoid_cudnn_attention()
        if self.args.device.type == "cpu":
            keep_freed_memory()
        self._stop = StopWhenAsked(self.accelerator)
        self.add_callback(self._stop)
        self.add_callback(BeginWriting(self.begin_writing))

    def run_identity(self) -> dict[str, Any]:
        """Return the description of this run that its checkpoints record."""
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        identity = self.identity or {"settings": checkpoints.comparable(self.args.to_dict()), "inputs": {}}
        return {"world_size": self.args.world_size, "train_rows": rows, **identity}

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, completely or not at all.

        Raises:
            UserError: on all ranks, if the disk is full or read-only on one. Earlier checkpoints are left unchanged.
        """
        self.begin_writing()
        output_dir, error = Path(self.args.output_dir), None
        name = f"checkpoint-{self.state.global_step}"
        writer = self.args.should_save
        if writer:
            shutil.rmtree(output_dir / checkpoints.ASIDE, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = output_dir / checkpoints.ASIDE
        try:
            super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(output_dir, name)
        except (OSError, RuntimeError, SafetensorError) as caught:
            error = caught
        finally:
            self._aside = None
        failed = on_any_rank(self.accelerator, error is not None)
        if writer and not failed:
            try:
                identity = self.run_identity()
                folder = output_dir / checkpoints.ASIDE / name
                checkpoints.seal(folder, output_dir / name, self.state.global_step, identity)
                checkpoints.rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
            except OSError as caught:
                error = caught
        failed = on_any_rank(self.accelerator, error is not None)
        if writer:
            shutil.rmtree(output_dir / checkpoints.ASIDE, ignore_errors=True)
        if failed:
            self._give_up_saving(output_dir / name, error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model. Sharded weights are gathered first, except inside checkpoints, which stay sharded."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "SHARDED" in str(plugin.state_dict_type):
            if _internal_call and output_dir is not None:
                # This is a checkpoint. Trainer checks that its folder exists before it writes the shards: without it,
                # ranks would disagree about which checkpoint is the best.
                Path(output_dir).mkdir(parents=True, exist_ok=True)
            else:
                self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the current step."""
        self._save_checkpoint(self.model, None)

    def _name_best_checkpoint(self, output_dir: Path, name: str) -> None:
        """Correct the path of the best checkpoint, which Trainer has noted under its temporary name."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._aside:
            self.state.best_model_checkpoint = str(output_dir / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(self._aside / name / TRAINER_STATE_NAME))

    def _give_up_saving(self, target: Path, error: BaseException | None) -> None:
        reason = checkpoints.disk_problem(error) if error is not None else "another rank could not write"
        if reason is None:
            raise error
        last = checkpoints.newest_whole(target.parent, set_aside=False)
        raise UserError(
            f"{target}: cannot be saved ({reason}); nothing of it was kept. "
            f"{f'{last} is whole' if last else 'There is no earlier checkpoint'}: make room, then run the same "
            "command again"
        ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._run_state()
        if self.args.should_save:
            Path(output_dir, self.state_file).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checkpoints.loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self._set_run_state(json.loads(Path(checkpoint, self.state_file).read_text(encoding="utf-8")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _run_state(self) -> dict[str, Any]:
        """Return the state to restore that Trainer does not save, in JSON types, the same on all ranks."""
        state: dict[str, Any] = {"logged_loss": self._earlier_loss + self._total_loss_scalar}
        if self.state.global_step > self._globalstep_last_logged:
            # Trainer does not save what it has not logged yet: without this the next log after resuming would differ.
            loss = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="sum").item()
            state["unlogged"] = {
                "loss": loss / self.accelerator.num_processes,
                "since_step": self._globalstep_last_logged,
                **self._unlogged_metrics(),
            }
        if self._evaluation_due:
            state["evaluation_due"] = True
        return state

    def _set_run_state(self, state: dict[str, Any]) -> None:
        """Restore the result of [`_run_state`]; the sums take effect when training begins."""
        self._unlogged = state.get("unlogged", {})
        self._earlier_loss = state["logged_loss"] + self._unlogged.get("loss", 0.0)
        self._evaluation_due = state.get("evaluation_due", False)

    def _unlogged_metrics(self) -> dict[str, Any]:
        """Return the metrics that were collected since the last log."""
        return {}

    def _restore_metrics(self, unlogged: dict[str, Any]) -> None:
        """Restore the result of [`_unlogged_metrics`]."""

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Train. `resume_from_checkpoint=True` takes the newest complete checkpoint of `output_dir`.

        Raises:
            ValueError: if there is no complete checkpoint to resume from.
            Interrupted: after a signal, once everything is saved.
        """
        start = self._start = self._checkpoint(resume_from_checkpoint)
        self._writes = False
        self._stop.stopped, self._earlier_loss, self._evaluation_due = False, 0.0, False
        self._goes_on = start is not None
        self._forget_evaluation()
        with signals.deferred():
            try:
                output = super().train(None if start is None else str(start), *args, **kwargs)
            except Interrupted:
                self.save_checkpoint()
                raise
            except pickle.UnpicklingError as error:
                raise UserError(
                    f"{start}: a file in it holds other things than numbers; refused, nothing ran"
                ) from error
            # A run that goes on may have no step to make.
            self.begin_writing()
        if self._stop.stopped:
            raise Interrupted(signals.requested() or "a signal to another rank")
        # Trainer has added these losses to its total; a checkpoint saved from here on must not add them again.
        self._tr_loss.zero_()
        self._globalstep_last_logged = self.state.global_step
        return output

    def begin_writing(self) -> None:
        """Put earlier runs out of the way, once: before the first optimizer step and before anything is saved.

        Until then a setting, the data or the memory can still be found wrong. Every process must call this.

        Raises:
            UserError: on all ranks, if the folder cannot be changed.
        """
        if self._writes:
            return
        error = None
        try:
            # Checkpoints first: without its `result.json`, a finished run would seem to be one that can go on.
            if self.args.should_save:
                checkpoints.clear_the_way(self.args.output_dir, self._start)
            if self.before_writing is not None:
                self.before_writing()
        except (OSError, UserError) as caught:
            error = caught
        if on_any_rank(self.accelerator, error is not None):
            raise error or UserError(f"{self.args.output_dir}: another rank could not write")
        self._writes = True

    def _forget_evaluation(self) -> None:
        """Make sure that several processes train together even if the model was evaluated before.

        `evaluate` marks the model as prepared, and accelerate 1.15 then leaves out DDP: each rank would train alone.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        alone = self.accelerator.num_processes == 1
        if not (alone or sharded or isinstance(self.model_wrapped, DistributedDataParallel)):
            self.model_wrapped = self.model
            vars(self.model).pop("_is_accelerate_prepared", None)

    def _checkpoint(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        if wanted is True:
            found = checkpoints.newest_whole(self.args.output_dir, set_aside=self.args.should_save)
            if found is None:
                raise ValueError(f"{self.args.output_dir}: no whole checkpoint to resume from")
            return found
        if problem := checkpoints.problem_of(wanted):
            raise ValueError(f"{wanted}: {problem}")
        return Path(wanted)

    def _run_epoch(self, **kwargs) -> None:
        """Skip the epoch when a resumed run has already taken every step; `Trainer` would take one extra."""
        self._take_up(kwargs["trial"], kwargs["start_time"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self._take_up(trial, start_time)
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _take_up(self, trial: Any, start_time: float) -> None:
        """Continue the unfinished work that the checkpoint records: the sums of the next log, and an evaluation."""
        if unlogged := self._unlogged:
            self._unlogged = {}
            self._tr_loss += unlogged["loss"]
            # `train_loss` is the loss of this call only, so it must not contain the restored loss.
            self._total_loss_scalar -= unlogged["loss"]
            self._globalstep_last_logged = unlogged["since_step"]
            self._restore_metrics(unlogged)
        if self._evaluation_due:
            self.control.should_evaluate, self.control.should_log, self.control.should_save = True, False, False
            self._maybe_log_save_evaluate(
                self._tr_loss, None, self.model_wrapped, trial, self.state.epoch, None, start_time
            )
            self.control.should_evaluate = False

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        # Only the evaluation of `eval_on_start` skips the scheduler. A resumed run has made it already, or makes it in
        # `_take_up`.
        if skip_scheduler and self._goes_on:
            return {}
        self._evaluation_due = True
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._evaluation_due = False
        return metrics

    def mean_train_loss(self) -> float:
        """Return the mean loss of all steps, with those before a resumption."""
        return (self._earlier_loss + self._total_loss_scalar) / max(self.state.global_step, 1)


class GuardedTrainer(ReliableTrainer):
    """[`ReliableTrainer`] whose optimizer never sees a loss or a gradient that is not finite."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_batches: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Return the number of trained tokens, but at least 1: a batch without any then has loss 0, not 0/0."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        if isinstance(count, torch.Tensor):
            return count.clamp(min=1)
        return None if count is None else max(count, 1)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_batches.append((loss, inputs))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm after a last check before the optimizer steps, with the same result on every rank.

        Raises:
            FloatingPointError: if a loss or the gradient is not finite on any rank.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        batches, self._step_batches = self._step_batches, []
        if not batches:
            return grad_norm
        losses = torch.stack([loss.detach().float() for loss, _ in batches]).tolist()
        # With fp16 a gradient overflow is not an error: the loss scaler skips the step and lowers its scale.
        norm = 0.0 if grad_norm is None or self.args.fp16 else float(grad_norm)
        finite = all(map(math.isfinite, (*losses, norm)))
        if on_any_rank(self.accelerator, not finite):
            found = f"loss {sum(losses):.3g}, gradient norm {norm:.3g}" if not finite else "on another rank"
            raise FloatingPointError(
                f"{self.place()}: not finite: {found}; {self._suspect(losses, batches)}. The weights are still those of "
                "the step before and nothing was saved. Look at these rows, lower learning_rate or max_grad_norm, or "
                "use bf16 or float32"
            )
        return grad_norm

    def _suspect(self, losses: list[float], batches: list[tuple[torch.Tensor, dict[str, Any]]]) -> str:
        """Say which micro-batch of a step has a loss that is not finite, or that none has."""
        rank = self.accelerator.process_index
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            shown = self._shown(batches[bad[0]][1])
            return f"micro-batch {bad[0] + 1} of {len(losses)}, rank {rank}, which begins {shown!r}"
        shown = self._shown(batches[0][1])
        return f"the loss of each of its micro-batches on rank {rank} is finite; the first one begins {shown!r}"

    def place(self) -> str:
        """Return the number of the next optimizer step as text, for error messages."""
        return f"step {self.state.global_step + 1} (epoch {self.state.epoch or 0:.2f})"

    def _shown(self, inputs: dict[str, Any]) -> str:
        """Return the beginning of a batch's first row as text."""
        ids = inputs["input_ids"].reshape(-1)[:SHOWN_TOKENS].tolist()
        return self.processing_class.decode(ids)


class GuardedTrlTrainer(GuardedTrainer):
    """[`GuardedTrainer`] for trainers of TRL, which collect means between two logs."""

    def _unlogged_metrics(self) -> dict[str, Any]:
        return {"metrics": self._metrics["train"]}

    def _restore_metrics(self, unlogged: dict[str, Any]) -> None:
        self._metrics["train"] = defaultdict(list, unlogged["metrics"])

    def _run_state(self) -> dict[str, Any]:
        return super()._run_state() | {"total_train_tokens": self._total_train_tokens}

    def _set_run_state(self, state: dict[str, Any]) -> None:
        super()._set_run_state(state)
        self._total_train_tokens = state["total_train_tokens"]
