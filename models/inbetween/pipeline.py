"""Geometry-guided generative in-betweening: CogVideoX between two anchor views.

The transformer takes 48 channels: noisy latents 16 | image latents 16 (start, zeros …, end) | edge latents 16.
diffusers' image-to-video pipeline already concatenates noise and conditions, so only where the conditions come from
is overridden.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
)

from models.finite import require_finite
from models.inbetween.stage import place_networks
from models.latents import draw_noise, posterior_sample, to_frames
from models.loading.files import load_ggi_transformer
from models.loading.networks import free_caches, load_encoders, load_model, load_pipeline
from models.prompts import warn_of_cuts
from models.runtime.convolution import use_onednn
from models.runtime.memory import PLACEMENTS, RESIDENT, place, place_pipeline
from models.runtime.rotary import use_complex_rotary
from models.runtime.runtime import Runtime
from utils.runs import derive_seed

LATENT_CHANNELS = 16
CHANNELS = 3 * LATENT_CHANNELS  # noisy latents | images | edges


def prepare_networks(transformer: CogVideoXTransformer3DModel, vae: AutoencoderKLCogVideoX, *, tiling: bool) -> None:
    """Set both up for inference. tiling: decode the VAE in tiles."""
    use_complex_rotary(transformer)
    prepare_vae(vae, tiling=tiling)


def prepare_vae(vae: AutoencoderKLCogVideoX, *, tiling: bool) -> None:
    """Set the VAE up: quick convolutions on a CPU, one video at a time, in tiles if asked to."""
    use_onednn(vae)
    vae.enable_slicing()
    if tiling:
        vae.enable_tiling()


@dataclass(frozen=True)
class ConditionEps:
    """N(0, 1) draws for the VAE posteriors. start, end: [1, 16, 1, h, w]; edges: [1, 16, F, h, w]."""

    start: torch.Tensor
    end: torch.Tensor
    edges: torch.Tensor

    @classmethod
    def draw(cls, latent_frames: int, h: int, w: int, seed: int, arc: int) -> "ConditionEps":
        """The end images take the first two draws of one generator, as in the reference; edges differ per arc."""
        generator = torch.Generator("cpu").manual_seed(seed)
        start, end = (torch.randn(1, LATENT_CHANNELS, 1, h, w, generator=generator) for _ in range(2))
        return cls(start, end, draw_noise((1, LATENT_CHANNELS, latent_frames, h, w), derive_seed(seed, arc, 0)))


class CogVideoXInbetweenPipeline(CogVideoXImageToVideoPipeline):
    """CogVideoX image-to-video with two end images and an edge video as conditions."""

    _conditions: torch.Tensor | None = None

    def encode_video(self, video: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Video [1, F, 3, H, W] in [-1, 1] -> latents [1, F', 16, h, w], F' = (F - 1)/4 + 1, in the VAE's dtype."""
        pixels = video.movedim(1, 2).to(self._execution_device, self.vae.dtype)
        latents = posterior_sample(self.vae.encode(pixels).latent_dist, eps)
        return self.vae_scaling_factor_image * latents.movedim(1, 2)

    @torch.no_grad()
    def encode_conditions(
        self,
        start: torch.Tensor,
        end: torch.Tensor,
        edges: torch.Tensor,
        eps: ConditionEps,
        end_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Conditions [1, F', 32, h, w]: (start, zeros …, end) | edges.

        start, end: images [1, 3, H, W] in [-1, 1]. edges: video [1, F, 3, H, W] in [-1, 1]. end_mask: [h, w], 1
        keeps the end latents there; in the reference it is off by default.
        """
        edge_latents = self.encode_video(edges, eps.edges)
        images = torch.zeros_like(edge_latents)
        images[:, 0] = self.encode_video(start[:, None], eps.start)[:, 0]
        images[:, -1] = self.encode_video(end[:, None], eps.end)[:, 0]
        if end_mask is not None:
            images[:, -1] *= end_mask.to(images)
        self.maybe_free_model_hooks()  # if networks are loaded on demand, the VAE makes room for the transformer
        return torch.cat([images, edge_latents], dim=2)

    def prepare_latents(
        self, image, batch_size, num_channels_latents, num_frames, height, width, dtype, device, generator, latents
    ):
        """The given noise and this call's conditions. (The parent encodes `image` as the first frame instead.)"""
        noise = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        return noise, self._conditions.to(device, dtype)

    @torch.no_grad()
    def __call__(
        self,
        conditions: torch.Tensor,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 6.0,
        on_step: Callable | None = None,
    ) -> torch.Tensor:
        """Denoise one arc; returns latents [1, F', 16, h, w].

        conditions: as `encode_conditions` returns them. noise: N(0, 1) [1, F', 16, h, w]. prompt_embeds,
        negative_prompt_embeds: [1, T, D]; if they are equal, guidance changes nothing and its second branch is
        skipped. on_step: diffusers' `callback_on_step_end`.
        """
        frames, channels, h, w = noise.shape[1:]
        if channels != LATENT_CHANNELS or conditions.shape != (1, frames, 2 * LATENT_CHANNELS, h, w):
            raise ValueError(
                f"noise {tuple(noise.shape)} and conditions {tuple(conditions.shape)} do not fit together"
            )
        if torch.equal(prompt_embeds, negative_prompt_embeds):
            guidance_scale = 1.0
        device, dtype = self._execution_device, self.transformer.dtype
        prompt_embeds, negative_prompt_embeds = (e.to(device, dtype) for e in (prompt_embeds, negative_prompt_embeds))
        scale = self.vae_scale_factor_spatial
        self._conditions = conditions
        try:
            return super().__call__(
                image=torch.zeros(1, 3, h * scale, w * scale),  # required by the parent, not used
                height=h * scale,
                width=w * scale,
                num_frames=(frames - 1) * self.vae_scale_factor_temporal + 1,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                latents=noise,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                output_type="latent",
                return_dict=False,
                callback_on_step_end=on_step,
            )[0]
        finally:
            self._conditions = None

    @torch.no_grad()
    def decode_video(self, latents: torch.Tensor) -> np.ndarray:
        """Latents [1, F', 16, h, w] -> frames uint8 [F, 8 h, 8 w, 3]."""
        return to_frames(self.decode_latents(latents.to(self._execution_device, self.vae.dtype)))


def encode_video_prompts(
    path: Path, prompts: Iterable[str], device: str, dtype: torch.dtype, max_length: int, how: str = RESIDENT
) -> dict[str, torch.Tensor]:
    """Encode prompts for CogVideoX, then free the text encoder: {prompt: T5 embedding [1, T, D] on the CPU}."""
    pipeline = load_encoders("cogvideox_text", CogVideoXInbetweenPipeline, path, dtype)
    place_pipeline(pipeline, how, device)
    prompts = list(dict.fromkeys(prompts))
    warn_of_cuts("T5", pipeline.tokenizer, prompts, max_length)
    with torch.no_grad():
        embeds = {
            prompt: pipeline.encode_prompt(prompt, None, False, max_sequence_length=max_length)[0].cpu()
            for prompt in prompts
        }
    del pipeline
    free_caches()
    for prompt, embed in embeds.items():
        require_finite(embed, f"the T5 embeddings of the prompt {prompt!r}")
    return embeds


def load_inbetween(
    paths: dict[str, Path],
    transformer: Path,
    device: str,
    dtype: torch.dtype,
    kept: Mapping[str, str] = PLACEMENTS["ggi"]["full"],
    *,
    tiling: bool,
) -> CogVideoXInbetweenPipeline:
    """Load the in-between pipeline without its text encoder.

    transformer: folder in either layout, merged while loading. kept: {network: placement} (`runtime/memory.py`).
    """
    networks = {
        "transformer": load_ggi_transformer(transformer, dtype).requires_grad_(False),
        "vae": load_model("cogvideox_vae", AutoencoderKLCogVideoX, paths["cogvideox_vae"], dtype),
    }
    no_text = {"text_encoder": None, "tokenizer": None}
    pipeline = load_pipeline(
        "cogvideox_text", CogVideoXInbetweenPipeline, paths["cogvideox_text"], dtype, **networks, **no_text
    )
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)  # whatever it was
    prepare_networks(**networks, tiling=tiling)
    place_networks(pipeline, kept, device)
    pipeline.set_progress_bar_config(leave=False, desc="steps")
    return pipeline


def load_video_vae(runtime: Runtime, paths: Mapping[str, Path]) -> AutoencoderKLCogVideoX:
    """Load only CogVideoX's VAE, onto the runtime's device."""
    vae = load_model("cogvideox_vae", AutoencoderKLCogVideoX, paths["cogvideox_vae"], runtime.dtype)
    prepare_vae(vae, tiling=runtime.preset.vae_tiling)
    place(vae, RESIDENT, runtime.device)
    return vae
