"""A disk that is full, for one process."""

import contextlib
import resource
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def fillable() -> Iterator[Callable[[], None]]:
    """Give a function after whose call files may not grow beyond some kB, until the block ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
