"""Distribution alignment: the training objective, and the stage that `fit` trains.

Rectified flow on the reference image, with the ControlNet's residuals unscaled and guidance 1: the LoRAs learn what
FLUX and its ControlNet must add so that edges of the reference give the reference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed

from models.flux.lora import add_lora, save_lora, save_loras_only, train_loras
from models.flux.network import (
    FluxModels,
    Text,
    encode_control,
    encode_flux_prompts,
    encode_image,
    load_flux,
    place_flux,
    stack_texts,
    training_schedule,
    velocity,
)
from models.latents import draw_noise, pack, to_signed
from models.runtime.memory import PLACEMENTS, is_gpu
from models.runtime.runtime import Runtime
from models.runtime.training import Training
from models.settings import AlignmentSettings
from utils.data.references import Reference, crop_size, draw_aspect, draw_crop
from utils.images import write_image
from utils.layout import checkpoint_lora_paths, cut_name
from utils.runs import derive_seed

GUIDANCE = 1.0  # distilled guidance during training


@dataclass(frozen=True)
class FlowSample:
    """One point on the path between image and noise. tokens, target: float32 [B, L, 64]; t: [B], in [0, 1]."""

    tokens: torch.Tensor
    target: torch.Tensor
    t: torch.Tensor


def flow_sample(image: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> FlowSample:
    """x_t = (1 - t) x_1 + t x_0 and its target x_0 - x_1. image: x_1, noise: x_0, packed [B, L, 64]; t: [B]."""
    t = t.to(image)
    return FlowSample((1 - t[:, None, None]) * image + t[:, None, None] * noise, noise - image, t)


class FlowObjective(torch.nn.Module):
    """Transformer and ControlNet as one module: one wrapper (autocast, DDP) then holds everything that is trained."""

    def __init__(self, models: FluxModels):
        super().__init__()
        self.transformer, self.controlnet = models.transformer, models.controlnet
        self._models = models

    def forward(self, sample: FlowSample, text: Text, control: torch.Tensor) -> dict[str, torch.Tensor]:
        """`loss`: the predicted velocity's mean squared error, float32. control: from `encode_control`."""
        prediction = velocity(self._models, sample.tokens, sample.t, text, control, guidance=GUIDANCE)
        return {"loss": F.mse_loss(prediction.float(), sample.target.float())}


@dataclass(frozen=True)
class Batch:
    """What one training step sees. images, control: [B, 3, H, W] in [-1, 1]; noise, eps: [B, 16, H/8, W/8]; t: [B]."""

    images: torch.Tensor
    control: torch.Tensor
    noise: torch.Tensor
    eps: torch.Tensor
    t: torch.Tensor
    prompt: str


