"""The ways a stage ends early on purpose."""


class UserError(Exception):
    """A mistake the user can mend. Shown as one line (cause, fix, place), exit code 2, no traceback."""


class GateError(Exception):
    """A stage ran but did not reach what the next one needs. Shown as one line with the figures, exit code 1."""


class Interrupted(BaseException):
    """SIGTERM or SIGINT. Not an `Exception`, so that nobody's `except Exception` swallows it. Exit code 75."""
