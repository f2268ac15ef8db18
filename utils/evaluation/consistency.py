"""Consistency of a video, measured along exact correspondences of its scene. docs/metrics.md explains every metric.

    covisibility = make_covisibility(caster, views)                      # once per scene and size
    temporal_error(frames, covisibility, 8), flicker(frames, covisibility), seams(frames, covisibility)

Frames are uint8 [F, H, W, 3], F = 45 N + 1. Errors are in grey levels, 0 to 255; NaN where nothing can be measured.
Every number is a pure function of its arguments.
"""

import math

import numpy as np

from utils.evaluation.covisibility import Covisibility
from utils.layout import ARC_STEPS

LEAST_SHARE = 0.005  # of the lattice pixels; the least overlap of a pair of frames that counts
SEAM_NEIGHBOURS = 4  # steps on either side that a seam is compared with


def sample(image: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Bilinear colours at points [N, 2] (x, y from the outer corner of the top-left pixel): float32 [N, C].

    image: [H, W, C], both sides at least 2. Points nearer to the border than half a pixel get the border's colour.
    """
    height, width = image.shape[:2]
    x, y = (np.clip(position[:, k] - 0.5, 0, side - 1) for k, side in ((0, width), (1, height)))
    left, top = np.minimum(x.astype(np.intp), width - 2), np.minimum(y.astype(np.intp), height - 2)
    dx, dy = (x - left).astype(np.float32)[:, None], (y - top).astype(np.float32)[:, None]
    upper = (1 - dx) * image[top, left] + dx * image[top, left + 1]
    lower = (1 - dx) * image[top + 1, left] + dx * image[top + 1, left + 1]
    return (1 - dy) * upper + dy * lower


def warped_error(frames: np.ndarray, covisibility: Covisibility, source: int, target: int) -> float:
    """Mean absolute difference between a frame and another frame warped to it, over the pixels that both see.

    mean over visible pixels p and channels of |I_t(p) - I_s(w(p))|, w(p) the exact position of p's surface point in
    frame s. In [0, 255], 0 is best; NaN when the two frames share less than LEAST_SHARE of the pixels.
    """
    _require_size(frames, covisibility)
    position, visible = covisibility.warp(source, target)
    if not _enough(visible):
        return float("nan")
    carried = sample(frames[source], position[visible])
    return float(np.abs(covisibility.on_lattice(frames[target])[visible] - carried).mean(dtype=np.float64))


def step_errors(frames: np.ndarray, covisibility: Covisibility, distance: int) -> np.ndarray:
    """`warped_error` from frame t - distance to t, for t = distance … F - 1: float64 [F - distance]."""
    return np.array([warped_error(frames, covisibility, t - distance, t) for t in range(distance, len(frames))])


def temporal_error(frames: np.ndarray, covisibility: Covisibility, distance: int) -> float:
    """Mean of `step_errors`. distance: one of `covisibility.DISTANCES`, in frames."""
    return _mean(step_errors(frames, covisibility, distance))


def anchor_error(frames: np.ndarray, covisibility: Covisibility) -> float:
    """Mean of `warped_error` between neighbouring anchors: frames 0 and 45, 45 and 90, …"""
    anchors = range(ARC_STEPS, len(frames), ARC_STEPS)
    return _mean(np.array([warped_error(frames, covisibility, t - ARC_STEPS, t) for t in anchors]))


def flicker(frames: np.ndarray, covisibility: Covisibility) -> float:
    """Temporal noise along the surfaces, as a standard deviation: sqrt(pi / 12) times the mean |second difference|.

    d_t(p) = I_{t-1}(w-(p)) - 2 I_t(p) + I_{t+1}(w+(p)) over pixels p of frame t that both neighbouring frames see.
    Gaussian noise of standard deviation s, new in every frame, gives d the deviation sqrt(1 + 4 + 1) s and |d| the
    mean sqrt(12 / pi) s: the result is s. A colour that drifts evenly gives 0. In [0, 261], 0 is best; NaN when no
    three frames share enough.
    """
    _require_size(frames, covisibility)
    total, count = 0.0, 0
    for t in range(1, len(frames) - 1):
        (before, seen_before), (after, seen_after) = (covisibility.warp(s, t) for s in (t - 1, t + 1))
        seen = seen_before & seen_after
        if not _enough(seen):
            continue
        middle = covisibility.on_lattice(frames[t])[seen].astype(np.float32)
        second = sample(frames[t - 1], before[seen]) - 2 * middle + sample(frames[t + 1], after[seen])
        total += float(np.abs(second).sum(dtype=np.float64))
        count += second.size
    return math.sqrt(math.pi / 12) * total / count if count else float("nan")


def seams(frames: np.ndarray, covisibility: Covisibility) -> float:
    """How much a video jumps where its arcs meet: 1 = no more than between other neighbouring frames.

    For the shared frame b of two arcs: the mean of the `step_errors` into b and out of b, over the mean of those of
    the four steps before and the four after. The mean over all b; above 0, 1 is best. NaN with a single arc, and
    where nothing changes at all.
    """
    errors = step_errors(frames, covisibility, 1)  # errors[t - 1]: from t - 1 to t
    ratios = []
    for b in range(ARC_STEPS, len(frames) - 1, ARC_STEPS):
        around = [*range(b - 1 - SEAM_NEIGHBOURS, b - 1), *range(b + 1, b + 1 + SEAM_NEIGHBOURS)]
        across, usual = _mean(errors[[b - 1, b]]), _mean(errors[around])
        ratios.append(across / usual if usual > 0 else float("nan"))
    return _mean(np.array(ratios))


def _enough(visible: np.ndarray) -> bool:
    return bool(visible.any()) and float(visible.mean()) >= LEAST_SHARE


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN when there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _require_size(frames: np.ndarray, covisibility: Covisibility) -> None:
    width, height = covisibility.size
    wanted = (covisibility.num_frames, height, width, 3)
    if frames.shape != wanted or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, the geometry is for uint8 {wanted}")