def draw_batch(
    references: Sequence[Reference], step_seed: Sequence[int], items: Iterable[int], resolution: int, multiple: int
) -> Batch:
    """The batch of one step: crops of one reference at one size, each with its own noise and timestep.

    items: numbers in the global batch. The reference and the size depend on `step_seed` alone, an item on `step_seed`
    and its number. No state is carried from step to step, so a resumed run, or several processes that share a global
    batch, draw exactly what one uninterrupted process would.
    """
    step_rng = np.random.default_rng(step_seed)
    reference = references[step_rng.integers(len(references))]
    size = crop_size(draw_aspect(reference, step_rng), resolution, multiple)
    latent_shape = (1, 16, size[1] // 8, size[0] // 8)
    schedule = training_schedule()
    columns: list[list] = [[] for _ in range(5)]
    for item in items:
        rng = np.random.default_rng([*step_seed, item])
        image, edges = draw_crop(reference, size, rng)
        noise, eps = (draw_noise(latent_shape, derive_seed(*step_seed, item, purpose)) for purpose in (1, 2))
        values = (
            to_signed(image)[None],
            to_signed(edges)[None],
            noise,
            eps,
            schedule[rng.integers(len(schedule))][None],
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return Batch(*(torch.cat(column) for column in columns), prompt=reference.prompt)


@torch.no_grad()
def batch_flow_sample(models: FluxModels, batch: Batch) -> FlowSample:
    """Encode the pictures of a batch and noise them."""
    latents = encode_image(models, batch.images, batch.eps)
    return flow_sample(pack(latents), pack(batch.noise).to(latents), batch.t)


def load_trainable(
    paths: Mapping[str, Path],
    device: str,
    dtype: torch.dtype,
    rank: int,
    seed: int,
    kept: Mapping[str, str] = PLACEMENTS["alignment"]["full"],
) -> tuple[FluxModels, list[list[torch.nn.Parameter]]]:
    """Load frozen networks in `dtype` and add float32 LoRAs to transformer and ControlNet: (models, LoRA parameters).

    paths: components of FLUX_STAGE. seed: initialises the LoRAs. kept: {network: placement}. On a GPU activations are
    recomputed in the backward pass; a CPU has room for them.
    """
    models = load_flux(paths, device, dtype)
    networks = [models.transformer, models.controlnet]
    set_seed(seed % 2**32)  # NumPy's generator takes 32 bits at most; its state is part of a checkpoint
    for network in networks:
        add_lora(network, rank)
    loras = train_loras(networks, checkpointing=is_gpu(device))
    place_flux(models, kept)
    return models, loras


class Alignment(Training):
    """Stage 1, ready to be trained by `fit`: LoRAs on FLUX and its ControlNet that learn the references' style.

    paths: components of FLUX_STAGE. Crops have a long side of `resolution` pixels and sides divisible by `multiple`.
    """

    name = "alignment"
    kept_states = None  # small, so every checkpoint can be resumed from

    def __init__(
        self,
        runtime: Runtime,
        paths: Mapping[str, Path],
        references: Sequence[Reference],
        settings: AlignmentSettings,
        resolution: int,
    ):
        device, dtype, preset = runtime.device, runtime.dtype, runtime.preset
        self.references, self.resolution, self.multiple = references, resolution, preset.training_multiple
        prompts, length = [reference.prompt for reference in references], preset.max_sequence_length
        self.texts = encode_flux_prompts(paths["flux_text"], prompts, device, dtype, length, runtime.placement["text"])
        self.models, self.loras = load_trainable(paths, device, dtype, settings.rank, settings.seed, runtime.placement)
        self.models.control_mode = settings.control_mode
        super().__init__(FlowObjective(self.models), self.draw_inputs, self.save_loras, None, runtime.attention)

    @property
    def networks(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Transformer and ControlNet."""
        return self.models.transformer, self.models.controlnet

    def draw_inputs(self, step_seed: Sequence[int], items: Iterable[int]) -> dict:
        batch = draw_batch(self.references, step_seed, items, self.resolution, self.multiple)
        text = stack_texts([self.texts[batch.prompt]] * len(batch.t))
        with torch.no_grad():
            control = encode_control(self.models, batch.control)
        return {"sample": batch_flow_sample(self.models, batch), "text": text, "control": control}

    def clip_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return dict(zip(("grad_norm/flux", "grad_norm/controlnet"), self.loras, strict=True))

    def prepare(self, accelerator: Accelerator) -> None:
        save_loras_only(accelerator, self.networks)

    def save_loras(self, folder: Path) -> None:
        for network, path in zip(self.networks, checkpoint_lora_paths(folder), strict=True):
            save_lora(network, path)

    def begin(self, folder: Path) -> None:
        """Copy the references and their edges beside the LoRAs."""
        for i, reference in enumerate(self.references):
            copy = folder / "references" / f"{i:02d}_{cut_name(reference.path.stem)}"
            write_image(copy.with_name(f"{copy.name}.png"), reference.image)
            write_image(copy.with_name(f"{copy.name}.edges.png"), reference.edges)
