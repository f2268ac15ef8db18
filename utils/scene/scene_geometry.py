"""The mesh and the cameras of a scene folder, ready for rays."""

from dataclasses import dataclass

from utils.cameras.read import read_cameras
from utils.cli import InputError
from utils.layout import CAMERAS_FILE, SCENE_FILE, Scene
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, turn
from utils.scene.raycast import RayCaster
from utils.scene.views import View, make_views, resize_view


@dataclass(frozen=True)
class SceneGeometry:
    """geometry: turned so that `up` ('+y' or '+z') points up. views: one per frame of the scene, 45 N + 1."""

    geometry: Geometry
    up: str
    caster: RayCaster
    views: list[View]


def missing_geometry(scene: Scene) -> str:
    """Name of the file that a scene folder lacks for `load_scene_geometry`; empty if it has both."""
    return next((path.name for path in scene.geometry_paths if not path.is_file()), "")


def load_scene_geometry(scene: Scene, size: tuple[int, int], needed_by: str) -> SceneGeometry:
    """Read the scene's mesh and cameras. size: width, height of the views, pixels. needed_by: for the message.

    Raises InputError when one is missing, damaged, or does not belong to the edges.
    """
    if missing := missing_geometry(scene):
        raise InputError(f"{needed_by} needs {scene.folder / missing}: preprocess.py writes it beside the arcs")
    path = read_cameras(scene.folder / CAMERAS_FILE)
    if len(path) != scene.num_frames:
        raise InputError(
            f"{scene.folder / CAMERAS_FILE} has {len(path)} poses, but the edges have {scene.num_frames} frames"
        )
    geometry = turn(load_geometry(scene.folder / SCENE_FILE), path.up)
    views = [resize_view(view, size) for view in make_views(path, scene.edge_size)]
    return SceneGeometry(geometry, path.up, RayCaster(geometry), views)
