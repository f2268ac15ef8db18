"""Decide whether mesh and cameras share one world, and which of its axes points up."""

import json
from dataclasses import replace
from pathlib import Path

from utils.cameras.colmap import COLMAP_NAMES
from utils.meshes.mesh import Geometry


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


def settle_up(
    geometry: Geometry, path: Path, cameras: Path | None = None, world_up: str | None = None
) -> tuple[Geometry, str | None]:
    """The scene of the file `path` with its stated or assumed up axis, and a note if it is assumed.

    cameras, world_up: file of the cameras and the up axis of their world. Where neither format has an axis of its own,
    mesh and cameras share one world: both are rotated or neither is.
    """
    if geometry.up_stated:
        return geometry, None
    kind = path.suffix.lower()
    if cameras is not None and kind not in (".glb", ".gltf") and has_no_axes(cameras):
        note = f"{path} and its cameras are taken as one world, {world_up} up; else give --scene_up"
        return replace(geometry, up=world_up, up_stated=True), note
    return geometry, f"{path} is taken as {geometry.up} up, as {kind[1:]} files are; if it lies down give --scene_up"
