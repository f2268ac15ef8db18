"""Noise that follows the camera: warp Gaussian noise along the correspondence maps of an arc, and keep it white.

    python -m utils.noise SCENE                                  arc*/noises.npy, for 90x60 latents
    python -m utils.noise SCENE --latent_size 18x12 --seed 1     arc*/noises_18x12.npy

Writes one file per arc, float32 [13, h, w, 16], and prints their paths, one per line. Files that are there already are
kept, whatever seed made them, unless --overwrite is given.

The noise lives on a grid of elements, one per map pixel, S x S of them in every latent cell. Element i has a mass m_i,
values v_i ~ N(0, m_i I) independent of all others, and the offset of its mass from its own centre. A cell reads
sum(v) / sqrt(sum(m)) over its elements. In one step every element of the new frame takes over the element that it sees
(an element seen by several is split into independent pieces), elements that none sees join the nearest one that was
taken over, and disoccluded elements draw fresh noise.

How mass moves never depends on the values. So every frame is exactly N(0, 1), white in space and over channels, for
any map. A step is therefore planned once, in float64 (`plan_step`), and then serves all channels (`apply_step`).
Limits: where a surface shrinks more than about threefold in one step, elements are dropped (the frame stays white),
and surfaces that reappear get fresh noise.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import InputError, Parser, non_negative_int, require_writable, run_script, size
from utils.correspondence import read_map, source_positions
from utils.files import atomic_path
from utils.layout import LATENT_FRAMES, NOISE_CHANNELS, Arc, load_scene, scene_seed
from utils.particles import elements_per_cell, warp_noise


def blend_noise(warped: Any, fresh: Any, alpha: float) -> Any:
    """Variance-preserving mix of two unit Gaussians: (alpha*fresh + (1-alpha)*warped) / sqrt(alpha² + (1-alpha)²).

    warped, fresh: NumPy arrays or torch tensors of the same shape, N(0, 1) each. alpha in [0, 1]: 0 keeps the warped
    noise, 1 discards it (`--degradation`).
    """
    if warped.shape != fresh.shape:
        raise ValueError(f"warped noise has shape {tuple(warped.shape)}, fresh noise {tuple(fresh.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, it must be between 0 and 1")
    return (alpha * fresh + (1 - alpha) * warped) / math.sqrt(alpha**2 + (1 - alpha) ** 2)


def arc_noise(arc: Arc, latent_size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Noise of one arc from its correspondence maps, float32 [13, h, w, 16]. Each arc has its own random stream."""
    correspondences = [source_positions(read_map(path)) for path in arc.corres_paths]
    return warp_noise(correspondences, latent_size, [seed, arc.index])


def load_or_make_noise(arc: Arc, latent_size: tuple[int, int], seed: int | None = None) -> np.ndarray:
    """The arc's noise, float32 [13, h, w, 16], latent_size = (w, h).

    Read from the arc's noise file if there is one (`seed` is then ignored), otherwise made and written there. If the
    folder is read-only, the noise is not stored. seed: default that of the scene.
    """
    path = arc.noise_path(latent_size)
    if path.exists():
        return read_noise(path, latent_size)
    noise = arc_noise(arc, latent_size, scene_seed(arc.folder.parent) if seed is None else seed)
    if _can_write(arc.folder):
        with contextlib.suppress(PermissionError):
            write_noise(path, noise)
    return noise


def read_noise(path: Path, latent_size: tuple[int, int]) -> np.ndarray:
    """Read and check a noise file: float32 [13, h, w, 16], finite. Raises InputError saying what is wrong with it."""
    again = "python -m utils.noise {} --latent_size {}x{} --overwrite".format(path.parent.parent, *latent_size)
    remedy = f"delete it, or make it again with {again}"
    try:
        # Memory-mapped, so that a file of another size is refused by its header, before its data is read.
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        stored_as = f"{stored.dtype} {list(stored.shape)}"
    except Exception as error:  # for a damaged header NumPy raises half a dozen kinds of exceptions
        reason = getattr(error, "strerror", None) or "damaged, or not a .npy file of numbers"
        raise InputError(f"{path} cannot be read: {reason}; {remedy}") from error
    wanted = (LATENT_FRAMES, latent_size[1], latent_size[0], NOISE_CHANNELS)
    if stored.dtype != np.float32 or stored.shape != wanted:
        raise InputError(f"{path} holds {stored_as}, but float32 {list(wanted)} is needed; {remedy}")
    noise = np.array(stored, order="C")
    if not np.isfinite(noise).all():
        raise InputError(f"{path} ({stored_as}) holds values that are not finite; {remedy}")
    return noise


def write_noise(path: Path, noise: np.ndarray) -> None:
    """Write a noise file, atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, noise, allow_pickle=False)


def _can_write(folder: Path) -> bool:
    try:
        require_writable(folder)
    except InputError:
        return False
    return True


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m utils.noise")
    parser.add_argument("scene", type=Path, help="scene folder with arc0, arc1, …")
    size_help = "WIDTHxHEIGHT in latent cells; must divide the maps"
    parser.add_argument("--latent_size", type=size, default="90x60", help=size_help)
    seed_help = "whole number; another one gives other noise (default: the one that preprocess.py was given, else 0)"
    parser.add_argument("--seed", type=non_negative_int, help=seed_help)
    parser.add_argument("--overwrite", action="store_true", help="make noise files again that are there already")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    scene = load_scene(args.scene)
    elements_per_cell(scene.map_size, args.latent_size)
    paths = {arc: arc.noise_path(args.latent_size) for arc in scene.arcs}
    seed = scene_seed(args.scene) if args.seed is None else args.seed
    kept = set() if args.overwrite else {arc for arc, path in paths.items() if path.exists()}
    for arc, path in paths.items():
        if arc in kept:
            read_noise(path, args.latent_size)
        elif not _can_write(arc.folder):
            raise InputError(f"cannot write {path}: {arc.folder} is read-only; make it writable or copy the scene")

    for arc, path in paths.items():
        if arc in kept:
            print(f"{path} is there already and was kept (--overwrite makes it again)", file=sys.stderr)
        else:
            write_noise(path, arc_noise(arc, args.latent_size, seed))
        print(path, flush=True)


if __name__ == "__main__":
    run_script(main)
