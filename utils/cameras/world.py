"""Which camera files are in the world of the mesh that they were made with."""

import json
from pathlib import Path

from utils.cameras.colmap import COLMAP_NAMES


def has_no_axes(cameras: Path) -> bool:
    """Whether a readable camera file is of a kind that has no up axis of its own: its poses are in the mesh's world.

    So are COLMAP models, keyframes, which are typed in the mesh's coordinates, `cameras.json` of splats, text files.
    """
    if cameras.is_dir() or cameras.name in COLMAP_NAMES or cameras.suffix.lower() in (".txt", ".tum"):
        return True
    if cameras.suffix.lower() != ".json":
        return False
    data = json.loads(cameras.read_bytes().decode("utf-8-sig"))
    return isinstance(data, list) or ("keyframes" in data and "camera_path" not in data)
