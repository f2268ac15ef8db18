"""Readers of cameras in JSON: nerfstudio transforms.json, and keyframes.

Keyframes are a format for paths written by hand:

    {"world_up": "+y", "fps": 24, "w": 1080, "h": 720, "fov": 45,
     "keyframes": [{"frame": 1,  "position": [0, 1, 5], "look_at": [0, 1, 0]},
                   {"frame": 46, "position": [3, 1, 4], "quaternion": [0, 0.3, 0, 0.95], "fov": 40}]}

position, look_at: metres; quaternion: x, y, z, w, camera-to-world, OpenGL camera axes; fov: vertical, in degrees,
for all keyframes or for each. Without `frame`, keyframes are 45 frames apart, which makes each of them an anchor.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.spatial.transform import Rotation, RotationSpline

from utils.arcs import ARC_STEPS
from utils.cameras import (
    DEFAULT_SIZE,
    MAX_NUMBER,
    MAX_POSES,
    UP_AXES,
    CameraPath,
    catmull_rom,
    look_at,
    make_path,
)
from utils.cli import InputError

DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
UNDISTORT = (
    "lens distortion is not supported; undistort the images first (COLMAP: image_undistorter) and use its cameras"
)
PINHOLE_MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")


# --- values of unknown type ---


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


def _get(entry: dict, key: str, where: str) -> object:
    if key not in entry:
        raise InputError(f"{where}: {key!r} is missing")
    return entry[key]


def _entries(data: dict, key: str, path: Path) -> list[dict]:
    entries = data[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: {key!r} must be a list of objects")
    return entries


def _size(entry: dict, where: str) -> tuple[int, int]:
    width, height = (to_int(_get(entry, key, where), f"{where}: {key!r}") for key in ("w", "h"))
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


def _fps(data: dict, fps: float, path: Path) -> float:
    return to_number(data["fps"], f"{path}: 'fps'") if "fps" in data else fps


# --- JSON ---


def read_camera_json(path: Path, up: str | None, fps: float) -> CameraPath:
    """Read transforms.json or keyframes JSON, told apart by their keys."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))  # Windows editors put a byte-order mark in front
    except RecursionError as error:
        raise InputError(f"{path} is not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object")
    if "keyframes" in data:
        return _read_keyframes(path, data, up, fps)
    if "frames" in data:
        return _read_transforms(path, data, up, fps)
    raise InputError(f"{path} holds neither 'frames' (nerfstudio transforms.json) nor 'keyframes'")


def _read_transforms(path: Path, data: dict, up: str | None, fps: float) -> CameraPath:
    _check_applied(path, data)
    entries = _entries(data, "frames", path)
    if all("frame" in entry for entry in entries):
        keyed = [(to_int(entry["frame"], f"{path}: 'frame'"), entry) for entry in entries]
        keyed.sort(key=lambda pair: pair[0])
        numbers, entries = [number for number, _ in keyed], [entry for _, entry in keyed]
    elif any("frame" in entry for entry in entries):
        raise InputError(f"{path}: some frames have the key 'frame' and some do not; number all or none")
    else:
        if all(isinstance(entry.get("file_path"), str) for entry in entries):  # nerfstudio's own order
            entries = sorted(entries, key=lambda entry: natural(entry["file_path"]))
        numbers = list(range(1, len(entries) + 1))
    cameras = []
    for number, entry in zip(numbers, entries, strict=True):
        # Anything but the pose may be given once, or per frame.
        cameras.append(_transforms_camera({**data, **entry}, f"{path}: frame {number}"))
    size = one_size([camera[0] for camera in cameras], path)
    arrays = [np.array([camera[i] for camera in cameras]) for i in (1, 2, 3)]
    return make_path(path, *arrays, size, world_up(data, up, path, "+z"), numbers, _fps(data, fps, path))


