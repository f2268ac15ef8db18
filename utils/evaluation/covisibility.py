"""Which pixels of a video show the same surface point: exact correspondences for all metrics of a scene, made once.

    covisibility = make_covisibility(RayCaster(geometry), views)

Pixels are sampled on a lattice: all of them up to LATTICE_WIDTH, otherwise every k-th row and column. Their source
positions are exact at any size. A pixel counts only if its neighbours move with it, so that object borders, where two
surfaces share a pixel, do not count as errors.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from utils.layout import ARC_STEPS
from utils.scene.raycast import RayCaster
from utils.scene.views import View, correspondence

DISTANCES = (1, 8, 24)  # frames
LATTICE_WIDTH = 360  # pixels; wider videos are sampled at every k-th pixel
BEND = 0.5  # pixels; largest distance of a pixel's source from the midpoint of its neighbours' sources

Progress = Callable[[Iterable, str], Iterable]  # (items, what is done) -> the same items


def silent(items: Iterable, what: str) -> Iterable:
    """A `Progress` that shows nothing."""
    return items


@dataclass(frozen=True)
class Covisibility:
    """Correspondences of pairs of frames of one camera path, at one video size.

    size: width, height of the video, pixels. step: pixels between neighbours of the lattice [h, w]. num_frames: F.
    pairs: int32 [P, 2], source and target frame, from 0. position: float32 [P, h, w, 2], the source position of each
    lattice pixel of the target: x then y, in pixels from the outer corner of the top-left pixel; NaN where unknown.
    visible: bool [P, h, w], the pixels that count.
    """

    size: tuple[int, int]
    step: int
    num_frames: int
    pairs: np.ndarray
    position: np.ndarray
    visible: np.ndarray

    @cached_property
    def _index(self) -> dict[tuple[int, int], int]:
        return {(int(source), int(target)): k for k, (source, target) in enumerate(self.pairs)}

    def warp(self, source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
        """(position [h, w, 2], visible [h, w]) of a pair. Raises KeyError for a pair that `frame_pairs` lacks."""
        k = self._index[source, target]
        return self.position[k], self.visible[k]

    def on_lattice(self, frame: np.ndarray) -> np.ndarray:
        """The lattice pixels [h, w, ...] of a frame [H, W, ...]."""
        start, height, width = self.step // 2, *self.position.shape[1:3]
        rows, columns = (np.arange(n) * self.step + start for n in (height, width))
        return frame[rows[:, None], columns]


def frame_pairs(num_frames: int) -> list[tuple[int, int]]:
    """(source, target) of all pairs that the metrics need, in order of the target.

    Frames 1, 8 and 24 apart, the earlier one as the source; neighbours in both directions; neighbouring anchors.
    """
    pairs = {(t - d, t) for d in DISTANCES for t in range(d, num_frames)}
    pairs |= {(t + 1, t) for t in range(1, num_frames - 1)}
    pairs |= {(t - ARC_STEPS, t) for t in range(ARC_STEPS, num_frames, ARC_STEPS)}
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def make_covisibility(caster: RayCaster, views: list[View], progress: Progress = silent) -> Covisibility:
    """Correspondences of `frame_pairs`. views: one per frame, at the size of the video."""
    first = views[0]
    step = -(-first.width // LATTICE_WIDTH)
    pairs = frame_pairs(len(views))
    coarse = [_lattice_view(view, step) for view in views]
    shape = (len(pairs), coarse[0].height, coarse[0].width)
    position, visible = np.empty((*shape, 2), np.float32), np.empty(shape, bool)
    for k, (source, target) in enumerate(progress(pairs, "geometry")):
        found = correspondence(caster, views[source], coarse[target])
        position[k], visible[k] = found.position, found.visible & _moves_together(found.position)
    return Covisibility((first.width, first.height), step, len(views), np.array(pairs, np.int32), position, visible)


def _lattice_view(view: View, step: int) -> View:
    """A view whose pixel centres are the centres of every `step`-th pixel of `view`, from pixel step // 2 on."""
    start = step // 2 + 0.5

    def to_lattice(x: float) -> float:
        return (x - start) / step + 0.5

    width, height = ((n - 1 - step // 2) // step + 1 for n in (view.width, view.height))
    return View(view.c2w, view.fx / step, view.fy / step, to_lattice(view.cx), to_lattice(view.cy), width, height)


def _moves_together(position: np.ndarray) -> np.ndarray:
    """Pixels whose source lies midway between those of opposite neighbours, in four directions: bool [h, w].

    On one surface the second difference is nearly 0. position: [h, w, 2]; NaN, and the border, never count.
    """
    together = np.zeros(position.shape[:2], bool)
    if min(together.shape) < 3:
        return together
    inner = np.ones((together.shape[0] - 2, together.shape[1] - 2), bool)
    middle = position[1:-1, 1:-1]
    rows, columns = position.shape[:2]
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        after = position[1 + dy : rows - 1 + dy, 1 + dx : columns - 1 + dx]
        before = position[1 - dy : rows - 1 - dy, 1 - dx : columns - 1 - dx]
        inner &= (np.abs((after + before) / 2 - middle) < BEND).all(axis=-1)
    together[1:-1, 1:-1] = inner
    return together
