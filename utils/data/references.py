"""Reference pictures of distribution alignment: reading, checking, and drawing training crops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import InputError
from utils.edges import resize_edges
from utils.images import read_image

ASPECTS = (16 / 9, 4 / 3, 1.0, None)  # width / height; None: the picture's own


@dataclass(frozen=True)
class Reference:
    """One reference picture, its edges (same size), and the prompt that identifies it."""

    path: Path
    image: np.ndarray  # uint8 [H, W, 3]
    edges: np.ndarray  # uint8 [H, W, 3]
    prompt: str


def load_references(
    images: Sequence[Path],
    prompts: Sequence[str],
    edge_paths: Sequence[Path],
    detect: Callable[[np.ndarray], np.ndarray],
    resolution: int,
) -> list[Reference]:
    """Read the pictures and their edges, given or detected once at the picture's own size.

    Raises InputError for unequal counts, unreadable or too small pictures, and edges of another size.
    """
    for name, others in (("--prompt", prompts), ("--path_edges", edge_paths)):
        if others and len(others) != len(images):
            raise InputError(f"{name} has {len(others)} value(s) for {len(images)} picture(s): give one for each")
    pictures = [_read_picture(path, resolution) for path in images]
    given = [read_image(path) for path in edge_paths]
    for picture, edges, path in zip(pictures, given, edge_paths, strict=False):
        if edges.shape != picture.shape:
            raise InputError(f"{path} is {_size(edges)}, its picture {_size(picture)}: edges must have the same size")
    edges = given or [detect(picture) for picture in pictures]
    return [Reference(*parts) for parts in zip(images, pictures, edges, prompts or [""] * len(images), strict=True)]


def _read_picture(path: Path, resolution: int) -> np.ndarray:
    picture = read_image(path)
    if max(picture.shape[:2]) < resolution:
        raise InputError(
            f"{path} is {_size(picture)}, too small for crops of {resolution} pixels: use a larger picture or a "
            "smaller --resolution"
        )
    return picture


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def crop_size(aspect: float, resolution: int, multiple: int) -> tuple[int, int]:
    """(width, height) of a training crop: the long side is `resolution`; both sides are rounded down to `multiple`."""
    width, height = (resolution, resolution / aspect) if aspect >= 1 else (resolution * aspect, resolution)
    floor = lambda side: max(multiple, int(side + 1e-6) // multiple * multiple)  # noqa: E731
    return floor(width), floor(height)


def draw_aspect(reference: Reference, rng: np.random.Generator) -> float:
    """Width / height of the next crop, uniform over `ASPECTS`."""
    aspect = ASPECTS[rng.integers(len(ASPECTS))]
    return aspect or reference.image.shape[1] / reference.image.shape[0]


def draw_crop(reference: Reference, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Crop the largest window of this aspect at random and resize it to `size`: (image, edges), uint8 [H, W, 3]."""
    full_height, full_width = reference.image.shape[:2]
    scale = min(full_width / size[0], full_height / size[1])
    width, height = round(size[0] * scale), round(size[1] * scale)
    left, top = rng.integers(full_width - width + 1), rng.integers(full_height - height + 1)
    window = np.s_[top : top + height, left : left + width]
    image = np.asarray(Image.fromarray(reference.image[window]).resize(size, Image.Resampling.LANCZOS))
    return image, resize_edges(reference.edges[window], *size)
