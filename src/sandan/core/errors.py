"""Exceptions with which a stage ends early on purpose."""


class UserError(Exception):
    """A mistake that the user can fix. Shown as one line (cause, fix, place), exit code 2, no traceback."""


class GateError(Exception):
    """A result too poor for the next stage, although this stage ran. Shown as one line with figures, exit code 1."""


class Interrupted(BaseException):
    """SIGTERM or SIGINT. Not an `Exception`, so that no `except Exception` catches it. Exit code 75."""
