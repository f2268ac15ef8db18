"""Preprocessing: a coarse scene and a camera path become arcs of edges, correspondences and noise (stage 0).

    python preprocess.py --scene scene.glb --cameras cameras.json --output assets/myscene --preview
    python preprocess.py --scene scene.glb --path orbit --num_arcs 2 --output assets/myscene

An arc is one interval of 45 steps; a path of another length is resampled evenly in time. Look at OUTPUT/preview
before you spend hours on a GPU. The same command continues an interrupted run, arc by arc.
"""

import argparse
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.cameras.builtin import builtin_path
from utils.cameras.check import suspicions
from utils.cameras.path import CameraPath, to_arcs
from utils.cameras.read import read_cameras, write_transforms
from utils.cameras.values import AXES
from utils.cameras.viewers import write_camera_path
from utils.cameras.world import settle_up
from utils.cli import (
    InputError,
    Parser,
    non_negative_int,
    positive_float,
    positive_int,
    require_writable,
    run_script,
    size,
    unit_float,
)
from utils.correspondence import encode_map, write_map
from utils.edges import DETECTORS, check_edge_detector, edge_detector
from utils.files import atomic_path
from utils.images import unreadable_size, write_image
from utils.layout import (
    ARC_FRAMES,
    CAMERAS_FILE,
    LATENT_FRAMES,
    PASSES_FOLDER,
    PREVIEW_FOLDER,
    REFERENCE_LATENT_SIZE,
    SCENE_FILE,
    SCENE_MANIFEST,
    Arc,
    count_arcs,
    fit_sizes,
    latent_frame_numbers,
    same_aspect,
)
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, turn
from utils.meshes.write import write_glb
from utils.noise import write_noise
from utils.particles import elements_per_cell, warp_noise
from utils.runs import Run, open_run
from utils.scene.arcs import choose_num_arcs
from utils.scene.lines import find_lines, make_line_scene, shade, soften
from utils.scene.passes.draw import PICTURES
from utils.scene.passes.write import check_passes, write_passes
from utils.scene.preview import write_preview
from utils.scene.raycast import RayCaster
from utils.scene.survey import survey
from utils.scene.views import View, correspondence, make_views

FPS = 24  # default for animated cameras
SMALLEST_EDGES = 16  # pixels
AUTO = "auto"
MIN_COVISIBLE, MAX_ARCS = 0.5, 64  # defaults of --num_arcs auto
FILES = ARC_FRAMES + LATENT_FRAMES  # edges, maps and corres_end.png of an arc
ARC_FOLDERS = tuple("arc" + digits * "[0-9]" for digits in range(1, 5))
OWNED = (*ARC_FOLDERS, SCENE_FILE, CAMERAS_FILE, SCENE_MANIFEST, PREVIEW_FOLDER, PASSES_FOLDER)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--scene", type=Path, required=True, help="mesh: GLB, glTF, OBJ, PLY, STL or OFF")
    cameras_help = "transforms.json, camera_path.json, keyframes, COLMAP folder, cameras.json of splats, GLB, or .txt"
    add("--cameras", type=Path, help=f"{cameras_help}; see docs/preprocessing.md")
    add("--path", choices=["orbit", "dolly", "flythrough"], help="a built-in path around the scene, without --cameras")
    add("--output", type=Path, required=True, help="scene folder to write")
    arcs_help = f"arcs of 45 steps, or {AUTO}: as few as share --min_covisible (default: as many as fit the path)"
    add(
        "--num_arcs",
        type=lambda text: text if text == AUTO else positive_int(text),
        metavar=f"N|{AUTO}",
        help=arcs_help,
    )
    covisible_help = "share of an anchor that the one before shows as well, at least, for --num_arcs auto"
    add("--min_covisible", type=unit_float, default=MIN_COVISIBLE, help=covisible_help)
    add("--max_arcs", type=positive_int, default=MAX_ARCS, help="arcs, at most, for --num_arcs auto")
    add("--fps", type=positive_int, help="frames per second of an animated camera (default 24), and of the preview")
    add("--frames", metavar="A:B", help="use frames A to B of the cameras only, by number")
    add("--edges", choices=DETECTORS, default="lines", help="lines of the geometry, or the HED network on a render")
    add("--edge_size", type=size, default="1080x720", help="WIDTHxHEIGHT of the edge frames in pixels")
    follows = "(default: follows from --edge_size;"
    add("--map_size", type=size, help=f"WIDTHxHEIGHT of the correspondence maps in pixels {follows} 360x240)")
    add("--latent_size", type=size, help=f"WIDTHxHEIGHT of the noise in cells that divide the maps {follows} 90x60)")
    add("--scene_up", choices=["y", "z"], help="up axis of the mesh (default: the file's, y for glTF and OBJ, else z)")
    add("--cameras_up", choices=["y", "z"], help="up axis of the cameras' world (default: the file's `world_up`)")
    add("--camera_axes", choices=AXES, help="axes of the cameras (default: the format's; opencv has +y down)")
    add("--fov", type=positive_float, help="vertical field of view in degrees, for TUM trajectories")
    add("--no_sky", action="store_true", help="no correspondences where nothing is hit, as in the reference")
    passes_help = "further pictures of every frame, to control video models; may be added to a finished scene"
    add("--passes", nargs="+", action="extend", choices=PICTURES, default=[], help=passes_help)
    exr_help = "also write depth, normals, positions and motion as floats, by OpenEXR"
    add("--exr", dest="passes", action="append_const", const="exr", default=argparse.SUPPRESS, help=exr_help)
    add("--seed", type=non_negative_int, default=0, help="seed of the noise")
    add("--threads", type=positive_int, default=os.cpu_count() or 1, help="frames worked on at a time")
    add("--preview", action="store_true", help="also write a contact sheet, an mp4 of the edges and a view from above")
    add("--write_camera_path", type=Path, help="also write the path as camera_path.json for nerfstudio's viewer")
    add("--overwrite", action="store_true", help="replace arcs that were made with other arguments")
    return parser.parse_args(argv)


