"""What a sceptic would try before a video model: videos of a path from its anchors, or from the image model alone.

    crossfade(anchors), copy(anchors), reproject(anchors, caster, views), per_frame(draw, edges)

Anchors are uint8 [N + 1, H, W, 3], at frames 0, 45, 90, … of a path of N arcs; videos are uint8 [45 N + 1, H, W, 3].
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import cv2
import numpy as np

from synthetic.measuring import figures
from utils.evaluation.consistency import sample
from utils.layout import ARC_FRAMES, ARC_STEPS
from utils.scene.raycast import RayCaster
from utils.scene.views import View, correspondence

INPAINT_RADIUS = 3  # pixels


def crossfade(anchors: np.ndarray) -> np.ndarray:
    """Each anchor fades linearly into the next one."""
    arcs = [figures.crossfade(a, b, ARC_FRAMES) for a, b in pairwise(anchors)]
    return np.concatenate([arcs[0], *(arc[1:] for arc in arcs[1:])])


def copy(anchors: np.ndarray) -> np.ndarray:
    """The nearest anchor in every frame: a slide show."""
    frames = np.arange(ARC_STEPS * (len(anchors) - 1) + 1)
    return anchors[np.round(frames / ARC_STEPS).astype(int)]


def per_frame(draw: Callable[[np.ndarray], np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Every frame from its own edges. draw: edges uint8 [H, W] -> picture uint8 [H, W, 3]; edges: uint8 [F, H, W]."""
    return np.array([draw(one) for one in edges])


def reproject(anchors: np.ndarray, caster: RayCaster, views: Sequence[View]) -> np.ndarray:
    """Anchors carried along the exact geometry, as textures projected onto the mesh.

    Every pixel takes its surface point's colour from the two anchors of its arc that see the point (rays stand in for
    a z-buffer, without its resolution), mixed by their nearness in time where both do. Holes are inpainted. views:
    one per frame, at the anchors' size.
    """
    return np.array([reproject_frame(anchors, caster, views, frame) for frame in range(len(views))])


def reproject_frame(anchors: np.ndarray, caster: RayCaster, views: Sequence[View], frame: int) -> np.ndarray:
    """One frame of `reproject`, uint8 [H, W, 3]. frame: its number, from 0."""
    first = min(frame // ARC_STEPS, len(anchors) - 2)
    share = frame / ARC_STEPS - first  # 0 at the arc's start, 1 at its end
    total, weights = np.zeros(anchors.shape[1:], np.float64), np.zeros(anchors.shape[1:3])
    for k, nearness in ((first, 1 - share), (first + 1, share)):
        colours, seen = carry(anchors[k], caster, views[ARC_STEPS * k], views[frame])
        weight = np.maximum(nearness, 1e-9) * seen  # where one anchor alone sees a point, it decides
        total, weights = total + weight[..., None] * colours, weights + weight
    picture = np.round(total / np.maximum(weights, 1e-12)[..., None]).astype(np.uint8)
    return fill_holes(picture, weights == 0)


def carry(picture: np.ndarray, caster: RayCaster, source: View, target: View) -> tuple[np.ndarray, np.ndarray]:
    """A picture of the view `source` as seen from `target`: (colours float32 [H, W, 3], seen bool [H, W]).

    Black where `source` does not see the point, which is hidden there or out of its picture. The sky is at infinity.
    """
    found = correspondence(caster, source, target)
    colours = np.zeros((*found.visible.shape, 3), np.float32)
    colours[found.visible] = sample(picture, found.position[found.visible])
    return colours, found.visible


def fill_holes(picture: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Inpainting by OpenCV (Telea 2004). picture: uint8 [H, W, 3]. holes: bool [H, W]; all of it stays black."""
    if not holes.any() or holes.all():
        return picture
    return cv2.inpaint(picture, holes.astype(np.uint8), INPAINT_RADIUS, cv2.INPAINT_TELEA)
