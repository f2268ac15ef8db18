"""The benchmark's metrics as plain functions of pictures: uint8 [H, W, 3], videos uint8 [F, H, W, 3]."""

import numpy as np

from utils.evaluation.consistency import sample
from utils.evaluation.pictures import psnr

LUMA = np.array([0.299, 0.587, 0.114])
BLUR = 0.7  # pixels; standard deviation of the blur before gradients are taken
LEAST_PIXELS = 60  # least size of a class whose mean colour counts


def inbetween_psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    """PSNR of the frames strictly between the first and the last."""
    return psnr(frames[1:-1], truth[1:-1])


def crossfade(start: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
    """A linear cross-fade of two pictures over `count` frames, both of them included: uint8 [count, H, W, 3]."""
    share = np.linspace(0, 1, count).reshape(-1, *(1,) * start.ndim)
    return np.round((1 - share) * start + share * end).astype(np.uint8)


def closure(frames: np.ndarray) -> float:
    """Mean absolute difference, 0..255, between each frame of a way out and the frame of the way back at its place."""
    out = len(frames) // 2
    return float(np.abs(frames[:out].astype(np.int16) - frames[: -out - 1 : -1]).mean())


def gradient_magnitude(image: np.ndarray) -> np.ndarray:
    """Length of the gradient of the slightly blurred luma, by Sobel's filters: float64 [H, W]."""
    offsets = np.arange(-2, 3)
    kernel = np.exp(-0.5 * (offsets / BLUR) ** 2)
    luma = _filter(_filter(image @ LUMA, kernel / kernel.sum(), 0), kernel / kernel.sum(), 1)
    smooth, difference = np.array([0.25, 0.5, 0.25]), np.array([-0.5, 0, 0.5])
    across = _filter(_filter(luma, smooth, 0), difference, 1)
    down = _filter(_filter(luma, difference, 0), smooth, 1)
    return np.hypot(across, down)


def gradient_correlation(image: np.ndarray, truth: np.ndarray) -> float:
    """Pearson's correlation of the gradient magnitudes of two pictures; 0 when one of them is flat."""
    _require_same_shape(image, truth)
    a, b = (gradient_magnitude(picture) for picture in (image, truth))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def class_colour_error(image: np.ndarray, truth: np.ndarray, classes: np.ndarray) -> float:
    """Mean over classes of the absolute difference of their mean colours, 0..255, mean of the channels.

    classes: int [H, W], class of each pixel, -1 where there is none. Classes below LEAST_PIXELS do not count; NaN when
    none does.
    """
    _require_same_shape(image, truth)
    errors = []
    for kind in np.unique(classes[classes >= 0]):
        where = classes == kind
        if where.sum() >= LEAST_PIXELS:
            errors.append(np.abs(image[where].mean(axis=0) - truth[where].mean(axis=0)).mean())
    return float(np.mean(errors)) if errors else float("nan")


def covisible_error(source: np.ndarray, target: np.ndarray, position: np.ndarray, visible: np.ndarray) -> float:
    """Mean absolute difference, 0..255, between a picture and another one warped to it; NaN when they share nothing.

    position: float [H, W, 2], the position in the source of each target pixel: x then y, in pixels from the outer
    corner of the top-left one. visible: bool [H, W], the pixels that count.
    """
    if not visible.any():
        return float("nan")
    carried = sample(source, position[visible])
    return float(np.abs(carried - target[visible]).mean())


def _filter(values: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    """Correlation of [H, W] with an odd kernel along an axis; the border is repeated."""
    reach = len(kernel) // 2
    padded = np.pad(values, [(reach * (k == axis),) * 2 for k in range(values.ndim)], mode="edge")
    length = values.shape[axis]
    return sum(weight * padded.take(range(k, k + length), axis) for k, weight in enumerate(kernel))


def _require_same_shape(image: np.ndarray, truth: np.ndarray) -> None:
    if image.shape != truth.shape:
        raise ValueError(f"pictures of shapes {image.shape} and {truth.shape} cannot be compared")
