"""Make a random coarse town as meshes, and a camera path through it: scene.glb and cameras.json.

    python -m synthetic.scenes --output my_scene
    python -m synthetic.scenes --output my_scene --seed 7 --path orbit --frames 136

Houses with windows and doors in real openings, balconies, chimneys, trees, rocks, garden walls, a road, meadows and
hills; every mesh is named after its class (`wall_03`). Paths: walk, orbit, flyover, rise. World axes are Blender's (Z
up, metres); the GLB is Y up, as glTF asks. The same seed gives the same town. Paths of 45 N + 1 frames make N arcs.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synthetic.shapes import Mesh, box, loft, make_house, place, quads, turned
from utils.cameras.path import CameraPath, look_at
from utils.cameras.read import write_transforms
from utils.cli import InputError, Parser, non_negative_int, positive_int, require_writable, run_script
from utils.files import atomic_path
from utils.layout import ARC_STEPS, CAMERAS_FILE, SCENE_FILE

SAMPLE_SEED, SAMPLE_PATH, SAMPLE_FRAMES = 46, "walk", 2 * ARC_STEPS + 1
PATHS = ("walk", "orbit", "flyover", "rise")
IMAGE_SIZE, FIELD_OF_VIEW = (1080, 720), 60.0  # width, height in pixels; degrees across

ROAD_END, ROAD_HALF_WIDTH = 75.0, 3.0
GROUND_END, FLAT = 170.0, 24.0  # the ground is flat up to FLAT metres from the road

CLEARANCE, MIN_VIEW, MIN_COVER = 1.2, 6.0, 0.65  # of cameras: metres, metres (median), share of pixels below the sky
TERRAIN = ("road", "ground", "hill")


SMALL = ("window", "door", "balcony", "chimney", "fence")  # classes that a coarse model may lack


@dataclass(frozen=True)
class Part:
    """One mesh of a town: vertices float64 [V, 3] in metres, Z up; faces int64 [F, 3]; name `class_number`."""

    name: str
    vertices: np.ndarray
    faces: np.ndarray

    @property
    def kind(self) -> str:
        """Its class: the name up to the number."""
        return self.name.rpartition("_")[0]


def make_town(seed: int) -> list[Part]:
    """A town of 6 to 14 houses, mostly 5 to 8 thousand triangles; its road runs along y through the origin."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    bend, wave, phase = rng.uniform(0, 3), 2 * np.pi / rng.uniform(90, 140), rng.uniform(0, 2 * np.pi)
    waves = rng.uniform((0.02, 0), (0.05, 2 * np.pi), (2, 2, 2))

    def road(y: np.ndarray) -> np.ndarray:  # x of its middle
        return bend * np.sin(wave * y + phase)

    def height(x: np.ndarray, y: np.ndarray) -> np.ndarray:  # of the ground: 0 near the road, up to 5 m elsewhere
        away = np.hypot(np.maximum(abs(x - road(y)) - FLAT, 0), np.maximum(abs(y) - ROAD_END - 6, 0))
        ramp = np.clip(away / 50, 0, 1)
        swell = sum(1 + np.sin(fx * x + px) * np.sin(fy * y + py) for (fx, px), (fy, py) in waves)
        return 1.25 * ramp**2 * (3 - 2 * ramp) * swell

    meshes = [("road", make_road(road)), ("ground", make_ground(height))]
    meshes += make_plots(rng, road)
    meshes += make_meadows(rng, road, height)
    numbers: Counter[str] = Counter()
    parts = []
    for kind, (vertices, faces) in meshes:
        parts.append(Part(f"{kind}_{numbers[kind]:02d}", vertices, faces))
        numbers[kind] += 1
    return parts


