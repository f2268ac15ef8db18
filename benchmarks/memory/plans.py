"""Memory plans: the phases of each stage and what they hold on the GPU, for every `--memory` mode.

Counted from the configurations of the weights that will be loaded (`benchmarks/memory/counting.py`). A plan is a dict
{mode: [Phase, …]}; phases run one after the other, so the largest decides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

from benchmarks.memory.counting import (
    autocast_as_on_gpu,
    count_activations,
    count_offloaded,
    empty_model,
    held_bytes,
    kept_bytes,
    materialize,
    restored_bytes,
    without_data,
)
from benchmarks.memory.steps import (
    alignment_step,
    anchor_decoding,
    anchor_step,
    ggi_step,
    latent_shape,
    video_decoding,
    video_encoding,
)
from models.flags import MEMORY_MODES
from models.flux.lora import add_lora, train_loras
from models.flux.network import FluxModels
from models.inbetween.pipeline import prepare_networks
from models.loading.networks import component_config
from models.runtime.memory import OFFLOADED, ON_DEMAND, RESIDENT, Phase, Plan, is_gpu, placement_on
from models.runtime.rotary import use_complex_rotary
from utils.cli import InputError
from utils.files import read_json

Build = Callable[[], torch.nn.Module]
FLUX_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
VIDEO_ENCODERS = {"text_encoder": T5EncoderModel}
LORA_STATE = 3 * 4  # bytes per trained LoRA parameter: gradient and two moments, float32


@dataclass(frozen=True)
class Work:
    """Peak bytes that a phase needs besides resident weights.

    networks: those that compute. layers: growth of the peak if they are offloaded; None if no mode offloads them.
    """

    networks: Sequence[str]
    activations: int
    layers: int | None = None
    optimizer: int = 0


def count_work(
    networks: Mapping[str, torch.nn.Module], step: Callable[[], object], device: str, *, streamed: bool = True
) -> Work:
    """Count a step of these networks. Call it inside `without_data`. streamed: whether some mode offloads them."""
    on_gpu = is_gpu(device)
    activations = count_activations(step, *networks.values(), on_gpu=on_gpu)
    layers = count_offloaded(step, *networks.values()) - activations if on_gpu and streamed else None
    return Work(tuple(networks), activations, layers)


def flux_builders(paths: dict[str, Path]) -> dict[str, Build]:
    """{network: function that builds it} for FLUX, from the configs in local paths."""
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
    """`flux_builders` for the in-between model. vae: from `locate`. transformer: folder in either layout."""
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
    """Wrap `build` so that a failure becomes an InputError naming the component and its path."""

    def build_or_say() -> torch.nn.Module:
        try:
            return build()
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{name}: {path} does not describe such a network: {error}") from error

    return build_or_say


def encoder_builder(folder: Path, name: str, cls: type) -> Build:
    """A function that builds a text encoder from the config in a pipeline folder."""
    return from_files(name, folder, lambda: cls(AutoConfig.from_pretrained(folder / name, local_files_only=True)))


def text_phases(
    folder: Path, encoders: dict[str, type], dtype: torch.dtype, length: int, device: str
) -> dict[str, Phase]:
    """{placement: phase of a pipeline folder's text encoders, loaded together, on one prompt of `length` tokens}."""
    models = {cls: empty_model(encoder_builder(folder, name, cls), dtype) for name, cls in encoders.items()}
    held = sum(held_bytes(model) for model in models.values())
    *_, model = models.values()  # the T5, which computes most
    with without_data(dtype), torch.no_grad():
        materialize(model)
        tokens = torch.empty(1, length, dtype=torch.long)
        work = count_work({"text": model}, lambda: model(tokens), device)
    phases = {RESIDENT: Phase("text", held, work.activations)}
    return phases | ({OFFLOADED: Phase("text", work.layers, work.activations)} if is_gpu(device) else {})


def combine_phases(
    stage: str,
    builders: dict[str, Build],
    dtype: torch.dtype,
    phases: dict[str, Work],
    text: dict[str, Phase],
    device: str,
) -> Plan:
    """Combine phases into a stage's plan. phases: by name, in order. text: from `text_phases`."""
    plan = {}
    for mode in MEMORY_MODES:
        kept = placement_on(device, stage, mode)
        empty = {n: empty_model(build, dtype) for n, build in builders.items() if kept[n] != OFFLOADED}
        restored = {n: restored_bytes(model, kept[n]) for n, model in empty.items()}
        held = {n: kept_bytes(model, kept[n]) for n, model in empty.items()}
        plan[mode] = [text[kept["text"]]]
        for name, work in phases.items():
            weights = sum(held[n] for n in held if n in work.networks or kept[n] != ON_DEMAND)
            if any(kept[n] == OFFLOADED for n in work.networks):
                weights += work.layers
            activations = work.activations + max(restored.get(n, 0) for n in work.networks)
            plan[mode].append(Phase(name, weights, activations, work.optimizer))
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
    """Plan stage 2. size: width, height of an anchor in pixels. rank: the LoRAs' rank. length: tokens per prompt.

    guided: run both branches of true CFG in one batch.
    """
    builders = flux_builders(paths)
    builders |= {name: with_lora(builders[name], rank) for name in ("transformer", "controlnet")}
    networks = [empty_model(build, dtype) for build in builders.values()]
    with without_data(dtype), torch.no_grad():
        models = FluxModels(*map(materialize, networks))
        step = anchor_step(models, size, length, 2 if guided else 1)
        pair = {"transformer": models.transformer, "controlnet": models.controlnet}
        for network in pair.values():
            use_complex_rotary(network)
        phases = {
            "denoising": count_work(pair, step, device),
            "decoding": count_work({"vae": models.vae}, anchor_decoding(models, size), device),
        }
    text = text_phases(paths["flux_text"], FLUX_ENCODERS, dtype, length, device)
    return combine_phases("anchors", builders, dtype, phases, text, device)


def with_lora(build: Build, rank: int) -> Build:
    """Wrap `build` so that it adds LoRA layers, with fused projections."""

    def build_with_lora() -> ModelMixin:
        model = build()
        add_lora(model, rank)
        return model

    return build_with_lora


def plan_alignment(
    paths: dict[str, Path],
    side: int,
    batch: int,
    rank: int,
    length: int,
    dtype: torch.dtype,
    device: str,
    *,
    autocast: torch.dtype | None,
) -> Plan:
    """Plan stage 1. side: of a square training crop (the largest), in pixels. batch: crops per process and step."""
    plain = flux_builders(paths)
    builders = plain | {name: with_lora(plain[name], rank) for name in ("transformer", "controlnet")}
    networks = [empty_model(build, dtype) for build in builders.values()]
    trained = networks[:2]
    loras = [parameter for group in train_loras(trained) for parameter in group]
    for model in trained:
        model.train()
        if is_gpu(device) and autocast:
            autocast_as_on_gpu(model)
    context = partial(torch.autocast, "cpu", autocast, enabled=autocast is not None)
    with without_data(dtype):
        models = FluxModels(*map(materialize, networks))
        step = alignment_step(models, side, batch, length, context)
        training = count_activations(step, *trained, on_gpu=is_gpu(device))
    count = sum(parameter.numel() for parameter in loras)
    training -= 4 * count  # gradients: counted below
    master = 4 - torch.empty((), dtype=dtype).element_size()  # bytes beyond those in `dtype`, which the plan counts
    optimizer = count * (LORA_STATE + master)
    phases = {"training": Work(tuple(builders), training, optimizer=optimizer)}
    text = text_phases(paths["flux_text"], FLUX_ENCODERS, dtype, length, device)
    return combine_phases("alignment", builders, dtype, phases, text, device)


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
    """Plan stage 3. size: width, height of the video in pixels. guided: run both branches of guidance in one batch."""
    builders = video_builders(paths["cogvideox_vae"], transformer)
    networks = [empty_model(build, dtype) for build in builders.values()]
    with without_data(dtype), torch.no_grad():
        network, vae = map(materialize, networks)
        prepare_networks(network, vae, tiling=tiling)
        shape, step = latent_shape(network, size, num_frames), ggi_step(network, size, num_frames, 2 if guided else 1)
        phases = {
            "encoding": count_work({"vae": vae}, video_encoding(vae, size, num_frames), device, streamed=False),
            "denoising": count_work({"transformer": network}, step, device),
            "decoding": count_work({"vae": vae}, video_decoding(vae, shape), device, streamed=False),
        }
        length = network.config.max_text_seq_length
    text = text_phases(paths["cogvideox_text"], VIDEO_ENCODERS, dtype, length, device)
    return combine_phases("ggi", builders, dtype, phases, text, device)
