"""Camera files of viewers: nerfstudio's camera_path.json (read and written), and cameras.json of Gaussian splats."""

import math
import sys
from pathlib import Path

import numpy as np

from utils.cameras.path import CameraPath, make_path
from utils.cameras.transforms import LENSES, focal_of_angle
from utils.cameras.values import (
    Given,
    entries_of,
    natural,
    note_distortion,
    one_size,
    opengl_poses,
    required,
    size_of,
    stated_up,
    to_number,
    to_numbers,
    to_pose,
    world_up,
)
from utils.cli import InputError
from utils.files import write_json


def read_camera_path(path: Path, data: dict, given: Given) -> CameraPath:
    """Read a camera_path.json of nerfstudio's viewers, old and new, or of its Blender add-on.

    The frames are taken as they are stored, sampled by the viewer from its keyframes. `fov` is vertical, in degrees;
    frames without it have the file's `default_fov`.
    """
    entries = entries_of(data, "camera_path", path)
    kind = str(data.get("camera_type") or "perspective").upper()
    if not any(word in kind for word in LENSES):
        raise InputError(f"{path}: camera type {kind.lower()!r} is not a perspective camera; choose that one")
    note_distortion(path, [(0, kind)])
    names = [f"{path}: frame {i}" for i in range(1, len(entries) + 1)]
    size = _render_size(path, data, entries, given)
    poses, focal, shared = [], [], {"fov": data["default_fov"]} if "default_fov" in data else {}
    for entry, name in zip(entries, names, strict=True):
        poses.append(to_pose(required(entry, "camera_to_world", name), f"{name}: 'camera_to_world'"))
        angle = math.radians(to_number(required(shared | entry, "fov", name), f"{name}: 'fov'"))
        focal.append(focal_of_angle(angle, size[1], f"{name}: 'fov'"))
    c2w = opengl_poses(np.array(poses).reshape(-1, 4, 4), given.axes or "opengl", path)
    center = np.tile(np.array(size) / 2, (len(entries), 1))
    up = world_up(data, given.up, path, "+z")
    numbers, fps = range(1, len(entries) + 1), _rate(path, data, len(entries), given)
    return make_path(path, c2w, np.repeat(np.reshape(focal, (-1, 1)), 2, axis=1), center, size, up, numbers, fps)


def _render_size(path: Path, data: dict, entries: list[dict], given: Given) -> tuple[int, int]:
    """The size to render at; where it is not stored, as high as the edges and of the first frame's aspect."""
    keys = ("render_width", "render_height")
    if any(data.get(key) is not None for key in keys):  # the Blender add-on writes "aspect": 1 whatever the size is
        return size_of(data, str(path), keys)
    if not entries or "aspect" not in entries[0]:
        return given.size
    aspect = to_number(entries[0]["aspect"], f"{path}: frame 1: 'aspect'")
    if not 0.01 < aspect < 100:
        raise InputError(f"{path}: frame 1: aspect {aspect:g} is not usable; give width / height")
    return max(1, round(given.size[1] * aspect)), given.size[1]


def _rate(path: Path, data: dict, count: int, given: Given) -> float:
    """Frames per second, stored or from the duration in seconds."""
    if data.get("fps") is not None:
        return to_number(data["fps"], f"{path}: 'fps'")
    seconds = to_number(data.get("seconds") or 0, f"{path}: 'seconds'")
    return count / seconds if seconds > 0 else given.fps


def write_camera_path(file: Path, path: CameraPath) -> None:
    """Write a camera_path.json for nerfstudio's viewer (Render > Load Path) and `ns-render camera-path`, atomically.

    Every frame is also a keyframe, since the viewer reads nothing else; `world_up` is for our own reader. The format
    has square pixels and the centre in the middle; what differs is noted and left out.
    """
    width, height = path.size
    shift = np.abs(path.center - np.array(path.size) / 2).max()
    squeeze = np.abs(path.focal[:, 0] / path.focal[:, 1] - 1).max()
    if shift > 1e-6 * width or squeeze > 1e-6:
        print(
            f"note: {file} leaves out what the format cannot hold: a centre {shift:.3g} pixels off the middle, pixels "
            f"{squeeze:.2%} off square",
            file=sys.stderr,
        )
    fovs = np.degrees(2 * np.arctan(height / 2 / path.focal[:, 1])).tolist()
    cameras = [(pose.ravel().tolist(), fov) for pose, fov in zip(path.c2w, fovs, strict=True)]
    aspect = width / height
    transition = {"override_transition_enabled": False, "override_transition_sec": None}
    keyframes = [{"matrix": matrix, "fov": fov, "aspect": aspect, **transition} for matrix, fov in cameras]
    frames = [{"camera_to_world": matrix, "fov": fov, "aspect": aspect} for matrix, fov in cameras]
    header = {
        "default_fov": fovs[0],
        "default_transition_sec": 1 / path.fps,
        "camera_type": "perspective",
        "render_height": height,
        "render_width": width,
        "fps": path.fps,
        "seconds": len(path) / path.fps,
        "is_cycle": False,
        "smoothness_value": 0.0,
        "world_up": path.up,
    }
    write_json(file, {**header, "keyframes": keyframes, "camera_path": frames})


def read_splat_cameras(path: Path, data: list, given: Given) -> CameraPath:
    """Read cameras.json of 3D Gaussian Splatting: poses camera-to-world with OpenCV axes.

    They are taken in the order of image names; without names, or where these are equal, in that of ids.
    """
    if not data or not all(isinstance(entry, dict) and {"position", "rotation"} <= entry.keys() for entry in data):
        raise InputError(
            f"{path} must hold a JSON object, or a list of cameras with 'position' and 'rotation' (Gaussian splats)"
        )
    up = stated_up(given, path)
    keys = [key for key in ("img_name", "id") if all(isinstance(entry.get(key), int | str) for entry in data)]
    data = sorted(data, key=lambda entry: [natural(str(entry[key])) for key in keys])  # test images come first in it
    sizes, poses, focal, center = [], np.tile(np.eye(4), (len(data), 1, 1)), [], []
    for pose, entry, number in zip(poses, data, range(1, len(data) + 1), strict=True):
        where = f"{path}: camera {number}"
        pose[:3, :3] = to_numbers(entry["rotation"], (3, 3), f"{where}: 'rotation'")
        pose[:3, 3] = to_numbers(entry["position"], (3,), f"{where}: 'position'")
        sizes.append(size_of(entry, where, ("width", "height")))
        focal.append([to_number(required(entry, key, where), f"{where}: {key!r}") for key in ("fx", "fy")])
        middle = zip(("cx", "cy"), sizes[-1], strict=True)
        center.append([to_number(entry.get(key, side / 2), f"{where}: {key!r}") for key, side in middle])
    size, focal, center = one_size(sizes, np.array(focal), np.array(center), path)
    c2w = opengl_poses(poses, given.axes or "opencv", path)
    return make_path(path, c2w, focal, center, size, up, range(1, len(data) + 1), given.fps)
