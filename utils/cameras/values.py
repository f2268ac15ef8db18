"""Checked values from camera files: numbers, sizes, rotations, the up axis. Each mistake becomes an InputError."""

import re
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from utils.cameras.path import DEFAULT_SIZE, MAX_NUMBER, UP_AXES
from utils.cli import InputError

DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
UNDISTORT = (
    "lens distortion is not supported; undistort the images first (COLMAP: image_undistorter) and use its cameras"
)
PINHOLE_MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")


def to_numbers(value: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    """`value` as finite float64 of `shape`; strings, nulls and ragged lists are refused. what: for messages."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} must be numbers") from error
    if array.dtype.kind not in "iuf" or array.shape != shape or not np.isfinite(array).all():
        size = " x ".join(map(str, shape))
        raise InputError(f"{what} must be {f'{size} finite numbers' if shape else 'a finite number'}")
    return array.astype(np.float64)


def to_number(value: object, what: str) -> float:
    return float(to_numbers(value, (), what))


def to_int(value: object, what: str) -> int:
    number = to_number(value, what)
    if not number.is_integer() or abs(number) > MAX_NUMBER:
        raise InputError(f"{what} must be a whole number, but is {value}")
    return int(number)


def required(entry: dict, key: str, where: str) -> object:
    if key not in entry:
        raise InputError(f"{where}: {key!r} is missing")
    return entry[key]


def entries_of(data: dict, key: str, path: Path) -> list[dict]:
    entries = data[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: {key!r} must be a list of objects")
    return entries


def size_of(entry: dict, where: str) -> tuple[int, int]:
    width, height = (to_int(required(entry, key, where), f"{where}: {key!r}") for key in ("w", "h"))
    if min(width, height) < 1:
        raise InputError(f"{where}: image size {width}x{height} is not usable; give w and h in pixels")
    return width, height


def world_up(data: dict, up: str | None, path: Path, default: str | None) -> str:
    """The up axis that the file states, else `up`, else `default`. A contradiction is an error, not a choice."""
    stated = data.get("world_up")
    if stated is None:
        if up or default:
            return up or default
        raise InputError(f'{path} does not say which way is up; add "world_up": "+y" or pass --cameras_up y or z')
    if stated not in list(UP_AXES):
        raise InputError(f"{path}: 'world_up' is {stated!r}, but must be '+y' or '+z'")
    if up and up != stated:
        raise InputError(
            f"{path} says 'world_up' {stated}, but {up} was asked for; drop --cameras_up or correct the file"
        )
    return stated


def fps_of(data: dict, fps: float, path: Path) -> float:
    return to_number(data["fps"], f"{path}: 'fps'") if "fps" in data else fps


def one_size(sizes: list[tuple[int, int]], path: Path) -> tuple[int, int]:
    if len(set(sizes)) > 1:
        (w, h), (other_w, other_h) = sorted(set(sizes))[:2]
        raise InputError(f"{path} holds cameras of {w}x{h} and of {other_w}x{other_h} pixels; one size is needed")
    return sizes[0] if sizes else DEFAULT_SIZE


def natural(name: str) -> str:
    """Sorting key that puts frame_9 before frame_10."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name)


def unit_rotation(quaternions: np.ndarray, where: object) -> Rotation:
    """Rotations of quaternions [..., 4] (x, y, z, w) of any length but zero."""
    if not (np.linalg.norm(quaternions, axis=-1) > 1e-6).all():
        raise InputError(f"{where}: a quaternion is zero, which is no rotation")
    return Rotation.from_quat(quaternions)
