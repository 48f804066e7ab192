"""Check every update of a PPO run with `sandan.ppo.diagnosis`. Only with `stop_on_collapse` does this end a run."""

import logging
from typing import Any

from transformers import TrainerControl, TrainerState

from ..core.errors import GateError
from ..training.checkpoints import newest_whole
from .config import PPOConfig
from .diagnosis import CRITIC_PATIENCE, WINDOW, Finding, findings


logger = logging.getLogger(__name__)


class Watch:
    """Watcher that logs each finding when it appears. It sees every update, even if the run logs rarely.

    A resumed run continues with the logged part of its history.

    Attributes:
        stopped: True once a collapse has ended the run, which then keeps its best checkpoint.
    """

    def __init__(self, args: PPOConfig):
        self.args = args
        self.history: list[dict[str, Any]] | None = None
        self.known: set[str] = set()
        self.stopped = False

    def look(self, metrics: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        """Check the metrics of a new update, which are the same on all ranks.

        At a collapse with `stop_on_collapse` the run ends, on all ranks, before Trainer saves the step.

        Raises:
            GateError: then, unless there is a best checkpoint that Trainer loads (`load_best_model_at_end`).
        """
        if self.history is None:
            self.history = [entry for entry in state.log_history if "objective/kl" in entry]
            self.known = {finding.kind for finding in self._find()}
        self.history.append(metrics)
        # The findings need only the start and the end.
        del self.history[WINDOW : -max(WINDOW, CRITIC_PATIENCE)]
        found = self._find()
        for finding in found:
            if finding.kind not in self.known and state.is_world_process_zero:
                logger.warning("step %d: %s", state.global_step, finding.text)
        self.known = {finding.kind for finding in found}
        lost = [finding.text for finding in found if finding.collapse]
        if lost and self.args.stop_on_collapse:
            self._stop(f"step {state.global_step}: stopped by stop_on_collapse: {'; '.join(lost)}", state)
            control.should_training_stop = True

    def _find(self) -> list[Finding]:
        return findings(self.history or [], self.args.max_kl_nats)

    def _stop(self, reason: str, state: TrainerState) -> None:
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self.stopped = True
            best = f"{self.args.metric_for_best_model} {state.best_metric:.3g}"
            if state.is_world_process_zero:
                logger.warning("%s. The best checkpoint is kept: %s (%s)", reason, state.best_model_checkpoint, best)
            return
        checkpoint = newest_whole(self.args.output_dir, set_aside=False)
        saved = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
        raise GateError(f"{reason}. Nothing of this step was saved; {saved}")
