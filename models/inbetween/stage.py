"""Stage 3, whatever its video model: the inputs of an arc, noise, guidance by carried anchors, and what is put over.

A model fills in how conditions are encoded, how they and noise become latents, and latents frames.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from models.finite import require_finite, require_finite_weights
from models.inbetween.replacement import Replacement, latent_coverage
from models.latents import draw_noise
from models.loading.files import blaming
from models.loading.networks import load_strictly
from models.runtime.memory import ON_DEMAND, RESIDENT, place
from models.runtime.runtime import Runtime
from models.runtime.speed import first_block_cache
from models.settings import InbetweenSettings
from utils.edges import resize_edges
from utils.images import read_image, resize_image
from utils.layout import LATENT_FRAMES, NOISE_CHANNELS, Arc, edge_frame_indices
from utils.noise import blend_noise
from utils.runs import derive_seed
from utils.scene.carry import CarriedVideo
from utils.scene.composite import composite, match_colours

CELL = 8  # pixels of a latent cell


@dataclass(frozen=True)
class ArcInputs:
    """The inputs of one arc. Pictures may have any size; the stage resizes them.

    index: its position on the path. start, end: anchors, or the last frame of the arc before, uint8 [H, W, 3].
    edges: or what else the stage is controlled by, uint8 [46, H, W, 3]. noise: warped, float32 [13, h, w, 16]; may be
    None where all noise is fresh. carried: the anchors carried to every frame, at the stage's size; needed for
    replacement, composite and colour matching.
    """

    index: int
    start: np.ndarray
    end: np.ndarray
    edges: np.ndarray
    noise: np.ndarray | None
    prompt: str
    carried: CarriedVideo | None = None


class InbetweenStage(ABC):
    """Stage 3, ready to fill arcs: a video model, and every prompt encoded.

    size: (width, height) in pixels. Subclasses make `pipe`; latents are [1, C, F', h, w] if `channels_first`, else
    [1, F', C, h, w].
    """

    pipe: DiffusionPipeline
    num_frames: int  # of the model, padding included
    control: str = "edges"  # what an arc's edges show
    channels_first: ClassVar[bool]

    def __init__(self, runtime: Runtime, settings: InbetweenSettings, size: tuple[int, int]):
        self.runtime, self.settings, self.size = runtime, settings, size

    def with_settings(self, **changes: object) -> "InbetweenStage":
        """A copy that shares the networks but has other settings."""
        other = copy.copy(self)
        other.settings = replace(self.settings, **changes)
        return other

    # --- what a model fills in ---

    @abstractmethod
    def conditions(self, arc: ArcInputs) -> torch.Tensor:
        """Encode an arc's conditions, on the device."""

    @abstractmethod
    def encode(self, frames: np.ndarray) -> torch.Tensor:
        """Latents of a whole video, uint8 [num_frames, H, W, 3], at the stage's size."""

    @abstractmethod
    def run(
        self, conditions: torch.Tensor, noise: torch.Tensor, prompt: str, replacement: Replacement | None
    ) -> torch.Tensor:
        """Denoise; returns latents. noise: N(0, 1), as latents, float32."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Decode latents into uint8 [num_frames, H, W, 3]: the arc's 46 frames, and the padding after them."""

    # --- what all models share ---

    def read_control(self, arc: Arc) -> np.ndarray:
        """Read what an arc's 46 frames are controlled by: uint8 [46, H, W, 3], at the stage's size."""
        return np.stack([resize_edges(read_image(path), *self.size) for path in arc.control_paths(self.control)])

    def ends(self, arc: ArcInputs) -> tuple[np.ndarray, np.ndarray]:
        """The two end pictures at the stage's size."""
        return resize_image(arc.start, *self.size), resize_image(arc.end, *self.size)

    def padded(self, frames: np.ndarray) -> np.ndarray:
        """An arc's 46 frames as the model sees them: the last one repeated."""
        return frames[edge_frame_indices(self.num_frames)]

    def start_noise(self, arc: ArcInputs) -> torch.Tensor:
        """Warped and fresh noise, mixed: float32, as latents, on the CPU."""
        width, height = self.size
        shape = (1, LATENT_FRAMES, NOISE_CHANNELS, height // CELL, width // CELL)
        noise = draw_noise(shape, derive_seed(self.settings.seed, arc.index, 1))
        if arc.noise is not None:
            warped = torch.from_numpy(arc.noise).movedim(-1, 1)[None]
            noise = blend_noise(warped, noise, self.settings.degradation)
        elif self.settings.degradation < 1:
            raise ValueError(f"without warped noise, degradation must be 1, not {self.settings.degradation}")
        return noise.movedim(2, 1) if self.channels_first else noise

    def denoise(self, arc: ArcInputs, conditions: torch.Tensor | None = None) -> torch.Tensor:
        """Denoise an arc; returns latents. conditions: replace the arc's own."""
        noise = self.start_noise(arc)
        replacement = self.replacement(arc, noise) if self.settings.num_replacement else None
        with self.runtime.attention(), first_block_cache(self.pipe.transformer, self.settings.cache):
            conditions = self.conditions(arc) if conditions is None else conditions
            latents = self.run(conditions, noise, arc.prompt, replacement)
        return require_finite(latents, f"the denoised latents of arc {arc.index}")

    @torch.no_grad()
    def replacement(self, arc: ArcInputs, noise: torch.Tensor) -> Replacement:
        """Encode the carried anchors. noise: the start noise."""
        latents = self.encode(self.padded(arc.carried.frames))
        self.pipe.maybe_free_model_hooks()
        mask = latent_coverage(self.padded(arc.carried.seen), self.settings.replacement_coverage)
        if self.channels_first:
            mask = mask.movedim(2, 1)
        return Replacement(latents, mask, noise, self.settings.num_replacement)

    def finish(self, frames: np.ndarray, arc: ArcInputs) -> np.ndarray:
        """Composite carried anchors over frames, uint8 [46, H, W, 3], or match their colours, as the settings say."""
        settings, carried = self.settings, arc.carried
        if settings.composite:
            return composite(frames, carried.frames, getattr(carried, settings.composite))
        return match_colours(frames, carried.frames, carried.seen) if settings.colour_match else frames


def place_networks(pipeline: DiffusionPipeline, kept: Mapping[str, str], device: str) -> None:
    """Place a pipeline's transformer and VAE. kept: {network: placement} (`runtime/memory.py`)."""
    names = ("transformer", "vae")
    if ON_DEMAND in kept.values():
        for name in names:
            require_finite_weights(getattr(pipeline, name))
        pipeline.enable_model_cpu_offload(device=device)
    else:
        for name in names:
            place(getattr(pipeline, name), kept[name], device)


@torch.no_grad()
def caption_image(image: np.ndarray, path: Path, device: str, dtype: torch.dtype, seed: int) -> str:
    """Describe an image, uint8 [H, W, 3], with the BLIP-2 model in `path`, then free the model."""
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

    # The processor is assembled here because its own loader requires torchvision.
    model = load_strictly("caption_model", Blip2ForConditionalGeneration, path, dtype, ("mismatched_keys",))
    place(model, RESIDENT, device)
    with blaming(f"caption_model: {path} cannot be loaded"):
        processor = Blip2Processor(
            BlipImageProcessorPil.from_pretrained(path, local_files_only=True),
            AutoTokenizer.from_pretrained(path, local_files_only=True),
            num_query_tokens=model.config.num_query_tokens,
        )
    torch.manual_seed(seed)
    inputs = processor(images=Image.fromarray(image), return_tensors="pt").to(device, dtype)
    tokens = model.generate(**inputs, max_new_tokens=40)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
