"""Carry the scripts, the recipes and the embedded data inside the package of a wheel; all else is in setup.cfg."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithFiles(build_py):
    """Copies what lies beside `src/` in a checkout to `sandan/_embedded/`, where src/sandan/core/places.py finds it."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in ("scripts", "recipes", "data"):
            target = Path(self.build_lib, "sandan", "_embedded", name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithFiles})
