"""Write the passes of a scene: one file per frame in each arc, one video per pass, one table of objects.

arc0/normal/0001.png ... 0046.png   and so on for every pass; exr/0001.exr ...
passes/normal.mp4 ...               all frames of the path
passes/ids.json                     the colour of every object
"""

import errno
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.cli import InputError
from utils.files import atomic_path, write_json
from utils.images import find_ffmpeg, write_png
from utils.layout import ARC_STEPS, LATENT_FRAMES, PASSES_FOLDER, Arc
from utils.meshes.mesh import Geometry
from utils.runs import Run, clear_leftovers
from utils.scene.lines import LineScene, make_line_scene
from utils.scene.passes.draw import PASSES, Frame, Stage, depth_range, make_stage
from utils.scene.preview import write_path_video
from utils.scene.raycast import RayCaster
from utils.scene.views import View, look

VIDEO, IDS = PASSES_FOLDER + "/{}.mp4", f"{PASSES_FOLDER}/ids.json"
FAST = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP)  # a third of the time


def check_passes(names: Sequence[str]) -> None:
    """Raise InputError if a program or library that these passes need is missing."""
    if "exr" in names and find_spec("OpenEXR") is None:
        raise InputError("--exr needs OpenEXR: pip install -r requirements-exr.txt")
    if any(PASSES[name].video for name in names):
        find_ffmpeg()


def write_passes(
    names: Sequence[str],
    geometry: Geometry,
    views: tuple[Sequence[View], Sequence[View]],
    arcs: Sequence[Arc],
    run: Run,
    *,
    sky: bool,
    fps: float,
    threads: int,
) -> None:
    """Write what is missing of some passes, and say in the manifest what their values mean.

    names: of PASSES. views: of every frame at the size of the edges, and at the size of the maps, which range of
    depth is found from.
    """
    caster = RayCaster(geometry)
    limits = depth_range(caster, views[1][:: ARC_STEPS // (LATENT_FRAMES - 1)]) if "depth" in names else None
    if "depth" in names:
        run.save(depth=limits and {"near": limits[0], "far": limits[1], "unit": PASSES["depth"].unit})
    scene = make_line_scene(geometry, caster) if "lines" in names else LineScene(geometry, caster, None)
    stage = make_stage(scene, limits, sky=sky)
    with ThreadPoolExecutor(threads) as pool:
        for arc in tqdm(arcs, desc=", ".join(names), unit="arc"):
            clear_leftovers(arc.folder)
            for _ in pool.map(partial(_write_frame, names, stage, views[0], arc), range(ARC_STEPS + 1)):
                pass
    if "ids" in names:
        *colours, sky_colour = stage.colours.tolist()
        objects = dict(zip(geometry.names, colours, strict=True))
        write_json(run.folder / IDS, {"sky": sky_colour, "objects": objects})
    _write_videos(names, arcs, run, fps)
    size = [views[0][0].width, views[0][0].height]
    run.save(passes=run.manifest.get("passes", {}) | {name: _describe(name, size, limits, fps) for name in names})


def _describe(name: str, size: list[int], limits: tuple[float, float] | None, fps: float) -> dict[str, object]:
    """What the manifest says of a pass."""
    entry = PASSES[name].about() | {"size": size}
    if name == "depth" and limits:
        entry |= {"near": limits[0], "far": limits[1]}
    if name == "ids":
        entry |= {"table": IDS}
    return entry | {"video": VIDEO.format(name), "fps": fps} if PASSES[name].video else entry


def _write_videos(names: Sequence[str], arcs: Sequence[Arc], run: Run, fps: float) -> None:
    """Write the videos that are missing, or have another rate."""
    if (run.folder / PASSES_FOLDER).is_dir():
        clear_leftovers(run.folder / PASSES_FOLDER)
    known = run.manifest.get("passes", {})
    for name in names:
        path = run.folder / VIDEO.format(name)
        if PASSES[name].video and not (path.exists() and known.get(name, {}).get("fps") == fps):
            write_path_video(path, [arc.pass_paths(name) for arc in arcs], fps)


def _write_frame(names: Sequence[str], stage: Stage, views: Sequence[View], arc: Arc, number: int) -> None:
    """Write those passes of a frame of an arc that are missing. number: from 0."""
    paths = {name: arc.pass_paths(name)[number] for name in names}
    missing = {name: path for name, path in paths.items() if not path.exists()}
    if not missing:
        return
    first, last, here = arc.first - 1, arc.last - 1, arc.first - 1 + number
    following = views[here + 1] if here + 1 < len(views) else None
    frame = Frame(stage, look(stage.scene.caster, views[here]), following, (views[first], views[last]))
    for name, path in missing.items():
        write_pass(path, PASSES[name].draw(frame))


def write_pass(path: Path, values: np.ndarray | dict[str, np.ndarray]) -> None:
    """Write a picture, or floats by channel, atomically."""
    if isinstance(values, dict):
        write_exr(path, values)
    else:
        write_png(path, values, *FAST)


def write_exr(path: Path, channels: dict[str, np.ndarray]) -> None:
    """Write an OpenEXR file, atomically. channels: float32 [H, W] each."""
    import OpenEXR

    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    with atomic_path(path) as temporary:
        try:
            OpenEXR.File(header, dict(channels)).write(str(temporary))  # it replaces the values
        except RuntimeError as error:
            raise OSError(errno.EIO, f"cannot write the whole file ({error})", str(path)) from error
