"""One unit of the benchmark: a test scene in a test style, measured part by part.

A part that is finished is kept on disk with its figures and with what they depend on. Pictures to look at lie beside
it: anchors.png, video.png, and the chain as video.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from models.weights import FLUX_STAGE, GGI_STAGE, Preset, weight_hashes
from synthetic.measuring import figures
from synthetic.measuring.round_trips import (
    AnchorStage,
    Paths,
    VideoStage,
    align,
    as_rgb,
    image_round_trip,
    load_image_vae,
    load_video_models,
    load_video_vae,
    video_round_trip,
    without_end,
)
from synthetic.measuring.scenes import ANCHORS, CheckScene
from synthetic.measuring.settings import Settings
from synthetic.reference_views import find_reference, town_world_and_views
from synthetic.render import paint, trace
from synthetic.styles import Style, make_style
from utils.cli import InputError
from utils.data.references import Reference, load_references
from utils.edges import edge_detector
from utils.files import read_json, write_json
from utils.images import contact_sheet, write_image, write_video
from utils.layout import ARC_FRAMES, resample_indices

REFERENCE_SIZE = (1080, 720)  # width, height in pixels
REFERENCE_SEEDS = 500_000  # from a scene's seed to that of the town its reference shows
SHEET_COLUMNS = 8
FPS = 12
VERSION = 3  # of what is measured; figures of another version are measured again

Figures = dict[str, float]


@dataclass(frozen=True)
class Unit:
    """number: of its scene in the benchmark. The reference shows another town, in the same style."""

    number: int
    scene_seed: int
    style_seed: int

    @property
    def name(self) -> str:
        return f"{self.scene_seed}_{self.style_seed}"


def choose_units(scenes: int, seeds: int, first_scene: int, first_style: int) -> list[Unit]:
    """`seeds` styles for each of `scenes` scenes; no two units share a style."""
    return [Unit(i, first_scene + i, first_style + i * seeds + j) for i in range(scenes) for j in range(seeds)]


class Workbench:
    """Everything that the parts of one unit share: pictures of the scene, the reference, and the anchors drawn."""

    def __init__(self, unit: Unit, preset: Preset, paths: Paths, settings: Settings, folder: Path):
        self.unit, self.preset, self.paths, self.settings = unit, preset, paths, settings
        self.size = preset.image_size
        self.folder = folder / "units" / unit.name
        self.scene = CheckScene(unit.scene_seed, unit.number, self.size, folder / "scenes")
        self.style: Style = make_style(unit.style_seed)
        self.prompt = settings.prompt_of(self.style.caption)

    @cached_property
    def true_anchors(self) -> tuple[np.ndarray, np.ndarray]:
        return self.scene.anchor_pictures(self.style)

    @cached_property
    def true_arc(self) -> np.ndarray:
        return self.scene.arc_pictures(self.style)

    @cached_property
    def reference(self) -> Reference:
        """The reference and its edges, read from a file as the script reads them."""
        path = self.folder / "reference.png"
        write_image(path, find_reference(self.unit.scene_seed + REFERENCE_SEEDS, self.style, REFERENCE_SIZE))
        detect = edge_detector(self.preset.edges)
        return load_references([path], [self.prompt], [], detect, self.preset.resolution)[0]

    @cached_property
    def other_pictures(self) -> list[np.ndarray]:
        """Views of the reference's town, as many as there are anchors: what a copy of the reference would resemble."""
        world, views = town_world_and_views(self.unit.scene_seed + REFERENCE_SEEDS, self.size)
        chosen = [views[i] for i in resample_indices(len(views), len(ANCHORS))]
        return [paint(trace(world, view), self.style) for view in chosen]

    @cached_property
    def drawn(self) -> "DrawnAnchors":
        return draw_anchors(self)

    @cached_property
    def video_stage(self) -> VideoStage:
        arc = self.scene.arc
        models = load_video_models(self.paths, self.preset, self.prompt)
        return VideoStage(models, self.settings, arc.edges, arc.noise)


@dataclass(frozen=True)
class DrawnAnchors:
    """Three anchors each, uint8 [3, H, W, 3]: independent ones and ones that follow the anchor before, with LoRAs and
    without (base), and the true ones after the image VAE."""

    free: np.ndarray
    guided: np.ndarray
    base_free: np.ndarray
    base_guided: np.ndarray
    vae: np.ndarray


def draw_anchors(bench: Workbench) -> DrawnAnchors:
    data, seed = bench.scene.anchors, bench.unit.style_seed
    stage = AnchorStage(bench.paths, bench.preset, bench.settings, bench.prompt, seed)

    def free_and_guided() -> tuple[np.ndarray, np.ndarray]:
        free = [stage.draw(edges) for edges in data.edges]
        guided = free[:1]
        for edges, code in zip(data.edges[1:], data.codes, strict=True):
            guided.append(stage.draw(edges, guided[-1], code))
        return np.array(free), np.array(guided)

    vae = image_round_trip(stage.models.vae, bench.true_anchors[0])
    base = free_and_guided()
    stage.put_in(align(bench.paths, bench.preset, bench.reference, bench.settings, seed))
    return DrawnAnchors(*free_and_guided(), *base, vae)


# --- parts ---


def measure_image_vae(bench: Workbench) -> Figures:
    truth, _ = bench.true_anchors
    seen = image_round_trip(load_image_vae(bench.paths, bench.preset), truth)
    return {"image_vae_psnr": figures.video_psnr(seen, truth)}


