"""All metrics of a video in one place: their names, units and directions, and one function that measures them.

    targets = load_targets(load_scene(folder), size)          # once per scene and video size
    values = measure(frames, targets, reference=reference, truth=truth)

`values` has an entry for every metric of METRICS: a number, or a Missing that says what it needs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.evaluation import networks as learned
from utils.evaluation.consistency import anchor_error, flicker, seams, temporal_error
from utils.evaluation.covisibility import DISTANCES, Covisibility, Progress, make_covisibility, silent
from utils.evaluation.pictures import (
    colour_distance,
    line_score,
    psnr,
    scene_lines,
    ssim,
    texture_distance,
    video_lines,
)
from utils.layout import Scene
from utils.scene.raycast import RayCaster
from utils.scene.scene_geometry import load_scene_geometry, missing_geometry
from utils.scene.views import View


@dataclass(frozen=True)
class Metric:
    """unit, range: text for reports. better: 'higher', 'lower', or 'near 1'."""

    name: str
    unit: str
    range: str
    better: str


METRICS = (
    Metric("structure_precision", "share", "0 … 1", "higher"),
    Metric("structure_recall", "share", "0 … 1", "higher"),
    Metric("structure_f1", "share", "0 … 1", "higher"),
    Metric("structure_psnr_d", "dB", "0 … 100", "higher"),
    Metric("style_colour", "Delta E", "0 …", "lower"),
    Metric("style_texture", "Delta E", "0 …", "lower"),
    Metric("style_clip", "cosine", "-1 … 1", "higher"),
    Metric("anchors_error", "levels", "0 … 255", "lower"),
    *(Metric(f"temporal_{distance}", "levels", "0 … 255", "lower") for distance in DISTANCES),
    Metric("flicker", "levels", "0 … 261", "lower"),
    Metric("seams", "ratio", "0 …", "near 1"),
    Metric("fidelity_psnr", "dB", "0 … 100", "higher"),
    Metric("fidelity_ssim", "share", "-1 … 1", "higher"),
    Metric("fidelity_lpips", "distance", "0 …", "lower"),
)


@dataclass(frozen=True)
class Missing:
    """The reason why a metric has no value: 'needs …', or what the video lacks."""

    reason: str


Value = float | Missing


@dataclass(frozen=True)
class Targets:
    """What a video of one size is measured against, for one scene.

    lines: bool [F, h, 720], the scene's one-pixel lines. views: F views at the video's size; caster: casts rays at the
    mesh. The geometric fields are None if the scene has no mesh or no cameras; `without` then says which.
    """

    lines: np.ndarray
    caster: RayCaster | None
    views: list[View] | None
    covisibility: Covisibility | None
    without: str = ""


def load_targets(scene: Scene, size: tuple[int, int], progress: Progress = silent) -> Targets:
    """Lines and geometry of a scene for videos of a size (width, height in pixels).

    Raises InputError when the mesh or the cameras are damaged, or do not belong to the edges.
    """
    views = caster = covisibility = None
    if not (missing := missing_geometry(scene)):
        geometry = load_scene_geometry(scene, size, "consistency")
        views, caster = geometry.views, geometry.caster
        covisibility = make_covisibility(caster, views, progress)
    edges = [path for arc in scene.arcs for path in arc.edge_paths[bool(arc.index) :]]
    lines = scene_lines(edges, size, progress)
    return Targets(lines, caster, views, covisibility, missing)


def measure(
    frames: np.ndarray,
    targets: Targets,
    *,
    reference: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    networks: bool = True,
    progress: Progress = silent,
) -> dict[str, Value]:
    """Compute every metric of METRICS, in order.

    frames, truth: uint8 [F, H, W, 3]. reference: uint8 [h, w, 3], of any size. networks: include metrics that need
    downloaded weights, if these are in the cache.
    """
    score = line_score(video_lines(frames, progress), targets.lines)
    values: dict[str, Value] = {f"structure_{name}": getattr(score, name) for name in ("precision", "recall", "f1")}
    values |= _style(frames, reference) | _consistency(frames, targets) | _fidelity(frames, truth, progress)
    values |= _learned(frames, targets, reference, truth) if networks else {}
    values = {metric.name: values.get(metric.name, Missing("not asked for")) for metric in METRICS}
    return {name: _or_missing(name, value) for name, value in values.items()}


def _style(frames: np.ndarray, reference: np.ndarray | None) -> dict[str, Value]:
    if reference is None:
        return dict.fromkeys(("style_colour", "style_texture"), Missing("needs --reference"))
    return {
        "style_colour": colour_distance(frames, reference),
        "style_texture": texture_distance(frames, reference),
    }


def _consistency(frames: np.ndarray, targets: Targets) -> dict[str, Value]:
    along: dict[str, Callable[[np.ndarray, Covisibility], float]] = {"anchors_error": anchor_error}
    for distance in DISTANCES:
        along[f"temporal_{distance}"] = lambda f, c, distance=distance: temporal_error(f, c, distance)
    along |= {"flicker": flicker, "seams": seams}
    if targets.covisibility is None:
        return dict.fromkeys(along, Missing(f"needs {targets.without}"))
    return {name: function(frames, targets.covisibility) for name, function in along.items()}


def _fidelity(frames: np.ndarray, truth: np.ndarray | None, progress: Progress) -> dict[str, Value]:
    if truth is None:
        return dict.fromkeys(("fidelity_psnr", "fidelity_ssim"), Missing("needs --ground_truth"))
    return {"fidelity_psnr": psnr(frames, truth), "fidelity_ssim": ssim(frames, truth, progress)}


def _learned(
    frames: np.ndarray, targets: Targets, reference: np.ndarray | None, truth: np.ndarray | None
) -> dict[str, Value]:
    some = slice(None, None, learned.EVERY)

    def depth() -> float:
        network = learned.load_depth()
        found = np.stack([network(frame) for frame in frames[some]])
        return learned.depth_psnr(found, np.stack([inverse_depth(targets.caster, v) for v in targets.views[some]]))

    def attempt(measured: Callable[[], float], needs: str) -> Value:
        if needs:
            return Missing(f"needs {needs}")
        try:
            return measured()
        except learned.Unavailable as error:
            return Missing(f"needs {error}")

    return {
        "structure_psnr_d": attempt(depth, targets.without),
        "style_clip": attempt(
            lambda: learned.load_clip()(frames[some], reference), "--reference" if reference is None else ""
        ),
        "fidelity_lpips": attempt(
            lambda: learned.load_lpips()(frames[some], truth[some]), "--ground_truth" if truth is None else ""
        ),
    }


def inverse_depth(caster: RayCaster, view: View) -> np.ndarray:
    """1 / planar depth of each pixel, float64 [H, W], 1 / metres; 0 where nothing is hit."""
    rays = view.rays().reshape(-1, 3)
    return (1 / caster.plane_depth(caster.cast(view.eye, rays), view.eye, rays)).reshape(view.height, view.width)


UNDEFINED = {  # what a NaN means
    "structure": "the video or the scene has no lines",
    "anchors": "neighbouring anchors share too few pixels",
    "temporal": "frames share too few pixels",
    "flicker": "frames share too few pixels",
    "seams": "needs two arcs with some change",
    "fidelity": "needs frames of 11x11 pixels",
}


def _or_missing(name: str, value: Value) -> Value:
    if isinstance(value, float) and math.isnan(value):
        return Missing(UNDEFINED[name.split("_")[0]])
    return value
