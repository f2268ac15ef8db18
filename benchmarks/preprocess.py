"""Speed of work on geometry: CPU and wall seconds, memory, and ratios of times, which hold on other machines too.

    python -m benchmarks.preprocess [--scene assets/sampleA/scene.glb --cameras assets/sampleA/cameras.json]

Every time is the median of 3. The scene is subdivided up to --max_faces triangles, which changes the mesh's size but
no picture; each size runs in its own process, so that its peak memory is its own. Measured: an edge frame takes as
long as 15 to 20 maps, a frame of all passes, drawn and written, as long as 6 to 9, two anchors carried to a view as
long as 1.6 to 1.8, and the noise of an arc 1 to 2 times as long as its 12 maps; with 256 times the triangles, a map
takes 1.3 times and a frame up to 1.5 times as long.
Threads are timed in wall seconds: use an idle machine.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.cameras.read import read_cameras
from utils.cli import Parser, positive_int, run_script
from utils.layout import ARC_STEPS
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, turn
from utils.particles import warp_noise
from utils.scene.carry import Picture, carry
from utils.scene.lines import LineScene, find_lines, make_line_scene, shade, soften
from utils.scene.passes.draw import PASSES, PICTURES, Frame, depth_range, make_stage
from utils.scene.passes.write import write_pass
from utils.scene.raycast import RayCaster
from utils.scene.views import View, correspondence, look, make_views

EDGE_SIZE, MAP_SIZE, LATENT_SIZE, PASS_SIZE = (1080, 720), (360, 240), (90, 60), (720, 480)
MAPS, FRAMES = 12, 4  # how many of each are timed together
REPEATS = 3


def subdivide(geometry: Geometry) -> Geometry:
    """Split every face into four at the middles of its sides; the surface stays the same."""
    corners, count = geometry.vertices[geometry.faces], len(geometry.faces)
    middles = [(corners[:, i] + corners[:, (i + 1) % 3]) / 2 for i in range(3)]
    a, b, c = (len(geometry.vertices) + i * count + np.arange(count) for i in range(3))
    u, v, w = geometry.faces.T
    faces = np.concatenate([np.stack(f, axis=1) for f in ((u, a, c), (v, b, a), (w, c, b), (a, b, c))])
    four = {name: np.tile(getattr(geometry, name), 4) for name in ("objects", "components", "smooth")}
    return replace(
        geometry, vertices=np.concatenate([geometry.vertices, *middles]), faces=faces, corner_normals=None, **four
    )


def median_seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median over REPEATS runs, after one to warm up. clock: `process_time` (CPU, all threads) or `perf_counter`."""
    work()
    times = []
    for _ in range(REPEATS):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def draw_passes(scene: LineScene, views: Sequence[View]) -> Callable[[], None]:
    """A function that draws all pictures of FRAMES frames of the first arc, and writes them."""
    stage = make_stage(scene, depth_range(scene.caster, views[::ARC_STEPS]))
    numbers = [i * (ARC_STEPS - 1) // (FRAMES - 1) for i in range(FRAMES)]

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for i in numbers:
                sight = look(scene.caster, views[i])
                frame = Frame(stage, sight, views[i + 1], (views[0], views[ARC_STEPS]))
                for name in PICTURES:
                    write_pass(Path(folder) / f"{name}.png", PASSES[name].draw(frame))

    return work


def measure(scene_path: Path, cameras_path: Path, splits: int) -> dict[str, float]:
    """Measure one mesh size, from loading to edge frames, in CPU seconds; threads in wall seconds."""
    path = read_cameras(cameras_path)
    start = time.process_time()
    geometry = turn(load_geometry(scene_path), path.up)
    for _ in range(splits):
        geometry = subdivide(geometry)
    caster = RayCaster(geometry)
    scene = make_line_scene(geometry, caster)
    build = time.process_time() - start
    maps, frames = make_views(path, MAP_SIZE), make_views(path, EDGE_SIZE)
    pairs = [(maps[4 * i], maps[4 * i + 4]) for i in range(MAPS)]
    views = [frames[i * (len(frames) - 1) // (FRAMES - 1)] for i in range(FRAMES)]

    def draw(view):
        return soften(find_lines(scene, view), typical_depth=5.0)

    def on_threads(count: int) -> float:
        with ThreadPoolExecutor(count) as pool:
            return median_seconds(lambda: list(pool.map(draw, views)), time.perf_counter)

    anchors = [Picture(shade(caster, view), view) for view in (maps[0], maps[ARC_STEPS])]
    found = [correspondence(caster, *pair) for pair in pairs]
    noise = [(one.position, one.visible) for one in found]
    return {
        "faces": len(geometry.faces),
        "build_s": build,
        "map_s": median_seconds(lambda: [correspondence(caster, *p) for p in pairs], time.process_time) / MAPS,
        "frame_s": median_seconds(lambda: [draw(view) for view in views], time.process_time) / FRAMES,
        "passes_s": median_seconds(draw_passes(scene, make_views(path, PASS_SIZE)), time.process_time) / FRAMES,
        "carry_s": median_seconds(lambda: [carry(caster, anchors, v) for _, v in pairs], time.process_time) / MAPS,
        "noise_s": median_seconds(lambda: warp_noise(noise, LATENT_SIZE, 0), time.process_time),
        "one_thread_s": on_threads(1),
        "two_threads_s": on_threads(2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def columns(row: dict[str, float], first: dict[str, float]) -> dict[str, str]:
    """The printed columns of a mesh size. first: the figures of the smallest. Ratios compare times of this run."""
    return {
        "triangles": f"{row['faces']}",
        "load+build s": f"{row['build_s']:.2f}",
        "maps/CPU s": f"{1 / row['map_s']:.1f}",
        "edge frames/CPU s": f"{1 / row['frame_s']:.2f}",
        "frames of passes/CPU s": f"{1 / row['passes_s']:.2f}",
        "views carried to/CPU s": f"{1 / row['carry_s']:.1f}",
        "noise CPU s/arc": f"{row['noise_s']:.2f}",
        "peak MiB": f"{row['peak_mib']:.0f}",
        "frame : map": f"{row['frame_s'] / row['map_s']:.2f}",
        "passes : map": f"{row['passes_s'] / row['map_s']:.2f}",
        "carrying : map": f"{row['carry_s'] / row['map_s']:.2f}",
        f"noise : {MAPS} maps": f"{row['noise_s'] / row['map_s'] / MAPS:.2f}",
        "1 : 2 threads": f"{row['one_thread_s'] / row['two_threads_s']:.2f}",
        "map : first": f"{row['map_s'] / first['map_s']:.2f}",
        "frame : first": f"{row['frame_s'] / first['frame_s']:.2f}",
    }


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, "python -m benchmarks.preprocess")
    parser.add_argument("--scene", type=Path, default=Path("assets/sampleA/scene.glb"), help="mesh to measure")
    parser.add_argument(
        "--cameras", type=Path, default=Path("assets/sampleA/cameras.json"), help="path of 49 poses or more"
    )
    parser.add_argument("--max_faces", type=positive_int, default=4_000_000, help="largest mesh, in triangles")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    splits, first = 0, None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        while True:
            row = pool.submit(measure, args.scene, args.cameras, splits).result()
            first = first or row
            shown = columns(row, first)
            if row is first:
                print("  ".join(shown), flush=True)
            print("  ".join(value.rjust(len(title)) for title, value in shown.items()), flush=True)
            splits += 1
            if 4 * row["faces"] > args.max_faces:
                break


if __name__ == "__main__":
    run_script(main)
