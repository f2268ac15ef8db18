"""Wan VACE between two anchors: first frame, last frame and a control video, as its own pipeline takes them.

Its input is one video [start, control …, end, end, end, end] with a mask that says which frames to generate: 49
frames are its causal groups {0}, {1–4}, …, {45–48}, and the last group holds the end anchor alone. diffusers' pipeline
encodes that in every call; only when it does so is overridden. Anchors never go into its reference images: these leak
into the first frames.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import WanVACEPipeline
from PIL import Image

from models.inbetween.stage import CELL
from models.latents import to_frames
from utils.layout import LATENT_FRAMES, PADDING_FRAMES

GROUP = 4  # frames of a latent frame, but for the first
NUM_FRAMES = GROUP * (LATENT_FRAMES - 1) + 1
MASK_CHANNELS = 64  # pixels of a latent cell


class WanVaceInbetweenPipeline(WanVACEPipeline):
    """Wan VACE that is given its conditions [1, 96, F', h, w]: latents of what is kept | of the control | mask."""

    _conditions: torch.Tensor | None = None
    _references = 0
    tiled_decoding = False

    @torch.no_grad()
    def encode_conditions(
        self, video: list[Image.Image], mask: list[Image.Image], reference: Image.Image | None, *, by_group: bool
    ) -> torch.Tensor:
        """Encode a call's inputs. mask: white where to generate. reference: becomes a latent frame before the others.

        by_group: a latent frame counts as given only if all its frames are, and not as one of them is.
        """
        width, height = video[0].size
        frames = len(video)
        device = self._execution_device
        pixels, masks, references = self.preprocess_conditions(
            video, mask, reference and [reference], 1, height, width, frames, torch.float32, device
        )
        latents = self.prepare_video_latents(pixels, masks, references, None, device)
        cells = self._group_masks(masks, references) if by_group else self.prepare_masks(masks, references)
        self.maybe_free_model_hooks()  # if networks are loaded on demand, the VAE makes room for the transformer
        return torch.cat([latents, cells], dim=1)

    def encode_arc(
        self,
        start: np.ndarray,
        end: np.ndarray,
        inner: Sequence[np.ndarray],
        style: np.ndarray | None = None,
        *,
        by_group: bool = False,
    ) -> torch.Tensor:
        """`encode_conditions` of an arc. start, end, inner: ends, 44 control frames, uint8 [H, W, 3] of one size."""
        size, ends = start.shape[1::-1], 1 + PADDING_FRAMES
        return self.encode_conditions(
            [Image.fromarray(frame) for frame in (start, *inner, *[end] * ends)],
            [Image.new("L", size, value) for value in (0, *[255] * len(inner), *[0] * ends)],
            None if style is None else Image.fromarray(style),
            by_group=by_group,
        )

    def _group_masks(self, masks: torch.Tensor, references: list[list[torch.Tensor]]) -> torch.Tensor:
        """`prepare_masks`, with the largest value in each causal group. (It reads frame 1 for the first latent.)"""
        groups = [masks[:, :, :1], *masks[:, :, 1:].split(GROUP, dim=2)]
        largest = [group.amax(dim=2, keepdim=True) for group in groups]
        return torch.cat([self.prepare_masks(one, [[]] if i else references) for i, one in enumerate(largest)], dim=2)

    def preprocess_conditions(self, *arguments, **options):
        if self._conditions is None:
            return super().preprocess_conditions(*arguments, **options)
        return None, None, [[None] * self._references]

    def prepare_video_latents(self, *arguments, **options):
        if self._conditions is None:
            return super().prepare_video_latents(*arguments, **options)
        return self._conditions[:, :-MASK_CHANNELS]

    def prepare_masks(self, *arguments, **options):
        if self._conditions is None:
            return super().prepare_masks(*arguments, **options)
        return self._conditions[:, -MASK_CHANNELS:]

    @torch.no_grad()
    def __call__(
        self,
        conditions: torch.Tensor,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        control_weight: float = 1.0,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """Denoise one arc; returns latents like the noise, [1, 16, F', h, w].

        conditions: as `encode_conditions` returns them. prompt_embeds, negative_prompt_embeds: [1, T, D]; if they are
        equal, guidance changes nothing and is skipped. on_step: diffusers' `callback_on_step_end`.
        """
        frames, h, w = noise.shape[2:]
        if conditions.shape[0] != 1 or conditions.shape[2:] != noise.shape[2:]:
            raise ValueError(
                f"noise {tuple(noise.shape)} and conditions {tuple(conditions.shape)} do not fit together"
            )
        if torch.equal(prompt_embeds, negative_prompt_embeds):
            guidance_scale = 1.0
        device = self._execution_device
        self._conditions, self._references = conditions.to(device), frames - LATENT_FRAMES
        try:
            return super().__call__(
                height=h * CELL,
                width=w * CELL,
                num_frames=NUM_FRAMES,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                conditioning_scale=control_weight,
                latents=noise,
                prompt_embeds=prompt_embeds.to(device),
                negative_prompt_embeds=negative_prompt_embeds.to(device),
                output_type="latent",
                return_dict=False,
                callback_on_step_end=on_step,
            )[0]
        finally:
            self._conditions = None

    def _deviations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the VAE's latents, [1, 16, 1, 1, 1]."""
        values = self.vae.config.latents_mean, self.vae.config.latents_std
        return tuple(torch.tensor(value).view(1, -1, 1, 1, 1).to(self._execution_device) for value in values)

    @torch.no_grad()
    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        """Video [1, F, 3, H, W] in [-1, 1] -> latents [1, 16, F', h, w], float32: means of the VAE's posterior."""
        mean, deviation = self._deviations()
        pixels = video.movedim(1, 2).to(self._execution_device, self.vae.dtype)
        return (self.vae.encode(pixels).latent_dist.mode().float() - mean) / deviation

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [1, 16, F', h, w] -> video [1, 3, F, 8 h, 8 w], about in [-1, 1]."""
        mean, deviation = self._deviations()
        self.vae.use_tiling = self.tiled_decoding
        try:
            return self.vae.decode((latents.to(mean) * deviation + mean).to(self.vae.dtype), return_dict=False)[0]
        finally:
            self.vae.use_tiling = False  # encoding needs less memory

    @torch.no_grad()
    def decode_video(self, latents: torch.Tensor) -> np.ndarray:
        """Latents [1, 16, F', h, w] -> frames uint8 [F, 8 h, 8 w, 3]."""
        return to_frames(self.decode_latents(latents))
