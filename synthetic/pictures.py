"""Draw pictures of random towns with edges, the training data of the image networks. Drawn once and cached.

    python -m synthetic.pictures --towns 1000 --processes 2

A town is seen from VIEWS places, each coloured in STYLES styles. Towns and styles of the three splits never meet.
Edges are drawn of the town itself and of a coarse mesh of it, as artists model.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from synthetic.render import draw_edges, paint, town_world, trace, typical_depth
from synthetic.scenes import PATHS, coarsen, make_path, make_town, to_camera_path
from synthetic.styles import make_style
from utils.cli import InputError, Parser, positive_int, run_script
from utils.data.tensor_cache import holds, read_arrays, write_arrays
from utils.edges import resize_edges, soft_edges
from utils.layout import ARC_FRAMES
from utils.scene.views import make_views

SIZE = (144, 96)  # width, height of the tiny networks' pictures
EDGE_SIZE = (540, 360)  # lines are drawn at half the width of preprocessing, in a quarter of the time
VIEWS, STYLES = 8, 4  # of each town
# (view, style) of the pictures whose edges are also detected in the picture, as alignment does with references: those
# follow textures and miss faint contours, which lines of the geometry do not.
DETECTED = ((0, 0), (6, 1))
SPLITS = {"train": (0, 100_000), "validation": (100_000, 110_000), "test": (200_000, 10**9)}  # seeds: first, end
CACHE = Path("cache/pictures")
COARSE = 0.05  # by how much coarse meshes are off, as in the benchmark
VERSION = 4  # of the drawn data; a cache of another version is made again


@dataclass(frozen=True)
class TownPictures:
    """images: uint8 [VIEWS, STYLES, H, W, 3]; edges, coarse: uint8 [VIEWS, H, W], lines of the geometry and of a
    coarse mesh; detected: uint8 [2, H, W], edges found in the pictures DETECTED; captions: one for each style."""

    images: np.ndarray
    edges: np.ndarray
    coarse: np.ndarray
    detected: np.ndarray
    captions: tuple[str, ...]


def scene_seed(split: str, number: int) -> int:
    """Seed of town `number` of a split. Raises ValueError beyond the split's end."""
    first, end = SPLITS[split]
    if not 0 <= number < (end - first) // STYLES:
        raise ValueError(f"town {number} is outside the {split} split of {(end - first) // STYLES} towns")
    return first + number


def require_count(split: str, count: int) -> None:
    """Raise InputError when a split has fewer towns."""
    first, end = SPLITS[split]
    if count > (most := (end - first) // STYLES):
        raise InputError(f"{count} towns: the {split} split has seeds for {most}")


def style_seeds(split: str, number: int) -> list[int]:
    """Seeds of the styles that town `number` is coloured in."""
    return [SPLITS[split][0] + STYLES * number + k for k in range(STYLES)]


def draw_town(split: str, number: int, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    """The arrays of TownPictures. Deterministic."""
    cv2.setNumThreads(1)
    seed = scene_seed(split, number)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 20]))
    parts = make_town(seed)
    world, rough = town_world(parts), town_world(coarsen(parts, COARSE, seed))
    styles = [make_style(style_seed) for style_seed in style_seeds(split, number)]
    images, edges, coarse, detected = [], [], [], []
    for kind in PATHS:
        path = to_camera_path(make_path(parts, kind, seed, ARC_FRAMES))
        views, large = make_views(path, size), make_views(path, EDGE_SIZE)
        depth = typical_depth(world, views[::9])
        for frame in rng.choice(ARC_FRAMES, VIEWS // len(PATHS), replace=False):
            buffer = trace(world, views[frame])
            images.append([paint(buffer, style) for style in styles])
            edges.append(resize_edges(draw_edges(world, large[frame], depth), *size)[..., 0])
            coarse.append(resize_edges(draw_edges(rough, large[frame], depth), *size)[..., 0])
            for style in (styles[k] for view, k in DETECTED if view == len(images) - 1):
                detected.append(resize_edges(soft_edges(paint(trace(world, large[frame]), style)), *size)[..., 0])
    arrays = {"images": images, "edges": edges, "coarse": coarse, "detected": detected}
    return {name: np.array(a) for name, a in arrays.items()}


def cache_entry(
    split: str, number: int, folder: Path, size: tuple[int, int] = SIZE, version: int = VERSION
) -> tuple[Path, dict]:
    """Cache file of a town, and the identity that it must have."""
    identity = {"split": split, "number": number, "size": list(size), "version": version}
    return folder / f"{split}_{number:05d}.safetensors", identity


def cached_town(split: str, number: int, folder: Path = CACHE, size: tuple[int, int] = SIZE) -> TownPictures:
    """Read a town's pictures from the cache; draw and cache them when they are missing or damaged."""
    path, identity = cache_entry(split, number, folder, size)
    arrays = read_arrays(path, identity)
    if arrays is None:
        try:
            arrays = draw_town(split, number, size)
        except InputError:  # this town has no collision-free path: cache an empty entry
            none = np.zeros((0, *size[::-1]), np.uint8)
            images = np.zeros((0, STYLES, *size[::-1], 3), np.uint8)
            arrays = {"images": images, "edges": none, "coarse": none, "detected": none}
        write_arrays(path, arrays, identity)
    captions = tuple(make_style(seed).caption for seed in style_seeds(split, number))
    return TownPictures(**arrays, captions=captions)


def load_towns(split: str, count: int, folder: Path = CACHE, processes: int | None = None) -> list[TownPictures]:
    """The first `count` towns of a split, except those without pictures; missing ones are drawn in parallel.

    Raises InputError when the split has fewer, or none of them has pictures.
    """
    require_count(split, count)
    missing = [n for n in range(count) if not holds(*cache_entry(split, n, folder))]
    if missing:
        with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
            jobs = pool.map(_draw_into, [(split, n, folder) for n in missing], chunksize=4)
            for _ in tqdm(jobs, total=len(missing), desc=f"draw {split}", unit="town"):
                pass
    towns = [cached_town(split, n, folder) for n in tqdm(range(count), desc=f"read {split}", unit="town")]
    if not (towns := [town for town in towns if len(town.images)]):
        raise InputError(f"none of the first {count} towns of the {split} split has a clear path; ask for more")
    return towns


def _draw_into(job: tuple[str, int, Path]) -> None:
    cached_town(*job)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.pictures")
    parser.add_argument("--split", choices=list(SPLITS), default="train", help="which seeds")
    parser.add_argument("--towns", type=positive_int, default=1000, help=f"how many, each {VIEWS}x{STYLES} pictures")
    parser.add_argument("--cache_dir", type=Path, default=CACHE, help="folder of the cache")
    parser.add_argument("--processes", type=positive_int, help="processes that draw (default: one for each core)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    towns = load_towns(args.split, args.towns, args.cache_dir, args.processes)
    print(f"{args.cache_dir}: {len(towns)} towns, {len(towns) * VIEWS * STYLES} pictures")


if __name__ == "__main__":
    run_script(main)
