"""Metrics of pictures: edges compared with the scene's, style with a reference, pixels with the true frames.

    line_score(video_lines(frames), scene_lines(paths, size))            # precision, recall, F1
    colour_distance(frames, reference), texture_distance(frames, reference), psnr(frames, truth), ssim(frames, truth)

Frames are uint8 [F, H, W, 3], pictures uint8 [H, W, 3], RGB. Every number is a pure function of its arguments.
docs/metrics.md explains them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.edges import resize_edges, soft_edges
from utils.evaluation.covisibility import Progress, silent
from utils.images import read_image

LINE_WIDTH = 720  # pixels; pictures are resized to this width before lines are compared
TOLERANCE = 1.5  # pixels at LINE_WIDTH
LINE_LEVEL = 128  # least brightness of soft edges that counts as a line

STYLE_SIDE = 128  # pixels; longer side at which styles are compared. No weight set draws smaller pictures
PATCH = 7  # pixels; side of the patches whose distributions are compared
PATCH_STRIDE = 4  # pixels; between the patches of a frame
PROJECTIONS, QUANTILES, PROJECTION_SEED = 128, 1024, 0

BEST_PSNR = 100.0  # dB, for equal pictures
SSIM_WINDOW = 11  # pixels


# --- structure ---


@dataclass(frozen=True)
class LineScore:
    """Shares in [0, 1]; NaN where a video, or a scene, has no lines at all."""

    precision: float
    recall: float
    f1: float


def line_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) at which the lines of a video of this size are compared."""
    return LINE_WIDTH, max(1, round(LINE_WIDTH * size[1] / size[0]))


def scene_lines(paths: Sequence[Path], size: tuple[int, int], progress: Progress = silent) -> np.ndarray:
    """One-pixel lines of a scene's edge frames: bool [F, h, 720]. size: width, height of the video, in pixels.

    Edge frames are stretched to the video's aspect, as for the models.
    """
    return np.stack([thin(resize_edges(read_image(path), *line_size(size))) for path in progress(paths, "lines")])


def video_lines(frames: np.ndarray, progress: Progress = silent) -> np.ndarray:
    """One-pixel lines where a video shows edges: bool [F, h, 720]. Smaller frames are enlarged first."""
    size = line_size((frames.shape[2], frames.shape[1]))
    enlarged = cv2.INTER_CUBIC if frames.shape[2] <= LINE_WIDTH else cv2.INTER_AREA
    return np.stack([thin(soft_edges(cv2.resize(f, size, interpolation=enlarged))) for f in progress(frames, "edges")])


def thin(edges: np.ndarray) -> np.ndarray:
    """Skeleton of all pixels at least LINE_LEVEL bright: bool [H, W]. edges: uint8 [H, W, 3], white on black."""
    from skimage.morphology import skeletonize

    return skeletonize(edges[..., 0] >= LINE_LEVEL)


