"""Read every scene and camera file of a folder as preprocessing does, and print a line for each.

    python -m tests.cases FOLDER

Files are told apart by their suffix; folders are COLMAP models. Text files and JSON are cameras. The
expected results are in the README of such a folder: this prints the actual ones only.
"""

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np

from utils.cameras.path import CameraPath
from utils.cameras.read import read_cameras
from utils.cameras.world import settle_up
from utils.cli import InputError, Parser, run_script
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry
from utils.scene.raycast import RayCaster

CAMERAS = (".json", ".txt", ".tum")
LEFT_OUT = (".md", ".bin", ".mtl", ".png", ".jpg")  # files that others refer to


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, "python -m tests.cases")
    parser.add_argument("folder", type=Path, help="folder of scenes and cameras")
    return parser.parse_args()


def read(path: Path) -> str:
    """'read: …' or 'refused: …'."""
    try:
        if path.is_dir() or path.suffix.lower() in CAMERAS:
            return f"read: {describe_path(read_any_cameras(path))}"
        geometry, note = settle_up(load_geometry(path), path)
        return "; note: ".join([f"read: {describe_scene(geometry)}", *([note] if note else []), *geometry.notes])
    except InputError as error:
        return f"refused: {error}"


def read_any_cameras(path: Path) -> CameraPath:
    """Read cameras; their world is Z up unless the file states its up axis."""
    try:
        return read_cameras(path)
    except InputError as error:
        if "--cameras_up" not in str(error):
            raise
        return read_cameras(path, "+z")


def describe_scene(geometry: Geometry) -> str:
    a, b, c = geometry.vertices[geometry.faces].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    low, high = (" ".join(f"{value:.4g}" for value in bound(geometry.vertices, 0)) for bound in (np.min, np.max))
    line = f"{len(geometry.faces)} triangles, area {area:.6g}, bounds {low} to {high}, {geometry.up} up"
    overlaps = RayCaster(geometry).overlaps
    return line if overlaps is None else f"{line}, with faces that overlap in one plane"


def describe_path(path: CameraPath) -> str:
    first, last = (" ".join(f"{value:.4g}" for value in path.c2w[k, :3, 3]) for k in (0, -1))
    focal = "x".join(f"{value:.5g}" for value in path.focal[0])
    size = "x".join(map(str, path.size))
    return f"{len(path.c2w)} cameras, {size}, focal length {focal}, from {first} to {last}, {path.up} up"


def main() -> None:
    folder = parse_args().folder
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in LEFT_OUT:
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            line = read(path)
        print("; ".join([f"{path.name}: {line}", *said.getvalue().split("\n")]).rstrip("; "))


if __name__ == "__main__":
    run_script(main)
