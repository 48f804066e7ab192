"""End an action at any of its file operations, as SIGKILL does, without a process of its own."""

import os
import sys
from collections.abc import Callable


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


class Killed(BaseException):
    """The end of a run that is killed. Not an `Exception`; what handles it can change no file."""


class Countdown:
    """An audit hook that lets `left` more file operations pass while it is `active`. Python cannot remove a hook."""

    active, left = False, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        """Count an operation that changes a file; raise [`Killed`] at the last one and at all after it."""
        if self.active and (event in CHANGES or (event == "open" and is_writing(arguments[2]))):
            self.left -= 1
            if self.left < 0:
                raise Killed


COUNTDOWN = Countdown()
sys.addaudithook(COUNTDOWN)


def is_writing(flags: int) -> bool:
    """Return whether a file is opened to change it."""
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def is_killed(number: int, action: Callable[[], object]) -> bool:
    """Run `action`, but only its first `number` changes of files; return whether it was killed by that."""
    COUNTDOWN.left, COUNTDOWN.active = number, True
    try:
        action()
        return False
    except Killed:
        return True
    finally:
        COUNTDOWN.active = False
