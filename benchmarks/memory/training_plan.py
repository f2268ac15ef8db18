"""The memory plan of `train_ggi.py`: encoding, training, updates and sample sheets, for every `--memory` mode.

Counted as in `benchmarks/memory/plans.py`, from the configurations alone, by running the real objective without data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from peft import LoraConfig

from benchmarks.memory.counting import (
    autocast_as_on_gpu,
    count_activations,
    empty_model,
    held_bytes,
    materialize,
    without_data,
)
from benchmarks.memory.plans import VIDEO_ENCODERS, text_phases, video_builders
from benchmarks.memory.steps import ggi_step, inbetween_training_step, latent_shape, video_decoding, video_encoding
from models.flags import MEMORY_MODES
from models.inbetween.training import CHANNELS, InbetweenObjective
from models.runtime.memory import PAGED, RESIDENT, Phase, Plan, is_gpu, placement_on
from models.runtime.optimizers import Parameters

SMALLEST = 4096  # elements from which a tensor's moments are kept in 8 bits
SMALLEST_PAGED = 100_000  # elements from which a tensor's moments are paged
SCALED = 256  # elements that share a scale
TABLES = 2 * 256 * 4  # bytes: code tables of both moments, shared by all tensors


@dataclass(frozen=True)
class TrainingSetup:
    """What decides the memory of a training besides its networks. size: (width, height) in pixels."""

    size: tuple[int, int]
    num_frames: int
    batch: int  # clips per process and step
    accumulation: int  # batches per update; with more than one, the previous batch's gradients are in memory
    checkpointing: bool  # recompute the blocks' activations in the backward pass
    autocast: torch.dtype | None
    ema_decay: float
    dtype: torch.dtype  # dtype of the VAE and the text encoder
    tiling: bool  # run the VAE in tiles
    encoding: bool  # clips are missing from the cache
    processes: int = 1
    sharded: bool = False  # weights, gradients and moments are divided among the processes


def trained_builder(
    config: Mapping, lora_ranks: Mapping[str, int], lora_dtype: torch.dtype
) -> Callable[[], torch.nn.Module]:
    """A function that builds the transformer as trained. lora_ranks: {layer: rank} of the frozen LoRA."""

    def build() -> torch.nn.Module:
        model = CogVideoXTransformer3DModel.from_config({**config, "in_channels": CHANNELS})
        if lora_ranks:
            model.add_adapter(LoraConfig(r=1, rank_pattern=dict(lora_ranks), target_modules=list(lora_ranks)))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(lora_dtype)
        return model

    return build


def empty_trained(build: Callable[[], torch.nn.Module], checkpointing: bool) -> torch.nn.Module:
    """An empty float32 transformer whose own weights require gradients."""
    model = empty_model(build, torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" not in name)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def plan_training(
    paths: Mapping[str, Path], build: Callable[[], torch.nn.Module], setup: TrainingSetup, device: str
) -> Plan:
    """Plan a training. paths: of cogvideox_vae and cogvideox_text. build: from `trained_builder`."""
    transformer = empty_trained(build, setup.checkpointing)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    weights, gradients = held_bytes(transformer), gradient_bytes(trained)
    average = gradients if setup.ema_decay else 0  # float32 as well
    standing = gradients if setup.processes > 1 else 0  # in DDP's buckets, also between steps
    shards = setup.processes if setup.sharded else 1
    if setup.sharded:
        weights, gradients = (sharded_bytes(transformer, trained_only, shards) for trained_only in (False, True))
        average, standing = average // shards, 0
    length = transformer.config.max_text_seq_length
    on_gpu = is_gpu(device)
    vae_weights, encoding, decoding = count_vae(paths["cogvideox_vae"], transformer, setup, on_gpu)
    text = text_phases(paths["cogvideox_text"], VIDEO_ENCODERS, setup.dtype, length, device)[RESIDENT]
    if on_gpu and setup.autocast:
        autocast_as_on_gpu(transformer)
    training, denoising = count_transformer(transformer, trained, setup)
    plan = {}
    for mode in MEMORY_MODES:
        moments = placement_on(device, "training", mode)["optimizer"]
        state = moment_bytes(trained, moments) // shards + average
        update = update_bytes(trained, moments, device) // shards
        if average:
            update = max(update, average - gradients + standing)  # the average takes a temporary copy of itself
        plan[mode] = [Phase("encoding", vae_weights, encoding)] if setup.encoding else []
        plan[mode] += [
            text,
            Phase("training", weights, training, gradients + state),
            Phase("update", weights, update, gradients + state),
            Phase("sheets", weights + vae_weights, max(denoising, decoding), standing + state),
        ]
    return plan


def sharded_bytes(transformer: torch.nn.Module, trained_only: bool, processes: int) -> int:
    """Bytes of weights, or of the gradients of those that are trained, in one process with FSDP.

    Its shard, all parameters outside the blocks, and two full blocks: the one computing and the one being prefetched.
    """

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained_only)

    blocks, total = [size(block) for block in transformer.transformer_blocks], size(transformer)
    buffers = 0 if trained_only else held_bytes(transformer) - total
    return -(-total // processes) + total - sum(blocks) + 2 * max(blocks) + buffers


def count_vae(vae: Path, transformer: torch.nn.Module, setup: TrainingSetup, on_gpu: bool) -> tuple[int, int, int]:
    """Bytes of the VAE's weights, and of the activations of encoding and decoding a clip.

    on_gpu: count autocast and convolutions as on a GPU.
    """
    build = video_builders(vae, Path())["vae"]
    model = empty_model(build, setup.dtype)
    weights = held_bytes(model)
    if setup.tiling:
        model.enable_tiling()
    if on_gpu and setup.autocast:
        autocast_as_on_gpu(model)
    with without_data(setup.dtype), torch.no_grad(), autocast(setup):
        materialize(model)
        encoding = count_activations(video_encoding(model, setup.size, setup.num_frames), model, on_gpu=on_gpu)
        shape = latent_shape(transformer, setup.size, setup.num_frames)
        return weights, encoding, count_activations(video_decoding(model, shape), model, on_gpu=on_gpu)


def count_transformer(
    transformer: torch.nn.Module, trained: list[torch.nn.Parameter], setup: TrainingSetup
) -> tuple[int, int]:
    """Bytes of the activations of a training step, and of a step of a sample sheet. Materializes the model."""
    with without_data(torch.float32):
        objective = InbetweenObjective(materialize(transformer), CogVideoXDDIMScheduler())
        step = inbetween_training_step(objective, setup.size, setup.num_frames, setup.batch, lambda: autocast(setup))
        if setup.accumulation > 1 or setup.processes > 1:  # gradients are added to those of the batch before
            weights = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            training = count_activations(step, transformer, holder([weight.grad for weight in weights]))
        else:
            training = count_activations(step, transformer) - gradient_bytes(trained)
        with torch.no_grad(), autocast(setup):
            denoising = count_activations(ggi_step(transformer, setup.size, setup.num_frames, 1), transformer)
    return training, denoising


def autocast(setup: TrainingSetup) -> torch.autocast:
    return torch.autocast("cpu", setup.autocast, enabled=setup.autocast is not None, cache_enabled=False)


def gradient_bytes(parameters: Parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def moment_bytes(parameters: Parameters, moments: str) -> int:
    """Bytes of both moments on the GPU. If paged: the scales, and the codes of the largest tensor, being updated."""
    if moments == RESIDENT:
        return 2 * gradient_bytes(parameters)
    sizes = [parameter.numel() for parameter in parameters]
    small = sum(2 * 4 * size for size in sizes if size < SMALLEST)
    large = [size for size in sizes if size >= SMALLEST]
    codes = [2 * size for size in large]
    if moments == PAGED:
        paged = [2 * size for size in large if size >= SMALLEST_PAGED]
        codes = [sum(codes) - sum(paged), max(paged, default=0)]
    return small + sum(codes) + sum(2 * 4 * -(-size // SCALED) for size in large) + (TABLES if large else 0)


def update_bytes(parameters: Parameters, moments: str, device: str) -> int:
    """Peak bytes of the temporary tensors of one update, counted by running one without data.

    On a GPU, PyTorch's AdamW updates all tensors at once; bitsandbytes' kernels work in place.
    """
    on_gpu = is_gpu(device)
    if moments != RESIDENT:
        largest = max((parameter.numel() for parameter in parameters if parameter.numel() >= SMALLEST), default=0)
        return 0 if on_gpu else 5 * 4 * largest  # float32: both moments, gradient, weight, denominator
    with without_data(torch.float32):
        copies = [torch.nn.Parameter(torch.empty(parameter.shape)) for parameter in parameters]
        for copy in copies:
            copy.grad = torch.empty_like(copy)
        optimizer = torch.optim.AdamW(copies, foreach=on_gpu)
        optimizer.step()  # creates the moments
        states = [value for state in optimizer.state.values() for value in state.values()]
        return count_activations(optimizer.step, holder([*copies, *(copy.grad for copy in copies), *states]))


def holder(tensors: Sequence[torch.Tensor]) -> torch.nn.Module:
    """A module that holds these tensors, for `count_activations`."""
    module = torch.nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_buffer(str(i), tensor.detach())
    return module