def read_path(args: argparse.Namespace) -> CameraPath:
    """Read the file of --cameras, cut to --frames."""
    path = read_cameras(
        args.cameras,
        args.cameras_up and f"+{args.cameras_up}",
        args.fps or FPS,
        size=args.edge_size,
        fov=args.fov,
        axes=args.camera_axes,
    )
    if args.camera_axes is None and args.cameras.suffix.lower() not in (".glb", ".gltf"):  # glTF fixes its axes
        for warning in suspicions(path):
            print(f"warning: {args.cameras}: {warning}", file=sys.stderr)
    return path.subset(*map(int, args.frames.split(":"))) if args.frames else path


def open_path(args: argparse.Namespace, geometry: Geometry) -> tuple[Callable[[int | None], CameraPath], str]:
    """The camera path as a function of the number of arcs, None for as many as fit, and the up axis of its world."""
    if args.path:
        bounds = np.stack([geometry.vertices.min(0), geometry.vertices.max(0)])
        about = bounds, geometry.up
        return lambda count: builtin_path(args.path, *about, count or 1, args.fps or FPS, args.edge_size), geometry.up
    path = read_path(args)
    return partial(to_arcs, path), path.up


def sample_path(
    args: argparse.Namespace, path_of: Callable[[int | None], CameraPath], geometry: Geometry
) -> CameraPath:
    """The path with 45 N + 1 poses, with intrinsics for the edge frames. geometry: in the cameras' world."""
    count = args.num_arcs
    if count == AUTO:
        count, shares = choose_num_arcs(RayCaster(geometry), path_of, args.min_covisible, args.max_arcs)
        print(f"note: {count} arcs; their anchors share {', '.join(f'{share:.0%}' for share in shares)}")
        if min(shares) < args.min_covisible:
            print(f"warning: --max_arcs {args.max_arcs} is too few for --min_covisible {args.min_covisible}")
    path = path_of(count)
    if path.size[0] * args.edge_size[1] != path.size[1] * args.edge_size[0]:
        print("note: cameras are {}x{}, edges {}x{}: width of view kept".format(*path.size, *args.edge_size))
    lens = path.intrinsics(*args.edge_size)
    return replace(path, focal=lens[:, :2], center=lens[:, 2:], size=args.edge_size)


