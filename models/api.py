"""Stages 2 and 3 from Python: stage objects that are ready to work, and what the scripts would make with them.

docs/python.md has an example. A stage holds its networks: delete it before the next one is opened. Errors of the user
are InputError, as in the scripts; nothing is written but the warped noise that a scene folder lacks.
"""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from models.flags import resolve_device
from models.flux.anchors import Anchor, AnchorStage
from models.flux.lora import read_loras
from models.foreign import require_cogvideox, require_flux, require_video_transformer
from models.inbetween.stage import ArcInputs, InbetweenStage
from models.inbetween.stages import CogVideoXStage
from models.loading.fit import require_fit
from models.loading.networks import component_config
from models.precision import automatic_precision
from models.runtime.memory import look_up_plan
from models.runtime.runtime import DTYPES, Runtime, open_runtime
from models.settings import AnchorSettings, InbetweenSettings, carries, check_carrying
from models.weights import EPOCH, FLUX_STAGE, GGI_STAGE, Preset, find_inbetween, load_preset, locate
from utils.cli import InputError
from utils.correspondence import read_map
from utils.edges import resize_edges
from utils.images import read_image
from utils.layout import ARC_FRAMES, Scene, pad_prompts
from utils.noise import load_or_make_noise
from utils.scene.carry import anchors_for_arc, carry_to_arc
from utils.scene.scene_geometry import load_scene_geometry

STYLE = "style"  # the only one of a stage that is opened here


def open_anchor_stage(
    scene: Scene,
    lora: tuple[Path, Path],
    prompts: Sequence[str],
    settings: AnchorSettings,
    *,
    weights: str = "full",
    **how: str,
) -> AnchorStage:
    """Load FLUX and its ControlNet with a LoRA (`find_lora`). how: device, memory and dtype, as the scripts' flags."""
    if settings.sources != "previous":
        raise InputError(f"sources={settings.sources!r}: draw_anchors goes from one anchor to the next only")
    preset = load_preset(weights)
    paths = locate(argparse.Namespace(), preset, FLUX_STAGE)
    require_flux(paths, settings.control_mode)
    require_fit(paths)
    configs = [component_config(name, paths[name]) for name in ("flux_transformer", "controlnet")]
    width, height = preset.anchor_size(scene.edge_size)
    runtime = _open(preset, "anchors", pixels=width * height, batch=1 + (settings.true_gs != 1), **how)
    stage = AnchorStage(runtime, paths, read_loras({STYLE: lora}, configs), prompts, settings)
    stage.put_on(STYLE)
    return stage


def draw_anchors(stage: AnchorStage, scene: Scene, prompts: str | Sequence[str], seed: int) -> list[np.ndarray]:
    """The anchors of a scene in order, uint8 [H, W, 3] each. prompts: one for all, or as of --prompt."""
    prompts = pad_prompts([prompts] if isinstance(prompts, str) else prompts, len(scene.arcs) + 1)
    require_encoded(prompts, stage.texts)
    size, anchors = stage.runtime.preset.anchor_size(scene.edge_size), []
    for k, path in enumerate(scene.anchor_edge_paths):
        before = (anchors[-1], read_map(scene.arcs[k - 1].corres_end_path)) if k else ()
        anchor = Anchor(k, resize_edges(read_image(path), *size), prompts[k], seed, *before)
        anchors.append(stage.decode(stage.draw(anchor).latents))
    return anchors


def open_inbetween_stage(
    prompts: Sequence[str],
    settings: InbetweenSettings,
    *,
    weights: str = "full",
    model_path: Path | None = None,
    epoch: int = EPOCH,
    **how: str,
) -> InbetweenStage:
    """Load CogVideoX with the in-between transformer. how: see `open_anchor_stage`."""
    check_carrying(settings)
    preset = load_preset(weights)
    transformer = find_inbetween(preset, model_path, epoch)
    require_video_transformer(transformer)
    paths = locate(argparse.Namespace(), preset, GGI_STAGE)
    require_cogvideox(paths, transformer)
    require_fit(paths | {"inbetween": transformer})
    (width, height), guided = preset.video_size, settings.guidance_scale != 1 and any(prompts)
    runtime = _open(preset, "ggi", pixels=width * height, frames=preset.num_frames, batch=1 + guided, **how)
    return CogVideoXStage(runtime, paths, transformer, prompts, settings, preset.video_size)


def fill_arcs(stage: InbetweenStage, scene: Scene, anchors: Sequence[np.ndarray], prompt: str) -> np.ndarray:
    """The whole video: uint8 [45 N + 1, H, W, 3], the frame that two arcs share once."""
    require_encoded([prompt], stage.texts)
    if len(anchors) != len(scene.arcs) + 1:
        raise InputError(f"{len(anchors)} anchors: {scene.folder} needs {len(scene.arcs) + 1}")
    settings, (width, height), end, frames = stage.settings, stage.size, None, []
    geometry = load_scene_geometry(scene, stage.size, "carrying the anchors") if carries(settings) else None
    for arc in scene.arcs:
        pictures = {k: anchors[k] for k in anchors_for_arc(arc.index, settings.sources, len(anchors))}
        carried = carry_to_arc(geometry.caster, geometry.views, pictures, arc.index) if geometry else None
        start = end if settings.chain and arc.index else anchors[arc.index]
        noise = load_or_make_noise(arc, (width // 8, height // 8))
        inputs = ArcInputs(arc.index, start, anchors[arc.index + 1], stage.read_control(arc), noise, prompt, carried)
        decoded = stage.decode(stage.denoise(inputs))
        end = decoded[-1]
        frames.append(stage.finish(decoded[:ARC_FRAMES], inputs)[bool(arc.index) :])
    return np.concatenate(frames)


def require_encoded(prompts: Sequence[str], texts: Collection[str]) -> None:
    """Raise InputError for prompts that a stage was not opened with."""
    if unknown := [prompt for prompt in prompts if prompt not in texts]:
        raise InputError(f"the prompt {unknown[0]!r} was not given when the stage was opened")


def _open(
    preset: Preset, stage: str, *, device: str = "auto", memory: str = "auto", dtype: str = "auto", **size: int
) -> Runtime:
    """The runtime that a script would open with these flags. size: see `look_up_plan`."""
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype={dtype!r}: choose from auto, {', '.join(DTYPES)}")
    args = argparse.Namespace(device=device, memory=memory, dtype=dtype, attention=None)
    vars(args).update(automatic_precision(args, preset.dtype, resolve_device(device)))
    return open_runtime(args, preset, stage, look_up_plan(preset.name, stage, **size))
