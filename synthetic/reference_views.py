"""Draw reference pictures: views of random towns that show every major class of object, and the sky.

A reference says nothing about the colours of classes that it does not show, so the view is chosen among many.
"""

import numpy as np

from synthetic.render import GBuffer, World, class_map, paint, town_world, trace
from synthetic.scenes import PATHS, make_path, make_town, to_camera_path
from synthetic.styles import CLASSES, MAJOR_CLASSES, Style
from utils.cli import InputError
from utils.layout import ARC_FRAMES
from utils.scene.views import View, make_views, resize_view

CANDIDATES = 48  # views that are compared, over all kinds of paths
THUMBNAIL = (144, 96)  # width, height at which views are compared
ENOUGH = {  # class -> share of the picture above which a larger one makes no better reference
    "wall": 0.12, "roof": 0.08, "window": 0.02, "tree": 0.06, "road": 0.08, "ground": 0.10, "sky": 0.10,
}  # fmt: skip


def find_reference(scene_seed: int, style: Style, size: tuple[int, int]) -> np.ndarray:
    """The best reference view into the town of this seed, in a style: uint8 [H, W, 3]. size: width, height.

    Raises InputError when the town has no collision-free camera path.
    """
    world, views = town_world_and_views(scene_seed, size)
    looks = [look(world, view) for view in views]
    best = int(np.argmax([completeness(shares) for shares in looks]))
    return paint(trace(world, views[best]), style)


def town_world_and_views(scene_seed: int, size: tuple[int, int]) -> tuple[World, list[View]]:
    """The town of a seed and CANDIDATES views along one arc of each kind of path that it allows."""
    parts = make_town(scene_seed)
    frames = np.linspace(0, ARC_FRAMES - 1, CANDIDATES // len(PATHS)).round().astype(int)
    views = []
    for kind in PATHS:
        try:
            path = to_camera_path(make_path(parts, kind, scene_seed, ARC_FRAMES))
        except InputError:  # the other kinds remain
            continue
        along = make_views(path, size)
        views += [along[frame] for frame in frames]
    if not views:
        raise InputError(f"town {scene_seed} has no clear camera path; take another seed")
    return town_world(parts), views


def look(world: World, view: View) -> dict[str, float]:
    """Share of the picture that each major class covers, from a thumbnail of the view."""
    return class_shares(trace(world, resize_view(view, THUMBNAIL)))


def class_shares(buffer: GBuffer) -> dict[str, float]:
    """Share of the pixels of a G-buffer that belong to each major class."""
    classes = class_map(buffer)
    return {name: float((classes == CLASSES.index(name)).mean()) for name in MAJOR_CLASSES}


def completeness(shares: dict[str, float]) -> float:
    """Score of a view by the classes that a reference should show: the scarcest counts most, the others break ties."""
    filled = [min(shares[name] / ENOUGH[name], 1.0) for name in MAJOR_CLASSES]
    return min(filled) + 0.1 * sum(filled) / len(filled)
