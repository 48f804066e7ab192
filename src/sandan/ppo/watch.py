"""Check every update of a PPO run with `sandan.ppo.diagnosis`. Only with `stop_on_collapse` does this end a run."""

import logging
from typing import Any

from transformers import TrainerState

from ..core.errors import GateError
from ..training.checkpoints import newest_whole
from .config import PPOConfig
from .diagnosis import CRITIC_PATIENCE, WINDOW, findings


logger = logging.getLogger(__name__)


class Watch:
    """Watcher that logs each finding when it appears. It sees every update, even if the run logs rarely.

    A resumed run continues with the logged part of its history.
    """

    def __init__(self, args: PPOConfig):
        self.args = args
        self.history: list[dict[str, Any]] | None = None
        self.known: set[str] = set()

    def look(self, metrics: dict[str, float], state: TrainerState) -> None:
        """Check the metrics of a new update, which are the same on all ranks.

        Raises:
            GateError: at a collapse with `stop_on_collapse`, on all ranks, before Trainer saves the step.
        """
        if self.history is None:
            self.history = [entry for entry in state.log_history if "objective/kl" in entry]
            self.known = {finding.kind for finding in findings(self.history)}
        self.history.append(metrics)
        # The findings need only the start and the end.
        del self.history[WINDOW : -max(WINDOW, CRITIC_PATIENCE)]
        found = findings(self.history)
        for finding in found:
            if finding.kind not in self.known and state.is_world_process_zero:
                logger.warning("step %d: %s", state.global_step, finding.text)
        self.known = {finding.kind for finding in found}
        lost = [finding.text for finding in found if finding.collapse]
        if lost and self.args.stop_on_collapse:
            checkpoint = newest_whole(self.args.output_dir, set_aside=False)
            raise GateError(
                f"step {state.global_step}: stopped by stop_on_collapse: {'; '.join(lost)}. Nothing of this step was "
                f"saved; {f'the last checkpoint is {checkpoint}' if checkpoint else 'there is no checkpoint'}"
            )
