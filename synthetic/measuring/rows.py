"""One unit of the benchmark: a test scene in a test style, its videos by every method, and what they measure.

Results that several rows share are computed once and cached with the settings they depend on: LoRAs and true frames
per unit, anchors per setting of stage 2, a video per recipe, its metrics.

    OUTPUT/scenes/              edges, correspondences and noise of each scene
    OUTPUT/units/SCENE_STYLE/   reference.png, *.safetensors as above, METHOD.json with the metrics
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from models.flux.anchors import AnchorStage
from models.inbetween.pipeline import load_video_vae
from models.inbetween.stage import ArcInputs
from models.runtime.runtime import plain_runtime
from models.weights import FLUX_STAGE, GGI_STAGE
from synthetic.measuring import baselines, figures
from synthetic.measuring.methods import (
    AUTOENCODER,
    COPY,
    CROSSFADE,
    FULL,
    GGI,
    METHODS,
    PER_FRAME,
    REPROJECT,
    TRUTH,
    Method,
    made_as,
)
from synthetic.measuring.round_trips import as_rgb, video_round_trip
from synthetic.measuring.scene_bench import SceneBench, without_edges, without_end
from synthetic.measuring.scenes import ARCS
from synthetic.measuring.scenes import VERSION as SCENE_VERSION
from synthetic.measuring.settings import Settings
from utils.cli import InputError
from utils.data.tensor_cache import read_arrays, write_arrays
from utils.evaluation.measure import METRICS, Metric, Targets, measure
from utils.evaluation.pictures import psnr, ssim
from utils.files import read_json, write_json
from utils.images import read_image
from utils.layout import ARC_FRAMES, ARC_STEPS
from utils.scene.carry import CarriedVideo, anchors_for_arc, carry_to_anchor, carry_to_arc

VERSION = 2  # of what is made
CARRY_VERSION = 1  # of how anchors are carried
METRICS_VERSION = 2  # of what is measured; videos stay when it changes
END_FRAMES = 10  # at the end of every arc, the anchor's own frame included
NEAR_FRAMES = 3  # frames on either side of an anchor, where methods that carry anchors are flattered
LEARNED = ("structure_psnr_d", "style_clip", "fidelity_lpips")  # they need downloaded weights
BENCH_METRICS = (
    *(metric for metric in METRICS if metric.name not in LEARNED),
    Metric("end_psnr", "dB", "0 … 100", "higher"),
    Metric("away_psnr", "dB", "0 … 100", "higher"),
    Metric("away_ssim", "share", "-1 … 1", "higher"),
    Metric("class_colour", "levels", "0 … 255", "lower"),
    Metric("closure", "levels", "0 … 255", "lower"),
    Metric("cpu_seconds", "s", "0 …", "lower"),
)

ALIGN_SETTINGS = ("lora_steps", "learning_rate", "train_batch_size", "rank", "precision", "prompt")
ANCHOR_SETTINGS = ("prompt", "num_steps", "true_gs")
METHOD_SETTINGS = ("lora_steps", "num_inference_steps")  # those that a row may set otherwise
VIDEO_SETTINGS = ("prompt", "num_inference_steps", "guidance_scale")
LATER = ("guided", "composite", "colour_match", "sources", "true_anchors")  # in the identity of a video that has them
WEIGHT_PATHS = ("name", "flux", "controlnet", "cogvideox", "ggi_transformer")  # of a preset; hashes stand for them
OTHERS = ("wan", "video_sizes")  # of a preset, for another video model

Values = dict[str, float | None]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Truth:
    """frames: uint8 [91, H, W, 3]. classes: int8 [91, H, W], -1 where a pixel has several."""

    frames: np.ndarray
    classes: np.ndarray


class RowBench(SceneBench):
    """Makes what the rows of one unit need. hashes: of all weights, {component: …} with `transformer`.

    `loras`, `anchors` and `video` also give the CPU seconds that they cost when they were made.
    """

    def __init__(self, *scene, hashes: dict[str, dict]):
        super().__init__(*scene)
        self.hashes = hashes

    # --- what decides what ---

    def settings_of(self, method: Method) -> Settings:
        """The settings, with what the row sets otherwise."""
        own = {name: getattr(method, name) for name in METHOD_SETTINGS}
        return dataclasses.replace(self.settings, **{name: value for name, value in own.items() if value is not None})

    def _identity(
        self, settings: Sequence[str] = (), weights: Sequence[str] = (), method: Method = FULL, **others: object
    ) -> dict:
        preset = {k: v for k, v in dataclasses.asdict(self.preset).items() if k not in (*WEIGHT_PATHS, *OTHERS)}
        chosen = self.settings_of(method)
        entries = {
            "version": [VERSION, SCENE_VERSION],
            "unit": vars(self.unit),
            "preset": preset,
            "settings": {name: getattr(chosen, name) for name in settings},
            "weights": {name: self.hashes[name] for name in weights},
        }
        return json.loads(json.dumps(entries | others))

    @property
    def _regime(self) -> dict:
        """What the method's mesh adds to the identity of what is made with it."""
        return ({"coarse": self.settings.coarse} if self.settings.coarse else {}) | self._path

    @property
    def _path(self) -> dict:
        return {"loop": True} if self.settings.loop else {}

    def _named(self, name: str) -> str:
        coarse = self.settings.coarse
        return name + f"_coarse{coarse}" * bool(coarse) + "_loop" * self.settings.loop

    def _lora_identity(self, method: Method) -> dict:
        return self._identity(ALIGN_SETTINGS, FLUX_STAGE, method)

    def _anchor_identity(self, method: Method) -> dict:
        loras = self._lora_identity(method) if method.aligned else None
        others = {"loras": loras, "num_replacement": method.num_replacement, **self._regime}
        if method.sources != FULL.sources:
            others["sources"] = method.sources
        return self._identity(ANCHOR_SETTINGS, FLUX_STAGE, method, **others)

    def video_identity(self, method: Method) -> dict:
        """Everything that the frames of a row depend on."""
        recipe = {name: value for name, value in vars(method).items() if name not in METHOD_SETTINGS}
        recipe = {name: value for name, value in recipe.items() if name not in LATER or value != getattr(FULL, name)}
        if method.is_carried:
            recipe["carry"] = CARRY_VERSION
        recipe |= self._regime
        if method.kind == AUTOENCODER:
            return self._identity(weights=("cogvideox_vae",), recipe=recipe)
        if method.kind == TRUTH:
            return self._identity(recipe=recipe)
        anchors = None if method.true_anchors else self._anchor_identity(method)
        if method.kind != GGI:
            return self._identity(recipe=recipe, anchors=anchors)
        return self._identity(VIDEO_SETTINGS, (*GGI_STAGE, "transformer"), method, recipe=recipe, anchors=anchors)

    def _kept(
        self, name: str, identity: dict, make: Callable[[], Arrays], prepare: Callable[[], object] | None = None
    ) -> tuple[Arrays, float]:
        """Arrays from disk, made first where they are missing or others; and what making them cost, in CPU seconds.

        prepare: called before they are made, not part of the cost.
        """
        path = self.folder / f"{name}.safetensors"
        arrays = read_arrays(path, identity)
        if arrays is None:
            if prepare:
                prepare()
            started = time.process_time()
            arrays = make()
            arrays["cpu_seconds"] = np.array([time.process_time() - started])
            write_arrays(path, arrays, identity)
        return arrays, float(arrays.pop("cpu_seconds")[0])

    # --- what is made ---

    @cached_property
    def truth(self) -> Truth:
        def draw() -> Arrays:
            frames, classes = self.scene.path_pictures(self.style)
            return {"frames": frames, "classes": classes}

        name = "truth_loop" if self.settings.loop else "truth"
        return Truth(**self._kept(name, self._identity(**self._path), draw)[0])

    @cached_property
    def reference_picture(self) -> np.ndarray:
        """uint8 [720, 1080, 3], as it lies beside the results."""
        path = self.folder / "reference.png"
        if not path.is_file():
            _ = self.reference  # drawn and written
        return read_image(path)

    def loras(self, method: Method) -> tuple[list[dict[str, torch.Tensor]], float]:
        """Of transformer and ControlNet, in bfloat16."""
        settings = self.settings_of(method)

        def train() -> Arrays:
            states = self.align(settings)
            return {f"{k} {name}": t.float().numpy() for k, state in enumerate(states) for name, t in state.items()}

        name = f"loras_{settings.lora_steps}"
        arrays, cost = self._kept(name, self._lora_identity(method), train, prepare=lambda: self.reference)
        states: list[dict[str, torch.Tensor]] = [{}, {}]
        for key, array in arrays.items():
            number, name = key.split(" ", 1)
            states[int(number)][name] = torch.from_numpy(array).bfloat16()  # exact: that is how they were saved
        return states, cost

    def stage_of(self, method: Method) -> AnchorStage:
        settings = self.settings_of(method).anchors(method.num_replacement)
        return self.anchor_stage(settings, self.loras(method)[0] if method.aligned else ())

    def anchors(self, method: Method) -> tuple[np.ndarray, float]:
        """uint8 [3, H, W, 3]. Each follows the one before, unless the method has no replacement."""
        steps, data = method.num_replacement, self.scene.anchors
        if method.aligned:
            self.loras(method)  # not part of this cost

        def draw() -> Arrays:
            stage = self.stage_of(method)
            drawn = [self.draw(stage, data.edges[0])]
            for k, (edges, code) in enumerate(zip(data.edges[1:], data.codes, strict=True), 1):
                if method.sources == "all":
                    known = dict(enumerate(drawn))
                    carried = carry_to_anchor(self.scene.world.caster, self.scene.views, known, k)
                    drawn.append(self.draw(stage, edges, carried=carried))
                else:
                    drawn.append(self.draw(stage, edges, *((drawn[-1], code) if steps else ())))
            return {"anchors": np.array(drawn)}

        of = f"aligned_{self.settings_of(method).lora_steps}" if method.aligned else "base"
        of += "_all" if method.sources == "all" else ""
        arrays, cost = self._kept(self._named(f"anchors_{of}_{steps}"), self._anchor_identity(method), draw)
        return arrays["anchors"], cost

    def video(self, name: str) -> tuple[np.ndarray, float | None]:
        """Frames of a row, uint8 [91, H, W, 3], and the CPU seconds of all stages; None for the true frames."""
        method = METHODS[name]
        if method.kind == TRUTH:
            return self.truth.frames, None
        anchors, anchor_cost = self.anchors(method) if method.has_anchors else (self.truth.frames[::ARC_STEPS], 0.0)
        lora_cost = self.loras(method)[1] if method.has_loras else 0.0
        make = {
            PER_FRAME: lambda: baselines.per_frame(partial(self.draw, self.stage_of(method)), self.scene.path.edges),
            CROSSFADE: lambda: baselines.crossfade(anchors),
            COPY: lambda: baselines.copy(anchors),
            AUTOENCODER: self._round_trip,
            REPROJECT: lambda: baselines.reproject(anchors, self.scene.world.caster, self.scene.views),
        }.get(method.kind, lambda: self._fill(method, anchors))
        identity = self.video_identity(method)
        arrays, cost = self._kept(self._named(f"video_{made_as(name)}"), identity, lambda: {"frames": make()})
        return arrays["frames"], lora_cost + anchor_cost + cost

    def _fill(self, method: Method, anchors: np.ndarray) -> np.ndarray:
        """All arcs by the in-between model, as ggi.py does it."""
        settings = self.settings_of(method)
        changes = {"degradation": method.degradation, "chain": method.chain, "colour_match": method.colour_match}
        changes |= {"num_replacement": min(method.guided, settings.num_inference_steps), "composite": method.composite}
        stage = self.inbetween_stage(settings.inbetween(**changes))
        path, video, start = self.scene.path, [], anchors[0]
        for arc in range(ARCS):
            edges = as_rgb(path.edges[ARC_STEPS * arc :][:ARC_FRAMES])
            carried = self._carry(anchors, arc, method) if method.is_carried else None
            inputs = ArcInputs(arc, start, anchors[arc + 1], edges, path.noise[arc], self.prompt, carried)
            conditions = stage.conditions(inputs if method.edges else without_edges(inputs))
            frames = stage.decode(stage.denoise(inputs, conditions if method.end else without_end(conditions)))
            start = frames[-1] if method.chain else anchors[arc + 1]
            # Of a frame that two arcs share, the earlier arc's is kept, as in ggi.py's video.
            video.append(stage.finish(frames[:ARC_FRAMES], inputs)[bool(arc) :])
        return np.concatenate(video)

    def _carry(self, anchors: np.ndarray, arc: int, method: Method) -> CarriedVideo:
        pictures = {k: anchors[k] for k in anchors_for_arc(arc, method.sources, len(anchors))}
        return carry_to_arc(self.scene.world.caster, self.scene.views, pictures, arc)

    def _round_trip(self) -> np.ndarray:
        """The true frames through the video VAE, arc by arc."""
        vae = load_video_vae(plain_runtime(self.preset, "ggi", self.preset.dtype), self.paths)
        arcs = [self.truth.frames[ARC_STEPS * arc :][:ARC_FRAMES] for arc in range(ARCS)]
        seen = [video_round_trip(vae, arc, self.preset.num_frames) for arc in arcs]
        return np.concatenate([arc[bool(k) :] for k, arc in enumerate(seen)])

    # --- what is measured ---

    def measure(self, name: str) -> Values:
        """{metric of BENCH_METRICS: value, or None where it has none} of a row; kept on disk."""
        if (kept := self.measured(name)) is not None:
            return kept
        frames, cost = self.video(name)
        targets = Targets(
            self.scene.path.lines, self.scene.true_world.caster, self.scene.views, self.scene.covisibility
        )
        values = measure_frames(frames, self.truth, targets, self.reference_picture) | {"cpu_seconds": cost}
        values["closure"] = figures.closure(frames) if self.settings.loop else None
        values = {metric.name: values[metric.name] for metric in BENCH_METRICS}
        write_json(self._result_path(name), {"identity": self._result_identity(name), "values": values})
        return values

    def measured(self, name: str) -> Values | None:
        """What `measure` kept under these very conditions, or None."""
        try:
            entry = read_json(self._result_path(name))
        except InputError:  # missing or damaged
            return None
        return entry.get("values") if entry.get("identity") == self._result_identity(name) else None

    def _result_path(self, name: str) -> Path:
        return self.folder / f"{self._named(made_as(name))}.json"

    def _result_identity(self, name: str) -> dict:
        return {"metrics": METRICS_VERSION, "video": self.video_identity(METHODS[name])}


