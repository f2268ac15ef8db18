"""Measure one unit of the benchmark, a test scene in a test style, part by part.

The figures of a finished part are saved together with everything that they depend on. Pictures to look at lie beside
them: anchors.png, video.png, and the chain as video.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from models.inbetween.pipeline import load_video_vae
from models.runtime.runtime import plain_runtime
from models.weights import FLUX_STAGE, GGI_STAGE, Preset
from synthetic.measuring import figures
from synthetic.measuring.round_trips import as_rgb, image_round_trip, load_image_vae, video_round_trip
from synthetic.measuring.scene_bench import SceneBench, Unit, fill, without_edges, without_end
from synthetic.measuring.settings import Settings
from utils.cli import InputError
from utils.evaluation.pictures import psnr
from utils.files import read_json, write_json
from utils.images import contact_sheet, write_image, write_video
from utils.layout import ARC_FRAMES, resample_indices

SHEET_COLUMNS = 8
FPS = 12
VERSION = 3  # of the measurements; figures of another version are measured again

Figures = dict[str, float]


# --- parts ---


def measure_image_vae(bench: SceneBench) -> Figures:
    truth, _ = bench.true_anchors
    runtime = plain_runtime(bench.preset, "anchors", bench.preset.dtype)
    seen = image_round_trip(load_image_vae(runtime, bench.paths), truth)
    return {"image_vae_psnr": psnr(seen, truth)}


def measure_video_vae(bench: SceneBench) -> Figures:
    vae = load_video_vae(plain_runtime(bench.preset, "ggi", bench.preset.dtype), bench.paths)
    truth, edges = bench.true_arc, as_rgb(bench.scene.arc.edges)
    video, edge_video = (video_round_trip(vae, one, bench.preset.num_frames) for one in (truth, edges))
    return {
        "video_vae_psnr": psnr(video, truth),
        "edge_vae_psnr": psnr(edge_video, edges),
        "gain_vae": gain(video, truth),
    }


def gain(frames: np.ndarray, truth: np.ndarray) -> float:
    """How much closer to the truth, in dB, than cross-fading the true anchors. Both uint8 [46, H, W, 3]."""
    faded = figures.crossfade(truth[0], truth[-1], len(truth))
    return figures.inbetween_psnr(frames, truth) - figures.inbetween_psnr(faded, truth)


def measure_anchors(bench: SceneBench) -> Figures:
    drawn, data, (truth, classes) = bench.drawn, bench.scene.anchors, bench.true_anchors
    correlation = partial(mean_of, figures.gradient_correlation)
    colour = partial(mean_of, figures.class_colour_error)

    def covisible(pictures: np.ndarray) -> float:
        sources, targets = pictures[:-1], pictures[1:]
        return mean_of(figures.covisible_error, sources, targets, data.positions, data.visible)

    write_anchor_sheet(bench)
    return {
        "edge_correlation": correlation(drawn.free, truth),
        "edge_correlation_shuffled": correlation(drawn.free, bench.other_pictures),
        "edge_correlation_base": correlation(drawn.base_free, truth),
        "edge_correlation_vae": correlation(drawn.vae, truth),
        "style_error": colour(drawn.free, truth, classes),
        "style_error_replacement": colour(drawn.guided[1:], truth[1:], classes[1:]),
        "style_error_base": colour(drawn.base_free, truth, classes),
        "style_error_vae": colour(drawn.vae, truth, classes),
        "covisible_error_replacement": covisible(drawn.guided),
        "covisible_error": covisible(drawn.free),
        "covisible_error_base_replacement": covisible(drawn.base_guided),
        "covisible_error_base": covisible(drawn.base_free),
        "covisible_error_vae": covisible(drawn.vae),
    }


def mean_of(measure: Callable[..., float], *columns: Iterable) -> float:
    """Mean of a measure over rows; rows where it is NaN do not count."""
    values = [value for row in zip(*columns, strict=True) if not np.isnan(value := measure(*row))]
    return float(np.mean(values)) if values else float("nan")


def measure_inbetween(bench: SceneBench) -> Figures:
    stage, truth = bench.inbetween, bench.true_arc
    start, end = truth[0], truth[-1]
    arc = bench.first_arc(start, end)
    conditions = stage.conditions(arc)
    filled = {
        "inbetween_gain_db": fill(stage, arc, conditions),
        "gain_no_edges": fill(stage, without_edges(arc)),
        "gain_no_end": fill(stage, arc, without_end(conditions)),
        "gain_no_warp": fill(stage.with_settings(degradation=1.0), arc, conditions),
    }
    faded = figures.crossfade(start, end, ARC_FRAMES)
    rows = [("truth", truth), ("between true anchors", filled["inbetween_gain_db"]), ("cross-fade", faded)]
    rows += [(name.replace("gain_", "").replace("_", " "), frames) for name, frames in list(filled.items())[1:]]
    write_video_sheet(bench.folder / "video.png", [("edges", bench.scene.arc.edges), *rows])
    values = {name: gain(frames, truth) for name, frames in filled.items()}
    return values | {"last_frame_psnr": psnr(filled["inbetween_gain_db"][-1:], end[None])}


def measure_chain(bench: SceneBench) -> Figures:
    stage, drawn, truth = bench.inbetween, bench.drawn, bench.true_arc
    start, end = drawn.guided[:2]
    arc = bench.first_arc(start, end)
    videos = {
        "chain_fidelity": fill(stage, arc),
        "chain_no_align": fill(stage, bench.first_arc(*drawn.base_guided[:2])),
        "chain_no_replace": fill(stage, bench.first_arc(start, drawn.free[1])),
        "chain_no_ggi": figures.crossfade(start, end, ARC_FRAMES),
        "chain_no_edges": fill(stage, without_edges(arc)),
    }
    write_video_sheet(bench.folder / "chain.png", [("truth", truth), *videos.items()])
    beside = np.concatenate([videos["chain_fidelity"], truth], axis=2)
    write_video(bench.folder / "chain.mp4", np.repeat(np.repeat(beside, 3, axis=1), 3, axis=2), FPS)
    return {name: psnr(frames, truth) for name, frames in videos.items()}


@dataclass(frozen=True)
class Part:
    """measure: computes its figures. components: weights that they depend on. with_transformer: whether they depend on
    the in-between transformer, too. scene_data: attributes of CheckScene that it needs."""

    measure: Callable[[SceneBench], Figures]
    components: tuple[str, ...]
    scene_data: tuple[str, ...] = ()
    with_transformer: bool = False


PARTS = {  # in the order in which they are measured
    "image_vae": Part(measure_image_vae, ("flux_vae",)),
    "video_vae": Part(measure_video_vae, ("cogvideox_vae",), ("arc",)),
    "anchors": Part(measure_anchors, FLUX_STAGE, ("anchors",)),
    "inbetween": Part(measure_inbetween, GGI_STAGE, ("arc",), True),
    "chain": Part(measure_chain, (*FLUX_STAGE, *GGI_STAGE), ("anchors", "arc"), True),
}


# --- sheets ---


def write_anchor_sheet(bench: SceneBench) -> None:
    """Reference, edges and anchors of all kinds above the truth."""
    drawn, (truth, _) = bench.drawn, bench.true_anchors
    rows = [
        ("reference and its edges", [bench.reference.image, bench.reference.edges]),
        ("edges", bench.scene.anchors.edges),
        ("anchors", drawn.guided),
        ("without replacement", drawn.free),
        ("without LoRA and replacement", drawn.base_free),
        ("truth", truth),
    ]
    write_image(bench.folder / "anchors.png", contact_sheet(rows, 288))


def write_video_sheet(path: Path, rows: list[tuple[str, np.ndarray]]) -> None:
    columns = resample_indices(ARC_FRAMES, SHEET_COLUMNS)
    write_image(path, contact_sheet([(label, [frames[i] for i in columns]) for label, frames in rows]))


# --- results on disk ---


def result_path(unit: Unit, folder: Path) -> Path:
    return folder / "units" / f"{unit.name}.json"


def part_identity(part: Part, unit: Unit, settings: Settings, hashes: Mapping[str, dict]) -> dict:
    """Everything that the figures of a part depend on, as JSON values."""
    names = [*part.components, *["transformer"] * part.with_transformer]
    identity = {"version": VERSION, "unit": vars(unit), "settings": dataclasses.asdict(settings)}
    return json.loads(json.dumps(identity | {"weights": {name: hashes[name] for name in names}}))


def read_entries(unit: Unit, folder: Path) -> dict[str, dict]:
    """{part: {"identity": …, "figures": …}} of all parts on disk. Empty if the file is missing or damaged."""
    try:
        return read_json(result_path(unit, folder))
    except InputError:
        return {}


def finished_parts(
    unit: Unit, names: Iterable[str], settings: Settings, hashes: Mapping[str, dict], folder: Path
) -> dict[str, Figures]:
    """{part: figures} of the named parts that were measured under the same conditions."""
    entries = read_entries(unit, folder)
    identities = {name: part_identity(PARTS[name], unit, settings, hashes) for name in names}
    return {
        name: entries[name]["figures"]
        for name, identity in identities.items()
        if name in entries and entries[name]["identity"] == identity
    }


def used_weights(names: Iterable[str], paths: dict[str, Path], preset: Preset) -> dict[str, Path]:
    """The weights that the named parts use."""
    used = {component: paths[component] for name in names for component in PARTS[name].components}
    if any(PARTS[name].with_transformer for name in names):
        used["transformer"] = Path(preset.ggi_transformer)
    return used


def measure_unit(
    unit: Unit,
    names: Iterable[str],
    preset: Preset,
    paths: dict[str, Path],
    settings: Settings,
    hashes: dict,
    folder: Path,
) -> Figures:
    """Measure the named parts, and return their figures; each part is added to the unit's file once measured."""
    bench = SceneBench(unit, preset, paths, settings, folder)
    measured = {}
    for name in names:
        started = time.process_time()
        values = PARTS[name].measure(bench)
        identity = part_identity(PARTS[name], unit, settings, hashes)
        entry = {"identity": identity, "figures": values, "cpu_seconds": round(time.process_time() - started, 1)}
        write_json(result_path(unit, folder), read_entries(unit, folder) | {name: entry})
        measured |= values
    return measured
