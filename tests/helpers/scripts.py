"""Run scripts as a user does, on one process or several, without the seconds that each needs for its imports.

    python -m helpers.scripts RECIPE ...      # the scripts of these recipes (sft.yaml: sft.py), one after the other

Each process is forked from one that has the imports behind it and no thread yet. What a library reads when it is
imported (`HF_HOME`, `HF_ENDPOINT`, `OMP_NUM_THREADS`) is therefore the same for all; a script that needs another value
there is started by `subprocess`.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from helpers import ROOT
from sandan.command.processes import become_script


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sandan.command.heavy_imports"])


def run_script(stage, *arguments, root=ROOT, cwd=ROOT, timeout=300, **environment) -> subprocess.CompletedProcess:
    """Do what `python scripts/STAGE.py ARGUMENTS` does in the folder `cwd`; `root` is the checkout with the script.

    Raises:
        subprocess.TimeoutExpired: the script was killed after `timeout` seconds.
    """
    script = root / "scripts" / f"{stage}.py"
    return run_processes([environment], script, *arguments, cwd=cwd, timeout=timeout)


def run_on_two_ranks(script, *arguments, timeout=180, **environment) -> subprocess.CompletedProcess:
    """Do what `torchrun --standalone --nproc_per_node=2 SCRIPT ARGUMENTS` does: one host, gloo, a thread each.

    The exit status is that of the first rank which failed; the other one then has seconds to end before it is killed.

    Raises:
        subprocess.TimeoutExpired: the ranks were killed after `timeout` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    cluster = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [environment | cluster | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"} for rank in "01"]
    return run_processes(ranks, script, *arguments, timeout=timeout)


def environment_of(*options) -> dict[str, str]:
    """Return the variables by which `accelerate launch OPTIONS` tells its processes what to do."""
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args([*map(str, options), "script.py"]))
    before = dict(os.environ)
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if before.get(name) != value}


def run_processes(environments, script, *arguments, cwd=ROOT, timeout) -> subprocess.CompletedProcess:
    """Run the script in a process for each environment; return the first status that is not 0, and all that they wrote."""
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[Path(folder) / f"{rank}.{name}" for name in ("out", "err")] for rank in range(len(environments))]
        processes = [
            PROCESSES.Process(
                target=become_script, args=(command, cwd, os.environ | environment, dict(enumerate(streams, start=1)))
            )
            for environment, streams in zip(environments, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        status = wait_for_all(processes, timeout)
        out, err = (
            "".join(path.read_text(encoding="utf-8") for path in paths) for paths in zip(*outputs, strict=True)
        )
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, out.encode(), err.encode())
    return subprocess.CompletedProcess(command, status, out, err)


def wait_for_all(processes, timeout, grace_seconds=5) -> int | None:
    """Return the first exit status that is not 0, else 0; None if some still ran after the timeout. None is left."""
    status, running, end = 0, set(processes), time.monotonic() + timeout
    while running and wait([process.sentinel for process in running], max(0, end - time.monotonic())):
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            if process.exitcode and not status:
                status, end = process.exitcode, time.monotonic() + grace_seconds
    for process in running:
        process.kill()
        process.join()
    return None if running and not status else status


if __name__ == "__main__":
    for recipe in sys.argv[1:]:
        done = run_script(Path(recipe).stem, "--config", recipe, cwd=Path.cwd())
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        if done.returncode:
            sys.exit(done.returncode)