def choose_sizes(args: argparse.Namespace) -> None:
    """Fill in the sizes of maps and latents that are not given. Raises InputError for sizes that do not fit."""
    edges, follows = "--edge_size {}x{}".format(*args.edge_size), args.latent_size is None
    if min(args.edge_size) < SMALLEST_EDGES:
        raise InputError(f"{edges}: at least {SMALLEST_EDGES} pixels a side are needed")
    if reason := unreadable_size(args.edge_size):
        raise InputError(f"{edges}: {reason}, which no script reads")
    args.map_size, args.latent_size = fit_sizes(args.edge_size, args.map_size, args.latent_size)
    elements_per_cell(args.map_size, args.latent_size)
    if not same_aspect(args.edge_size, args.map_size):
        fitting = "maps of {}x{} and latents of {}x{}".format(*sum(fit_sizes(args.edge_size), ()))
        raise InputError("{} and maps of {}x{} differ in aspect ratio; {} fit".format(edges, *args.map_size, fitting))
    if follows and args.latent_size != REFERENCE_LATENT_SIZE:
        (map_width, map_height), (width, height) = args.map_size, args.latent_size
        print(
            f"note: {edges} gives maps of {map_width}x{map_height} and latents of {width}x{height}, for a video of "
            f"{8 * width}x{8 * height}; the released in-between weights make 720x480 only, from edges of 3:2"
        )


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for arguments that are wrong whatever the files hold."""
    check_edge_detector(args.edges)
    check_passes(args.passes)
    if bool(args.cameras) == bool(args.path):
        raise InputError("give either --cameras FILE or --path orbit|dolly|flythrough")
    if args.path and (args.frames or args.cameras_up or args.camera_axes or args.fov):
        raise InputError("--frames, --cameras_up, --camera_axes and --fov go with --cameras, not with --path")
    if args.num_arcs != AUTO and (args.min_covisible, args.max_arcs) != (MIN_COVISIBLE, MAX_ARCS):
        raise InputError(f"--min_covisible and --max_arcs go with --num_arcs {AUTO}")
    if args.frames and not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", args.frames):
        raise InputError(f"--frames {args.frames} is not A:B, two frame numbers in order")
    for given, own in ((args.scene, SCENE_FILE), (args.cameras, CAMERAS_FILE)):
        if given and given.resolve() == (args.output / own).resolve():
            raise InputError(f"{given} would be replaced by the one that is written; choose another --output")
    if args.write_camera_path:
        written, output = args.write_camera_path.resolve(), args.output.resolve()
        is_input = written in [given.resolve() for given in (args.scene, args.cameras) if given]
        in_output = [path for path in (written, *written.parents) if path.parent == output]
        is_result = any(path.match(pattern) for path in in_output for pattern in OWNED)
        if written.is_dir() or is_input or is_result:
            raise InputError(
                f"--write_camera_path {args.write_camera_path} is a folder, an input or a result; name another file"
            )
        require_writable(written.parent)


def result_arguments(args: argparse.Namespace, geometry: Geometry, path: CameraPath) -> dict:
    """The flags, and hashes of mesh and path (not of their files), that decide the arcs."""
    chosen = {key: getattr(args, key) for key in ("edges", "edge_size", "map_size", "latent_size", "no_sky", "seed")}
    return chosen | {
        "scene_sha256": _sha256(geometry.vertices, geometry.faces, geometry.components, geometry.smooth),
        "cameras_sha256": _sha256(path.c2w, path.focal, path.center),
    }


def look_hash(geometry: Geometry) -> str:
    """Hash of what a mesh's arcs do not depend on, but its passes and the scene file do: names and normals."""
    names = np.frombuffer("\0".join(geometry.names).encode(), np.uint8)
    normals = () if geometry.corner_normals is None else (geometry.corner_normals,)
    return _sha256(geometry.objects, names, *normals)


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def prepare(args: argparse.Namespace) -> tuple[Geometry, CameraPath, Run]:
    """Read and check everything: the mesh in the cameras' world, the sampled path, the run. Fills in sizes."""
    check_arguments(args)
    choose_sizes(args)
    geometry = load_geometry(args.scene, args.scene_up and f"+{args.scene_up}")
    path_of, world_up = open_path(args, geometry)
    geometry, note = settle_up(geometry, args.scene, args.cameras, world_up)
    for line in (*([note] if note else ()), *geometry.notes):
        print(f"note: {line}", file=sys.stderr)
    geometry = turn(geometry, world_up)
    path = sample_path(args, path_of, geometry)
    for kind, count in geometry.dropped.items():
        if count:
            print(f"note: {count} {kind} faces of {args.scene} are left out")
    arguments = result_arguments(args, geometry, path)
    run = open_run(args.output, arguments, overwrite=args.overwrite, owned=OWNED, manifest_name=SCENE_MANIFEST)
    look = look_hash(geometry)
    if run.manifest.setdefault("look_sha256", look) != look:
        raise InputError(
            f"{args.scene} has other names or normals than when {args.output} was made; pass --overwrite to replace it"
        )
    return geometry, path, run


def main() -> None:
    args = parse_args()
    geometry, path, run = prepare(args)
    if args.write_camera_path:
        write_camera_path(args.write_camera_path, path)
    arcs = [Arc(i, args.output / f"arc{i}") for i in range(count_arcs(len(path.c2w)))]
    if not run.replaces:
        require_whole(arcs)
    if run.finished and all(arc.folder.is_dir() for arc in arcs):
        write_inputs(args.output, geometry, path, replace=False)
        print(f"{args.output} is finished")
    else:
        make_scene(args, geometry, path, arcs, run)
    if args.passes:
        views = make_views(path, args.edge_size), make_views(path, args.map_size)
        shown = {"sky": not args.no_sky, "fps": args.fps or path.fps, "threads": args.threads}
        write_passes([*dict.fromkeys(args.passes)], geometry, views, arcs, run, **shown)
    if args.preview:
        write_preview(args.output, geometry, path, args.fps or path.fps)
    print(args.output)


