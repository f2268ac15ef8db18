"""One step of each stage on random inputs of full shape: what memory plans count and benchmarks measure.

A step is a function without arguments that runs the code of the stage itself. Inputs lie on the networks' device, in
torch's default dtype; inside `without_data` they have no values.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, ModelMixin

from models.flux.alignment import FlowObjective, FlowSample
from models.flux.network import FluxModels, Text, decode_latents, velocity
from models.inbetween.pipeline import LATENT_CHANNELS
from models.inbetween.training import InbetweenObjective

Pass = Callable[[], object]


def _text(models: FluxModels, batch: int, length: int) -> Text:
    config, device = models.transformer.config, models.device
    tokens = torch.randn(batch, length, config.joint_attention_dim, device=device)
    return Text(tokens, torch.randn(batch, config.pooled_projection_dim, device=device))


def anchor_step(models: FluxModels, size: tuple[int, int], length: int, branches: int = 1) -> Pass:
    """Predict the velocity. size: width, height in pixels. length: tokens of the prompt. branches: 2 with true CFG."""
    width, height = size
    text = _text(models, branches, length)
    tokens = torch.randn(branches, width * height // 256, 64, device=models.device)
    control = torch.randn(branches, 3, height, width, device=models.device)
    return lambda: velocity(models, tokens, 0.5, text, control, guidance=4.0)


def anchor_decoding(models: FluxModels, size: tuple[int, int]) -> Pass:
    latents = torch.randn(1, 16, size[1] // 8, size[0] // 8, device=models.device)
    return lambda: decode_latents(models, latents)


def alignment_step(
    models: FluxModels,
    side: int,
    batch: int,
    length: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Pass:
    """Loss and gradients of square crops. side: in pixels. batch: crops. autocast: context of the forward pass."""
    objective, text = FlowObjective(models), _text(models, batch, length)
    tokens = torch.randn(batch, side * side // 256, 64, device=models.device)
    sample = FlowSample(tokens, torch.randn_like(tokens), torch.full((batch,), 0.5, device=models.device))
    control = torch.randn(batch, 3, side, side, device=models.device)

    def step() -> None:
        with autocast():
            loss = objective(sample, text, control)["loss"]
        loss.backward()

    return step


def ggi_step(network: CogVideoXTransformer3DModel, size: tuple[int, int], num_frames: int, batch: int) -> Pass:
    """One pass of the transformer. batch: 2 with guidance, for its two branches."""
    config, device = network.config, network.device
    frames, h, w = latent_shape(network, size, num_frames)
    arguments = {
        "hidden_states": torch.randn(batch, frames, config.in_channels, h, w, device=device),
        "encoder_hidden_states": torch.randn(batch, config.max_text_seq_length, config.text_embed_dim, device=device),
        "timestep": torch.full((batch,), 500.0, device=device),
    }
    if config.use_rotary_positional_embeddings:
        shape = (frames * h * w // config.patch_size**2, config.attention_head_dim // 2)
        angles = torch.rand(shape, dtype=torch.float32, device=device).repeat_interleave(2, dim=1)
        arguments["image_rotary_emb"] = angles.cos(), angles.sin()
    return lambda: network(**arguments)


def inbetween_training_step(
    objective: InbetweenObjective,
    size: tuple[int, int],
    num_frames: int,
    batch: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Pass:
    """Loss and gradients of a batch of clips. size: width, height in pixels. autocast: context of the forward pass."""
    config, device = objective.transformer.config, objective.transformer.device
    frames, h, w = latent_shape(objective.transformer, size, num_frames)
    shape = (batch, frames, LATENT_CHANNELS, h, w)
    inputs = {
        "latents": torch.randn(shape, device=device),
        "noise": torch.randn(shape, device=device),
        "conditions": torch.randn(batch, frames, 2 * LATENT_CHANNELS, h, w, device=device),
        "text": torch.randn(batch, config.max_text_seq_length, config.text_embed_dim, device=device),
        "timesteps": torch.full((batch,), 500, device=device),
    }

    def step() -> None:
        with autocast():
            loss = objective(**inputs)["loss"]
        loss.backward()

    return step


def latent_shape(network: ModelMixin, size: tuple[int, int], num_frames: int) -> tuple[int, int, int]:
    """Frames, height, width of a video's latents. network: CogVideoX's transformer or VAE. size: width, height."""
    return (num_frames - 1) // network.config.temporal_compression_ratio + 1, size[1] // 8, size[0] // 8


def video_encoding(vae: AutoencoderKLCogVideoX, size: tuple[int, int], num_frames: int) -> Pass:
    pixels = torch.randn(1, 3, num_frames, size[1], size[0], device=vae.device)
    return lambda: vae.encode(pixels)


def video_decoding(vae: AutoencoderKLCogVideoX, shape: tuple[int, int, int]) -> Pass:
    """Decode a video. shape: the latents' frames, height and width, from `latent_shape`."""
    latents = torch.randn(1, LATENT_CHANNELS, *shape, device=vae.device)
    return lambda: vae.decode(latents)
