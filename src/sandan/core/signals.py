"""Handle SIGTERM and SIGINT so that a stopped run can be resumed from where it was.

Signals come from a scheduler, a spot machine or Ctrl-C. A signal ends a stage at once, as Ctrl-C does. During training
it only sets a flag: the trainer finishes its step, saves and stops (see [`ReliableTrainer`](../training/trainer.py)).
"""

import contextlib
import signal
import time
from collections.abc import Iterator

from .errors import Interrupted


# EX_TEMPFAIL of sysexits.h: "try again later". Schedulers can requeue on it.
REQUEUE_EXIT_CODE = 75
# Launchers forward a signal that the process has already received. A second one within this time is the same request.
SAME_REQUEST_SECONDS = 2.0

_received: signal.Signals | None = None
_received_at = 0.0
_deferred = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle SIGTERM and SIGINT here while the block runs."""
    global _received
    before = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _received = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: object) -> None:
    global _received, _received_at
    if _received is not None:
        # A second Ctrl-C from a person means: stop without saving. A scheduler has SIGKILL for that.
        if number == signal.SIGINT and time.monotonic() - _received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return
    _received, _received_at = signal.Signals(number), time.monotonic()
    if not _deferred:
        raise Interrupted(_received.name)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let signals only set the flag that [`requested`] reads, while the block runs."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def requested() -> str | None:
    """Return the name of the signal that asked this process to stop, or None."""
    return None if _received is None else _received.name
