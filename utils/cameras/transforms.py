"""Readers of cameras in JSON: nerfstudio transforms.json, and keyframes.

Keyframes are a format for paths written by hand:

    {"world_up": "+y", "fps": 24, "w": 1080, "h": 720, "fov": 45,
     "keyframes": [{"frame": 1,  "position": [0, 1, 5], "look_at": [0, 1, 0]},
                   {"frame": 46, "position": [3, 1, 4], "quaternion": [0, 0.3, 0, 0.95], "fov": 40}]}

position, look_at: metres; quaternion: x, y, z, w, camera-to-world, OpenGL camera axes; fov: vertical, in degrees,
for all keyframes or for each. Without `frame`, keyframes are 45 frames apart, which makes each of them an anchor.
"""

import math
import sys
from pathlib import Path

import numpy as np

from utils.cameras.path import (
    CameraPath,
    make_path,
)
from utils.cameras.values import (
    DISTORTION,
    PINHOLE_MODELS,
    UNDISTORT,
    entries_of,
    fps_of,
    natural,
    one_size,
    required,
    size_of,
    to_int,
    to_number,
    to_numbers,
    world_up,
)
from utils.cli import InputError

# --- values of unknown type ---


# --- JSON ---


def read_transforms(path: Path, data: dict, up: str | None, fps: float) -> CameraPath:
    _check_applied(path, data)
    entries = entries_of(data, "frames", path)
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
    return make_path(path, *arrays, size, world_up(data, up, path, "+z"), numbers, fps_of(data, fps, path))


def _check_applied(path: Path, data: dict) -> None:
    """Warn when nerfstudio has moved or scaled the poses: they are used unchanged, and the mesh must match them."""
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
    matrix = required(entry, "transform_matrix", where)
    if isinstance(matrix, list) and len(matrix) == 3:
        matrix = [*matrix, [0, 0, 0, 1]]
    c2w = to_numbers(matrix, (4, 4), f"{where}: 'transform_matrix'")
    size = size_of(entry, where)
    focal_x = _focal(entry, "x", size[0], where)
    if focal_x is None:
        raise InputError(f"{where}: 'fl_x' is missing (nor is there a 'camera_angle_x')")
    focal_y = _focal(entry, "y", size[1], where)
    center = [to_number(entry.get(k, s / 2), f"{where}: {k!r}") for k, s in zip(("cx", "cy"), size, strict=True)]
    return size, c2w, np.array([focal_x, focal_x if focal_y is None else focal_y]), center


def _focal(entry: dict, axis: str, side: int, where: str) -> float | None:
    """Focal length in pixels along one axis, from fl_x or camera_angle_x (radians); None if the entry has neither."""
    if (key := f"fl_{axis}") in entry:
        return to_number(entry[key], f"{where}: {key!r}")
    if (key := f"camera_angle_{axis}") in entry:
        return focal_of_angle(to_number(entry[key], f"{where}: {key!r}"), side, f"{where}: {key!r}")
    return None


def focal_of_angle(angle: float, side: int, what: str) -> float:
    """angle: field of view across `side` pixels, in radians."""
    if not 0 < angle < math.pi:
        raise InputError(f"{what} must lie between 0 and 180 degrees")
    return side / 2 / math.tan(angle / 2)


# --- keyframes ---
