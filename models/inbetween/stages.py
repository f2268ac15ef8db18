"""The video models of stage 3, ready to fill arcs (`models/inbetween/stage.py`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from models.inbetween.pipeline import ConditionEps, encode_video_prompts, load_inbetween
from models.inbetween.replacement import Replacement
from models.inbetween.stage import CELL, ArcInputs, InbetweenStage
from models.latents import to_signed
from models.runtime.runtime import Runtime
from models.settings import InbetweenSettings
from utils.edges import resize_edges
from utils.files import read_json
from utils.layout import LATENT_FRAMES


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
