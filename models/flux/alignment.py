"""Distribution alignment: the training objective and one optimizer step.

Rectified flow on the reference image, with the ControlNet's residuals unscaled and guidance 1: the LoRAs learn what
FLUX and its ControlNet must add so that edges of the reference give the reference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from models.flux.lora import add_lora, train_loras
from models.flux.network import FluxModels, Text, encode_image, load_flux, place_flux, training_schedule, velocity
from models.latents import draw_noise, pack, to_signed
from models.runtime.memory import KEPT
from models.runtime.sharding import whole
from utils.data.references import Reference, crop_size, draw_aspect, draw_crop
from utils.runs import derive_seed

GUIDANCE = 1.0  # distilled guidance during training


@dataclass(frozen=True)
class FlowSample:
    """One point on the path between image and noise. tokens, target: float32 [B, L, 64]; t: [B], in [0, 1]."""

    tokens: torch.Tensor
    target: torch.Tensor
    t: torch.Tensor


def flow_sample(image: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> FlowSample:
    """x_t = (1 - t) x_1 + t x_0 and its target x_0 - x_1. image: x_1, noise: x_0, packed [B, L, 64]; t: [B]."""
    t = t.to(image)
    return FlowSample((1 - t[:, None, None]) * image + t[:, None, None] * noise, noise - image, t)


class FlowObjective(torch.nn.Module):
    """Transformer and ControlNet as one module: one wrapper (autocast, DDP) then holds everything that is trained."""

    _no_split_modules: ClassVar = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]  # what FSDP gathers together

    def __init__(self, models: FluxModels):
        super().__init__()
        self.transformer, self.controlnet = models.transformer, models.controlnet
        self._models = models

    def forward(self, sample: FlowSample, text: Text, control: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the predicted velocity, float32 scalar. control: edges [B, 3, H, W] in [-1, 1]."""
        prediction = velocity(self._models, sample.tokens, sample.t, text, control, guidance=GUIDANCE)
        return F.mse_loss(prediction.float(), sample.target.float())


@dataclass(frozen=True)
class Batch:
    """What one training step sees. images, control: [B, 3, H, W] in [-1, 1]; noise, eps: [B, 16, H/8, W/8]; t: [B]."""

    images: torch.Tensor
    control: torch.Tensor
    noise: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    prompt: str


def draw_batch(
    references: Sequence[Reference], step_seed: Sequence[int], items: Iterable[int], resolution: int, multiple: int
) -> Batch:
    """The batch of one step: crops of one reference at one size, with noise and timesteps of their own.

    items: numbers in the global batch. The reference and the size depend on `step_seed` alone, an item on `step_seed`
    and its number. No state is carried from step to step: a resumed run draws what an uninterrupted one would have
    drawn, and so do several processes that share a global batch.
    """
    step_rng = np.random.default_rng(step_seed)
    reference = references[step_rng.integers(len(references))]
    size = crop_size(draw_aspect(reference, step_rng), resolution, multiple)
    latent_shape = (1, 16, size[1] // 8, size[0] // 8)
    schedule = training_schedule()
    columns: list[list] = [[] for _ in range(5)]
    for item in items:
        rng = np.random.default_rng([*step_seed, item])
        image, edges = draw_crop(reference, size, rng)
        noise, eps = (draw_noise(latent_shape, derive_seed(*step_seed, item, purpose)) for purpose in (1, 2))
        values = (
            to_signed(image)[None],
            to_signed(edges)[None],
            noise,
            eps,
            schedule[rng.integers(len(schedule))][None],
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return Batch(*(torch.cat(column) for column in columns), prompt=reference.prompt)


@torch.no_grad()
def batch_flow_sample(models: FluxModels, batch: Batch) -> FlowSample:
    """Encode the pictures of a batch and noise them."""
    latents = encode_image(models, batch.images, batch.eps)
    return flow_sample(pack(latents), pack(batch.noise).to(latents), batch.t)


def load_trainable(
    paths: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    rank: int,
    seed: int,
    kept: Mapping[str, str] = KEPT["alignment"]["full"],
) -> tuple[FluxModels, list[list[torch.nn.Parameter]]]:
    """Frozen networks in `dtype`, and new float32 LoRAs on transformer and ControlNet: (models, parameters of each).

    paths: as `models.weights.locate` gives them. seed: of the LoRAs' start values. kept: {network: how it is kept}.
    """
    models = load_flux(paths, device, dtype)
    networks = [models.transformer, models.controlnet]
    set_seed(seed % 2**32)  # NumPy's generator takes no more; its state is part of a checkpoint
    for model in networks:
        add_lora(model, rank)
    loras = train_loras(networks)
    place_flux(models, kept)
    return models, loras


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    clip_groups: Iterable[Iterable[torch.nn.Parameter]],
    max_norm: float = 1.0,
) -> list[float]:
    """Clip each group of parameters to `max_norm` on its own, step, and clear gradients.

    Returns each group's norm before clipping.
    """
    norms = [float(whole(torch.nn.utils.clip_grad_norm_(list(group), max_norm))) for group in clip_groups]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def lora_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW as the reference sets it; one optimizer for both LoRAs, constant learning rate."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=tuple(betas), weight_decay=weight_decay, eps=eps)