def measure_frames(frames: np.ndarray, truth: Truth, targets: Targets, reference: np.ndarray) -> Values:
    """BENCH_METRICS without `cpu_seconds` and `closure`. frames: uint8 [91, H, W, 3]. reference: uint8 [h, w, 3]."""
    values = measure(frames, targets, reference=reference, truth=truth.frames, networks=False)
    ends = arc_end_frames(len(frames))
    values["end_psnr"] = psnr(frames[ends], truth.frames[ends])
    away = [i for i in range(len(frames)) if NEAR_FRAMES < i % ARC_STEPS < ARC_STEPS - NEAR_FRAMES]
    pair = frames[away], truth.frames[away]
    values |= {"away_psnr": psnr(*pair), "away_ssim": ssim(*pair)}
    colours = [figures.class_colour_error(*row) for row in zip(frames, truth.frames, truth.classes, strict=True)]
    values["class_colour"] = float(np.nanmean(colours))
    return {name: v if isinstance(v, float) and math.isfinite(v) else None for name, v in values.items()}


def arc_end_frames(count: int) -> list[int]:
    """Numbers of the last END_FRAMES frames of every arc of a path of `count` = 45 N + 1 frames."""
    return [end - k for end in range(ARC_STEPS, count, ARC_STEPS) for k in reversed(range(END_FRAMES))]
