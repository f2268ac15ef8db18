"""Memory plans: the phases of each stage and what they hold on the card, for every `--memory` mode.

Counted from the configurations of the weights that will be loaded (`models/memory.py`). A plan is a dict
{mode: [Phase, …]}; phases follow each other, so the largest decides.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXTransformer3DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    ModelMixin,
)
from transformers import AutoConfig, CLIPTextModel, T5EncoderModel

from models.flux import FluxModels
from models.loading import component_config
from models.lora import add_lora
from models.memory import (
    AT_WORK,
    RESIDENT,
    STREAMED,
    Phase,
    bring_in,
    count_activations,
    empty_model,
    kept_bytes,
    kept_on,
    without_data,
)
from models.steps import (
    alignment_step,
    anchor_decoding,
    anchor_step,
    ggi_step,
    latent_shape,
    video_decoding,
    video_encoding,
)
from models.weights import MEMORY_MODES
from utils.cli import InputError
from utils.runs import read_json

Build = Callable[[], torch.nn.Module]
Plan = dict[str, list[Phase]]
FLUX_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
VIDEO_ENCODERS = {"text_encoder": T5EncoderModel}
LORA_STATE = 3 * 4  # bytes for each LoRA parameter in training: gradient and two moments, float32


def flux_builders(paths: dict[str, Path]) -> dict[str, Build]:
    """{network: how to make an empty one} of FLUX from local paths."""
    classes = {
        "transformer": ("flux_transformer", FluxTransformer2DModel),
        "controlnet": ("controlnet", FluxControlNetModel),
        "vae": ("flux_vae", AutoencoderKL),
    }
    return {
        key: from_files(name, paths[name], lambda n=name, cls=cls: cls.from_config(component_config(n, paths[n])))
        for key, (name, cls) in classes.items()
    }


def video_builders(vae: Path, transformer: Path) -> dict[str, Build]:
    """The same of the in-between model. vae: from `locate`. transformer: folder in either layout."""
    config = transformer / "config.json"
    return {
        "transformer": from_files(
            "transformer", transformer, lambda: CogVideoXTransformer3DModel.from_config(read_json(config))
        ),
        "vae": from_files(
            "cogvideox_vae", vae, lambda: AutoencoderKLCogVideoX.from_config(component_config("cogvideox_vae", vae))
        ),
    }


def from_files(name: str, path: Path, build: Build) -> Build:
    """The same function; what it cannot build is an InputError that names component and path."""

    def build_or_say() -> torch.nn.Module:
        try:
            return build()
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{name}: {path} does not describe such a network: {error}") from error

    return build_or_say


def encoder_builder(folder: Path, name: str, cls: type) -> Build:
    """How to make an empty text encoder of a pipeline folder."""
    return from_files(name, folder, lambda: cls(AutoConfig.from_pretrained(folder / name, local_files_only=True)))


def text_phases(folder: Path, encoders: dict[str, type], dtype: torch.dtype, length: int) -> dict[str, Phase]:
    """{how they are kept: the text encoders of a pipeline folder, all at once, on one prompt of `length` tokens}."""
    models = {cls: empty_model(encoder_builder(folder, name, cls), dtype) for name, cls in encoders.items()}
    held = {how: sum(kept_bytes(model, how) for model in models.values()) for how in (RESIDENT, STREAMED)}
    model = models[T5EncoderModel]  # the largest of them
    with without_data(dtype), torch.no_grad():
        bring_in(model)
        tokens = torch.empty(1, length, dtype=torch.long)
        activations = count_activations(lambda: model(tokens), model)
    return {how: Phase("text", weights, activations) for how, weights in held.items()}


def _plan(
    stage: str,
    builders: dict[str, Build],
    dtype: torch.dtype,
    phases: dict[str, tuple[Sequence[str], int, int]],
    text: dict[str, Phase],
    device: str,
) -> Plan:
    """phases: name -> (networks at work, bytes of activations, bytes of the optimizer). text: from `text_phases`."""
    plan = {}
    for mode in MEMORY_MODES:
        kept = kept_on(device, stage, mode)
        held = {name: kept_bytes(empty_model(build, dtype), kept[name]) for name, build in builders.items()}
        plan[mode] = [text[kept["text"]]]
        for phase, (at_work, activations, optimizer) in phases.items():
            present = [name for name in builders if name in at_work or kept[name] not in (STREAMED, AT_WORK)]
            plan[mode].append(Phase(phase, sum(held[name] for name in present), activations, optimizer))
    return plan


def plan_anchors(
    paths: dict[str, Path],
    size: tuple[int, int],
    rank: int,
    length: int,
    dtype: torch.dtype,
    device: str,
    *,
    guided: bool,
) -> Plan:
    """Stage 2. size: width, height of an anchor in pixels. rank: of the LoRAs. length: tokens of a prompt.

    guided: both branches of true CFG go in one batch.
    """
    builders = flux_builders(paths)
    builders |= {name: with_lora(builders[name], rank) for name in ("transformer", "controlnet")}
    networks = [empty_model(build, dtype) for build in builders.values()]
    with without_data(dtype), torch.no_grad():
        models = FluxModels(*map(bring_in, networks))
        step = anchor_step(models, size, length, 2 if guided else 1)
        denoising = count_activations(step, models.transformer, models.controlnet)
        decoding = count_activations(anchor_decoding(models, size), models.vae)
    phases = {
        "denoising": (("transformer", "controlnet"), denoising, 0),
        "decoding": (("vae",), decoding, 0),
    }
    return _plan(
        "anchors", builders, dtype, phases, text_phases(paths["flux_text"], FLUX_ENCODERS, dtype, length), device
    )


def with_lora(build: Build, rank: int) -> Build:
    """The same network with LoRA layers, its fused projections included."""

    def build_with_lora() -> ModelMixin:
        model = build()
        add_lora(model, rank)
        return model

    return build_with_lora


def plan_alignment(
    paths: dict[str, Path], side: int, batch: int, rank: int, length: int, dtype: torch.dtype, device: str
) -> Plan:
    """Stage 1. side: of a training crop in pixels; the largest crop is square. batch: crops per process and step."""
    plain = flux_builders(paths)
    builders = plain | {name: with_lora(plain[name], rank) for name in ("transformer", "controlnet")}
    networks = [empty_model(build, dtype) for build in builders.values()]
    loras = [
        parameter.requires_grad_()
        for model in networks
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    ]
    for model in networks[:2]:
        model.train()
        model.enable_gradient_checkpointing()
    with without_data(dtype):
        models = FluxModels(*map(bring_in, networks))
        training = count_activations(alignment_step(models, side, batch, length), *networks[:2])
    count = sum(parameter.numel() for parameter in loras)
    training -= sum(parameter.numel() * parameter.element_size() for parameter in loras)  # gradients: counted below
    master = 4 - torch.empty((), dtype=dtype).element_size()  # LoRA is trained in float32
    phases = {"training": (("transformer", "controlnet", "vae"), training, count * (LORA_STATE + master))}
    return _plan(
        "alignment", builders, dtype, phases, text_phases(paths["flux_text"], FLUX_ENCODERS, dtype, length), device
    )


def plan_ggi(
    paths: dict[str, Path],
    transformer: Path,
    size: tuple[int, int],
    num_frames: int,
    dtype: torch.dtype,
    device: str,
    *,
    guided: bool,
    tiling: bool,
) -> Plan:
    """Stage 3. size: width, height of the video in pixels. guided: both branches of guidance go in one batch."""
    builders = video_builders(paths["cogvideox_vae"], transformer)
    networks = [empty_model(build, dtype) for build in builders.values()]
    with without_data(dtype), torch.no_grad():
        network, vae = map(bring_in, networks)
        vae.enable_slicing()
        if tiling:
            vae.enable_tiling()
        denoising = count_activations(ggi_step(network, size, num_frames, 2 if guided else 1), network)
        encoding = count_activations(video_encoding(vae, size, num_frames), vae)
        decoding = count_activations(video_decoding(vae, latent_shape(network, size, num_frames)), vae)
        length = network.config.max_text_seq_length
    phases = {
        "encoding": (("vae",), encoding, 0),
        "denoising": (("transformer",), denoising, 0),
        "decoding": (("vae",), decoding, 0),
    }
    return _plan(
        "ggi", builders, dtype, phases, text_phases(paths["cogvideox_text"], VIDEO_ENCODERS, dtype, length), device
    )
