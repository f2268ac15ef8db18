"""What is drawn in the browser: the mesh, camera paths, frusta with pictures, covisibility as colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import viser

from utils.images import read_image, resize_image
from utils.layout import ARC_STEPS
from utils.meshes.mesh import Geometry
from utils.scene.views import View
from window.covisible import BOTH, FIRST, NEITHER, SECOND, SmallFaces
from window.poses import lens_of, wxyz_of

GREY, PATH, ANCHOR, DRAWN, NOW = (160, 160, 155), (40, 90, 200), (20, 40, 90), (200, 60, 40), (230, 160, 0)
SEEN = {BOTH: (90, 170, 90), FIRST: (80, 130, 220), SECOND: (230, 150, 60), NEITHER: GREY}
LINE = 2.0  # pixels
SMALLER = 0.8  # of an anchor's frustum: those that move along a path
PICTURE = 480  # pixels; longest side of pictures that are sent


def add_mesh(
    scene: viser.SceneApi, name: str, vertices: np.ndarray, faces: np.ndarray, colour: tuple[int, int, int]
) -> viser.MeshHandle:
    """Flat triangles, seen from both sides. vertices: [V, 3], sent around their own middle: float32 is coarse."""
    middle = (vertices.min(0) + vertices.max(0)) / 2
    return scene.add_mesh_simple(
        name,
        (vertices - middle).astype(np.float32),
        faces,
        color=colour,
        flat_shading=True,
        side="double",
        position=middle,
    )


def add_geometry(scene: viser.SceneApi, geometry: Geometry) -> viser.MeshHandle:
    return add_mesh(scene, "/mesh", geometry.vertices, geometry.faces, GREY)


def add_seen(scene: viser.SceneApi, small: SmallFaces, seen: np.ndarray) -> list[viser.MeshHandle]:
    """The mesh in the colours of `SEEN`. seen: int [F], see `seen_by_anchors`."""
    drawn = []
    for kind, colour in SEEN.items():
        if (seen == kind).any():
            vertices = small.corners[seen == kind].reshape(-1, 3)
            faces = np.arange(len(vertices)).reshape(-1, 3)
            drawn.append(add_mesh(scene, f"/seen/{kind}", vertices, faces, colour))
    return drawn


def add_curve(
    scene: viser.SceneApi, name: str, eyes: np.ndarray, colour: tuple[int, int, int]
) -> viser.LineSegmentsHandle:
    """The line through camera positions [P, 3]."""
    middle = eyes.mean(0)
    lines = np.stack([eyes[:-1], eyes[1:]], axis=1) - middle
    return scene.add_line_segments(name, lines, colour, thickness=LINE, thickness_units="screen", position=middle)


def add_frustum(
    scene: viser.SceneApi,
    name: str,
    view: View,
    scale: float,
    colour: tuple[int, int, int],
    picture: np.ndarray | None = None,
) -> viser.CameraFrustumHandle:
    """A camera's frustum, `scale` metres deep, with a picture uint8 [H, W, 3] on it."""
    fov, aspect = lens_of(view)
    return scene.add_camera_frustum(
        name,
        fov,
        aspect,
        scale=scale,
        thickness=LINE,
        thickness_units="screen",
        color=colour,
        image=picture,
        wxyz=wxyz_of(view.c2w[:3, :3]),
        position=view.eye,
        cast_shadow=False,
        receive_shadow=False,
    )


def move_frustum(frustum: viser.CameraFrustumHandle, view: View) -> None:
    """Put a frustum where another camera is."""
    frustum.wxyz, frustum.position = wxyz_of(view.c2w[:3, :3]), view.eye
    frustum.fov, frustum.aspect = lens_of(view)


def frustum_scale(geometry: Geometry, views: Sequence[View]) -> float:
    """Depth of frusta in metres: a quarter of the way between anchors, at most a twentieth of the scene."""
    most = np.linalg.norm(np.ptp(geometry.vertices, axis=0)) / 20
    eyes = np.array([view.eye for view in views[::ARC_STEPS]])
    ways = np.linalg.norm(np.diff(eyes, axis=0), axis=1) if len(eyes) > 1 else np.zeros(0)
    return float(min(most, ways.mean() / 4)) if ways.any() else float(most)


def read_small(path: Path) -> np.ndarray:
    """A picture of at most PICTURE pixels a side."""
    picture = read_image(path)
    height, width = picture.shape[:2]
    factor = PICTURE / max(width, height)
    if factor >= 1:
        return picture
    return resize_image(picture, max(1, round(width * factor)), max(1, round(height * factor)))
