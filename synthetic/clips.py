"""Draw clips of random towns with edges and warped noise, the training data of the video networks. Cached.

    python -m synthetic.clips --clips 400 --processes 2

A clip is one arc of a camera path, coloured in STYLES styles. Training also uses each of them flipped. Edges and noise
of every other four clips are of a coarse mesh, as artists model: pictures then hold what the geometry lacks.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from synthetic.pictures import COARSE, EDGE_SIZE, SIZE, SPLITS, cache_entry, require_count, scene_seed
from synthetic.render import World, draw_edges, paint, town_world, trace, typical_depth
from synthetic.scenes import PATHS, coarsen, make_path, make_town, to_camera_path
from synthetic.styles import make_style
from utils.cameras.path import CameraPath
from utils.cli import InputError, Parser, positive_int, run_script
from utils.data.clips import Clip
from utils.data.tensor_cache import holds, read_arrays, write_arrays
from utils.edges import resize_edges
from utils.layout import ARC_FRAMES, latent_frame_numbers
from utils.particles import warp_noise
from utils.scene.views import correspondence, make_views

STYLES = 2  # of each clip
VARIANTS = 2 * STYLES  # with flips
MAP_SIZE = (360, 240)  # of the correspondences that warp the noise, as in preprocessing
CACHE = Path("cache/clips")
MOST_TRIES = 50  # towns to try from the one asked for on
VERSION = 3  # of the drawn data; a cache of another version is made again


def draw_clip(split: str, number: int, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    """images: uint8 [STYLES, 46, H, W, 3]; edges: uint8 [46, H, W]; noise: float32 [13, H/8, W/8, 16]. Deterministic.

    Raises InputError when this town has no collision-free camera path.
    """
    cv2.setNumThreads(1)
    seed = scene_seed(split, number)
    parts = make_town(seed)
    path = to_camera_path(make_path(parts, PATHS[number % len(PATHS)], seed, ARC_FRAMES))
    true = town_world(parts)
    given = town_world(coarsen(parts, COARSE, seed)) if has_coarse_mesh(number) else true
    views, large = make_views(path, size), make_views(path, EDGE_SIZE)
    depth = typical_depth(given, views)
    buffers = [trace(true, view) for view in views]
    edges = [resize_edges(draw_edges(given, view, depth), *size)[..., 0] for view in large]
    return {
        "images": np.array([[paint(buffer, style) for buffer in buffers] for style in clip_styles(split, number)]),
        "edges": np.array(edges),
        "noise": path_noise(given, path, (size[0] // 8, size[1] // 8), seed),
    }


def has_coarse_mesh(number: int) -> bool:
    """Whether edges and noise of clip `number` are of a coarse mesh. Every kind of path has as many of both."""
    return number // len(PATHS) % 2 == 1


def clip_styles(split: str, number: int) -> list:
    """The styles of clip `number`. Seeds count down from the split's end; those of its town's pictures count up."""
    end = min(SPLITS[split][1], 10**6)
    return [make_style(end - 1 - (STYLES * number + k)) for k in range(STYLES)]


def path_noise(world: World, path: CameraPath, latent_size: tuple[int, int], seed: int, arc: int = 0) -> np.ndarray:
    """Noise that follows one arc of a path, as preprocessing makes it: float32 [13, h, w, 16]. arc: its number."""
    views = make_views(path, MAP_SIZE)
    numbers = latent_frame_numbers(1, ARC_FRAMES)
    found = [correspondence(world.caster, views[a - 1], views[b - 1]) for a, b in pairwise(numbers)]
    return warp_noise([(one.position, one.visible) for one in found], latent_size, [seed, arc])


def cached_clip(split: str, number: int, folder: Path = CACHE) -> dict[str, np.ndarray] | None:
    """Read a clip from the cache; draw and cache it when it is missing or damaged. None: the town has no such path."""
    path, identity = cache_entry(split, number, folder, version=VERSION)
    arrays = read_arrays(path, identity)
    if arrays is None:
        try:
            arrays = draw_clip(split, number)
        except InputError:
            arrays = {"edges": np.zeros((0, *SIZE[::-1]), np.uint8)}
        write_arrays(path, arrays, identity)
    return arrays if len(arrays["edges"]) else None


def draw_clips(split: str, count: int, folder: Path = CACHE, processes: int | None = None) -> None:
    """Draw the missing ones of the first `count` clips of a split, in parallel. Raises InputError for too many."""
    require_count(split, count)
    missing = [n for n in range(count) if not holds(*cache_entry(split, n, folder, version=VERSION))]
    if not missing:
        return
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        jobs = pool.map(_draw_into, [(split, n, folder) for n in missing])
        for _ in tqdm(jobs, total=len(missing), desc=f"draw {split} clips", unit="clip"):
            pass


def _draw_into(job: tuple[str, int, Path]) -> None:
    cached_clip(*job)


@dataclass(frozen=True)
class SyntheticClips:
    """Clips for the in-between trainer. count: their number; each drawn clip gives VARIANTS of them.

    A clip of a town without a path is replaced by the nearest one before it, else after it.
    """

    count: int
    split: str = "train"
    folder: Path = CACHE

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{self.split}_{i:06d}"

    def identity(self) -> dict:
        return {"dataset": "synthetic", "split": self.split, "version": VERSION}

    def prepare(self, processes: int | None = None) -> None:
        """Draw all clips that are missing, in parallel."""
        draw_clips(self.split, -(-self.count // VARIANTS), self.folder, processes)

    def load(self, i: int) -> Clip:
        number, variant = divmod(i, VARIANTS)
        style, flip = divmod(variant, 2)
        for used in [*range(number, -1, -1), *range(number + 1, number + MOST_TRIES)]:
            if (arrays := cached_clip(self.split, used, self.folder)) is not None:
                break
        else:
            raise InputError(f"no town up to number {number + MOST_TRIES} of the {self.split} split has a clear path")
        way = -1 if flip else 1
        frames, edges = arrays["images"][style][:, :, ::way], arrays["edges"][:, :, ::way]
        caption = clip_styles(self.split, used)[style].caption
        noise = arrays["noise"][:, :, ::way]
        return Clip(*map(np.ascontiguousarray, (frames, np.repeat(edges[..., None], 3, axis=-1), noise)), caption)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.clips")
    parser.add_argument("--split", choices=list(SPLITS), default="train", help="which seeds")
    parser.add_argument("--clips", type=positive_int, default=400, help="drawn clips")
    parser.add_argument("--cache_dir", type=Path, default=CACHE, help="folder of the cache")
    parser.add_argument("--processes", type=positive_int, help="processes that draw (default: one for each core)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    draw_clips(args.split, args.clips, args.cache_dir, args.processes)
    print(f"{args.cache_dir}: {args.clips} clips")


if __name__ == "__main__":
    run_script(main)