def coarsen(parts: list[Part], share: float, seed: int) -> list[Part]:
    """Imitate an artist's rough model of the town: every object is off by up to `share`, small ones may be missing.

    Each object but the terrain is moved by up to `share` of its extent along each axis, rotated about its vertical
    axis by up to `share` radians, and scaled by up to `share`; half of the objects of SMALL classes are left out.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    kept = []
    for part in parts:
        left_out, *errors = rng.random() < 0.5, *rng.uniform(-share, share, 5)
        if part.kind in TERRAIN:
            kept.append(part)
        elif not (left_out and part.kind in SMALL):
            kept.append(Part(part.name, _misplace(part.vertices, *errors), part.faces))
    return kept


def _misplace(vertices: np.ndarray, x: float, y: float, z: float, angle: float, growth: float) -> np.ndarray:
    low, high = vertices.min(0), vertices.max(0)
    foot = np.array([*(low + high)[:2] / 2, low[2]])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return (1 + growth) * (vertices - foot) @ turn.T + foot + np.array([x, y, z]) * (high - low)


def make_road(road: Callable[[np.ndarray], np.ndarray]) -> Mesh:
    """A low ridge with a flat top, 0.08 m above the ground. Rings of 4, see `road_middle`."""
    y = np.linspace(-ROAD_END, ROAD_END, 31)
    outline = [(ROAD_HALF_WIDTH, 0.08), (ROAD_HALF_WIDTH, -0.2), (-ROAD_HALF_WIDTH, -0.2), (-ROAD_HALF_WIDTH, 0.08)]
    return loft(np.array([[(road(s) + x, s, z) for x, z in outline] for s in y]))


def make_ground(height: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Mesh:
    """A grid, finer in the middle."""
    line = np.linspace(-1, 1, 21)
    x, y = np.meshgrid(*2 * [GROUND_END * np.sign(line) * abs(line) ** 1.3], indexing="ij")
    numbers = np.arange(x.size).reshape(x.shape)
    faces = quads(numbers[:-1, :-1], numbers[1:, :-1], numbers[1:, 1:], numbers[:-1, 1:])
    return np.stack([x, y, height(x, y)], axis=-1).reshape(-1, 3), faces


def make_plots(rng: np.random.Generator, road: Callable[[np.ndarray], np.ndarray]) -> list[tuple[str, Mesh]]:
    """Houses in a row on either side of the road, garden walls before them and trees between them."""
    meshes, rows = [], (rng.integers(3, 8), rng.integers(3, 8))
    for side, count in zip((-1, 1), rows, strict=True):
        plot = rng.uniform(12.5, 14)
        for y in (np.arange(count) - (count - 1) / 2) * plot + rng.uniform(-3, 3):
            slant = -np.arctan2(road(y + 1) - road(y - 1), 2.0)
            facing = slant - side * np.pi / 2  # rotates -y towards the road

            def at(out: float, along: float, y: float = y, slant: float = slant, side: int = side) -> tuple:
                """A point `out` metres from the middle of the road."""
                return (
                    road(y) + side * out * np.cos(slant) - along * np.sin(slant),
                    y + side * out * np.sin(slant) + along * np.cos(slant),
                    0.0,
                )

            house, door_side, half = make_house(rng)
            out = 6.6 + half[1 - door_side] + rng.uniform(0, 1.2)
            yaw = facing - door_side * np.pi / 2 + rng.uniform(-0.08, 0.08)
            meshes += [(kind, place(mesh, at(out, 0), yaw)) for kind, mesh in house]
            if rng.random() < 0.6:
                start, end, top = plot * rng.uniform(-0.48, -0.4), plot * rng.uniform(-0.2, -0.12), rng.uniform(0.7, 1)
                wall = box((start, -0.15, -0.3), (end, 0.15, top))
                meshes.append(("fence", place(wall, at(4.9, 0), facing)))
            if rng.random() < 0.8:
                meshes += make_tree(rng, at(rng.uniform(6.6, 9), plot / 2 + rng.uniform(-0.5, 0.5)), 1.0)
    return meshes


def make_tree(rng: np.random.Generator, at: tuple, scale: float) -> list[tuple[str, Mesh]]:
    """A trunk and its crown: a fir or a round one. Crowns reach 1.9 m times `scale` from the trunk."""
    foot, top = 1.2 * scale, scale * rng.uniform(4, 5.5)
    middle, wide = (foot + top) / 2, scale * rng.uniform(1.2, 1.6)
    if rng.random() < 0.4:
        profile = [(wide, foot), (0.5 * wide, middle), (0.8 * wide, middle), (0.05, top)]
    else:
        profile = [(0.5 * wide, foot), (wide, 0.7 * foot + 0.3 * top), (0.9 * wide, 0.65 * top), (0.3 * wide, top)]
    trunk = turned(4, [(0.2 * scale, -0.6), (0.14 * scale, middle)])
    crown = turned(6, profile, rng, 0.15)
    yaw = rng.uniform(0, np.pi)
    return [("trunk", place(trunk, at, yaw)), ("tree", place(crown, at, yaw))]


def make_meadows(
    rng: np.random.Generator,
    road: Callable[[np.ndarray], np.ndarray],
    height: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> list[tuple[str, Mesh]]:
    """Trees and rocks behind the houses, and a ring of hills that closes the horizon."""
    meshes = []
    for _ in range(rng.integers(7, 12)):
        y, out = rng.uniform(-80, 80), rng.choice((-1, 1)) * rng.uniform(20, 55)
        meshes += make_tree(rng, (road(y) + out, y, height(road(y) + out, y)), rng.uniform(1.2, 2))
    for _ in range(rng.integers(7, 12)):
        y, out, r = rng.uniform(-70, 70), rng.choice((-1, 1)), rng.uniform(0.4, 0.9)
        x = road(y) + out * (rng.uniform(18, 40) if abs(y) < 55 else rng.uniform(5, 20))  # beside houses, or beyond
        rock = turned(6, [(1.1 * r, -0.3), (1.1 * r, 0.4 * r), (0.4 * r, 1.1 * r)], rng, 0.25)
        meshes.append(("rock", place(rock, (x, y, height(x, y)), rng.uniform(0, np.pi))))
    count = int(rng.integers(7, 10))
    for angle in (np.arange(count) + rng.uniform(-0.3, 0.3, count)) * 2 * np.pi / count:
        r, top = rng.uniform(35, 60), rng.uniform(14, 32)
        hill = turned(10, [(r, -3), (0.8 * r, 0.35 * top), (0.5 * r, 0.8 * top), (0.12 * r, top)], rng, 0.12)
        meshes.append(("hill", place(hill, (150 * np.cos(angle), 150 * np.sin(angle), 0))))
    return meshes


# --- Camera paths ----------------------------------------------------------------------------------------------------


def make_path(parts: list[Part], kind: str, seed: int, frames: int) -> np.ndarray:
    """A smooth camera path through a town of `make_town`, clear of everything and looking at houses rather than sky.

    kind: walk (eye level, along the road), orbit (around a point of the road, above the roofs), flyover (along the
    road, above the roofs) or rise (up from the road). Returns c2w [frames, 4, 4] float64, OpenGL axes, Z-up world.
    Speed does not depend on `frames`. Raises InputError when no such path is found.
    """
    draw = {"walk": draw_walk, "orbit": draw_orbit, "flyover": draw_flyover, "rise": draw_rise}[kind]
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1 + PATHS.index(kind)]))
    arcs = np.arange(frames) / ARC_STEPS  # time, in arcs
    everything = triangles_of(parts)
    terrain = triangles_of([part for part in parts if part.kind in TERRAIN])
    for _ in range(50):
        c2w = look_at(*draw(rng, parts, arcs), np.array([0.0, 0, 1]), kind)
        eyes = c2w[:, :3, 3]
        if is_over(terrain, eyes) and is_clear(everything, eyes) and has_view(everything, c2w):
            return c2w
    raise InputError(f"no {kind} of {frames} frames through this town keeps clear of it; try fewer frames or a seed")


def draw_walk(rng: np.random.Generator, parts: list[Part], arcs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eyes and the points they look at, both [F, 3]; so do the other draw functions. arcs [F]: time."""
    way = rng.choice((-1, 1))
    length = min(rng.uniform(7, 10) * arcs[-1], 1.3 * ROAD_END)
    start = -way * (length / 2 + rng.uniform(2, 12))
    eyes = along_road(parts, start, start + way * length, arcs)
    sway = rng.uniform(2, 3)
    eyes[:, 0] += rng.uniform(0.5, 1.5) * _swing(rng, arcs, sway)
    eyes[:, 2] = rng.uniform(1.9, 2.6) + 0.3 * _swing(rng, arcs, sway)
    yaw = way * np.pi / 2 + np.radians(rng.uniform(16, 26)) * _swing(rng, arcs, rng.uniform(1.8, 2.6))
    return eyes, eyes + np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw + rng.uniform(-0.02, 0.06)], axis=1)


