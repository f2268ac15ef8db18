"""Read camera paths of every supported format; write nerfstudio's transforms.json."""

import json
from pathlib import Path

import numpy as np

from utils.cameras.keyframes import read_keyframes
from utils.cameras.path import (
    UP_AXES,
    CameraPath,
)
from utils.cameras.transforms import read_transforms
from utils.cli import InputError
from utils.files import write_json


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
        return read_keyframes(path, data, up, fps)
    if "frames" in data:
        return read_transforms(path, data, up, fps)
    raise InputError(f"{path} holds neither 'frames' (nerfstudio transforms.json) nor 'keyframes'")


def read_cameras(path: Path, up: str | None = None, fps: float = 24.0) -> CameraPath:
    """Read a camera path of any supported format.

    up: the world's up axis, '+y' or '+z', for files without `world_up` (COLMAP has none; transforms.json defaults to
    '+z', glTF to '+y'); it must not contradict the file. fps: frames per second for files that state none; an animated
    glTF camera is sampled at this rate.
    Raises InputError for anything that is not a usable path.
    """
    from utils.cameras import colmap as camera_colmap
    from utils.cameras import gltf as camera_gltf

    path = Path(path)
    if up is not None and up not in UP_AXES:
        raise InputError(f"up axis {up!r} is not known; choose +y or +z")
    try:
        if not path.exists():
            raise InputError(f"camera file {path} does not exist")
        if path.is_dir() or path.name in camera_colmap.COLMAP_NAMES:
            return camera_colmap.read_colmap(path, up, fps)
        if path.suffix.lower() == ".json":
            return read_camera_json(path, up, fps)
        if path.suffix.lower() in (".glb", ".gltf"):
            return camera_gltf.read_gltf_camera(path, up, fps)
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read ({error.strerror or error})") from error
    raise InputError(f"{path}: cameras come as .json, .glb, .gltf or a COLMAP model folder")


def write_transforms(path_file: Path, path: CameraPath) -> None:
    """Write nerfstudio's transforms.json, atomically. Values that are constant along the path are stored once."""
    values = dict(zip(("fl_x", "fl_y", "cx", "cy"), np.hstack([path.focal, path.center]).T.tolist(), strict=True))
    shared = {key: column[0] for key, column in values.items() if min(column) == max(column)}
    frames = [
        {
            "file_path": f"images/{number:04d}.png",
            "frame": number,
            **{key: column[i] for key, column in values.items() if key not in shared},
            "transform_matrix": path.c2w[i].tolist(),
        }
        for i, number in enumerate(path.numbers)
    ]
    size = {"w": path.size[0], "h": path.size[1]}
    undistorted = dict.fromkeys(("k1", "k2", "p1", "p2"), 0)
    header = {"camera_model": "OPENCV", **shared, **size, **undistorted, "fps": path.fps, "world_up": path.up}
    write_json(Path(path_file), {**header, "frames": frames})
