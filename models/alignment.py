"""Distribution alignment: the training objective and one optimizer step (paper section 4.1).

Rectified flow on the reference image, with the ControlNet's residuals unscaled and guidance 1: the LoRAs learn what
FLUX and its ControlNet must add so that edges of the reference give the reference.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.flux import FluxModels, Text, velocity

GUIDANCE = 1.0  # distilled guidance during training


@dataclass(frozen=True)
class FlowSample:
    """One point on the path between image and noise. Tokens [B, L, 64], float32; t in [0, 1]."""

    tokens: torch.Tensor
    target: torch.Tensor
    t: float


def flow_sample(image: torch.Tensor, noise: torch.Tensor, t: float) -> FlowSample:
    """x_t = (1 - t) x_1 + t x_0 and its target velocity x_0 - x_1. image: x_1, noise: x_0, packed [B, L, 64]."""
    return FlowSample((1 - t) * image + t * noise, noise - image, t)


def flow_loss(models: FluxModels, sample: FlowSample, text: Text, control: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted velocity, float32 scalar. control: edges [B, 3, H, W] in [-1, 1]."""
    prediction = velocity(models, sample.tokens, sample.t, text, control, guidance=GUIDANCE)
    return F.mse_loss(prediction.float(), sample.target.float())


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    clip_groups: Iterable[Iterable[torch.nn.Parameter]],
    max_norm: float = 1.0,
    clip: Callable[[Iterable[torch.nn.Parameter], float], torch.Tensor] = torch.nn.utils.clip_grad_norm_,
) -> list[float]:
    """Clip each group of parameters to `max_norm` on its own, step, and clear gradients.

    clip: `torch.nn.utils.clip_grad_norm_` or accelerate's version of it. Returns each group's norm before clipping.
    """
    norms = [float(clip(list(group), max_norm)) for group in clip_groups]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def lora_optimizer(parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW as the reference sets it; one optimizer for both LoRAs, constant learning rate."""
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
