"""Composite carried pixels over generated frames, without visible seams.

    frames = composite(generated, video.frames, video.seen)     # video: carry_to_arc(…)

The low frequencies of the generated frames are first matched to the carried ones, nearby and beyond their border; a
carried pixel then fades in within a pixel or two. Wider feathers, and multi-band blending, lose lines.
"""

import cv2
import numpy as np

REACHES = (1 / 6, 1 / 12, 1 / 24, 1 / 48)  # of the picture's width: standard deviations of blurs, coarse to fine
ENOUGH = 0.6  # share of chosen pixels under a blur, from which on it is taken instead of a coarser one
FEATHER = 1.5  # pixels


def composite(frames: np.ndarray, carried: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Carried pixels where they are chosen, elsewhere the frames with matched colours.

    frames, carried: uint8 [F, H, W, 3]. chosen: bool [F, H, W], `seen` or `sure` of a `CarriedVideo`.
    """
    return np.array([_blend(*row) for row in zip(frames, carried, chosen, strict=True)])


def match_colours(frames: np.ndarray, carried: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Frames whose low frequencies are those of the carried ones, near chosen pixels: uint8 [F, H, W, 3]."""
    return np.array([_to_bytes(_match(*row)) for row in zip(frames, carried, chosen, strict=True)])


def _match(frame: np.ndarray, carried: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Add the blurred difference of chosen pixels, extrapolated to the others: float32 [H, W, 3]."""
    weight = chosen.astype(np.float32)
    difference = weight[..., None] * (carried.astype(np.float32) - frame)
    low = np.zeros_like(difference)
    for reach in REACHES:
        near, blurred = (cv2.GaussianBlur(x, (0, 0), reach * frame.shape[1]) for x in (weight, difference))
        finer = blurred / np.maximum(near, 1e-6)[..., None]
        low += np.minimum(near / ENOUGH, 1)[..., None] * (finer - low)
    return frame + low


def _blend(frame: np.ndarray, carried: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    inside = cv2.distanceTransform(chosen.astype(np.uint8), cv2.DIST_L2, 3)
    weight = np.minimum(inside / FEATHER, 1)[..., None]
    matched = _match(frame, carried, chosen)
    return _to_bytes(matched + weight * (carried - matched))


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)