def draw_orbit(rng: np.random.Generator, parts: list[Part], arcs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    focus = np.array([0, rng.uniform(-12, 12), 2])
    angle = rng.uniform(0, 2 * np.pi) + rng.choice((-1, 1)) * np.radians(rng.uniform(18, 30)) * arcs
    radius, height = rng.uniform(26, 36), top_of(parts) + rng.uniform(2, 7)
    height = height + 1.5 * _swing(rng, arcs, 3)
    return np.stack([radius * np.cos(angle), focus[1] + radius * np.sin(angle), height], axis=1), 0 * angle[
        :, None
    ] + focus


def draw_flyover(rng: np.random.Generator, parts: list[Part], arcs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    way = rng.choice((-1, 1))
    length = min(rng.uniform(9, 14) * arcs[-1], 1.6 * ROAD_END)
    start = -way * (length / 2 + rng.uniform(15, 25))
    eyes = along_road(parts, start, start + way * length, arcs)
    eyes += np.stack([rng.uniform(2, 8) * _swing(rng, arcs, 3), 0 * arcs, _swing(rng, arcs, 3)], axis=1)
    eyes[:, 2] += top_of(parts) + rng.uniform(2, 5)
    yaw = way * np.pi / 2 + np.radians(rng.uniform(8, 16)) * _swing(rng, arcs, 2.5)
    return eyes, eyes + np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw - rng.uniform(0.28, 0.42)], axis=1)