def measure_video_vae(bench: Workbench) -> Figures:
    vae, truth, edges = load_video_vae(bench.paths, bench.preset), bench.true_arc, as_rgb(bench.scene.arc.edges)
    video, edge_video = (video_round_trip(vae, one, bench.preset.num_frames) for one in (truth, edges))
    return {
        "video_vae_psnr": figures.video_psnr(video, truth),
        "edge_vae_psnr": figures.video_psnr(edge_video, edges),
        "gain_vae": gain(video, truth),
    }


def gain(frames: np.ndarray, truth: np.ndarray) -> float:
    """How much closer to the truth, in dB, than cross-fading the true anchors. Both uint8 [46, H, W, 3]."""
    faded = figures.crossfade(truth[0], truth[-1], len(truth))
    return figures.inbetween_psnr(frames, truth) - figures.inbetween_psnr(faded, truth)


def measure_anchors(bench: Workbench) -> Figures:
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
    """Mean of a measure over rows, those left out that it cannot say anything about (NaN)."""
    values = [value for row in zip(*columns, strict=True) if not np.isnan(value := measure(*row))]
    return float(np.mean(values)) if values else float("nan")


def measure_inbetween(bench: Workbench) -> Figures:
    stage, truth = bench.video_stage, bench.true_arc
    start, end = truth[0], truth[-1]
    conditions = stage.conditions(start, end)
    filled = {
        "inbetween_gain_db": stage.fill(conditions),
        "gain_no_edges": stage.fill(stage.conditions(start, end, edges=False)),
        "gain_no_end": stage.fill(without_end(conditions)),
        "gain_no_warp": stage.fill(conditions, degradation=1.0),
    }
    faded = figures.crossfade(start, end, ARC_FRAMES)
    rows = [("truth", truth), ("between true anchors", filled["inbetween_gain_db"]), ("cross-fade", faded)]
    rows += [(name.replace("gain_", "").replace("_", " "), frames) for name, frames in list(filled.items())[1:]]
    write_video_sheet(bench.folder / "video.png", [("edges", bench.scene.arc.edges), *rows])
    values = {name: gain(frames, truth) for name, frames in filled.items()}
    return values | {"last_frame_psnr": figures.psnr(filled["inbetween_gain_db"][-1], end)}


def measure_chain(bench: Workbench) -> Figures:
    stage, drawn, truth = bench.video_stage, bench.drawn, bench.true_arc
    start, end = drawn.guided[:2]
    videos = {
        "chain_fidelity": stage.fill(stage.conditions(start, end)),
        "chain_no_align": stage.fill(stage.conditions(*drawn.base_guided[:2])),
        "chain_no_replace": stage.fill(stage.conditions(start, drawn.free[1])),
        "chain_no_ggi": figures.crossfade(start, end, ARC_FRAMES),
        "chain_no_edges": stage.fill(stage.conditions(start, end, edges=False)),
    }
    write_video_sheet(bench.folder / "chain.png", [("truth", truth), *videos.items()])
    beside = np.concatenate([videos["chain_fidelity"], truth], axis=2)
    write_video(bench.folder / "chain.mp4", np.repeat(np.repeat(beside, 3, axis=1), 3, axis=2), FPS)
    return {name: figures.video_psnr(frames, truth) for name, frames in videos.items()}


@dataclass(frozen=True)
class Part:
    """measure: its figures. components: weights that decide them; with_transformer: and the in-between transformer.
    scene_data: which drawings of the scene it needs, attributes of CheckScene."""

    measure: Callable[[Workbench], Figures]
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


def write_anchor_sheet(bench: Workbench) -> None:
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
    """What decides the figures of a part, as JSON values."""
    names = [*part.components, *["transformer"] * part.with_transformer]
    identity = {"version": VERSION, "unit": vars(unit), "settings": dataclasses.asdict(settings)}
    return json.loads(json.dumps(identity | {"weights": {name: hashes[name] for name in names}}))


def read_entries(unit: Unit, folder: Path) -> dict[str, dict]:
    """{part: {"identity": …, "figures": …}} of all parts on disk. A missing or damaged file holds none."""
    try:
        return read_json(result_path(unit, folder))
    except InputError:
        return {}


def finished_parts(
    unit: Unit, names: Iterable[str], settings: Settings, hashes: Mapping[str, dict], folder: Path
) -> dict[str, Figures]:
    """{part: figures} of those of the named parts that were measured under these very conditions."""
    entries = read_entries(unit, folder)
    identities = {name: part_identity(PARTS[name], unit, settings, hashes) for name in names}
    return {
        name: entries[name]["figures"]
        for name, identity in identities.items()
        if name in entries and entries[name]["identity"] == identity
    }


def hash_weights(names: Iterable[str], paths: Paths, preset: Preset) -> dict[str, dict]:
    """Hashes of the weights that the named parts use. Raises InputError when some of them are not there."""
    used = {component: paths[component] for name in names for component in PARTS[name].components}
    if any(PARTS[name].with_transformer for name in names):
        used["transformer"] = Path(preset.ggi_transformer)
    hashes = weight_hashes(used)
    for name, path in used.items():
        if not hashes[name]:
            raise InputError(f"{name}: {path} holds no weights")
    return hashes


def measure_unit(
    unit: Unit, names: Iterable[str], preset: Preset, paths: Paths, settings: Settings, hashes: dict, folder: Path
) -> Figures:
    """Measure the named parts, and return their figures; each is added to the unit's file as soon as it is there."""
    bench = Workbench(unit, preset, paths, settings, folder)
    measured = {}
    for name in names:
        started = time.process_time()
        values = PARTS[name].measure(bench)
        identity = part_identity(PARTS[name], unit, settings, hashes)
        entry = {"identity": identity, "figures": values, "cpu_seconds": round(time.process_time() - started, 1)}
        write_json(result_path(unit, folder), read_entries(unit, folder) | {name: entry})
        measured |= values
    return measured
