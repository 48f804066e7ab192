"""The two ways a stage ends early on purpose."""


class UserError(Exception):
    """A mistake the user can mend. Shown as one line (cause, fix, place), exit code 2, no traceback."""


class GateError(Exception):
    """A stage ran but did not reach what the next one needs. Shown as one line with the figures, exit code 1."""