def require_whole(arcs: Sequence[Arc]) -> None:
    """Raise InputError if a file of an arc that was finished has gone."""
    for arc in arcs:
        missing = [path for path in arc.input_paths if not path.exists()] if arc.folder.is_dir() else []
        if missing:
            raise InputError(
                f"{missing[0]} is missing, one of {len(missing)}: delete {arc.folder}, and it is made again"
            )


def write_inputs(folder: Path, geometry: Geometry, path: CameraPath, *, replace: bool) -> None:
    """Write the scene and the cameras as they were used. replace: files that are there, too."""
    for name, write, value in ((SCENE_FILE, write_glb, geometry), (CAMERAS_FILE, write_transforms, path)):
        if replace or not (folder / name).exists():
            write(folder / name, value)


def make_scene(args: argparse.Namespace, geometry: Geometry, path: CameraPath, arcs: list[Arc], run: Run) -> None:
    """Write all missing arcs, and the scene and cameras as they were used."""
    caster = RayCaster(geometry)
    views = make_views(path, args.edge_size), make_views(path, args.map_size)
    found = survey(caster, views[1])
    for warning in found.warnings:
        print(f"warning: {warning}")
    draw = edge_drawer(args.edges, geometry, caster, found.typical_depth)
    run.begin(flags=vars(args), faces=len(geometry.faces), dropped_faces=geometry.dropped, warnings=found.warnings)
    write_inputs(args.output, geometry, path, replace=True)
    statistics = run.manifest.get("arcs", {})
    with (
        ThreadPoolExecutor(args.threads) as pool,
        tqdm(total=FILES * len(arcs), desc="preprocess", unit="file") as bar,
    ):
        for arc in arcs:
            if not (str(arc.index) in statistics and arc.folder.is_dir()):
                statistics[str(arc.index)] = make_arc(args, arc, caster, views, draw, pool, bar)
                run.save(arcs=statistics)
            bar.update(FILES * (arc.index + 1) - bar.n)
    run.finish()


def edge_drawer(
    name: str, geometry: Geometry, caster: RayCaster, typical_depth: float
) -> Callable[[View], np.ndarray]:
    """A function that draws the soft edges of a view, uint8 [H, W, 3]."""
    if name == "hed":
        detect = edge_detector(name)
        return lambda view: detect(shade(caster, view))
    scene = make_line_scene(geometry, caster)
    return lambda view: soften(find_lines(scene, view), typical_depth)


def make_arc(
    args: argparse.Namespace,
    arc: Arc,
    caster: RayCaster,
    views: tuple[list[View], list[View]],
    draw: Callable[[View], np.ndarray],
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> dict[str, float]:
    """Write one arc, completely or not at all; returns its statistics."""
    edge_views, map_views = views
    numbers = latent_frame_numbers(arc.first, arc.last)
    pairs = [*itertools.pairwise(numbers), (arc.first, arc.last)]

    def report(value):
        bar.update()
        return value

    with atomic_path(arc.folder) as folder:
        partial = Arc(arc.index, folder)
        edges = pool.map(lambda n: draw(edge_views[n - 1]), range(arc.first, arc.last + 1))
        maps = pool.map(lambda p: correspondence(caster, *(map_views[n - 1] for n in p), sky=not args.no_sky), pairs)
        density = [_write_edges(path, report(image)) for path, image in zip(partial.edge_paths, edges, strict=True)]
        found = [report(one) for one in maps]
        for path, one in zip([*partial.corres_paths, partial.corres_end_path], found, strict=True):
            write_map(path, encode_map(one.position, one.visible))
        noise = warp_noise(
            [(one.position, one.visible) for one in found[:-1]], args.latent_size, [args.seed, arc.index]
        )
        write_noise(partial.noise_path(args.latent_size), noise)
    return {
        # Share of the last frame's pixels whose point the first frame shows as well: with sky, and surfaces only.
        "covisible_share": round(float(found[-1].visible.mean()), 4),
        "covisible_surface_share": round(float((found[-1].visible & found[-1].hit).mean()), 4),
        # Between latent frames: share of pixels whose surface was inside the previous picture but hidden.
        "occluded_share": round(float(np.mean([one.occluded.mean() for one in found[:-1]])), 4),
        "edge_density": round(float(np.mean(density)), 4),  # share of pixels above 127
    }


def _write_edges(path: Path, image: np.ndarray) -> float:
    """Write an edge frame; returns its share of bright pixels."""
    write_image(path, image)
    return float((image[..., 0] > 127).mean())


if __name__ == "__main__":
    run_script(main)
