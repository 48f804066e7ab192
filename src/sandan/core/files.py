"""Write files completely or not at all, and identify files by the hash of their bytes."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the hex digest of a file's bytes, read in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a complete file or nothing: to a temporary name first, then rename it."""
    aside = path.with_name(temporary_name(path.name))
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def temporary_name(name: str) -> str:
    """Return the name under which [`write_text`] writes a file."""
    return f".{name}.tmp"
