"""Small tensor maths shared by both diffusion models: posterior samples, FLUX's token packing, colour ranges."""

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.finite import require_finite
from utils.files import atomic_path


def posterior_sample(posterior: DiagonalGaussianDistribution, eps: torch.Tensor | None = None) -> torch.Tensor:
    """mean + std * eps, in the posterior's dtype. eps: N(0, 1) of the latents' shape; None gives the mean."""
    if eps is None:
        return posterior.mean
    if eps.shape != posterior.mean.shape:
        raise ValueError(f"eps has shape {tuple(eps.shape)}, the latents have {tuple(posterior.mean.shape)}")
    return posterior.mean + posterior.std * eps.to(posterior.mean)


def draw_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """N(0, 1) as float32 on the CPU: the same numbers on every device and in every dtype."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] -> tokens [B, h/2 * w/2, 4 C]; features ordered (channel, dy, dx), tokens row-major."""
    b, c, h, w = latents.shape
    return latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Inverse of `pack`: tokens [B, h/2 * w/2, 4 C] -> latents [B, C, h, w]."""
    b, _, c = tokens.shape
    return tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def token_positions(h: int, w: int, device: torch.device) -> torch.Tensor:
    """Rotary positions of the tokens of [h, w] latents: float32 [h/2 * w/2, 3] = (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float().to(device)


def to_signed(images: np.ndarray) -> torch.Tensor:
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    if images.dtype != np.uint8 or images.shape[-1] != 3:
        raise ValueError(f"expected uint8 [..., H, W, 3], got {images.dtype} {images.shape}")
    return torch.tensor(images).movedim(-1, -3).float() / 127.5 - 1


def to_frames(video: torch.Tensor) -> np.ndarray:
    """Decoded video [1, 3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3]. Rounds, as the reference does for CogVideoX.

    Raises FloatingPointError when it is not finite.
    """
    frames = require_finite(video.float(), "the decoded frames")[0]
    return (frames / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).movedim(0, -1).cpu().numpy()


def find_or_make(path: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Read latents from the file `path`, or make them and write them there. On the CPU.

    So a failed decode needs no second denoising. A file that is damaged or not finite is made again. Raises OSError
    when they cannot be written.
    """
    if path.exists():
        with suppress(SafetensorError, KeyError, FloatingPointError):
            return require_finite(load_file(path)["latents"], str(path))
    latents = make().cpu().contiguous()
    try:
        with atomic_path(path) as temporary:
            save_file({"latents": latents}, temporary)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, f"cannot write latents ({error})", str(path)) from error
    return latents