def _check_applied(path: Path, data: dict) -> None:
    """Say so when nerfstudio has moved or scaled the poses: they are taken as they stand; the mesh must fit them."""
    matrix = data.get("applied_transform", np.eye(4).tolist())
    shape = (4, 4) if isinstance(matrix, list) and len(matrix) == 4 else (3, 4)
    off = np.abs(to_numbers(matrix, shape, f"{path}: 'applied_transform'") - np.eye(*shape)).max()
    if max(off, abs(to_number(data.get("applied_scale", 1), f"{path}: 'applied_scale'") - 1)) > 1e-6:
        print(
            f"note: {path} has an applied_transform or applied_scale; the mesh must be in the world of the poses as "
            "they stand",
            file=sys.stderr,
        )


def _transforms_camera(entry: dict, where: str) -> tuple[tuple[int, int], np.ndarray, np.ndarray, list[float]]:
    """(size, c2w [4, 4], focal [2], center [2]) of one frame."""
    model = entry.get("camera_model", "PINHOLE")
    if model not in PINHOLE_MODELS or entry.get("is_fisheye"):
        raise InputError(f"{where}: camera model {model!r} is not a pinhole camera; {UNDISTORT}")
    for key in DISTORTION:
        if to_number(entry.get(key, 0), f"{where}: {key!r}") != 0:
            raise InputError(f"{where}: {key} is {entry[key]}; {UNDISTORT}")
    matrix = _get(entry, "transform_matrix", where)
    if isinstance(matrix, list) and len(matrix) == 3:
        matrix = [*matrix, [0, 0, 0, 1]]
    c2w = to_numbers(matrix, (4, 4), f"{where}: 'transform_matrix'")
    size = _size(entry, where)
    focal_x = _focal(entry, "x", size[0], where)
    if focal_x is None:
        raise InputError(f"{where}: 'fl_x' is missing (nor is there a 'camera_angle_x')")
    focal_y = _focal(entry, "y", size[1], where)
    center = [to_number(entry.get(k, s / 2), f"{where}: {k!r}") for k, s in zip(("cx", "cy"), size, strict=True)]
    return size, c2w, np.array([focal_x, focal_x if focal_y is None else focal_y]), center


def _focal(entry: dict, axis: str, side: int, where: str) -> float | None:
    """Focal length in pixels along one axis, from fl_x or camera_angle_x (radians); None if neither is there."""
    if (key := f"fl_{axis}") in entry:
        return to_number(entry[key], f"{where}: {key!r}")
    if (key := f"camera_angle_{axis}") in entry:
        return _focal_of_angle(to_number(entry[key], f"{where}: {key!r}"), side, f"{where}: {key!r}")
    return None


def _focal_of_angle(angle: float, side: int, what: str) -> float:
    """angle: field of view across `side` pixels, in radians."""
    if not 0 < angle < math.pi:
        raise InputError(f"{what} must lie between 0 and 180 degrees")
    return side / 2 / math.tan(angle / 2)


def one_size(sizes: list[tuple[int, int]], path: Path) -> tuple[int, int]:
    if len(set(sizes)) > 1:
        (w, h), (other_w, other_h) = sorted(set(sizes))[:2]
        raise InputError(f"{path} holds cameras of {w}x{h} and of {other_w}x{other_h} pixels; one size is needed")
    return sizes[0] if sizes else DEFAULT_SIZE


