"""FLUX with its ControlNet: the schedule, one velocity with true CFG, encoding and decoding of pictures.

The reference runs the ControlNet for both branches of true CFG; diffusers' ControlNet pipeline reuses the positive
residuals. The numbers must agree with the reference, so this is a thin layer over diffusers' models instead.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)

from models.finite import require_finite
from models.latents import pack, posterior_sample, token_positions
from models.loading.networks import free_caches, load_encoders, load_model
from models.prompts import warn_of_cuts
from models.runtime.memory import RESIDENT, place, place_pipeline

TRAINING_STEPS, TRAINING_TOKENS = 999, 4096  # the schedule that training timesteps are drawn from
CONTROL_STEPS = 25  # the ControlNet acts on the first 25 steps only


@dataclass
class FluxModels:
    """The networks of one FLUX pipeline, on one device; transformer and ControlNet in one dtype."""

    transformer: FluxTransformer2DModel
    controlnet: FluxControlNetModel
    vae: AutoencoderKL
    device: str = "cpu"  # where they compute; offloaded weights are elsewhere
    control_mode: int | None = None  # kind of picture that a ControlNet for several kinds (`num_mode`) is given


@dataclass(frozen=True)
class Text:
    """An encoded prompt. tokens: T5 output [B, T, D]; pooled: CLIP output [B, P]."""

    tokens: torch.Tensor
    pooled: torch.Tensor

    def same_as(self, other: "Text") -> bool:
        return torch.equal(self.tokens, other.tokens) and torch.equal(self.pooled, other.pooled)

    def to(self, device: str) -> "Text":
        return Text(self.tokens.to(device), self.pooled.to(device))


def stack_texts(texts: Sequence[Text]) -> Text:
    """Stack prompts that were encoded one by one into a batch."""
    return Text(torch.cat([text.tokens for text in texts]), torch.cat([text.pooled for text in texts]))


def shifted_schedule(num_steps: int, tokens: int) -> torch.Tensor:
    """Timesteps of rectified flow, float32 [num_steps + 1], from 1 (noise) to 0 (image).

    t = e^mu / (e^mu + 1/s - 1), s linear from 1 to 0, mu on the line through (256 tokens, 0.5) and (4096, 1.15).
    """
    linear = torch.linspace(1, 0, num_steps + 1)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    shift = float(np.exp(mu))
    timesteps = shift / (shift + (1 / linear - 1))
    timesteps[-1] = 0
    return timesteps


def anchor_schedule(num_steps: int, width: int, height: int) -> torch.Tensor:
    """The schedule of anchor views of width x height pixels.

    Its length parameter is a sixteenth of the token count, as in the reference; the released settings are tuned to
    that.
    """
    return shifted_schedule(num_steps, (width // 8) * (height // 8) // 256)


def training_schedule() -> torch.Tensor:
    """The 1000 timesteps from which alignment draws, float32."""
    return shifted_schedule(TRAINING_STEPS, TRAINING_TOKENS)


def encode_image(models: FluxModels, images: torch.Tensor, eps: torch.Tensor | None) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> float32 latents [B, 16, H/8, W/8].

    eps: N(0, 1) of the latents' shape (the posterior is sampled, as in the reference); None takes the mean.
    """
    vae = models.vae
    latents = posterior_sample(vae.encode(images.to(models.device, vae.dtype)).latent_dist, eps)
    return vae.config.scaling_factor * (latents.float() - vae.config.shift_factor)


def decode_latents(models: FluxModels, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 16, h, w] -> float32 images [B, 3, 8 h, 8 w], about [-1, 1]."""
    vae = models.vae
    latents = latents.float() / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(models.device, vae.dtype)).sample.float()


def encode_control(models: FluxModels, edges: torch.Tensor) -> torch.Tensor:
    """Turn edge images [B, 3, H, W] in [-1, 1] into the ControlNet's input.

    XLabs' takes the images themselves. InstantX's and Shakker's, which have no layers for pictures, take latents
    [B, 16, H/8, W/8]: the mean of the posterior, so that the position of an edge does not depend on a random draw.
    """
    reads_pictures = models.controlnet.input_hint_block is not None
    return edges if reads_pictures else encode_image(models, edges, None)


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]. Truncates, as the reference does for FLUX.

    Raises FloatingPointError when they are not finite.
    """
    require_finite(images, "the decoded pictures")
    scaled = 127.5 * (images.float().clamp(-1, 1) + 1)
    return scaled.to(torch.uint8).movedim(1, -1).cpu().numpy()


