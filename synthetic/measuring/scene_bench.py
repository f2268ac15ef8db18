"""A test scene in a test style, and the three stages of the method on it, as the scripts run them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from models.flux.alignment import Alignment
from models.flux.anchors import Anchor, AnchorStage
from models.flux.lora import LoraState, read_loras
from models.inbetween.stage import ArcInputs, InbetweenStage
from models.inbetween.stages import CogVideoXStage
from models.loading.networks import component_config
from models.precision import MIXED
from models.runtime.runtime import plain_runtime
from models.runtime.training import fit
from models.settings import AnchorSettings, InbetweenSettings
from models.weights import Preset
from synthetic.measuring.round_trips import as_rgb, image_round_trip
from synthetic.measuring.scenes import ANCHORS, CheckScene
from synthetic.measuring.settings import Settings
from synthetic.reference_views import find_reference, town_world_and_views
from synthetic.render import paint, trace
from synthetic.styles import Style, make_style
from utils.data.references import Reference, load_references
from utils.edges import edge_detector
from utils.images import write_image
from utils.layout import ARC_FRAMES, checkpoint_lora_paths, resample_indices
from utils.runs import open_run

REFERENCE_SIZE = (1080, 720)  # width, height in pixels
REFERENCE_SEEDS = 500_000  # offset from a scene's seed to the seed of its reference's town


@dataclass(frozen=True)
class Unit:
    """A test scene in a test style. number: the scene's, in the benchmark. The reference shows another town."""

    number: int
    scene_seed: int
    style_seed: int

    @property
    def name(self) -> str:
        return f"{self.scene_seed}_{self.style_seed}"


def choose_units(scenes: int, seeds: int, first_scene: int, first_style: int) -> list[Unit]:
    """`seeds` styles for each of `scenes` scenes; no two units share a style."""
    return [Unit(i, first_scene + i, first_style + i * seeds + j) for i in range(scenes) for j in range(seeds)]


@dataclass(frozen=True)
class DrawnAnchors:
    """Three anchors each, uint8 [3, H, W, 3]: independent (free) or guided by the previous anchor, with LoRAs or
    without (base), and the true ones encoded and decoded by the image VAE."""

    free: np.ndarray
    guided: np.ndarray
    base_free: np.ndarray
    base_guided: np.ndarray
    vae: np.ndarray


class SceneBench:
    """Everything that the parts of one unit share: pictures of the scene, the reference, and the anchors drawn."""

    def __init__(self, unit: Unit, preset: Preset, paths: dict[str, Path], settings: Settings, folder: Path):
        self.unit, self.preset, self.paths, self.settings = unit, preset, paths, settings
        self.size = preset.image_size
        self.folder = folder / "units" / unit.name
        place = unit.scene_seed, unit.number, self.size, folder / "scenes"
        self.scene = CheckScene(*place, settings.coarse, settings.loop)
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
        """The reference and its edges, read from a file, as by the script."""
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
    def drawn(self) -> DrawnAnchors:
        return draw_anchors(self)

    # --- the three stages ---

    def align(self, settings: Settings) -> list[LoraState]:
        """Train the LoRAs of transformer and ControlNet on the reference; as saved: bfloat16, under peft's names."""
        wanted = settings.alignment(self.unit.style_seed)
        runtime = plain_runtime(self.preset, "alignment", MIXED[wanted.mixed_precision])
        alignment = Alignment(runtime, self.paths, [self.reference], wanted, self.preset.resolution)
        configs = [component_config(name, self.paths[name]) for name in ("flux_transformer", "controlnet")]
        with TemporaryDirectory() as folder:
            fit(open_run(Path(folder) / "run", {}), alignment, wanted.training(), quiet=True)
            files = checkpoint_lora_paths(Path(folder) / "run" / f"checkpoint-{wanted.max_train_steps}")
            return read_loras({"": files}, configs)[""]

    def anchor_stage(self, settings: AnchorSettings, loras: Sequence[LoraState] = ()) -> AnchorStage:
        """The image model, with the LoRAs of one style or none."""
        runtime = plain_runtime(self.preset, "anchors", self.preset.dtype)
        stage = AnchorStage(runtime, self.paths, {"style": loras} if loras else {}, [self.prompt], settings)
        if loras:
            stage.put_on("style")
        return stage

    def draw(self, stage: AnchorStage, edges: np.ndarray, *before: np.ndarray, **given: object) -> np.ndarray:
        """One anchor, uint8 [H, W, 3]. edges: uint8 [H, W]. before: the previous anchor, and the map from it.

        given: what else an Anchor holds.
        """
        anchor = Anchor(1, as_rgb(edges), self.prompt, self.unit.style_seed, *before, **given)
        return stage.decode(stage.draw(anchor).latents)

    def inbetween_stage(self, settings: InbetweenSettings) -> InbetweenStage:
        runtime, transformer = plain_runtime(self.preset, "ggi", self.preset.dtype), Path(self.preset.ggi_transformer)
        stage = CogVideoXStage(runtime, self.paths, transformer, [self.prompt], settings, self.preset.video_size)
        stage.pipe.set_progress_bar_config(disable=True)
        return stage

    @cached_property
    def inbetween(self) -> InbetweenStage:
        return self.inbetween_stage(self.settings.inbetween())

    def first_arc(self, start: np.ndarray, end: np.ndarray) -> ArcInputs:
        """The arc between the first two anchors. start, end: uint8 [H, W, 3]."""
        arc = self.scene.arc
        return ArcInputs(0, start, end, as_rgb(arc.edges), arc.noise, self.prompt)


def fill(stage: InbetweenStage, arc: ArcInputs, conditions: torch.Tensor | None = None) -> np.ndarray:
    """Generate the arc's frames, uint8 [46, H, W, 3]. conditions: replace the arc's own."""
    return stage.decode(stage.denoise(arc, conditions))[:ARC_FRAMES]


def without_edges(arc: ArcInputs) -> ArcInputs:
    return dataclasses.replace(arc, edges=np.zeros_like(arc.edges))


def without_end(conditions: torch.Tensor) -> torch.Tensor:
    """The same conditions with zeros in place of the end anchor: [1, 13, 32, h, w]."""
    taken = conditions.clone()
    taken[:, -1, : conditions.shape[2] // 2] = 0
    return taken


def draw_anchors(bench: SceneBench) -> DrawnAnchors:
    data = bench.scene.anchors

    def free_and_guided(stage: AnchorStage) -> tuple[np.ndarray, np.ndarray]:
        free = [bench.draw(stage, edges) for edges in data.edges]
        guided = free[:1]
        for edges, code in zip(data.edges[1:], data.codes, strict=True):
            guided.append(bench.draw(stage, edges, guided[-1], code))
        return np.array(free), np.array(guided)

    bare = bench.anchor_stage(bench.settings.anchors())
    vae = image_round_trip(bare.models.vae, bench.true_anchors[0])
    aligned = bench.anchor_stage(bench.settings.anchors(), bench.align(bench.settings))
    return DrawnAnchors(*free_and_guided(aligned), *free_and_guided(bare), vae)
