"""Whether what a command is to write can be written, asked before its work."""

import os
from collections.abc import Sequence
from pathlib import Path

from lsa_jax.config_checks import refusal


def _writable(directory: Path) -> bool:
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def check_file(option: str, path: Path, *, suffixes: Sequence[str] = ()) -> None:
    """Raises ConfigError where no file can be written to `path`, or its suffix is not one of these
    (all, if none is given)."""
    if suffixes and path.suffix not in suffixes:
        raise refusal(option, str(path), f"a name that ends in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise refusal(option, str(path), "a file, not a directory")
    if not _writable(path.parent):
        raise refusal(option, str(path), "in a directory that is there and can be written to")


def check_directory(option: str, path: Path) -> None:
    """Raises ConfigError where `path` is not, and cannot become, a directory to write to."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not _writable(there):
        raise refusal(option, str(path), f"a directory to write to, but {there} is none")
