"""The reader of nerfstudio's transforms.json."""

import math
import sys
from pathlib import Path

import numpy as np

from utils.cameras.path import (
    CameraPath,
    make_path,
)
from utils.cameras.values import (
    Given,
    entries_of,
    fps_of,
    natural,
    note_distortion,
    one_size,
    opengl_poses,
    required,
    size_of,
    to_int,
    to_number,
    to_numbers,
    to_pose,
    world_up,
)
from utils.cli import InputError

DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
# What the names of perspective cameras contain.
LENSES = ("PINHOLE", "PERSPECTIVE", "RADIAL", "OPENCV", "FISHEYE", "FOV", "BROWN")


def read_transforms(path: Path, data: dict, given: Given) -> CameraPath:
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
    # Anything but the pose may be given once, or per frame.
    merged = [({**data, **entry}, f"{path}: frame {n}") for n, entry in zip(numbers, entries, strict=True)]
    cameras = [_transforms_camera(entry, where, given) for entry, where in merged]
    _note_lenses(path, merged)
    poses, focal, center = (np.array([camera[i] for camera in cameras]) for i in (1, 2, 3))
    size, focal, center = one_size([camera[0] for camera in cameras], focal, center, path)
    if len(poses):
        poses = opengl_poses(poses, given.axes or "opengl", path)
    up = world_up(data, given.up, path, "+z")
    return make_path(path, poses, focal, center, size, up, numbers, fps_of(data, given.fps, path))


def _note_lenses(path: Path, entries: list[tuple[dict, str]]) -> None:
    """Refuse pictures that no focal length describes, and note the strongest distortion."""
    found = []
    for entry, where in entries:
        model = str(entry.get("camera_model", "PINHOLE")).upper()
        if not isinstance(entry.get("camera_model", ""), str) or not any(word in model for word in LENSES):
            raise InputError(f"{where}: camera model {model!r} is not a perspective camera; export one that is")
        if entry.get("is_fisheye") and "FISHEYE" not in model:
            model += ", FISHEYE"
        found += [(to_number(entry.get(key, 0), f"{where}: {key!r}"), model) for key in DISTORTION]
    note_distortion(path, found)


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


def _transforms_camera(
    entry: dict, where: str, given: Given
) -> tuple[tuple[int, int], np.ndarray, list[float], list[float]]:
    """(size, pose [4, 4], focal [2], center [2]) of one frame."""
    pose = to_pose(required(entry, "transform_matrix", where), f"{where}: 'transform_matrix'")
    if not entry.keys() & {"w", "h", "fl_x", "cx", "cy"}:
        # NeRF-synthetic and older BlenderNeRF: an angle means the same at any size.
        entry = {**entry, "w": given.size[0], "h": given.size[1]}
    size = size_of(entry, where)
    focal_x = _focal(entry, "x", size[0], where)
    if focal_x is None:
        raise InputError(f"{where}: 'fl_x' is missing (nor is there a 'camera_angle_x')")
    focal_y = _focal(entry, "y", size[1], where)
    center = [to_number(entry.get(k, s / 2), f"{where}: {k!r}") for k, s in zip(("cx", "cy"), size, strict=True)]
    return size, pose, [focal_x, focal_x if focal_y is None else focal_y], center


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
