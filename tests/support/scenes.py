"""Tiny scene folders for tests: a camera that slides along a flat wall of soft lines."""

from pathlib import Path

import cv2
import numpy as np

from utils.correspondence import VISIBLE
from utils.layout import ARC_STEPS, Arc, latent_frame_numbers


def make_scene(
    folder: Path,
    num_arcs: int = 1,
    edge_size: tuple[int, int] = (72, 48),
    map_size: tuple[int, int] = (72, 48),
    pan: tuple[float, float] = (0.4, 0.1),
) -> Path:
    """Write a valid scene folder (edges and maps, no noise, no cameras) and return it.

    Sizes are (width, height) in pixels. pan: how far the camera moves in one frame, right and down, in map pixels: the
    point seen at x in frame n + 1 was at x + pan in frame n.
    """
    for arc in (Arc(i, folder / f"arc{i}") for i in range(num_arcs)):
        arc.edge_paths[0].parent.mkdir(parents=True)
        arc.corres_paths[0].parent.mkdir()
        scale = np.array(edge_size) / np.array(map_size)
        for number, path in enumerate(arc.edge_paths, start=arc.first):
            cv2.imwrite(str(path), draw_edges(edge_size, (number - 1) * scale * pan))
        numbers = latent_frame_numbers(arc.first, arc.last)
        for path, steps in zip(arc.corres_paths, np.diff(numbers), strict=True):
            write_map(path, *pan_map(map_size, steps * np.array(pan)))
        write_map(arc.corres_end_path, *pan_map(map_size, ARC_STEPS * np.array(pan)))
    return folder


def draw_edges(size: tuple[int, int], shift: np.ndarray, spacing: int = 24) -> np.ndarray:
    """Soft white lines on black, uint8 [H, W, 3]: a grid of squares, moved left and up by `shift` pixels."""
    y, x = np.indices(size[::-1]) + 0.5
    to_line = np.minimum(
        *(abs((axis + move) % spacing - spacing / 2) for axis, move in ((x, shift[0]), (y, shift[1])))
    )
    return np.repeat((255 * np.clip(1.5 - to_line / 2, 0, 1)).astype(np.uint8)[..., None], 3, axis=-1)


def pan_map(size: tuple[int, int], shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source positions float64 [H, W, 2] (x, y; outer-corner pixels) and validity bool [H, W] of a shifted picture."""
    y, x = np.indices(size[::-1]) + 0.5
    position = np.stack([x, y], axis=-1) + shift
    return position, ((position >= 0) & (position < size)).all(-1)


def write_map(path: Path, position: np.ndarray, valid: np.ndarray) -> None:
    """Write a correspondence map as the 16-bit RGB file that `utils.correspondence.read_map` reads."""
    height, width = valid.shape
    red, green = np.clip(position / (width, height) * 65536, 0, 65535).astype(np.uint16).transpose(2, 0, 1)
    code = np.stack([red, 65535 - green, np.full_like(red, VISIBLE)], axis=-1)
    code[~valid] = 0
    cv2.imwrite(str(path), code[..., ::-1])
