"""Sparse appearance-guided sampling: one anchor view, kept consistent with the previous one.

The loop is rectified flow with true CFG. In its first steps the latents are replaced, wherever the previous anchor
can be warped to this view reliably, by that anchor noised to the current time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.finite import require_finite
from models.flux.lora import LoraState, add_lora, common_ranks, set_lora
from models.flux.network import (
    CONTROL_STEPS,
    FluxModels,
    Text,
    anchor_schedule,
    decode_latents,
    encode_control,
    encode_flux_prompts,
    encode_image,
    guided_velocity,
    load_flux,
    place_flux,
    stack_texts,
    to_bytes,
    velocity,
)
from models.flux.other_loras import OtherLora, merge_lora
from models.latents import draw_noise, pack, to_signed, unpack
from models.runtime.rotary import use_complex_rotary
from models.runtime.runtime import Runtime
from models.settings import AnchorSettings
from utils.correspondence import grow_holes, latent_mask, resize_map, unreliable_mask, warp_image


@dataclass(frozen=True)
class Replacement:
    """Replaces latents in early steps. latents x_1: [1, 16, h, w]; mask: [1, 16, h, w], 1 = keep the sample."""

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

    noise: x_0 ~ N(0, 1), float32 [1, 16, h, w], h and w even. control: from `encode_control`. True CFG
    changes nothing if the prompts are equal or its scale is 1: the negative branch is then skipped. Otherwise both
    branches go in one batch, whose activations are smaller than the decoder's (`plan_anchors`).
    """
    height, width = noise.shape[-2:]
    schedule = anchor_schedule(settings.num_steps, 8 * width, 8 * height)
    use_cfg = settings.true_gs != 1 and not positive.same_as(negative)
    both = stack_texts([positive, negative]).to(models.device) if use_cfg else None
    positive, control = positive.to(models.device), control.to(models.device)  # once instead of in every step
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
    """Latents [1, 16, h, w] -> picture uint8 [8 h, 8 w, 3]."""
    return to_bytes(decode_latents(models, latents))[0]


@dataclass(frozen=True)
class Anchor:
    """The inputs of one anchor.

    number: its index on the path. edges: uint8 [H, W, 3]. seed: the run's seed. previous: the anchor before it, uint8
    [H, W, 3]. code: uint16 correspondence map from it. carried: in their place, pictures carried to this view, uint8
    [H, W, 3], and where they are seen, bool [H, W]. Without either the anchor is drawn on its own.
    """

    number: int
    edges: np.ndarray
    prompt: str
    seed: int
    previous: np.ndarray | None = None
    code: np.ndarray | None = None
    carried: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Drawn:
    """An anchor's latents, float32 [1, 16, h, w], and the warp and mask that guided them (`warp_anchor`)."""

    latents: torch.Tensor
    warped: np.ndarray | None = None
    mask: np.ndarray | None = None


class AnchorStage:
    """Stage 2, ready to draw: FLUX and its ControlNet with the LoRAs of every style, and every prompt encoded.

    paths: components of FLUX_STAGE. loras: {style: LoRAs of both networks, from `read_loras`}; if empty, none are
    added. prompts: every prompt that an anchor will use. others: LoRAs of other programs, added under every style's.
    """

    def __init__(
        self,
        runtime: Runtime,
        paths: Mapping[str, Path],
        loras: Mapping[str, Sequence[LoraState]],
        prompts: Sequence[str],
        settings: AnchorSettings,
        others: Sequence[OtherLora] = (),
    ):
        self.runtime, self.settings, self.loras = runtime, settings, loras
        prompts = [*prompts, settings.neg_prompt]
        device, dtype, length = runtime.device, runtime.dtype, runtime.preset.max_sequence_length
        self.texts = encode_flux_prompts(paths["flux_text"], prompts, device, dtype, length, runtime.placement["text"])
        self.models = load_flux(paths, device, dtype)
        self.models.control_mode = settings.control_mode
        for lora in others:
            merge_lora(self.models.transformer, lora)
        for network, rank in zip(self.networks, common_ranks(loras) if loras else (None, None), strict=True):
            if rank:
                add_lora(network, rank)
            use_complex_rotary(network)
        place_flux(self.models, runtime.placement)
        runtime.compile(self.models.transformer)
        self._style = None

    @property
    def networks(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Transformer and ControlNet."""
        return self.models.transformer, self.models.controlnet

    def put_on(self, style: str) -> None:
        """Use the LoRAs of this style from now on."""
        if style != self._style:
            for network, state in zip(self.networks, self.loras[style], strict=True):
                set_lora(network, state, self.settings.lora_weight)
        self._style = style

    def draw(self, anchor: Anchor, on_step: Callable[[Step], None] | None = None) -> Drawn:
        """Denoise one anchor."""
        control = self._control(anchor.edges)
        noise = self._noise(anchor, anchor.number)
        warped = mask = replacement = None
        dilations = self.runtime.preset.mask_dilations
        if anchor.previous is not None:
            warped, mask = warp_anchor(anchor.previous, anchor.code, dilations)
        elif anchor.carried is not None:
            # They have neither black holes nor jagged silhouettes: half of the margin is enough.
            warped, mask = anchor.carried[0], grow_holes(~anchor.carried[1], dilations // 2)
        if warped is not None:
            # The reference's posterior draw is the first after seeding the previous anchor: its noise, bit for bit.
            replacement = encode_warped(self.models, warped, mask, self._noise(anchor, anchor.number - 1))
        texts = self.texts[anchor.prompt], self.texts[self.settings.neg_prompt]
        with self.runtime.attention():
            latents = sample_anchor(self.models, noise, control, *texts, self.settings, replacement, on_step)
        return Drawn(require_finite(latents, f"the denoised latents of anchor {anchor.number}"), warped, mask)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Latents [1, 16, h, w] -> picture uint8 [8 h, 8 w, 3]."""
        return decode_anchor(self.models, latents)

    @torch.no_grad()
    def _control(self, edges: np.ndarray) -> torch.Tensor:
        return encode_control(self.models, to_signed(edges)[None])

    def _noise(self, anchor: Anchor, number: int) -> torch.Tensor:
        """N(0, 1) [1, 16, h, w] for the anchor with this number; the same for all anchors unless `use_else_noise`."""
        height, width = anchor.edges.shape[:2]
        return draw_noise((1, 16, height // 8, width // 8), anchor.seed + number * self.settings.use_else_noise)
