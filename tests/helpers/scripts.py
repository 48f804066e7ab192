"""Run scripts as a user does, without the seconds that each needs for its imports.

    python -m helpers.scripts RECIPE ...      # the scripts of these recipes (sft.yaml: sft.py), one after the other

Each script is a process of its own, forked from one that has the imports behind it and no thread yet. What a library
reads when it is imported (`HF_HOME`, `HF_ENDPOINT`, `OMP_NUM_THREADS`) is therefore the same for all; a script that
needs another value there is started by `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import ROOT


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["helpers.imports_of_scripts"])


def run_script(stage, *arguments, root=ROOT, cwd=ROOT, timeout=300, **environment) -> subprocess.CompletedProcess:
    """Do what `python scripts/STAGE.py ARGUMENTS` does in the folder `cwd`; `root` is the checkout with the script.

    Raises:
        subprocess.TimeoutExpired: the script was killed after `timeout` seconds.
    """
    command = [str(root / "scripts" / f"{stage}.py"), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        script = PROCESSES.Process(target=be_script, args=(command, cwd, os.environ | environment, streams))
        script.start()
        script.join(timeout)
        if script.is_alive():
            script.kill()
            script.join()
            raise subprocess.TimeoutExpired(command, timeout, *(stream.read_bytes() for stream in streams))
        texts = [stream.read_text(encoding="utf-8") for stream in streams]
    return subprocess.CompletedProcess(command, script.exitcode, *texts)


def be_script(command: list[str], cwd: Path, environment: dict[str, str], streams: list[Path]) -> None:
    """Run in the forked process: become the script, with its arguments, folder, environment and output files."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


if __name__ == "__main__":
    for recipe in sys.argv[1:]:
        done = run_script(Path(recipe).stem, "--config", recipe, cwd=Path.cwd())
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        if done.returncode:
            sys.exit(done.returncode)
