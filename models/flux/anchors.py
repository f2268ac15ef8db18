"""Sparse appearance-guided sampling: one anchor view, kept consistent with the previous one.

The loop is rectified flow with true CFG. In its first steps the latents are replaced, wherever the previous anchor
can be warped to this view reliably, by that anchor noised to the current time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from models.flux.network import (
    CONTROL_STEPS,
    FluxModels,
    Text,
    anchor_schedule,
    decode_latents,
    encode_image,
    guided_velocity,
    stack_texts,
    to_bytes,
    velocity,
)
from models.latents import pack, to_signed, unpack
from utils.correspondence import latent_mask, resize_map, unreliable_mask, warp_image


@dataclass(frozen=True)
class AnchorSettings:
    """How an anchor is drawn; field names are the script's flags."""

    num_steps: int = 25  # denoising steps
    guidance: float = 4.0  # distilled guidance of FLUX.1-dev
    true_gs: float = 3.5  # scale of true classifier-free guidance
    timestep_to_start_cfg: int = 1  # first step that uses true CFG
    control_weight: float = 0.8  # ControlNet strength
    num_replacement: int = 12  # steps 1 … num_replacement - 1 use the warped previous anchor


@dataclass(frozen=True)
class Replacement:
    """What the early steps are replaced by. latents x_1: [1, 16, h, w]; mask: [1, 16, h, w], 1 = keep the sample."""

    latents: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Step:
    """One denoising step, for progress bars and tests. Tokens [1, L, 64]; negative is None where CFG is off."""

    index: int
    tokens_in: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor | None
    tokens_out: torch.Tensor


def warp_anchor(previous: np.ndarray, code: np.ndarray, dilations: int) -> tuple[np.ndarray, np.ndarray]:
    """Carry the previous anchor along a correspondence map.

    previous: uint8 [H, W, 3]. code: uint16 map of any size. dilations: growth of the mask (`mask_dilations` of a
    preset). Returns the image, uint8 [H, W, 3], black where nothing arrives, and its mask, uint8 [H, W]: 1 = generate
    freely, 0 = keep the warp.
    """
    resized = resize_map(code, previous.shape[1], previous.shape[0])
    return warp_image(previous, resized), unreliable_mask(resized, dilations)


@torch.no_grad()
def encode_warped(models: FluxModels, image: np.ndarray, mask: np.ndarray, eps: torch.Tensor) -> Replacement:
    """VAE-encode a warped anchor and bring its mask to the latent grid. eps: N(0, 1) [1, 16, h, w]."""
    latents = encode_image(models, to_signed(image)[None], eps)
    keep = torch.from_numpy(latent_mask(mask)).to(latents)
    return Replacement(latents, keep.expand_as(latents))


@torch.no_grad()
def sample_anchor(
    models: FluxModels,
    noise: torch.Tensor,
    control: torch.Tensor,
    positive: Text,
    negative: Text,
    settings: AnchorSettings,
    replacement: Replacement | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Denoise one anchor; returns float32 latents [1, 16, h, w].

    noise: x_0 ~ N(0, 1), float32 [1, 16, h, w], h and w even. control: edges [1, 3, 8 h, 8 w] in [-1, 1]. When both
    prompts are equal, or its scale is 1, true CFG changes nothing, and its second branch is left out; else both go
    in one batch, whose activations are fewer than the decoder's (`plan_anchors`).
    """
    height, width = noise.shape[-2:]
    schedule = anchor_schedule(settings.num_steps, 8 * width, 8 * height)
    use_cfg = settings.true_gs != 1 and not positive.same_as(negative)
    both = stack_texts([positive, negative]).to(models.device) if use_cfg else None
    positive, control = positive.to(models.device), control.to(models.device)  # once, not in every step
    x0 = tokens = pack(noise).to(models.device)
    if replacement is not None:
        x1, keep = pack(replacement.latents), pack(replacement.mask)
    for i, (t, t_next) in enumerate(zip(schedule[:-1].tolist(), schedule[1:].tolist(), strict=True)):
        if replacement is not None and 0 < i < settings.num_replacement:
            tokens = keep * tokens + (1 - keep) * ((1 - t) * x1 + t * x0)
        weights = {"guidance": settings.guidance, "control_weight": settings.control_weight * (i < CONTROL_STEPS)}
        pred_negative = None
        if use_cfg and i >= settings.timestep_to_start_cfg:
            batch = tokens.expand(2, -1, -1), t, both, control.expand(2, -1, -1, -1)
            pred, pred_negative = velocity(models, *batch, **weights).chunk(2)
        else:
            pred = velocity(models, tokens, t, positive, control, **weights)
        following = tokens + (t_next - t) * guided_velocity(pred, pred_negative, settings.true_gs)
        if on_step:
            on_step(Step(i, tokens, pred, pred_negative, following))
        tokens = following
    return unpack(tokens, height, width)


@torch.no_grad()
def decode_anchor(models: FluxModels, latents: torch.Tensor) -> np.ndarray:
    """Latents [1, 16, h, w] -> image uint8 [8 h, 8 w, 3]."""
    return to_bytes(decode_latents(models, latents))[0]
