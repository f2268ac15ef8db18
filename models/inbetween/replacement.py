"""Guide the in-betweening by anchors that were carried (reprojected) along the geometry to every frame.

After each of the first steps, latents are replaced by those of the carried frames, noised to the next timestep,
outside their holes: as stage 2 does with the previous anchor. The idea, with other sources of frames: SDEdit
(Meng et al. 2022), Time-to-Move (Singer et al. 2025), WorldForge (Song et al. 2025).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CELL, GROUP = 8, 4  # pixels and frames of a latent cell


@dataclass(frozen=True)
class Replacement:
    """Replace the latents of `CogVideoXInbetweenPipeline` after each of the first `steps` steps.

    latents: of the carried frames [1, F', 16, h, w]. mask: bool [1, F', 1, h, w]. noise: the start noise, as latents.
    """

    latents: torch.Tensor
    mask: torch.Tensor
    noise: torch.Tensor
    steps: int

    def __call__(self, pipe, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]) -> dict:
        """diffusers' `callback_on_step_end`."""
        latents = values["latents"]
        if step < self.steps:
            later = pipe.scheduler.timesteps[step + 1 : step + 2]
            carried = self.latents.to(latents)
            if len(later):  # after the last step the latents are clean
                carried = pipe.scheduler.add_noise(carried, self.noise.to(latents), later)
            latents = torch.where(self.mask.to(latents.device), carried, latents)
        return {"latents": latents}


def latent_coverage(seen: np.ndarray, coverage: float) -> torch.Tensor:
    """Mask of the latent cells that are seen to a share `coverage` in each of their frames: bool [1, F', 1, h, w].

    seen: bool [F, H, W], F = 4 (F' - 1) + 1: the first frame is a group alone. coverage: share of a cell's pixels.
    """
    shares = F.avg_pool2d(torch.from_numpy(seen).float()[None], CELL)[0]
    enough = shares >= coverage
    groups = enough[1:].unflatten(0, (-1, GROUP)).all(dim=1)
    return torch.cat([enough[:1], groups])[None, :, None]
