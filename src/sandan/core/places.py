"""Where the scripts, the recipes and the embedded data lie: in the checkout, or in the package that a wheel installed.

Only the standard library is imported.
"""

import shlex
from pathlib import Path


# Not resolved: a checkout may link to the sources of another one.
PACKAGE = Path(__file__).absolute().parents[1]
# There only in a wheel (setup.py).
EMBEDDED = PACKAGE / "_embedded"
HOME = EMBEDDED if EMBEDDED.is_dir() else PACKAGE.parents[1]
DATA = "data"


def here_or_embedded(path: str | Path) -> Path:
    """Return the path; of `data/...` that is not in the current folder, the embedded file if there is one."""
    path = Path(path)
    embedded = HOME / path
    return embedded if path.parts[:1] == (DATA,) and not path.exists() and embedded.exists() else path


def recorded(path: str | Path) -> str:
    """Return the path as it is written into results: of an embedded file the same on every machine, `data/...`."""
    path = Path(path)
    return str(path.relative_to(HOME) if path.is_relative_to(HOME / DATA) else path)


def shown(path: Path) -> str:
    """Return the path as short as it can be written here: relative, if it lies in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)


def command_for(target: str, recipe: str, *options: str) -> str:
    """Return the command of a recipe's stage or chain: of the Makefile in a checkout, of `sandan` in a wheel."""
    if HOME == EMBEDDED:
        return shlex.join(["sandan", target, "--recipe", recipe, *options])
    return f"make {target} RECIPE={recipe}" + (f' ARGS="{shlex.join(options)}"' if options else "")


def ranking_command(recipe: str) -> str:
    """Return the command with which a person ranks a recipe's candidates."""
    if HOME == EMBEDDED:
        return command_for("rank", recipe, "--annotator", "your-name")
    return f"{command_for('rank', recipe)} ANNOTATOR=your-name"
