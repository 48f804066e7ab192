"""Where the scripts, the recipes and the embedded data lie; only the standard library is imported."""

from pathlib import Path


# The checkout that this package is part of. Not resolved: a checkout may link to the sources of another one.
HOME = Path(__file__).absolute().parents[3]


def shown(path: Path) -> str:
    """Return the path as short as it can be written here: relative, if it lies in the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)
