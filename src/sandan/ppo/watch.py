"""Watches a run with `sandan.watch`; only with `stop_on_collapse` does a run end by it."""

import logging

from transformers import TrainerCallback

from ..checkpoints import newest_whole
from ..errors import GateError
from ..watch import findings


logger = logging.getLogger(__name__)


class Watch(TrainerCallback):
    """Logs each finding when it appears; what is known follows from the log history, also in a resumed run."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Raise `GateError` at a collapse, if the settings say so: on all ranks, and before Trainer saves the step."""
        if not logs or "objective/kl" not in logs:
            return
        known = {finding.kind for finding in findings(state.log_history[:-1])}
        found = findings(state.log_history)
        for finding in found:
            if finding.kind not in known and state.is_world_process_zero:
                logger.warning("step %d: %s", state.global_step, finding.text)
        lost = [finding.text for finding in found if finding.collapse]
        if lost and args.stop_on_collapse:
            checkpoint = newest_whole(args.output_dir, set_aside=False)
            raise GateError(
                f"step {state.global_step}: stopped by stop_on_collapse: {'; '.join(lost)}. Nothing of this step was "
                f"saved; {f'the last checkpoint is {checkpoint}' if checkpoint else 'there is no checkpoint'}"
            )
