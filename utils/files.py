"""Atomic writes, JSON, hashes, and file sizes as text."""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.cli import InputError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix; rename it to `path` when the block succeeds.

    Works for files and folders. When the block fails, the temporary path is removed and `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(3)}.tmp{path.suffix}")
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():  # a file never takes the place of a folder
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: object) -> None:
    """Write `data` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError when the file is missing or is not a JSON object."""
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path} is missing") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object")
    return data


def known_sha256(path: Path) -> str | None:
    """SHA-256 of a file from its name: the hub's cache names large files by their hash. None for other files."""
    name = path.resolve().name
    return name if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else None


def file_sha256(path: Path, *, trust: bool = True) -> str:
    """SHA-256 of a file. trust: take the hash from the file's name if it is there, without reading the file."""
    if trust and (known := known_sha256(path)):
        return known
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def show_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def files_sha256(paths: Iterable[Path]) -> str:
    """One SHA-256 over several files, in order."""
    return hashlib.sha256("".join(file_sha256(path) for path in paths).encode()).hexdigest()
