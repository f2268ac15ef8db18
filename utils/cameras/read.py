"""Read camera paths of every supported format; write nerfstudio's transforms.json.

Formats: nerfstudio's transforms.json and camera_path.json, NeRF-synthetic, cameras.json of Gaussian splats, keyframes
JSON, COLMAP models, RealEstate10K and TUM text, and a camera in a GLB or glTF file.
"""

import json
from pathlib import Path

import numpy as np

from utils.cameras.colmap import COLMAP_NAMES, read_colmap
from utils.cameras.gltf import read_gltf_camera
from utils.cameras.keyframes import read_keyframes
from utils.cameras.path import DEFAULT_SIZE, UP_AXES, CameraPath
from utils.cameras.text import read_text
from utils.cameras.transforms import read_transforms
from utils.cameras.values import Given
from utils.cameras.viewers import read_camera_path, read_splat_cameras
from utils.cli import InputError
from utils.files import write_json


def read_camera_json(path: Path, given: Given) -> CameraPath:
    """Read any of the JSON formats, told apart by their keys."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))  # Windows editors put a byte-order mark in front
    except RecursionError as error:
        raise InputError(f"{path} is not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if isinstance(data, list):
        return read_splat_cameras(path, data, given)
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object")
    for key, reader in READERS.items():
        if key in data:
            return reader(path, data, given)
    raise InputError(f"{path} holds neither 'frames' (transforms.json), 'camera_path' (nerfstudio) nor 'keyframes'")


READERS = {"camera_path": read_camera_path, "keyframes": read_keyframes, "frames": read_transforms}


def read_cameras(
    path: Path,
    up: str | None = None,
    fps: float = 24.0,
    *,
    size: tuple[int, int] = DEFAULT_SIZE,
    fov: float | None = None,
    axes: str | None = None,
) -> CameraPath:
    """Read a camera path of any supported format.

    up: the world's up axis, '+y' or '+z', for files without `world_up` (COLMAP, splats and text files have none;
    transforms.json and camera_path.json default to '+z', glTF to '+y'); it must not contradict the file. fps: frames
    per second for files that state none; an animated glTF camera is sampled at this rate. The rest: see `Given`.
    Raises InputError for anything that is not a usable path.
    """
    path = Path(path)
    given = Given(up, fps, size, fov, axes)
    if up is not None and up not in UP_AXES:
        raise InputError(f"up axis {up!r} is not known; choose +y or +z")
    suffix = path.suffix.lower()
    try:
        if not path.exists():
            raise InputError(f"camera file {path} does not exist")
        if suffix in (".txt", ".tum") and path.is_file() and path.name not in COLMAP_NAMES:
            return read_text(path, given)
        if fov is not None:
            raise InputError(f"{path}: --fov is for TUM trajectories; other files hold a lens of their own")
        if path.is_dir() or path.name in COLMAP_NAMES:
            return read_colmap(path, given)
        if suffix == ".json":
            return read_camera_json(path, given)
        if suffix in (".glb", ".gltf"):
            return read_gltf_camera(path, given)
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read ({error.strerror or error})") from error
    raise InputError(f"{path}: cameras come as .json, .glb, .gltf, .txt (RealEstate10K, TUM) or a COLMAP model folder")


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
