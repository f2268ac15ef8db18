"""Helpers that the tests of metrics share."""

import numpy as np

from tests.support.helpers import ROOT
from utils.meshes.mesh import build_geometry
from utils.scene.raycast import RayCaster
from utils.scene.views import View

SAMPLE = ROOT / "assets" / "sampleA"


SIZE = (72, 48)  # width, height


EDGE_SIZE = (1080, 720)


def noisy(frames: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Add offsets (one per frame, [F], or one per value) to frames, and clip."""
    offsets = offsets.reshape(len(frames), *(1,) * 3) if offsets.ndim == 1 else offsets
    return np.clip(np.round(frames + offsets), 0, 255).astype(np.uint8)


def shift(frames: np.ndarray, amount: int) -> np.ndarray:
    return np.roll(frames, amount, axis=2)


def plane_views(count: int, size: tuple[int, int] = (24, 16), slide: float = 0.0) -> tuple[RayCaster, list[View]]:
    """Cameras that look at a wall 10 m away and slide to the right by `slide` pixels a frame."""
    wall = np.array([[-500.0, -50, -10], [500, -50, -10], [500, 50, -10], [-500, 50, -10]])
    geometry = build_geometry([("wall", wall, np.array([[0, 1, 2], [0, 2, 3]]))], "+y")
    views = []
    for k in range(count):
        c2w = np.eye(4)
        c2w[0, 3] = k * slide * 10 / 20
        views.append(View(c2w, 20.0, 20.0, size[0] / 2, size[1] / 2, *size))
    return RayCaster(geometry), views
