"""Print a constraints file of the oldest versions that setup.cfg allows: what `make setup-oldest` installs.

    python tests/helpers/oldest_versions.py > oldest.txt

It runs before anything is installed, so it imports only the standard library.
"""

import configparser
import re
import sys
from pathlib import Path


SETUP = Path(__file__).parents[2] / "setup.cfg"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?>=(?P<lowest>[\w.]+)(,<[\w.]+)?")


def oldest_versions(text: str) -> list[str]:
    """Return `name==lowest` for every requirement of this setup.cfg, those of its extras too, sorted by name.

    Raises:
        ValueError: if a requirement has no lower bound, or two of them.
    """
    config = configparser.ConfigParser()
    config.read_string(text)
    blocks = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lowest: dict[str, str] = {}
    for requirement in "\n".join(blocks).split():
        found = REQUIREMENT.fullmatch(requirement)
        if found is None:
            raise ValueError(
                f"setup.cfg: {requirement}: expected name>=lowest,<next or name[extra]>=lowest,<next, without spaces"
            )
        name, version = found["name"], found["lowest"]
        if lowest.setdefault(name, version) != version:
            raise ValueError(f"setup.cfg: {name}: two lower bounds, {lowest[name]} and {version}; give it one")
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


if __name__ == "__main__":
    sys.stdout.write("\n".join(oldest_versions(SETUP.read_text(encoding="utf-8"))) + "\n")