def control_residuals(
    models: FluxModels,
    tokens: torch.Tensor,
    timestep: float | torch.Tensor,
    text: Text,
    control: torch.Tensor,
    guidance: float | torch.Tensor,
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Unscaled ControlNet residuals for double and for single blocks, one [B, L, hidden] per block of the ControlNet.

    Arguments as for `velocity`.
    """
    network = models.controlnet
    mode = None
    if models.control_mode is not None:
        mode = torch.full((len(tokens), 1), models.control_mode, device=tokens.device)
    double, single = network(
        controlnet_cond=(control if is_picture(control) else pack(control)).to(tokens.device, network.dtype),
        controlnet_mode=mode,
        return_dict=False,
        **_inputs(network, tokens, timestep, text, control, guidance),
    )
    return double or (), single or ()


def velocity(
    models: FluxModels,
    tokens: torch.Tensor,
    timestep: float | torch.Tensor,
    text: Text,
    control: torch.Tensor,
    *,
    guidance: float | torch.Tensor,
    control_weight: float = 1.0,
) -> torch.Tensor:
    """Predicted velocity (noise minus image) of one branch, in the transformer's dtype, [B, L, 64].

    tokens: packed latents [B, L, 64]. timestep in [0, 1], one or [B]. control: edge images [B, 3, H, W] in [-1, 1], H
    W = 256 L, or their latents (`encode_control`). guidance: distilled guidance scale, one or [B] (4 at inference, 1
    in training). control_weight: 0 leaves the ControlNet out.
    """
    double, single = (), ()
    if control_weight:
        double, single = control_residuals(models, tokens, timestep, text, control, guidance)
    return models.transformer(
        controlnet_block_samples=[control_weight * residual for residual in double] or None,
        controlnet_single_block_samples=[control_weight * residual for residual in single] or None,
        # XLabs: of n residuals, k mod n is added after double block k; InstantX: each after several blocks in a row
        controlnet_blocks_repeat=is_picture(control),
        return_dict=False,
        **_inputs(models.transformer, tokens, timestep, text, control, guidance),
    )[0]


def guided_velocity(positive: torch.Tensor, negative: torch.Tensor | None, true_guidance: float) -> torch.Tensor:
    """True classifier-free guidance: negative + scale * (positive - negative); float32."""
    if negative is None:
        return positive.float()
    return negative.float() + true_guidance * (positive.float() - negative.float())


def is_picture(control: torch.Tensor) -> bool:
    """Whether a ControlNet's input is a picture, not latents."""
    return control.shape[1] == 3


def _inputs(network, tokens, timestep, text, control, guidance) -> dict:
    """The arguments that transformer and ControlNet share."""
    device, dtype = tokens.device, network.dtype
    batch = tokens.shape[0]
    height, width = (side // 8 if is_picture(control) else side for side in control.shape[-2:])
    return {
        "hidden_states": tokens.to(dtype),
        "encoder_hidden_states": text.tokens.to(device, dtype),
        "pooled_projections": text.pooled.to(device, dtype),
        "timestep": torch.as_tensor(timestep, dtype=torch.float32).expand(batch).to(device, dtype),
        "img_ids": token_positions(height, width, device),
        "txt_ids": torch.zeros(text.tokens.shape[1], 3, device=device),
        "guidance": torch.as_tensor(guidance, dtype=torch.float32).expand(batch).to(device, dtype)
        if network.config.guidance_embeds
        else None,
    }


def load_flux(paths: dict[str, Path], device: str, dtype: torch.dtype) -> FluxModels:
    """Load FLUX's transformer, ControlNet and VAE into CPU memory; `place_flux` moves them to `device`."""
    return FluxModels(
        load_model("flux_transformer", FluxTransformer2DModel, paths["flux_transformer"], dtype),
        load_model("controlnet", FluxControlNetModel, paths["controlnet"], dtype),
        load_model("flux_vae", AutoencoderKL, paths["flux_vae"], dtype),
        device,
    )


def place_flux(models: FluxModels, kept: Mapping[str, str]) -> None:
    """Place the networks. kept: {network: placement}. Call it after LoRA layers were added."""
    for name in kept.keys() & {"transformer", "controlnet", "vae"}:
        place(getattr(models, name), kept[name], models.device)


def encode_flux_prompts(
    path: Path, prompts: Iterable[str], device: str, dtype: torch.dtype, max_length: int, how: str = RESIDENT
) -> dict[str, Text]:
    """Encode prompts with the pipeline folder `path`'s text encoders, then free them: {prompt: Text on the CPU}."""
    pipeline = load_encoders("flux_text", FluxPipeline, path, dtype)
    place_pipeline(pipeline, how, device)
    prompts, texts = list(dict.fromkeys(prompts)), {}
    warn_of_cuts("CLIP", pipeline.tokenizer, prompts, pipeline.tokenizer_max_length)
    warn_of_cuts("T5", pipeline.tokenizer_2, prompts, max_length)
    with torch.no_grad():
        for prompt in prompts:
            tokens, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=max_length)
            texts[prompt] = Text(tokens.cpu(), pooled.cpu())
            for part in (tokens, pooled):
                require_finite(part, f"the embeddings of the prompt {prompt!r}")
    del pipeline
    free_caches()
    return texts
