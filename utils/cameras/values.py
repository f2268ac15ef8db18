"""Checked values from camera files: numbers, sizes, poses, the up axis. Each mistake becomes an InputError."""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from utils.cameras.path import DEFAULT_SIZE, MAX_NUMBER, UP_AXES
from utils.cli import InputError

AXES = ("opengl", "opencv")  # of cameras: +x right, and +y up, -z forward, or +y down, +z forward

FEW_PIXELS = 0.02  # of the width; images that differ by less are cropped to one size, not scaled


@dataclass(frozen=True)
class Given:
    """What the user states about a camera file, used where the file itself does not say.

    up: the world's up axis, '+y' or '+z'. size: (width, height) in pixels, for formats that store none. fov: vertical
    field of view in degrees, for formats without a lens. axes: one of AXES, for files that do not keep to their
    format's.
    """

    up: str | None = None
    fps: float = 24.0
    size: tuple[int, int] = DEFAULT_SIZE
    fov: float | None = None
    axes: str | None = None


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


def size_of(entry: dict, where: str, keys: tuple[str, str] = ("w", "h")) -> tuple[int, int]:
    width, height = (to_int(required(entry, key, where), f"{where}: {key!r}") for key in keys)
    if min(width, height) < 1:
        raise InputError(f"{where}: image size {width}x{height} is not usable; give w and h in pixels")
    return width, height


def to_pose(value: object, what: str) -> np.ndarray:
    """A pose [4, 4] from 4 or 3 rows of 4 numbers, or from the same numbers in one list."""
    shapes = {3: (3, 4), 12: (12,), 16: (16,)}
    numbers = to_numbers(value, shapes.get(len(value), (4, 4)) if isinstance(value, list) else (4, 4), what)
    pose = np.eye(4)
    pose.flat[: numbers.size] = numbers.ravel()
    return pose


def opengl_poses(poses: np.ndarray, axes: str, path: Path) -> np.ndarray:
    """c2w [P, 4, 4] with OpenGL axes, from poses as they are stored. axes: one of AXES, those of the file."""
    moved, column = poses[:, 3, :3], poses[:, :3, 3]
    if moved.any() and not column.any() and (poses[:, 3, 3] == 1).all():
        print(f"warning: {path} holds its matrices transposed (positions in the last row); read so", file=sys.stderr)
        poses = poses.transpose(0, 2, 1)
    return poses * (1, -1, -1, 1) if axes == "opencv" else poses


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


def stated_up(given: Given, path: Path) -> str:
    """The up axis of a format that states none."""
    if given.up is None:
        raise InputError(f"{path}: its world does not say which way is up; pass --cameras_up y or z")
    return given.up


def one_size(
    sizes: list[tuple[int, int]], focal: np.ndarray, center: np.ndarray, path: Path
) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """(size, focal [P, 2], center [P, 2]) of all cameras at the size that most of them have.

    Sizes that differ by a few pixels, as undistorting leaves them, are cropped or extended around the middle; others
    are scaled to the same width first. Scaling by a few pixels would make the zoom jitter.
    """
    if not sizes:
        return DEFAULT_SIZE, focal, center
    (size, count), *others = Counter(sizes).most_common()
    if others:
        print(
            f"note: {path} holds cameras of {len(others) + 1} image sizes; {len(sizes) - count} of {len(sizes)} are "
            f"brought to {size[0]}x{size[1]}",
            file=sys.stderr,
        )
    own = np.array(sizes, dtype=np.float64)
    scale = np.where(np.abs(size[0] / own[:, :1] - 1) < FEW_PIXELS, 1, size[0] / own[:, :1])
    middle = np.array(size) / 2 + scale * (center - own / 2)
    same = (own == size).all(1, keepdims=True)
    return size, focal * scale, np.where(same, center, middle)


def note_distortion(path: Path, lenses: list[tuple[float, str]]) -> None:
    """Say once that lens distortion is left out. lenses: coefficients and the camera models that they belong to."""
    largest, model = max(lenses, key=lambda one: (abs(one[0]), "FISHEYE" in one[1]), default=(0, ""))
    if largest or "FISHEYE" in model:
        print(
            f"note: {path}: lens distortion ({model}, largest coefficient {largest:g}) is left out; it bends pixels, "
            "not the path",
            file=sys.stderr,
        )


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:
        raise InputError(f"{path} is not a text file ({error})") from error


def natural(name: str) -> str:
    """Sorting key that puts frame_9 before frame_10."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name)


def unit_rotation(quaternions: np.ndarray, where: object) -> Rotation:
    """Rotations of quaternions [..., 4] (x, y, z, w) of any length but zero."""
    if not (np.linalg.norm(quaternions, axis=-1) > 1e-6).all():
        raise InputError(f"{where}: a quaternion is zero, which is no rotation")
    return Rotation.from_quat(quaternions)
