"""Put carried pixels over generated frames, so that no patch shows.

    frames = composite(generated, carried)     # or match_colours(generated, carried)

The low frequencies of the generated frames are first matched to the carried ones, nearby and beyond their border; a
carried pixel then fades in within a pixel or two. Wider feathers, and mixing band by band, lose lines.
"""

import cv2
import numpy as np

from utils.scene.carry import CarriedVideo

REACH = 1 / 48  # of the picture's width: standard deviation of the blur that keeps only colour
LEAST = 0.05  # weight below which the colour of the nearest carried pixels fades to nothing
FEATHER = 1.5  # pixels


def composite(frames: np.ndarray, carried: CarriedVideo) -> np.ndarray:
    """Carried pixels where they are sure, elsewhere the frames with matched colours. All uint8 [F, H, W, 3]."""
    return np.array([_blend(*row) for row in zip(frames, carried.frames, carried.sure, strict=True)])


def match_colours(frames: np.ndarray, carried: CarriedVideo) -> np.ndarray:
    """Frames whose low frequencies are those of the carried anchors, where these are sure. uint8 [F, H, W, 3]."""
    return np.array([_to_bytes(_match(*row)) for row in zip(frames, carried.frames, carried.sure, strict=True)])


def _match(frame: np.ndarray, carried: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Add the blurred difference of sure pixels: float32 [H, W, 3]."""
    weight = sure.astype(np.float32)[..., None]
    sigma = REACH * frame.shape[1]
    difference = cv2.GaussianBlur(weight * (carried.astype(np.float32) - frame), (0, 0), sigma)
    near = cv2.GaussianBlur(weight[..., 0], (0, 0), sigma)[..., None]
    return frame + difference / np.maximum(near, LEAST)


def _blend(frame: np.ndarray, carried: np.ndarray, sure: np.ndarray) -> np.ndarray:
    inside = cv2.distanceTransform(sure.astype(np.uint8), cv2.DIST_L2, 3)
    weight = np.minimum(inside / FEATHER, 1)[..., None]
    matched = _match(frame, carried, sure)
    return _to_bytes(matched + weight * (carried - matched))


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)
