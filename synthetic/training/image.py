"""Training of FLUX, its ControlNet and its text encoders from scratch: rectified flow on pictures, edges and captions.

Unlike distribution alignment this trains every weight, at all noise levels alike, and drops captions and edges now and
then, so that both can be weakened at inference.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxControlNetModel, FluxPipeline
from torch import nn

from models.flux.alignment import flow_sample
from models.flux.anchors import AnchorSettings
from models.flux.network import FluxModels, Text, anchor_schedule, decode_latents, encode_image, to_bytes, velocity
from models.latents import draw_noise, pack, to_signed, unpack
from models.precision import computes_in_bfloat16
from synthetic.pictures import DETECTED, TownPictures
from synthetic.tiny_models import HEIGHT, MAX_TOKENS, PRESET, WIDTH
from utils.data.references import ASPECTS, Reference, crop_size, draw_crop
from utils.runs import derive_seed

GUIDANCE = (1.0, 5.0)  # distilled guidance has no meaning here: the network learns that it changes nothing
CONTROL_WEIGHT = (0.75, 1.0)  # alignment takes 1, anchors are drawn with 0.8
EDGE_DROPOUT = 0.05
DETECTED_SHARE = 0.3  # of the pictures come with edges that were detected in them, as references do
COARSE_SHARE = 0.3  # with lines of a coarse mesh: what it lacks is to be invented in the style
FINE_STEPS = 1000  # of the schedule that timesteps are drawn from
SHEET_STEPS = 25


class ImageObjective(nn.Module):
    """All trained networks as one module, with the frozen autoencoder."""

    def __init__(self, pipeline: FluxPipeline, controlnet: FluxControlNetModel, vae: AutoencoderKL):
        """vae: already on the device of the training."""
        super().__init__()
        self.transformer, self.controlnet = pipeline.transformer, controlnet
        self.t5, self.clip = pipeline.text_encoder_2, pipeline.text_encoder
        self.models = FluxModels(self.transformer, self.controlnet, vae.requires_grad_(False), str(vae.device))
        self._tokenizers = (pipeline.tokenizer_2, pipeline.tokenizer)

    def texts(self, captions: Sequence[str]) -> Text:
        """Encoded captions, as FluxPipeline.encode_prompt does it, but with gradients."""
        t5_ids, clip_ids = (
            tokenizer(
                list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids.to(self.t5.device)
            for tokenizer in self._tokenizers
        )
        return Text(self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output)

    def forward(self, images, control, noise, t, guidance, control_weight, captions) -> dict[str, torch.Tensor]:
        """images, control: [B, 3, H, W] in [-1, 1]; noise: [B, 16, H/8, W/8]; t, guidance: [B]. One control_weight."""
        with torch.no_grad():
            tokens = pack(encode_image(self.models, images, None))
        sample = flow_sample(tokens, pack(noise), t)
        text = self.texts(captions)
        scales = {"guidance": guidance, "control_weight": control_weight}
        prediction = velocity(self.models, sample.tokens, t, text, control, **scales)
        return {"loss": F.mse_loss(prediction.float(), sample.target)}


def timesteps(width: int, height: int) -> torch.Tensor:
    """The schedule of anchor views in FINE_STEPS steps, without its end, float32 [FINE_STEPS]."""
    return anchor_schedule(FINE_STEPS, width, height)[:-1]


def draw_captioned(
    towns: Sequence[TownPictures], caption_dropout: float
) -> Callable[[tuple[int, ...], Iterable[int]], dict]:
    """The draw function of `models.runtime.training.fit`: pictures with edges, captions, noise and timesteps.

    All pictures of a step are cropped to one of the shapes that alignment crops its references to.
    """
    schedule = timesteps(WIDTH, HEIGHT)

    def draw(step_seed: tuple[int, ...], items: Iterable[int]) -> dict:
        step_rng, rows = np.random.default_rng(step_seed), []
        aspect = ASPECTS[step_rng.integers(len(ASPECTS))] or WIDTH / HEIGHT
        size = crop_size(aspect, PRESET["resolution"], PRESET["training_multiple"])
        for item in items:
            rng = np.random.default_rng([*step_seed, item])
            town = towns[rng.integers(len(towns))]
            view, style = rng.integers(len(town.images)), rng.integers(town.images.shape[1])
            edges, way, kind = town.edges[view], rng.choice((1, -1)), rng.random()
            if kind > 1 - COARSE_SHARE:
                edges = town.coarse[view]
            elif kind < DETECTED_SHARE:
                k = rng.integers(len(DETECTED))
                (view, style), edges = DETECTED[k], town.detected[k]
            image, edges = town.images[view, style][:, ::way], edges[:, ::way]
            if rng.random() < EDGE_DROPOUT:
                edges = np.zeros_like(edges)
            caption = "" if rng.random() < caption_dropout else town.captions[style]
            whole = Reference(Path(), image, np.repeat(edges[..., None], 3, axis=-1), caption)
            image, edges = draw_crop(whole, size, rng)
            noise = draw_noise((16, size[1] // 8, size[0] // 8), derive_seed(*step_seed, item, 1))
            rows.append((image, edges, caption, noise, schedule[rng.integers(len(schedule))], rng.uniform(*GUIDANCE)))
        images, edges, captions, noise, t, guidance = zip(*rows, strict=True)
        return {
            "images": to_signed(np.array(images)),
            "control": to_signed(np.array(edges)),
            "captions": captions,
            "noise": torch.stack(noise),
            "t": torch.stack(t),
            "control_weight": step_rng.uniform(*CONTROL_WEIGHT),
            "guidance": torch.tensor(guidance, dtype=torch.float32),
        }

    return draw


@torch.no_grad()
def sample_pictures(objective: ImageObjective, edges: np.ndarray, captions: Sequence[str], seed: int) -> np.ndarray:
    """Draw pictures along edges: uint8 [N, H, W, 3]. edges: uint8 [N, H, W]."""
    models, settings = objective.models, AnchorSettings()
    height, width = edges.shape[1:]
    control = to_signed(np.repeat(edges[..., None], 3, axis=-1)).to(models.device)
    text = objective.texts(captions)
    noise = torch.stack([draw_noise((16, height // 8, width // 8), seed + k) for k in range(len(edges))])
    tokens = pack(noise).to(models.device)
    schedule = anchor_schedule(SHEET_STEPS, width, height)
    scales = {"guidance": settings.guidance, "control_weight": settings.control_weight}
    quick = computes_in_bfloat16(models.device)
    with torch.autocast(torch.device(models.device).type, torch.bfloat16, enabled=quick):
        for now, after in pairwise(schedule):
            prediction = velocity(models, tokens, now, text, control, **scales)
            tokens = tokens + (after - now) * prediction.float()
    return to_bytes(decode_latents(models, unpack(tokens, height // 8, width // 8)))