def natural(name: str) -> str:
    """Sorting key that puts frame_9 before frame_10."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), name)


# --- keyframes ---


def _read_keyframes(path: Path, data: dict, up: str | None, fps: float) -> CameraPath:
    entries = _entries(data, "keyframes", path)
    if len(entries) < 2:
        raise InputError(f"{path} holds {len(entries)} keyframe(s): a path needs at least two")
    names = [f"{path}: keyframe {i}" for i in range(1, len(entries) + 1)]
    frames = _keyframe_numbers(entries, path)
    numbers = np.arange(int(frames[0]), int(frames[-1]) + 1)
    size = _size({"w": DEFAULT_SIZE[0], "h": DEFAULT_SIZE[1], **data}, str(path))
    focal = [
        _focal_of_angle(math.radians(to_number(_get({**data, **e}, "fov", n), f"{n}: 'fov'")), size[1], f"{n}: 'fov'")
        for n, e in zip(names, entries, strict=True)
    ]
    up = world_up(data, up, path, None)
    for entry, name in zip(entries, names, strict=True):
        if ("look_at" in entry) == ("quaternion" in entry):
            raise InputError(f"{name}: give 'look_at' or 'quaternion', one of the two")
    eyes = _vectors(entries, names, "position", 3)
    if all("look_at" in entry for entry in entries):
        # Moving the target keeps the horizon level and what is looked at in the middle, between keyframes too.
        targets = smooth_curve(frames, _vectors(entries, names, "look_at", 3), numbers)
        c2w = look_at(smooth_curve(frames, eyes, numbers), targets, UP_AXES[up], path)
    else:
        rotations = [_rotation(e, n, UP_AXES[up]) for n, e in zip(names, entries, strict=True)]
        c2w = np.tile(np.eye(4), (len(numbers), 1, 1))
        c2w[:, :3, :3] = RotationSpline(frames, Rotation.concatenate(rotations))(numbers).as_matrix()
        c2w[:, :3, 3] = smooth_curve(frames, eyes, numbers)
    focal = np.repeat(PchipInterpolator(frames, focal)(numbers)[:, None], 2, axis=1)
    center = np.tile([size[0] / 2, size[1] / 2], (len(numbers), 1))
    return make_path(path, c2w, focal, center, size, up, numbers.tolist(), _fps(data, fps, path))


def _keyframe_numbers(entries: list[dict], path: Path) -> np.ndarray:
    """float64 [K], increasing."""
    numbered = ["frame" in entry for entry in entries]
    if any(numbered) and not all(numbered):
        raise InputError(f"{path}: some keyframes have the key 'frame' and some do not; number all or none")
    frames = [
        to_int(entry.get("frame", 1 + ARC_STEPS * i), f"{path}: keyframe {i + 1}: 'frame'")
        for i, entry in enumerate(entries)
    ]
    if (np.diff(frames) <= 0).any():
        raise InputError(f"{path}: 'frame' must grow from keyframe to keyframe, but is {frames}")
    if frames[-1] - frames[0] >= MAX_POSES:
        raise InputError(
            f"{path}: the keyframes span {frames[-1] - frames[0]} frames, at most {MAX_POSES} can be made"
        )
    return np.array(frames, dtype=np.float64)


def _vectors(entries: list[dict], names: list[str], key: str, length: int) -> np.ndarray:
    """float64 [K, length], of a size that later arithmetic survives."""
    vectors = np.array(
        [to_numbers(_get(e, key, n), (length,), f"{n}: {key!r}") for n, e in zip(names, entries, strict=True)]
    )
    if np.abs(vectors).max() > MAX_NUMBER:
        raise InputError(f"{names[int(np.abs(vectors).max(1).argmax())]}: {key!r} is too far away")
    return vectors


def _rotation(entry: dict, where: str, up: np.ndarray) -> Rotation:
    if "quaternion" in entry:
        return unit_rotation(_vectors([entry], [where], "quaternion", 4)[0], where)
    eye, target = (_vectors([entry], [where], key, 3) for key in ("position", "look_at"))
    return Rotation.from_matrix(look_at(eye, target, up, where)[0, :3, :3])


def unit_rotation(quaternions: np.ndarray, where: object) -> Rotation:
    """Rotations of quaternions [..., 4] (x, y, z, w) of any length but zero."""
    if not (np.linalg.norm(quaternions, axis=-1) > 1e-6).all():
        raise InputError(f"{where}: a quaternion is zero, which is no rotation")
    return Rotation.from_quat(quaternions)


def smooth_curve(times: np.ndarray, points: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Points [A, 3] of a curve through `points` [K, 3] at increasing `times` [K], continuous in position and velocity.

    The shape is a centripetal Catmull-Rom spline, which makes no loops between uneven keyframes; a monotone cubic
    decides how far along it each moment is, so that speed does not jump at a keyframe. Repeated points rest.
    """
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    moving = steps > 1e-9 * steps.sum()
    if not moving.any():
        return np.repeat(points[:1], len(at), axis=0)
    knots = np.concatenate([[0.0], np.cumsum(np.sqrt(np.where(moving, steps, 0)))])
    distinct = np.concatenate([[True], moving])
    return catmull_rom(knots[distinct], points[distinct])(PchipInterpolator(times, knots)(at))