def draw_rise(rng: np.random.Generator, parts: list[Part], arcs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    way = rng.choice((-1, 1))
    start = -way * rng.uniform(14, 30)
    eyes = along_road(parts, start, start + way * rng.uniform(-3, 3) * arcs[-1], arcs)
    progress = arcs / max(arcs[-1], 2)
    eyes[:, 2] = rng.uniform(1.8, 2.2) + rng.uniform(10, 16) * progress**2 * (3 - 2 * progress)
    focus = along_road(parts, start + way * 22, start + way * 22, arcs)
    focus[:, 2] = 2.5
    focus[:, 0] += rng.uniform(7, 11) * _swing(rng, arcs, rng.uniform(2, 3))
    return eyes, focus


def _swing(rng: np.random.Generator, arcs: np.ndarray, period: float) -> np.ndarray:
    """A sine of random phase over time [F], its period in arcs."""
    return np.sin(2 * np.pi * arcs / period + rng.uniform(0, 2 * np.pi))


def along_road(parts: list[Part], start: float, end: float, arcs: np.ndarray) -> np.ndarray:
    """Points [F, 3] over the middle of the road while y goes steadily from start to end; z = 0."""
    road = next(part for part in parts if part.kind == "road")
    middle = road.vertices.reshape(-1, 4, 3).mean(axis=1)
    y = start + (end - start) * arcs / max(arcs[-1], 1e-9)
    # A polynomial, because the mesh's own line has corners.
    x = np.polynomial.Polynomial.fit(middle[:, 1], middle[:, 0], 9)(y)
    return np.stack([x, y, 0 * y], axis=1)


def top_of(parts: list[Part]) -> float:
    """Height of the highest roof or chimney."""
    return max(part.vertices[:, 2].max() for part in parts if part.kind in ("roof", "chimney"))


def is_over(terrain: np.ndarray, eyes: np.ndarray) -> bool:
    """Whether all eyes [F, 3] are above the terrain [N, 3, 3], and not beyond its border."""
    under = (terrain.min(axis=1) <= eyes.max(axis=0))[:, :2].all(axis=1)
    under &= (terrain.max(axis=1) >= eyes.min(axis=0))[:, :2].all(axis=1)
    down = np.broadcast_to((0.0, 0.0, -1.0), eyes.shape)
    return bool(np.isfinite(cast(eyes, down, terrain[under])).all())


def is_clear(triangles: np.ndarray, eyes: np.ndarray) -> bool:
    """Whether all eyes [F, 3] are at least CLEARANCE from all triangles [N, 3, 3]."""
    center = triangles.mean(axis=1)
    reach = np.linalg.norm(triangles - center[:, None], axis=2).max(axis=1) + CLEARANCE
    near, eye = np.nonzero(((center[:, None] - eyes) ** 2).sum(axis=2) < reach[:, None] ** 2)
    return bool((distances(eyes[eye], triangles[near]) >= CLEARANCE).all())


def has_view(triangles: np.ndarray, c2w: np.ndarray) -> bool:
    """Whether the first and last view of every arc show far more town than sky, and no large object close up."""
    x, y = np.meshgrid((np.arange(6) + 0.5) / 3 - 1, (np.arange(4) + 0.5) / 2 - 1)
    wide = np.tan(np.radians(FIELD_OF_VIEW / 2))
    rays = np.stack([wide * x, wide * y * IMAGE_SIZE[1] / IMAGE_SIZE[0], 0 * x - 1], axis=-1).reshape(-1, 3)
    for pose in [*c2w[::ARC_STEPS], c2w[-1]]:
        t = cast(np.broadcast_to(pose[:3, 3], rays.shape), rays @ pose[:3, :3].T, triangles)
        if np.isfinite(t).mean() < MIN_COVER or np.median(t) < MIN_VIEW:
            return False
    return True


def triangles_of(parts: list[Part]) -> np.ndarray:
    """Corners of all faces, [N, 3, 3]."""
    return np.concatenate([part.vertices[part.faces] for part in parts])


def cast(origins: np.ndarray, directions: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """First hits [R] of rays (origins and directions [R, 3]), in lengths of the direction; inf where there is none."""
    a, ab, ac = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    normal = np.cross(ab, ac)
    # With m = origin x direction, all products are matrix products: determinant, edges and distance of Cramer's rule.
    with np.errstate(divide="ignore", invalid="ignore"):
        det = -directions @ normal.T
        moment = np.cross(origins, directions)
        u = (moment @ ac.T - directions @ np.cross(ac, a).T) / det
        v = (directions @ np.cross(ab, a).T - moment @ ab.T) / det
        t = (origins @ normal.T - (a * normal).sum(axis=1)) / det
        return np.where((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0), t, np.inf).min(axis=1, initial=np.inf)


def distances(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Distance of each point [N, 3] from its own triangle [N, 3, 3]."""
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    inside, nearest = np.ones(len(points), bool), np.full(len(points), np.inf)
    for k in range(3):
        edge, to_point = triangles[:, (k + 1) % 3] - triangles[:, k], points - triangles[:, k]
        inside &= (np.cross(edge, to_point) * normal).sum(axis=1) >= 0
        share = np.clip((edge * to_point).sum(axis=1) / (edge * edge).sum(axis=1), 0, 1)
        nearest = np.minimum(nearest, np.linalg.norm(to_point - share[:, None] * edge, axis=1))
    return np.where(inside, abs(((points - triangles[:, 0]) * normal).sum(axis=1)), nearest)


# --- Files -----------------------------------------------------------------------------------------------------------


def export_glb(parts: list[Part], path: Path) -> None:
    """Write the town as a GLB, a named mesh and node for each part. Y up: (x, y, z) becomes (x, z, -y)."""
    import trimesh  # only here: towns for training need no files

    scene = trimesh.Scene()
    for part in parts:
        vertices = part.vertices @ np.array([(1, 0, 0), (0, 0, -1), (0, 1, 0)], float)
        mesh = trimesh.Trimesh(vertices, part.faces, process=False)
        scene.add_geometry(mesh, node_name=part.name, geom_name=part.name)
    with atomic_path(path) as temporary:
        temporary.write_bytes(scene.export(file_type="glb", include_normals=False))  # none: every face is flat


def to_camera_path(
    c2w: np.ndarray, size: tuple[int, int] = IMAGE_SIZE, fov: float = FIELD_OF_VIEW, fps: float = 24.0
) -> CameraPath:
    """Poses c2w [F, 4, 4] with the same intrinsics. size: width, height in pixels; fov: degrees across."""
    count, focal = len(c2w), size[0] / 2 / np.tan(np.radians(fov / 2))
    center = np.tile((size[0] / 2, size[1] / 2), (count, 1))
    return CameraPath(c2w, np.full((count, 2), focal), center, size, "+z", tuple(range(1, count + 1)), fps)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.scenes")
    parser.add_argument("--output", type=Path, required=True, help="folder for scene.glb and cameras.json")
    parser.add_argument("--seed", type=non_negative_int, default=SAMPLE_SEED, help="of the town and of the path")
    parser.add_argument("--path", choices=PATHS, default=SAMPLE_PATH, help="how the camera moves")
    parser.add_argument("--frames", type=positive_int, default=SAMPLE_FRAMES, help="45 for each arc, and one more")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    scene, cameras = args.output / SCENE_FILE, args.output / CAMERAS_FILE
    for path in (scene, cameras):
        if path.exists() and not args.overwrite:
            raise InputError(f"{path} exists already; pass --overwrite to replace it, or choose another --output")
    require_writable(args.output)
    parts = make_town(args.seed)
    c2w = make_path(parts, args.path, args.seed, args.frames)
    export_glb(parts, scene)
    write_transforms(cameras, to_camera_path(c2w))
    print(f"scene: {scene} ({len(parts)} meshes, {sum(len(part.faces) for part in parts)} triangles)")
    print(f"cameras: {cameras} ({args.path}, {args.frames} frames)")


if __name__ == "__main__":
    run_script(main)