def line_score(found: np.ndarray, wanted: np.ndarray) -> LineScore:
    """Agreement of two sets of one-pixel lines, both bool [F, h, w], over all frames together.

    precision = |found pixels within TOLERANCE of a wanted one| / |found|, recall the same the other way round, F1
    their harmonic mean.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"lines of shapes {found.shape} and {wanted.shape} cannot be compared")
    hits = [(_near(f, w), _near(w, f)) for f, w in zip(found, wanted, strict=True)]
    near_found, near_wanted = np.sum(hits, axis=0)
    precision, recall = (_ratio(a, b.sum()) for a, b in ((near_found, found), (near_wanted, wanted)))
    f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else precision + recall
    return LineScore(precision, recall, f1)


def _near(lines: np.ndarray, others: np.ndarray) -> int:
    """How many pixels of `lines` are within TOLERANCE of one of `others`."""
    if not others.any():
        return 0
    distance = cv2.distanceTransform((~others).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return int((distance[lines] <= TOLERANCE).sum())


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


# --- style ---


def colour_distance(frames: np.ndarray, reference: np.ndarray) -> float:
    """Distance between the colours of a video and of a picture: Wasserstein-2 between Gaussians, in Lab.

    sqrt(|m1 - m2|² + tr(C1 + C2 - 2 (C1^½ C2 C1^½)^½)), m and C the mean and covariance of all pixels' CIE Lab. In
    units of Delta E (1976); 0 is best.
    """
    (mean1, cov1), (mean2, cov2) = _lab_statistics(frames), _lab_statistics(reference[None])
    root = _square_root(cov1)
    spread = np.trace(cov1 + cov2 - 2 * _square_root(root @ cov2 @ root))
    return float(np.sqrt(np.square(mean1 - mean2).sum() + max(spread, 0.0)))


def texture_distance(frames: np.ndarray, reference: np.ndarray) -> float:
    """Distance between the patterns of a video and of a picture: sliced Wasserstein-2 between patches, in Lab.

    Patches of PATCH x PATCH pixels, minus their own mean colour, are projected onto PROJECTIONS seeded unit vectors v:
    sqrt(3 mean over v of W2²(v·patches of the video, v·patches of the picture)). 0 is best. Since the mean is
    subtracted, a shift of all colours changes nothing; weaker contrast, blur and grain do.
    """
    wanted, found = _projected_quantiles(reference[None], 1), _projected_quantiles(frames, PATCH_STRIDE)
    return float(np.sqrt(3 * np.square(wanted - found).mean(dtype=np.float64)))


def _style_lab(picture: np.ndarray) -> np.ndarray:
    """CIE Lab, float32 [h, w, 3], with a longer side of STYLE_SIDE."""
    scale = STYLE_SIDE / max(picture.shape[:2])
    size = tuple(max(PATCH, round(side * scale)) for side in picture.shape[1::-1])
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _lab_statistics(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [3] and covariance [3, 3] of the Lab of all pixels, float64."""
    total, products, count = np.zeros(3), np.zeros((3, 3)), 0
    for frame in frames:
        lab = _style_lab(frame).reshape(-1, 3).astype(np.float64)
        total, products, count = total + lab.sum(0), products + np.einsum("ni,nj->ij", lab, lab), count + len(lab)
    mean = total / count
    return mean, products / count - np.outer(mean, mean)


def _square_root(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _projected_quantiles(frames: np.ndarray, stride: int) -> np.ndarray:
    """Quantiles of all patches' projections, float32 [QUANTILES, PROJECTIONS]. stride: pixels between patches."""
    rng = np.random.default_rng(PROJECTION_SEED)
    vectors = rng.standard_normal((PATCH, PATCH, 3, PROJECTIONS))
    vectors /= np.sqrt(np.square(vectors).sum((0, 1, 2)))
    vectors = (vectors - vectors.mean((0, 1))).astype(np.float32).reshape(-1, PROJECTIONS)  # subtracts the means
    projected = np.concatenate([_patches(_style_lab(frame), stride) @ vectors for frame in frames])
    return np.quantile(projected, (np.arange(QUANTILES) + 0.5) / QUANTILES, axis=0)


def _patches(lab: np.ndarray, stride: int) -> np.ndarray:
    """float32 [N, PATCH * PATCH * 3]."""
    windows = np.lib.stride_tricks.sliding_window_view(lab, (PATCH, PATCH), axis=(0, 1))[::stride, ::stride]
    return windows.transpose(0, 1, 3, 4, 2).reshape(-1, PATCH * PATCH * 3)


# --- fidelity ---


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, the mean over frames of 10 log10(255² / MSE), each at most BEST_PSNR."""
    _require_same_shape(frames, truth)
    errors = [np.mean(np.square(a.astype(np.float64) - b)) for a, b in zip(frames, truth, strict=True)]
    least = 255**2 * 10 ** (-BEST_PSNR / 10)
    return float(np.mean([10 * np.log10(255**2 / max(error, least)) for error in errors]))


def ssim(frames: np.ndarray, truth: np.ndarray, progress: Progress = silent) -> float:
    """Structural similarity (Wang et al. 2004), by scikit-image: the mean over frames, channels and pixels.

    Gaussian window, sigma 1.5, 11x11 pixels, K = (0.01, 0.03). In [-1, 1], 1 is best; NaN for frames smaller than the
    window.
    """
    from skimage.metrics import structural_similarity

    _require_same_shape(frames, truth)
    if min(frames.shape[1:3]) < SSIM_WINDOW:
        return float("nan")
    settings = {"channel_axis": 2, "data_range": 255, "gaussian_weights": True, "use_sample_covariance": False}
    pairs = list(zip(frames, truth, strict=True))
    return float(np.mean([structural_similarity(a, b, **settings) for a, b in progress(pairs, "ssim")]))


def _require_same_shape(frames: np.ndarray, truth: np.ndarray) -> None:
    if frames.shape != truth.shape or not len(frames):
        raise ValueError(f"videos of shapes {frames.shape} and {truth.shape} cannot be compared")
