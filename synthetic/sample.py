"""Make the sample that ships with the repository: a scene folder of two arcs, and a picture to take the style from.

    python -m synthetic.sample --overwrite
    python -m synthetic.sample --output my_scene --reference my_style.png

Both show a village street built from convex solids, which numpy ray-casts exactly, without a mesh library. World axes
are Blender's (Z up, metres); cameras look along their -z with +y up; pixels have their origin at the outer corner of
the top-left pixel and their centres at +0.5. The same command writes the same files. It takes about two minutes.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import cv2
import numpy as np
from tqdm import tqdm

from utils.arcs import ARC_STEPS, Arc, latent_frame_numbers
from utils.cli import InputError, Parser, run_script
from utils.correspondence import VISIBLE

ARCS = 2
EDGE_SIZE, MAP_SIZE, REFERENCE_SIZE = (1080, 720), (360, 240), (960, 640)  # width, height
SAMPLE_SEED, REFERENCE_SEED = 4, 3
STOREY = 2.9  # metres
FOCAL = 0.87  # focal length in image widths: 60 degrees across
SUPERSAMPLE = 2  # rays per pixel and axis, for the style picture
CHUNK = 1 << 15  # rays cast at a time: temporaries stay in the cache
REACH = 1 - 1e-4  # a ray that gets this share of the way to a point has reached it

OUTLINE, CREASE, DEPTH_JUMP = 255, 215, 0.02  # an edge is an outline if the depth jumps by more than this share
LINE_WIDTHS, LINE_NEARNESS = (4, 5, 6, 7), (1 / 35, 1 / 18, 1 / 9)  # pixels, and 1/metres between them
SOFTNESS, GREY_STEP = 1.0, 43  # sigma of the blur in pixels; seven grey levels, which halve the files

# Eye and the point looked at, in metres: control points of quadratic Bezier curves.
SAMPLE_PATH = ((-2.6, -13, 2.0), (-1.5, -6, 4), (2.6, -2, 2.6)), ((9, 3, 2.5), (0, 14, 3.5), (-10, 12, 3.0))
REFERENCE_VIEW = (2.6, -15.5, 3.4), (-1.6, 6, 3.6)

SHADE, SUNLIGHT = np.array([0.52, 0.52, 0.62]), np.array([0.68, 0.6, 0.48])  # cool shadows, warm light
SUN = np.array([0.3, -0.6, 0.74])  # direction towards the sun
SKY_LOW, SKY_HIGH = np.array([250, 226, 190.0]), np.array([96, 158, 196.0])
WALLS = ((226, 196, 148), (205, 120, 92), (238, 226, 200), (146, 176, 170), (216, 166, 84))
ROOFS = ((150, 66, 52), (92, 74, 84), (176, 92, 58))
DOORS = ((84, 54, 44), (48, 92, 96))
GLASS, FRAME, TRUNK, LEAVES = (58, 78, 104), (244, 238, 224), (104, 74, 56), (86, 124, 80)
GRASS, PAVEMENT, ROAD = (138, 158, 88), (206, 196, 178), (122, 116, 120)


@dataclass(frozen=True)
class Solid:
    """The points x with normals @ x <= offsets: normals [K, 3] outwards, unit; all within `radius` of `center` [3]."""

    normals: np.ndarray
    offsets: np.ndarray
    center: np.ndarray
    radius: float
    colors: np.ndarray  # [K, 3], 0 to 255


@dataclass(frozen=True)
class Town:
    """Solids, and the faces of all of them numbered through: normals [F, 3], offsets [F], colors [F, 3]."""

    solids: tuple[Solid, ...]
    normals: np.ndarray
    offsets: np.ndarray
    colors: np.ndarray

    @classmethod
    def of(cls, solids: list[Solid]) -> "Town":
        faces = ([getattr(solid, part) for solid in solids] for part in ("normals", "offsets", "colors"))
        return cls(tuple(solids), *map(np.concatenate, faces))


def place(shape: str, size: tuple, base: tuple, color: tuple, at: tuple = (0, 0, 0), yaw: float = 0.0) -> Solid:
    """A `box`, a `gable` (ridge along its x) or a `cone` (six sides) of the given size along x, y, z.

    It stands on the middle of its base, which is at `base` in a frame turned by yaw (radians) and moved to `at`.
    """
    x, y, z = size
    down = (0, 0, -1, 0)  # normal, offset
    ends = [(1, 0, 0, x / 2), (-1, 0, 0, x / 2)]
    if shape == "box":
        planes = [*ends, (0, 1, 0, y / 2), (0, -1, 0, y / 2), (0, 0, 1, z), down]
    elif shape == "gable":
        planes = [*ends, (0, z, y / 2, z * y / 2), (0, -z, y / 2, z * y / 2), down]
    else:
        turns = np.arange(6) * np.pi / 3
        planes = [*((z * np.cos(a), z * np.sin(a), x / 2, z * x / 2) for a in turns), down]
    planes = np.array(planes, float)
    planes /= np.linalg.norm(planes[:, :3], axis=1, keepdims=True)
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    normals, center = planes[:, :3] @ turn.T, turn @ np.array(base, float) + at
    # The corners of a cone lie outside the circle of diameter x, hence a radius from the whole x and y.
    radius, colors = float(np.linalg.norm((x, y, z))), np.tile(np.array(color, float), (len(planes), 1))
    return Solid(normals, planes[:, 3] + normals @ center, center, radius, colors)


def make_house(rng: Random, at: tuple, yaw: float, framed: bool) -> Iterator[Solid]:
    """A house at `at`: door and windows in its front (-y of its own axes), windows in its sides."""
    x, y, floors = rng.uniform(6, 8), rng.uniform(5, 7), rng.choice((1, 2, 2, 3))
    wall, roof, door, flat = rng.choice(WALLS), rng.choice(ROOFS), rng.choice(DOORS), rng.random() < 0.3
    yield place("box", (x, y, STOREY * floors), (0, 0, 0), wall, at, yaw)
    roof_size = (x + 0.7, y + 0.7, 0.45) if flat else (x + 0.8, y + 1, rng.uniform(2, 3))
    yield place("box" if flat else "gable", roof_size, (0, 0, STOREY * floors), roof, at, yaw)
    door_side = rng.choice((-1, 1))
    yield place("box", (1.2, 0.3, 2.2), (door_side * x / 4, -y / 2, 0), door, at, yaw)
    for floor, side in itertools.product(range(floors), (-1, 1)):
        sill = STOREY * floor + 1
        if floor or side != door_side:
            yield from make_window((1.5, 0.3), (side * x / 4, -y / 2, sill), at, yaw, framed)
        yield from make_window((0.3, 1.5), (side * x / 2, 0, sill), at, yaw, framed)


def make_window(size: tuple, base: tuple, at: tuple, yaw: float, framed: bool) -> Iterator[Solid]:
    """A pane that stands out of its wall, size along x and y; if framed, inside a frame that stands out less."""
    yield place("box", (*size, 1.4), base, GLASS, at, yaw)
    if framed:
        frame = [side + 0.3 if side > 1 else side - 0.1 for side in size]
        yield place("box", (*frame, 1.7), (*base[:2], base[2] - 0.15), FRAME, at, yaw)


def make_town(seed: int, framed: bool = False) -> Town:
    """A road along +y between pavements, trees and houses, up to a tower."""
    rng = Random(seed)
    solids = [
        place("box", (4000, 4000, 1), (0, 0, -1), GRASS),
        place("box", (6.4, 100, 0.04), (0, 0, 0), ROAD),
        place("box", (8, 8, 15), (0, 58, 0), WALLS[0]),
        place("cone", (10, 10, 9), (0, 58, 15), ROOFS[0]),
        *(window for z in (5, 11) for window in make_window((1.8, 0.3), (0, 54, z), (0, 0, 0), 0, framed)),
    ]
    for side in (-1, 1):
        solids.append(place("box", (1.6, 100, 0.2), (side * 4, 0, 0), PAVEMENT))
        y = rng.uniform(-7, -4)
        while y < 40:
            at = (side * rng.uniform(9.5, 10.5), y, 0)
            solids += make_house(rng, at, -side * np.pi / 2 + rng.uniform(-0.12, 0.12), framed)
            y += rng.uniform(11, 13)
            tree = (side * rng.uniform(6.2, 6.8), y - rng.uniform(5.5, 6.5), 0)
            solids.append(place("box", (0.35, 0.35, 1.2), tree, TRUNK))
            solids.append(place("cone", (2, 2, rng.uniform(3, 4.5)), (*tree[:2], 1), LEAVES))
    return Town.of(solids)


@dataclass(frozen=True)
class Camera:
    """eye [3]; axes [3, 3], columns right, up, backward (camera-to-world rotation, OpenGL axes)."""

    eye: np.ndarray
    axes: np.ndarray

    def rays(self, width: int, height: int) -> np.ndarray:
        """Directions through the pixel centres, [3, height * width], row-major; 1 long along the view axis."""
        y, x = np.mgrid[:height, :width].reshape(2, -1) + 0.5
        scale = FOCAL * width
        return _dot(self.axes, ((x - width / 2) / scale, (height / 2 - y) / scale, np.full(x.shape, -1.0)))

    def project(self, directions: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixel x and y where directions [3, N] from the eye meet the image, and whether that is inside it."""
        right, up, backward = _dot(self.axes.T, directions)
        with np.errstate(divide="ignore", invalid="ignore"):
            x = width / 2 - FOCAL * width * right / backward
            y = height / 2 + FOCAL * width * up / backward
        return x, y, (backward < 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)


