"""Cache files of named arrays, with a record of what they were made from and a check that they are undamaged.

A file is a safetensors file whose header holds the identity of its content and a hash over its bytes. A file that is
missing, damaged or of another identity is read as None, and is made again.
"""

import errno
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from utils.files import atomic_path


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], identity: Mapping) -> None:
    """Write arrays atomically. identity: JSON values that determine the content."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {"identity": _text(identity), "sha256": _hash(arrays)}
    with atomic_path(path) as temporary:
        try:
            save_file(arrays, temporary, header)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(errno.EIO, f"cannot write a cache file ({error})", str(path)) from error


def read_arrays(path: Path, identity: Mapping) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None when it must be made (again)."""
    if not holds(path, identity):
        return None
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError, ValueError):
        return None
    return arrays if header.get("sha256") == _hash(arrays) else None


def holds(path: Path, identity: Mapping) -> bool:
    """Whether a file states this identity. Reads only its header: damage is found by `read_arrays`."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "numpy") as file:
            return (file.metadata() or {}).get("identity") == _text(identity)
    except (SafetensorError, OSError, ValueError):
        return False


def _text(identity: Mapping) -> str:
    return json.dumps(identity, sort_keys=True)


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array)
    return digest.hexdigest()
