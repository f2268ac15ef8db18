"""Encode and decode true pictures with the autoencoders alone: an upper bound on the quality of a stage."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

from models.flux.network import FluxModels, decode_latents, encode_image, to_bytes
from models.latents import to_signed
from models.loading.networks import load_model
from models.runtime.runtime import Runtime
from utils.layout import ARC_FRAMES, edge_frame_indices


def load_image_vae(runtime: Runtime, paths: Mapping[str, Path]) -> AutoencoderKL:
    return load_model("flux_vae", AutoencoderKL, paths["flux_vae"], runtime.dtype)


@torch.no_grad()
def image_round_trip(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode pictures uint8 [N, H, W, 3] with the image VAE (posterior means) and decode them."""
    models = FluxModels(None, None, vae)  # encoding and decoding need no other network
    return to_bytes(decode_latents(models, encode_image(models, to_signed(images), None)))


@torch.no_grad()
def video_round_trip(vae: AutoencoderKLCogVideoX, video: np.ndarray, num_frames: int) -> np.ndarray:
    """Encode an arc, uint8 [46, H, W, 3], padded for the model, with the video VAE (posterior means) and decode it."""
    pixels = to_signed(video[edge_frame_indices(num_frames)]).movedim(0, 1)[None].to(vae.dtype)
    output = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0].float()
    frames = ((output.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.movedim(0, -1).numpy()[:ARC_FRAMES]


def as_rgb(edges: np.ndarray) -> np.ndarray:
    """uint8 [..., H, W] -> [..., H, W, 3]."""
    return np.repeat(edges[..., None], 3, axis=-1)