def look_at(eye: tuple, target: tuple) -> Camera:
    """A level camera at `eye` (x, y, z) that sees `target` in the middle of its image."""
    backward = np.subtract(eye, target) / np.linalg.norm(np.subtract(eye, target))
    right = np.cross((0, 0, 1), backward)
    right /= np.linalg.norm(right)
    return Camera(np.array(eye, float), np.stack([right, np.cross(backward, right), backward], axis=1))


def make_path(frames: int) -> list[Camera]:
    """The camera path of the sample: `frames` cameras at equal steps along two Bezier curves."""
    eyes, targets = np.array(SAMPLE_PATH, float)
    weights = [((1 - s) ** 2, 2 * s * (1 - s), s**2) for s in np.linspace(0, 1, frames)]
    return [look_at(np.array(w) @ eyes, np.array(w) @ targets) for w in weights]


def _dot(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """matrix [K, 3] times vectors [3, N]. Not `@`: BLAS rounds differently from one processor to the next."""
    a, b, c = matrix.T[:, :, None]
    return a * vectors[0] + b * vectors[1] + c * vectors[2]


def cast(town: Town, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hits of rays from `origin` ([3], or [3, N] one for each ray) along directions [3, N], not normalised.

    Returns t [N], in lengths of the direction, inf where nothing is hit, and the number of the face hit [N], or -1.
    """
    count = directions.shape[1]
    t, face = np.full(count, np.inf), np.full(count, -1)
    origin = origin.reshape(3, -1)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        own = origin if origin.shape[1] == 1 else origin[:, part]
        _cast_chunk(town, own, directions[:, part], t[part], face[part])
    return t, face


def _cast_chunk(town: Town, origin: np.ndarray, directions: np.ndarray, t: np.ndarray, face: np.ndarray) -> None:
    """`cast` for rays that fit in the cache, with origin [3, 1] or [3, N]; writes t and face."""
    length = np.sqrt((directions * directions).sum(axis=0))
    first_face = 0
    for solid in town.solids:
        to_center = solid.center[:, None] - origin
        beyond = (to_center * to_center).sum(axis=0) - solid.radius**2
        # Only rays that come within `radius` of the centre can hit: all of those that start there.
        ahead = np.where(beyond > 0, np.sqrt(np.abs(beyond)), -np.inf) * length
        near = np.flatnonzero((to_center * directions).sum(axis=0) >= ahead)
        if near.size:
            rate = _dot(solid.normals, directions[:, near])
            rate[rate == 0] = 1e-300  # a ray along a face leaves it, in the end
            gap = solid.offsets[:, None] - _dot(solid.normals, origin if origin.shape[1] == 1 else origin[:, near])
            crossing = gap / rate
            entering = np.where(rate < 0, crossing, -np.inf)
            enter, leave = entering.max(axis=0), np.where(rate > 0, crossing, np.inf).min(axis=0)
            hit = (enter > 0) & (enter < leave) & (enter < t[near])
            t[near[hit]] = enter[hit]
            face[near[hit]] = first_face + entering.argmax(axis=0)[hit]
        first_face += len(solid.offsets)


def correspondence_map(town: Town, source: Camera, target: Camera, width: int, height: int) -> np.ndarray:
    """Where the surface seen at each pixel of the target is in the source: uint16 [height, width, 3], R, G, B.

    The codec is that of utils/correspondence.py. Sky is a point at infinity: it moves with rotation only.
    """
    rays = target.rays(width, height)
    t, face = cast(town, target.eye, rays)
    sky = face < 0
    to_point = np.where(sky, rays, target.eye[:, None] + np.where(sky, 0, t) * rays - source.eye[:, None])
    x, y, visible = source.project(to_point, width, height)
    # The ray from the source must get to the point, and to the outside of its face; a ray to the sky must hit nothing.
    reached, _ = cast(town, source.eye, to_point)
    outside = _dot(town.normals, source.eye[:, None])[:, 0] > town.offsets
    visible &= np.where(sky, np.isinf(reached), (reached >= REACH) & outside[face])
    code = np.zeros((height * width, 3), np.uint16)
    code[visible, 0] = np.minimum(65535, np.floor(x[visible] / width * 65536))
    code[visible, 1] = 65535 - np.minimum(65535, np.floor(y[visible] / height * 65536))
    code[visible, 2] = VISIBLE
    return code.reshape(height, width, 3)


def soft_edges(town: Town, camera: Camera, width: int, height: int) -> np.ndarray:
    """Outlines and creases, drawn like the output of an HED network: uint8 [height, width, 3], white on black."""
    t, face = cast(town, camera.eye, camera.rays(width, height))
    face, nearness = face.reshape(height, width), (1 / t).reshape(height, width)  # 1/metres; 0 for the sky
    layers = np.zeros((len(LINE_WIDTHS), height, width), np.uint8)
    for down, right in ((1, 0), (0, 1)):
        # Faces of convex solids are flat and whole: depth can only jump where the face changes.
        y, x = np.nonzero(face[: height - down, : width - right] != face[down:, right:])
        ends = nearness[y, x], nearness[y + down, x + right]
        near, far = np.maximum(*ends), np.minimum(*ends)
        value = np.where(near - far > DEPTH_JUMP * near, OUTLINE, CREASE)
        layer = np.searchsorted(LINE_NEARNESS, near)
        for pixels in ((layer, y, x), (layer, y + down, x + right)):  # both sides, so that the line is centred
            layers[pixels] = np.maximum(layers[pixels], value)
    lines = np.zeros((height, width), np.uint8)
    for line_width, layer in zip(LINE_WIDTHS, layers, strict=True):
        side = line_width - 1  # the border is two pixels wide before it grows
        y, x = np.mgrid[:side, :side] - (side - 1) / 2
        lines = np.maximum(lines, cv2.dilate(layer, (np.hypot(x, y) < line_width / 2).astype(np.uint8)))
    lines = cv2.GaussianBlur(lines, (0, 0), SOFTNESS)
    lines = np.minimum(np.round(lines / GREY_STEP) * GREY_STEP, 255).astype(np.uint8)
    return np.repeat(lines[..., None], 3, axis=2)


def render(town: Town, camera: Camera, width: int, height: int) -> np.ndarray:
    """A flat-shaded picture with cast shadows, haze and an evening sky: uint8 [height, width, 3] RGB."""
    size = (SUPERSAMPLE * height, SUPERSAMPLE * width)
    rays = camera.rays(size[1], size[0])
    t, face = cast(town, camera.eye, rays)
    slope = np.clip(rays[2] / np.linalg.norm(rays[:2], axis=0) / 0.5, 0, 1)[:, None]
    picture = SKY_LOW + (SKY_HIGH - SKY_LOW) * slope
    hit = np.flatnonzero(face >= 0)
    normal = town.normals[face[hit]].T
    points = camera.eye[:, None] + t[hit] * rays[:, hit] + 1e-4 * normal  # clear of their own face
    sun = SUN / np.linalg.norm(SUN)
    _, blocker = cast(town, points, np.broadcast_to(sun[:, None], points.shape))
    lit = np.where(blocker < 0, np.clip(_dot(sun[None], normal)[0], 0, None), 0)[:, None]
    shaded = town.colors[face[hit]] * (SHADE + SUNLIGHT * lit)
    haze = 1 - np.exp(-t[hit] / 160)[:, None]
    picture[hit] = shaded + (SKY_LOW - shaded) * haze
    picture = np.clip(picture, 0, 255).astype(np.float32).reshape(*size, 3)
    return np.round(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)).astype(np.uint8)


def write_scene(folder: Path, edge_size: tuple[int, int], map_size: tuple[int, int]) -> None:
    """Write the sample's edges and maps to a new folder. Sizes are width, height."""
    town, cameras = make_town(SAMPLE_SEED), make_path(ARC_STEPS * ARCS + 1)
    jobs = []
    for arc in (Arc(i, folder / f"arc{i}") for i in range(ARCS)):
        jobs += [(path, soft_edges, (int(path.stem),), edge_size) for path in arc.edge_paths]
        pairs = [*itertools.pairwise(latent_frame_numbers(arc.first, arc.last)), (arc.first, arc.last)]
        paths = [*arc.corres_paths, arc.corres_end_path]
        jobs += [(path, correspondence_map, pair, map_size) for path, pair in zip(paths, pairs, strict=True)]
    for path, draw, frames, size in tqdm(jobs, desc="sample scene", unit="file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, draw(town, *(cameras[number - 1] for number in frames), *size))


def write_png(path: Path, image: np.ndarray) -> None:
    """image: uint8 or uint16 [H, W, 3] RGB."""
    _, data = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
    path.write_bytes(data.tobytes())  # unlike imwrite, raises when the disk is full


def check_replaceable(scene: Path, reference: Path, overwrite: bool) -> None:
    """Raise InputError if something exists and may not be replaced."""
    for path in (scene, reference):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already; pass --overwrite to replace it, or choose another name")
    if reference.is_dir() or (scene.exists() and not scene.is_dir()):
        raise InputError(f"--output {scene} must be a folder, and --reference {reference} a file")
    parts = {f"arc{i}" for i in range(ARCS)}
    foreign = sorted(path for path in scene.glob("*") if path.name not in parts)
    if foreign:  # results, or a folder given by mistake
        raise InputError(f"{foreign[0]} would be lost with {scene}; move it away, or choose another --output")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.sample")
    parser.add_argument("--output", type=Path, default=Path("assets/sampleA"), help="scene folder to make")
    parser.add_argument(
        "--reference", type=Path, default=Path("assets/references/boxtown.png"), help="style picture to make"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_replaceable(args.output, args.reference, args.overwrite)
    for path in (args.output, args.reference):
        path.parent.mkdir(parents=True, exist_ok=True)
    # Everything is made beside its place and moved there when complete.
    with tempfile.TemporaryDirectory(prefix=".sample-", dir=args.output.parent) as unfinished:
        scene = Path(unfinished) / "scene"
        write_scene(scene, EDGE_SIZE, MAP_SIZE)
        if args.output.exists():
            shutil.rmtree(args.output)
        scene.rename(args.output)
    with tempfile.TemporaryDirectory(prefix=".sample-", dir=args.reference.parent) as unfinished:
        picture = Path(unfinished) / "picture.png"
        write_png(picture, render(make_town(REFERENCE_SEED, framed=True), look_at(*REFERENCE_VIEW), *REFERENCE_SIZE))
        picture.replace(args.reference)
    print(f"scene: {args.output}\nreference: {args.reference}")


if __name__ == "__main__":
    run_script(main)
