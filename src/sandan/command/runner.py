"""Run stages, side by side if they do not depend on one another.

One stage has the terminal; a stage beside it writes to its log, and the terminal says when it starts and ends.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ..core import environment, signals
from ..core.errors import UserError
from .plan import Job
from .processes import Forks, Started, start_program


@dataclass(frozen=True)
class Running:
    """A stage that runs.

    Args:
        log: where its output goes; None if it has the terminal.
        began: seconds of the monotonic clock.
    """

    job: Job
    started: Started
    log: Path | None
    began: float


def physical_cores() -> int:
    """Return the number of physical cores that this process may use."""
    import psutil

    return max(1, min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1))


def threads_of_a_stage(cores: int) -> int:
    """Return how many threads a stage on the CPU uses: half of the cores, or fewer if the user says so."""
    threads = max(1, cores // 2)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(threads, int(given)) if given.isdecimal() and int(given) else threads


class Runner:
    """Runs jobs and remembers the exit code of the first that failed.

    Args:
        side_by_side: whether jobs that do not depend on one another run at the same time, on the CPU.
        keep_going: whether the other jobs run although one has failed.
    """

    def __init__(self, side_by_side: bool, keep_going: bool = False):
        environment.set_defaults()
        self.keep_going = keep_going
        self.lanes = 1
        self.variables: dict[str, str] = {}
        self.running: dict[Future[int], Running] = {}
        self.failed: list[str] = []
        self.code = 0
        self.signal: int | None = None
        if side_by_side:
            self.lanes = physical_cores()
            self.variables = {"OMP_NUM_THREADS": str(threads_of_a_stage(self.lanes))}
            os.environ.update(self.variables)

    def run(self, jobs: Sequence[Job]) -> int:
        """Run the jobs; return 0, or the exit code of the first that failed.

        After a failure no job is started, and those that still run are asked to stop, as by SIGTERM: the same command
        goes on. SIGTERM is handed on; a Ctrl-C reaches the stages from the terminal.
        """
        # One stage alone imports less than all of them together.
        use_forks = sum(job.python for job in jobs) > 1
        waiting = {job.name: job for job in jobs}
        with ThreadPoolExecutor(self.lanes) as waiters, self._signals_handled():
            forks = Forks() if use_forks else None
            if len(jobs) > 1 and not self.keep_going and not self._settings_hold(jobs, forks):
                return self.code
            while waiting or self.running:
                while (job := self._next(waiting)) is not None:
                    del waiting[job.name]
                    self._start(job, forks, waiters)
                if not self.running:
                    break
                done, _ = wait(self.running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._end(self.running.pop(future), future.result())
        if waiting and self.signal is not None and not self.code:
            self.code = signals.REQUEUE_EXIT_CODE
        return self.code

    def _settings_hold(self, jobs: Sequence[Job], forks: Forks | None) -> bool:
        """Let every script on the CPU read its settings: a mistake in the last stage shows before the first one runs.

        What a launcher starts is left out: its settings may be right only where it starts them.
        """
        say("checking the settings of all stages")
        only_settings = os.environ | self.variables | {environment.ONLY_SETTINGS: "1"}
        for job in jobs:
            if job.launched:
                continue
            with tempfile.TemporaryDirectory() as folder:
                log = Path(folder, "log")
                start = forks.start if forks is not None and job.python else start_program
                code = start(job, log, only_settings | job.environment).wait()
                if code != 0:
                    print(log.read_text(encoding="utf-8", errors="replace").rstrip(), file=sys.stderr)
                    self.failed.append(job.name)
                    self.code = exit_code(code)
            if self.signal is not None or self.code:
                self.code = self.code or signals.REQUEUE_EXIT_CODE
                return False
        return True

    def _next(self, waiting: dict[str, Job]) -> Job | None:
        """Return the job that can start now, or None."""
        if self.signal is not None or (self.code and not self.keep_going) or len(self.running) >= self.lanes:
            return None
        unfinished = waiting.keys() | {running.job.name for running in self.running.values()}
        return next((job for job in waiting.values() if not job.needs & unfinished), None)

    def _start(self, job: Job, forks: Forks | None, waiters: ThreadPoolExecutor) -> None:
        log = job.log if any(running.log is None for running in self.running.values()) else None
        if log is None:
            print(f"\n\033[1m── {job.recipe}: {job.name} ──\033[0m", flush=True)
        else:
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                log.touch()
            except OSError as error:
                raise UserError(f"{log}: cannot be written: {error.strerror}") from error
            say(f"beside it: {job.name}, see {log}")
        start = forks.start if forks is not None and job.python else start_program
        began = time.monotonic()
        started = start(job, log, os.environ | self.variables | job.environment)
        self.running[waiters.submit(started.wait)] = Running(job, started, log, began)
        if self.signal is not None:
            # It came while the process was made, which may not have received it.
            self._signal_all(self.signal)

    def _end(self, ended: Running, code: int) -> None:
        code = exit_code(code)
        seconds = time.monotonic() - ended.began
        if ended.log is not None:
            how = f"done in {seconds:,.0f} s" if code == 0 else f"exit code {code}: {last_line(ended.log)}"
            say(f"{ended.job.name}: {how}, see {ended.log}")
        if code == 0:
            return
        self.failed.append(ended.job.name)
        if not self.code:
            self.code = code
            if not self.keep_going and self.signal is None:
                self._signal_all(signal.SIGTERM)

    @contextlib.contextmanager
    def _signals_handled(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        if number == signal.SIGTERM:
            self._signal_all(number)

    def _signal_all(self, number: int) -> None:
        for future, running in self.running.items():
            if not future.done():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.started.pid, number)


def exit_code(code: int) -> int:
    """Return the exit code as a shell gives it: 128 + N for a process that was killed by signal N, whose code is -N."""
    return 128 - code if code < 0 else code


def say(line: str) -> None:
    """Print a line below a progress bar; on a terminal it replaces the bar, which is drawn again."""
    print("\r\033[K" if sys.stdout.isatty() else "\n", line, sep="", flush=True)


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = text.replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
