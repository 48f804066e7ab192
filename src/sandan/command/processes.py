"""Start a stage's process: forked from one that has the heavy imports behind it, or as a program of its own."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from .plan import Job


@dataclass(frozen=True)
class Started:
    """A process that was started: its id, and a function that waits for its end and returns its exit code."""

    pid: int
    wait: Callable[[], int]


def start_program(job: Job, log: Path | None, environment: Mapping[str, str]) -> Started:
    """Start the job as a program; its output goes to the terminal, or to the log."""
    with nullcontext() if log is None else log.open("wb") as stream:
        quiet = {} if log is None else {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(job.command, env=environment, **quiet)
    return Started(process.pid, process.wait)


class Forks:
    """Forks stages from a process that has imported the heavy packages, and has no thread yet.

    What a library reads when it is imported (`OMP_NUM_THREADS`) is the same for all, so it must be set before.
    """

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["sandan.command.heavy_imports"])
        # A Ctrl-C reaches every process. It must not end the imports: those who are forked later have to stop by it.
        # They inherit that it waits until they can deal with it. (Starting the tracker would let it through again.)
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def start(self, job: Job, log: Path | None, environment: Mapping[str, str]) -> Started:
        """Fork a process that becomes the job's script; its output goes to the terminal, or to the log."""
        streams = {} if log is None else {1: log, 2: log}
        process = self.context.Process(
            target=become_script, args=(job.command[1:], Path.cwd(), dict(environment), streams)
        )
        process.start()

        def wait() -> int:
            process.join()
            return process.exitcode

        return Started(process.pid, wait)


def become_script(
    command: tuple[str, ...], folder: Path, environment: Mapping[str, str], streams: Mapping[int, Path]
) -> None:
    """Run in a forked process: become the script, with its arguments, folder, environment and output files.

    Args:
        command: the script and its arguments.
        streams: the file of each file descriptor that is not inherited.
    """
    for number, path in streams.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), number)
    if "datasets" in sys.modules:
        # It names cache files. Seeded before the fork, it would give those of two stages the same name.
        sys.modules["datasets.fingerprint"].fingerprint_rng.seed()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).absolute().parent))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        runpy.run_path(command[0], run_name="__main__")
    except KeyboardInterrupt:
        # Before the script handles signals itself.
        sys.exit(128 + signal.SIGINT)
    finally:
        atexit._run_exitfuncs()
