"""SIGTERM and SIGINT: whoever stops a run (a scheduler, a spot machine, Ctrl-C) finds it where it was.

A signal ends a stage at once, as Ctrl-C does. While a trainer has something to lose, it only sets a flag: the trainer
finishes its step, saves and stops (see [`ReliableTrainer`](trainer.py)).
"""

import contextlib
import signal
import time
from collections.abc import Iterator

from .errors import Interrupted


# EX_TEMPFAIL of sysexits.h: "try again later". Schedulers can requeue on it.
REQUEUE_EXIT_CODE = 75
# Launchers pass on a signal that the process got already: what comes at once is the same request.
SAME_REQUEST_SECONDS = 2.0

_received: signal.Signals | None = None
_received_at = 0.0
_deferred = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Take over SIGTERM and SIGINT while the block runs."""
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
        # Only a person who presses Ctrl-C again wants an end without saving; a scheduler has SIGKILL for that.
        if number == signal.SIGINT and time.monotonic() - _received_at > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        return
    _received, _received_at = signal.Signals(number), time.monotonic()
    if not _deferred:
        raise Interrupted(_received.name)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While the block runs, signals only set the flag that [`requested`] reads."""
    global _deferred
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def requested() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return None if _received is None else _received.name
