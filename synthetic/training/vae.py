"""Training of the two tiny autoencoders: reconstruction at two scales, extra weight on colour, a little KL.

Weights can be set on the differences of neighbouring pixels, which hold outlines, and of neighbouring frames.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.latents import draw_noise, posterior_sample, to_signed
from models.precision import computes_in_bfloat16
from synthetic.pictures import TownPictures
from utils.runs import derive_seed

CROP = (72, 96)  # pixels, height and width of the video autoencoder's training windows
COARSE = 4  # pixels; side of the cells whose mean colours are compared besides the pixels
KL_WEIGHT = 1e-4  # of the KL divergence per latent element
STATISTICS = 256  # pictures from which the scale of the latents is measured


class ReconstructionObjective(nn.Module):
    """An autoencoder and its loss. Images [B, 3, H, W] or videos [B, 3, F, H, W], in [-1, 1].

    sharpness, motion: weights of the errors in the differences between neighbouring pixels, and frames of a video.
    """

    def __init__(self, vae: nn.Module, sharpness: float = 0.0, motion: float = 0.0):
        super().__init__()
        self.vae, self.sharpness, self.motion = vae, sharpness, motion

    def forward(self, pixels: torch.Tensor, eps: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        output = self.vae.decode(posterior_sample(posterior, eps)).sample
        error = output.float() - pixels
        chroma = error - error.mean(dim=1, keepdim=True)
        frames = error.movedim(2, 1).flatten(0, 1) if error.dim() == 5 else error
        loss = _absolute(error) + _absolute(chroma) + _absolute(F.avg_pool2d(frames, COARSE))
        if self.sharpness:
            loss = loss + self.sharpness * sum(_absolute(error.diff(dim=side)) for side in (-2, -1))
        if self.motion:
            loss = loss + self.motion * _absolute(error.diff(dim=-3))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        psnr = -10 * torch.log10(error.detach().square().mean() / 4)
        return {"loss": loss + KL_WEIGHT * kl, "psnr": psnr, "kl": kl}


def _absolute(error: torch.Tensor) -> torch.Tensor:
    """Mean absolute error, smooth around zero."""
    return (error.square() + 1e-4).sqrt().mean()


def draw_pictures(towns: Sequence[TownPictures]) -> Callable[[tuple[int, ...], Iterable[int]], dict]:
    """The draw function of `fit`: pictures, half of them flipped, and the posterior's noise."""

    def draw(step_seed: tuple[int, ...], items: Iterable[int]) -> dict:
        images, eps = [], []
        for item in items:
            rng = np.random.default_rng([*step_seed, item])
            town = towns[rng.integers(len(towns))]
            image = town.images[rng.integers(len(town.images)), rng.integers(town.images.shape[1])]
            images.append(image[:, ::-1] if rng.random() < 0.5 else image)
            eps.append(draw_noise((16, image.shape[0] // 8, image.shape[1] // 8), derive_seed(*step_seed, item, 1)))
        return {"pixels": to_signed(np.array(images)), "eps": torch.stack(eps)}

    return draw


def draw_segments(
    videos: Sequence[tuple[np.ndarray, np.ndarray]], frames: int, edge_share: float
) -> Callable[[tuple[int, ...], Iterable[int]], dict]:
    """The same for segments of `frames` (8 k + 1) consecutive frames of videos or, for a share `edge_share`, of edges.

    videos: (frames uint8 [F, H, W, 3], edges uint8 [F, H, W]) of each. A segment shows a window of the size CROP:
    several small ones teach more than a large one. Half of the segments run backwards, half are flipped.
    """

    def draw(step_seed: tuple[int, ...], items: Iterable[int]) -> dict:
        parts, eps = [], []
        for item in items:
            rng = np.random.default_rng([*step_seed, item])
            video, edges = videos[rng.integers(len(videos))]
            chosen = video_and_edges((video, edges))[int(rng.random() < edge_share)]
            start, top, left = rng.integers(np.array(chosen.shape[:3]) - (frames, *CROP) + 1)
            part = chosen[start : start + frames, top : top + CROP[0], left : left + CROP[1]]
            part = part[:: rng.choice((1, -1)), :, :: rng.choice((1, -1))]
            parts.append(part)
            shape = (16, (frames - 1) // 4 + 1, part.shape[1] // 8, part.shape[2] // 8)
            eps.append(draw_noise(shape, derive_seed(*step_seed, item, 1)))
        return {"pixels": to_signed(np.array(parts)).movedim(2, 1), "eps": torch.stack(eps)}

    return draw


def video_and_edges(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Both as uint8 [F, H, W, 3]."""
    return pair[0], np.repeat(pair[1][..., None], 3, axis=-1)


@torch.no_grad()
def reconstruct(vae: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode pixels, without noise; float32, on the CPU."""
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=computes_in_bfloat16(str(vae.device))):
        return vae.decode(vae.encode(pixels.to(vae.device)).latent_dist.mean).sample.float().cpu()


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], after clamping."""
    return float(-10 * torch.log10((output.clamp(-1, 1) - target).square().mean() / 4))


@torch.no_grad()
def latent_statistics(vae: nn.Module, batches: Iterable[torch.Tensor]) -> tuple[float, float]:
    """(mean, standard deviation) of all latents of some batches of pixels."""
    latents = torch.cat([vae.encode(pixels.to(vae.device)).latent_dist.mean.flatten() for pixels in batches])
    return float(latents.mean()), float(latents.std())


def reconstruction_sheet(pictures: np.ndarray, output: torch.Tensor) -> np.ndarray:
    """True pictures above their reconstructions: uint8. pictures: uint8 [N, H, W, 3]; output: [N, 3, H, W]."""
    painted = ((output.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
    return np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, painted)])
