"""The video models of stage 3, ready to fill arcs (`models/inbetween/stage.py`)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from models.inbetween.pipeline import ConditionEps, encode_video_prompts, load_inbetween
from models.inbetween.replacement import Replacement
from models.inbetween.stage import CELL, ArcInputs, InbetweenStage
from models.inbetween.wan_loading import encode_wan_prompts, load_wan_vace
from models.inbetween.wan_vace import NUM_FRAMES
from models.latents import draw_noise, to_signed
from models.runtime.runtime import Runtime
from models.settings import InbetweenSettings, WanVaceSettings
from utils.edges import resize_edges, scribble
from utils.files import read_json
from utils.images import resize_image
from utils.layout import LATENT_FRAMES
from utils.runs import derive_seed


class CogVideoXStage(InbetweenStage):
    """CogVideoX with two end images. paths: components of GGI_STAGE. transformer: folder in either layout."""

    channels_first = False

    def __init__(
        self,
        runtime: Runtime,
        paths: Mapping[str, Path],
        transformer: Path,
        prompts: Sequence[str],
        settings: InbetweenSettings,
        size: tuple[int, int],
    ):
        super().__init__(runtime, settings, size)
        config = read_json(transformer / "config.json")
        self.num_frames = (LATENT_FRAMES - 1) * config["temporal_compression_ratio"] + 1
        device, dtype, length = runtime.device, runtime.dtype, config["max_text_seq_length"]
        self.texts = encode_video_prompts(
            paths["cogvideox_text"], [*prompts, ""], device, dtype, length, runtime.placement["text"]
        )
        tiling = runtime.preset.vae_tiling
        self.pipe = load_inbetween(paths, transformer, device, dtype, runtime.placement, tiling=tiling)
        runtime.compile(self.pipe.transformer)

    def conditions(self, arc: ArcInputs) -> torch.Tensor:
        """[1, 13, 32, h, w]."""
        ends = (to_signed(picture)[None] for picture in self.ends(arc))
        edges = self.padded(np.stack([resize_edges(edges, *self.size) for edges in arc.edges]))
        width, height = self.size
        eps = ConditionEps.draw(LATENT_FRAMES, height // CELL, width // CELL, seed=self.settings.seed, arc=arc.index)
        return self.pipe.encode_conditions(*ends, to_signed(edges)[None], eps)

    def encode(self, frames: np.ndarray) -> torch.Tensor:
        return self.pipe.encode_video(to_signed(frames)[None])

    def run(
        self, conditions: torch.Tensor, noise: torch.Tensor, prompt: str, replacement: Replacement | None
    ) -> torch.Tensor:
        return self.pipe(
            conditions,
            noise,
            self.texts[prompt],
            self.texts[""],
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
            on_step=replacement,
        )

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return self.pipe.decode_video(latents)


class WanVaceStage(InbetweenStage):
    """Wan VACE with two end images. paths: components of WAN_STAGE, and `lora` if any.

    style: a picture for its reference images, uint8 [H, W, 3].
    """

    channels_first = True
    num_frames = NUM_FRAMES
    settings: WanVaceSettings

    def __init__(
        self,
        runtime: Runtime,
        paths: Mapping[str, Path],
        prompts: Sequence[str],
        settings: WanVaceSettings,
        size: tuple[int, int],
        style: np.ndarray | None = None,
    ):
        super().__init__(runtime, settings, size)
        self.control, self.style = settings.control, style
        device, dtype, kept = runtime.device, runtime.dtype, runtime.placement
        texts = [*prompts, settings.neg_prompt]
        self.texts = encode_wan_prompts(paths["wan_text"], texts, device, dtype, kept["text"])
        self.pipe = load_wan_vace(paths, device, dtype, kept, paths.get("lora"), tiling=runtime.preset.vae_tiling)
        runtime.compile(self.pipe.transformer)

    def conditions(self, arc: ArcInputs) -> torch.Tensor:
        """[1, 96, 13, h, w]; 14 with a style reference, which comes first."""
        inner = [self.draw_control(frame) for frame in arc.edges[1:-1]]
        return self.pipe.encode_arc(*self.ends(arc), inner, self.style, by_group=self.settings.latent_mask == "groups")

    def draw_control(self, frame: np.ndarray) -> np.ndarray:
        """A control frame as the model knows it: dark lines on white, or depth as it is. uint8 [H, W, 3]."""
        if self.control == "edges":
            return scribble(resize_edges(frame, *self.size))
        return resize_image(frame, *self.size)

    def start_noise(self, arc: ArcInputs) -> torch.Tensor:
        noise = super().start_noise(arc)
        if self.style is None:
            return noise
        first = draw_noise(noise[:, :, :1].shape, derive_seed(self.settings.seed, arc.index, 2))
        return torch.cat([first, noise], dim=2)

    def replacement(self, arc: ArcInputs, noise: torch.Tensor) -> Replacement:
        found = super().replacement(arc, noise)
        if self.style is None:
            return found
        latents, mask = (torch.cat([torch.zeros_like(x[:, :, :1]), x], dim=2) for x in (found.latents, found.mask))
        return replace(found, latents=latents, mask=mask)

    def encode(self, frames: np.ndarray) -> torch.Tensor:
        return self.pipe.encode_video(to_signed(frames)[None])

    def run(
        self, conditions: torch.Tensor, noise: torch.Tensor, prompt: str, replacement: Replacement | None
    ) -> torch.Tensor:
        settings = self.settings
        # The corrector would compute the latents that were replaced once more.
        self.pipe.scheduler = UniPCMultistepScheduler.from_config(
            self.pipe.scheduler.config,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=settings.flow_shift,
            disable_corrector=list(range(settings.num_replacement)),
        )
        return self.pipe(
            conditions,
            noise,
            self.texts[prompt],
            self.texts[settings.neg_prompt],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            control_weight=settings.control_weight,
            on_step=replacement,
        )

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return self.pipe.decode_video(latents[:, :, -LATENT_FRAMES:])
