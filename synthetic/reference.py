"""A reference picture: another town than the sample's, flat shaded in warm evening light.

    python -m synthetic.reference [--output assets/references/boxtown.png] [--seed 3] [--overwrite]

Colours belong to object classes (the prefix of a mesh name); the sun casts shadows, distance fades into the sky. World
axes are Blender's: Z up, metres.
"""

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np

from synthetic.scenes import export_glb, make_path, make_town
from utils.cli import InputError, Parser, non_negative_int, run_script
from utils.geometry import Geometry, RayCaster, load_geometry, turn
from utils.images import write_image
from utils.views import View

SIZE = (1152, 768)  # width, height in pixels
SAMPLES = 2  # rays per pixel and axis
FOCAL = 0.87  # focal length in image widths: 60 degrees across
FRAME = 20  # of the walk through the town
COLOURS = {
    "wall": (226, 190, 140), "roof": (164, 78, 58), "window": (58, 78, 104), "door": (96, 58, 44),
    "balcony": (238, 226, 200), "chimney": (150, 84, 66), "trunk": (104, 74, 56), "tree": (92, 128, 78),
    "rock": (150, 142, 136), "fence": (206, 190, 160), "road": (132, 122, 126), "ground": (146, 162, 92),
    "hill": (120, 142, 104),
}  # fmt: skip
SUN = np.array([0.45, -0.5, 0.55]) / np.linalg.norm([0.45, -0.5, 0.55])  # towards the sun
SHADE, LIGHT = np.array([0.52, 0.52, 0.62]), np.array([0.62, 0.55, 0.42])
LOW_SKY, HIGH_SKY = np.array([250.0, 226, 190]), np.array([96.0, 158, 196])
HAZE = 160.0  # metres over which a surface fades to 1/e


def render(geometry: Geometry, view: View) -> np.ndarray:
    """A flat-shaded picture of a scene whose names start with their class: uint8 [H, W, 3]."""
    caster = RayCaster(geometry)
    rays = view.rays(SAMPLES).reshape(-1, 3)
    face = caster.cast(view.eye, rays)
    rise = np.clip(rays[:, 2] / np.linalg.norm(rays[:, :2], axis=1) / 0.5, 0, 1)[:, None]
    picture = LOW_SKY + (HIGH_SKY - LOW_SKY) * rise
    hit = face >= 0
    face, seen = face[hit], rays[hit]
    depth = caster.plane_depth(face, view.eye, seen)[:, None]
    normal = caster.normals[face] * -np.sign(np.einsum("ij,ij->i", caster.normals[face], seen))[:, None]
    points = view.eye + depth * seen + 1e-3 * normal  # clear of their own face
    lit = caster.cast(points, np.broadcast_to(SUN, points.shape)) < 0
    light = SHADE + LIGHT * (np.clip(normal @ SUN, 0, None) * lit)[:, None]
    classes = [name.split("_")[0] for name in geometry.names]
    colour = np.array([COLOURS[kind] for kind in classes], float)[geometry.objects[face]]
    haze = 1 - np.exp(-depth / HAZE)
    picture[hit] = colour * light * (1 - haze) + LOW_SKY * haze
    large = np.clip(picture, 0, 255).astype(np.float32).reshape(SAMPLES * view.height, SAMPLES * view.width, 3)
    return cv2.resize(large, (view.width, view.height), interpolation=cv2.INTER_AREA).round().astype(np.uint8)


def town_picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A view into the town of this seed. size: width, height."""
    parts = make_town(seed)
    with tempfile.TemporaryDirectory() as folder:
        mesh = Path(folder) / "town.glb"
        export_glb(parts, mesh)
        geometry = turn(load_geometry(mesh), "+z")
    width, height = size
    c2w = make_path(parts, "walk", seed, 46)[FRAME]
    return render(geometry, View(c2w, FOCAL * width, FOCAL * width, width / 2, height / 2, width, height))


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.reference")
    parser.add_argument("--output", type=Path, default=Path("assets/references/boxtown.png"), help="picture to write")
    parser.add_argument("--seed", type=non_negative_int, default=3, help="of the town")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output} exists already; pass --overwrite to replace it")
    write_image(args.output, town_picture(args.seed))
    print(args.output)


if __name__ == "__main__":
    run_script(main)
