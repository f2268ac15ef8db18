"""Depth of a scene's frames, as video models are controlled by it: 16-bit pictures of inverse depth, near is white.

One range for the whole scene, so that a surface keeps its grey while the camera moves.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from utils.images import write_image
from utils.scene.raycast import RayCaster
from utils.scene.views import Sight, View, look

WHITE = 65535
OUTLIERS = 0.005  # share of pixels that may be nearer, and farther, than the range: they are clipped


def depth_range(caster: RayCaster, views: Sequence[View]) -> tuple[float, float] | None:
    """(near, far) in metres of the surfaces that these views see; None if they see none."""
    depths = [sight.depth[sight.hit] for sight in (look(caster, view) for view in views)]
    seen = np.concatenate(depths)
    if not seen.size:
        return None
    near, far = np.quantile(seen, [OUTLIERS, 1 - OUTLIERS])
    return float(near), float(far)


def draw_depth(sight: Sight, limits: tuple[float, float] | None) -> np.ndarray:
    """Inverse planar depth, uint16 [H, W]: WHITE at `near` and nearer, 1 at `far` and farther, 0 for the sky."""
    shape = (sight.view.height, sight.view.width)
    if limits is None:
        return np.zeros(shape, np.uint16)
    near, far = limits
    above, span = 1 / np.clip(sight.depth, near, far) - 1 / far, 1 / near - 1 / far
    nearness = above / span if span > 0 else np.ones_like(above)
    return np.where(sight.hit, np.round(1 + (WHITE - 1) * nearness), 0).astype(np.uint16).reshape(shape)


def write_depths(
    caster: RayCaster, views: dict[Path, View], limits: tuple[float, float] | None, pool: Executor
) -> None:
    """Write the depth of each view to its path, unless it is there."""

    def write(path: Path) -> None:
        write_image(path, draw_depth(look(caster, views[path]), limits))

    for _ in pool.map(write, [path for path in views if not path.exists()]):
        pass
