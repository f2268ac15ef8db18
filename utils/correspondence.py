"""Correspondence maps: read and write the 16-bit PNG, and warp an image along them.

A map lives on the *target* frame. At pixel (x2, y2), R = x1/W * 65536 and G = 65535 - y1/H * 65536 encode the position
(x1, y1) of the same surface point in the *source* frame, and B = 65535 means that the point is visible there.

Two readers exist because the project needs both: `gather_indices` floors, as the reference implementation does, and
addresses pixels of an image of any size; `source_positions` returns sub-pixel positions for transporting noise.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.cli import InputError
from utils.images import write_png

VISIBLE = 65535  # blue value of a valid pixel
MASK_KERNEL = 5  # pixels; side of the dilation kernel


def read_map(path: Path) -> np.ndarray:
    """Read a correspondence map: uint16 [H, W, 3], channels R, G, B.

    Raises InputError when the file is missing, unreadable, or not a 16-bit colour image.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing")
    try:
        with Image.open(path) as image:
            image.verify()  # checks checksums; OpenCV would print messages about a damaged file, or return half of it
        stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        stored = None
    if stored is None:
        raise InputError(f"{path} cannot be read as an image; make the file again")
    if stored.dtype != np.uint16 or stored.ndim != 3 or stored.shape[2] not in (3, 4):
        channels = stored.shape[2] if stored.ndim == 3 else 1
        raise InputError(f"{path} must be a 16-bit RGB image, but has {channels} channel(s) of {stored.dtype}")
    return np.ascontiguousarray(stored[..., 2::-1])  # OpenCV stores B, G, R (, A)


def encode_map(position: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Encode source positions as a map, uint16 [H, W, 3]; pixels without a visible source become all zero.

    position: float [H, W, 2], x then y, in pixels of the map with the origin at the outer corner of the top-left
    pixel. visible: bool [H, W]. Positions are floored, so that both readers below return the pixel they lie in.
    """
    height, width = visible.shape
    share = np.where(visible[..., None], position, 0) / (width, height)
    if share.min() < 0 or share.max() > 1:
        raise ValueError(f"visible sources must lie inside the frame, found {share.min():.3g} to {share.max():.3g}")
    column, row = np.moveaxis(np.minimum(65535, np.floor(share * 65536)), -1, 0)
    code = np.zeros((height, width, 3), np.uint16)
    code[visible] = np.stack([column, 65535 - row, np.full_like(row, VISIBLE)], axis=-1)[visible]
    return code


def write_map(path: Path, code: np.ndarray) -> None:
    """Write a map as a 16-bit PNG, atomically. code: uint16 [H, W, 3], R, G, B."""
    write_png(path, code, cv2.IMWRITE_PNG_COMPRESSION, 7)


def source_positions(code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sub-pixel source positions of a map.

    code: uint16 [H, W, 3]. Returns (position float64 [H, W, 2], x then y, in pixels of the map with the origin at the
    outer corner of the top-left pixel; valid bool [H, W]). The +0.5 undoes the floor of the encoder on average.
    """
    height, width = code.shape[:2]
    x = (code[..., 0] + 0.5) / 65536 * width
    y = (65535 - code[..., 1].astype(np.float64) + 0.5) / 65536 * height
    return np.stack([x, y], axis=-1), code[..., 2] == VISIBLE


def resize_map(code: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear resize of a map to uint16 [height, width, 3]; pixels that mix visible and hidden ones become zero."""
    resized = cv2.resize(code, (width, height), interpolation=cv2.INTER_LINEAR)
    resized[resized[..., 2] != VISIBLE] = 0
    return resized


def gather_indices(code: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Whole-pixel correspondences of a map of the image's own size, row-major over its valid pixels.

    code: uint16 [H, W, 3]. Returns x1, y1 (int32, pixel in the source) and x2, y2 (int64, pixel in the target). A
    pixel is valid when B >= 100, the reference's threshold.
    """
    height, width = code.shape[:2]
    y2, x2 = np.nonzero(code[..., 2] >= 100)
    red, green = code[y2, x2, 0].astype(np.int64), code[y2, x2, 1].astype(np.int64)
    x1 = (red / 65536 * width).astype(np.int32)
    y1 = ((65535 - green) / 65536 * height).astype(np.int32)
    return x1, y1, x2, y2


def warp_image(image: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Warp `image` to the target frame by nearest-neighbour gather; pixels without a source stay black.

    image: uint8 [H, W, C], the source frame. code: uint16 [H, W, 3], already resized to the image (`resize_map`).
    """
    if image.shape[:2] != code.shape[:2]:
        raise ValueError(f"image is {image.shape[:2]}, the map {code.shape[:2]}: resize the map first")
    x1, y1, x2, y2 = gather_indices(code)
    warped = np.zeros_like(image)
    warped[y2, x2] = image[y1, x1]
    return warped


def unreliable_mask(code: np.ndarray, dilations: int) -> np.ndarray:
    """Mask of pixels whose warp is missing or unreliable (`grow_holes`). code: uint16 [H, W, 3]."""
    return grow_holes(code[..., 2] == 0, dilations)


def grow_holes(holes: np.ndarray, dilations: int) -> np.ndarray:
    """Holes bool [H, W], and what is near them, as a mask: uint8 [H, W], 1 = generate freely, 0 = keep the warp.

    The holes grow by a 5x5 dilation, `dilations` times, which also hides the jagged silhouettes of the gather. The
    blur acts on a 0/1 integer image, so it only rounds corners (the reference does the same).
    """
    grown = cv2.dilate(holes.astype(np.uint16), np.ones((MASK_KERNEL, MASK_KERNEL), np.uint8), iterations=dilations)
    return cv2.GaussianBlur(grown, (9, 9), 3).astype(np.uint8)


def latent_mask(mask: np.ndarray) -> np.ndarray:
    """Nearest-neighbour resize of a mask [H, W] to the FLUX latent grid, float32 [2 ceil(H/16), 2 ceil(W/16)]."""
    height, width = mask.shape
    grid = (2 * -(-width // 16), 2 * -(-height // 16))
    return cv2.resize(mask.astype(np.float32), grid, interpolation=cv2.INTER_NEAREST)
