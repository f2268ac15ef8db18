"""Simple baselines of the video model: videos of a path made from its anchors, or with the image model alone.

    crossfade(anchors), copy(anchors), reproject(anchors, caster, views), per_frame(draw, edges)

Anchors are uint8 [N + 1, H, W, 3], at frames 0, 45, 90, … of a path of N arcs; videos are uint8 [45 N + 1, H, W, 3].
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from synthetic.measuring import figures
from utils.layout import ARC_FRAMES, ARC_STEPS
from utils.scene.carry import carry_to_arc
from utils.scene.raycast import RayCaster
from utils.scene.views import View


def crossfade(anchors: np.ndarray) -> np.ndarray:
    """Fade each anchor linearly into the next one."""
    arcs = [figures.crossfade(a, b, ARC_FRAMES) for a, b in pairwise(anchors)]
    return np.concatenate([arcs[0], *(arc[1:] for arc in arcs[1:])])


def copy(anchors: np.ndarray) -> np.ndarray:
    """Show the nearest anchor in every frame: a slide show."""
    frames = np.arange(ARC_STEPS * (len(anchors) - 1) + 1)
    return anchors[np.round(frames / ARC_STEPS).astype(int)]


def per_frame(draw: Callable[[np.ndarray], np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Draw each frame from its edges. draw: edges uint8 [H, W] -> picture uint8 [H, W, 3]. edges: uint8 [F, H, W]."""
    return np.array([draw(one) for one in edges])


def reproject(anchors: np.ndarray, caster: RayCaster, views: Sequence[View]) -> np.ndarray:
    """Carry each anchor along the geometry to the frames of its neighbouring arcs; holes are inpainted.

    views: one per frame, at the anchors' size.
    """
    carried = [carry_to_arc(caster, views, dict(enumerate(ends, k)), k) for k, ends in enumerate(pairwise(anchors))]
    return np.concatenate([arc.frames[bool(k) :] for k, arc in enumerate(carried)])
