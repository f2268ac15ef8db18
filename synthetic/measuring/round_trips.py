"""The three stages of the method as the benchmark runs them: the scripts' own functions, in one process on the CPU.

Every stage takes the settings that its script has as flags, and draws what the script would draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

from models.flux.alignment import (
    FlowObjective,
    batch_flow_sample,
    draw_batch,
    load_trainable,
    lora_optimizer,
    optimizer_step,
)
from models.flux.anchors import AnchorSettings, decode_anchor, encode_warped, sample_anchor, warp_anchor
from models.flux.lora import check_lora, load_lora, save_lora
from models.flux.network import (
    FluxModels,
    decode_latents,
    encode_flux_prompts,
    encode_image,
    load_flux,
    stack_texts,
    to_bytes,
)
from models.inbetween.pipeline import CogVideoXInbetweenPipeline, ConditionEps, encode_video_prompts, load_inbetween
from models.latents import draw_noise, to_signed
from models.loading.networks import DTYPES, component_config, load_model
from models.weights import Preset
from synthetic.measuring.settings import Settings
from utils.data.references import Reference
from utils.files import read_json
from utils.layout import ARC_FRAMES, checkpoint_lora_paths, edge_frame_indices
from utils.noise import blend_noise
from utils.runs import derive_seed

NEGATIVE_PROMPT = ""
VIDEO_SEED = 43  # of fresh noise and the VAE's draws, as in ggi.py
DEGRADATION = 0.5  # share of fresh noise in a video's noise, as in ggi.py
END = -1  # the latent frame that holds the end anchor


Paths = dict[str, Path]


# --- stage 1: alignment ---


def align(
    paths: Paths, preset: Preset, reference: Reference, settings: Settings, seed: int
) -> list[dict[str, torch.Tensor]]:
    """LoRAs on transformer and ControlNet, trained on one reference; as saved: bfloat16, under peft's names."""
    low = settings.precision == "bf16"
    dtype = DTYPES["bfloat16" if low else "float32"]
    texts = encode_flux_prompts(paths["flux_text"], [reference.prompt], "cpu", dtype, preset.max_sequence_length)
    models, loras = load_trainable(paths, torch.device("cpu"), dtype, settings.rank, seed)
    networks = (models.transformer, models.controlnet)
    for network in networks:
        network.disable_gradient_checkpointing()  # costs time and saves memory; the numbers are the same
    optimizer = lora_optimizer([parameter for group in loras for parameter in group], settings.learning_rate)
    objective, items = FlowObjective(models), range(settings.train_batch_size)
    for step in range(settings.lora_steps):
        batch = draw_batch([reference], (seed, step, 0), items, preset.resolution, preset.training_multiple)
        sample, text = batch_flow_sample(models, batch), stack_texts([texts[batch.prompt]] * len(batch.t))
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = objective(sample, text, batch.control)
        loss.backward()
        optimizer_step(optimizer, loras)
    return saved_loras(networks, paths)


def saved_loras(networks: Sequence, paths: Paths) -> list[dict[str, torch.Tensor]]:
    """What stage 2 reads of the LoRAs that stage 1 writes."""
    with TemporaryDirectory() as folder:
        files = checkpoint_lora_paths(Path(folder))
        for network, file in zip(networks, files, strict=True):
            save_lora(network, file)
        names = ("flux_transformer", "controlnet")
        return [check_lora(file, component_config(n, paths[n])) for n, file in zip(names, files, strict=True)]


# --- stage 2: anchors ---


class AnchorStage:
    """Draws the anchors of one scene and style, all from one noise, as the script does; LoRAs can be put in once."""

    def __init__(self, paths: Paths, preset: Preset, settings: Settings, prompt: str, seed: int):
        dtype = DTYPES[preset.dtype]
        prompts = [prompt, NEGATIVE_PROMPT]
        texts = encode_flux_prompts(paths["flux_text"], prompts, "cpu", dtype, preset.max_sequence_length)
        self.positive, self.negative = (texts[prompt] for prompt in prompts)
        self.models = load_flux(paths, "cpu", dtype)
        self.settings = AnchorSettings(num_steps=settings.num_steps, true_gs=settings.true_gs)
        self.dilations = preset.mask_dilations
        width, height = preset.image_size
        self.noise = draw_noise((1, 16, height // 8, width // 8), seed)

    def put_in(self, loras: Sequence[dict[str, torch.Tensor]]) -> None:
        for model, state in zip((self.models.transformer, self.models.controlnet), loras, strict=True):
            load_lora(model, state)

    def draw(
        self,
        edges: np.ndarray,
        previous: np.ndarray | None = None,
        code: np.ndarray | None = None,
        num_replacement: int = AnchorSettings.num_replacement,
    ) -> np.ndarray:
        """One anchor, uint8 [H, W, 3]. edges: uint8 [H, W]. previous, code: the anchor before and the map to it, for
        sparse appearance-guided sampling in the first `num_replacement` steps; None draws independently."""
        settings, replacement = replace(self.settings, num_replacement=num_replacement), None
        if previous is not None:
            warped, mask = warp_anchor(previous, code, self.dilations)
            replacement = encode_warped(self.models, warped, mask, self.noise)
        control = to_signed(as_rgb(edges))[None]
        latents = sample_anchor(self.models, self.noise, control, self.positive, self.negative, settings, replacement)
        return decode_anchor(self.models, latents)


def load_image_vae(paths: Paths, preset: Preset) -> AutoencoderKL:
    return load_model("flux_vae", AutoencoderKL, paths["flux_vae"], DTYPES[preset.dtype])


@torch.no_grad()
def image_round_trip(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] through the image VAE, posterior means."""
    models = FluxModels(None, None, vae)  # the two directions need no more
    return to_bytes(decode_latents(models, encode_image(models, to_signed(images), None)))


# --- stage 3: in-betweening ---


@dataclass(frozen=True)
class VideoModels:
    """What all arcs share. positive, negative: prompt embeddings [1, T, D]. num_frames: the model's, with padding."""

    pipe: CogVideoXInbetweenPipeline
    positive: torch.Tensor
    negative: torch.Tensor
    num_frames: int


def load_video_models(paths: Paths, preset: Preset, prompt: str) -> VideoModels:
    dtype, transformer = DTYPES[preset.dtype], Path(preset.ggi_transformer)
    length = read_json(transformer / "config.json")["max_text_seq_length"]
    embeds = encode_video_prompts(paths["cogvideox_text"], [prompt, ""], "cpu", dtype, length)
    pipe = load_inbetween(paths, transformer, "cpu", dtype, tiling=preset.vae_tiling)
    pipe.set_progress_bar_config(disable=True)
    return VideoModels(pipe, embeds[prompt], embeds[""], preset.num_frames)


class VideoStage:
    """Fills one arc of one scene between any two anchors, as ggi.py does.

    edges: uint8 [46, H, W]. noise: warped noise, float32 [13, h, w, 16]. arc: its number in the path.
    """

    def __init__(self, models: VideoModels, settings: Settings, edges: np.ndarray, noise: np.ndarray, arc: int = 0):
        self.models, self.pipe, self.settings, self.arc = models, models.pipe, settings, arc
        self.edges = as_rgb(edges[edge_frame_indices(models.num_frames)])
        self.warped = torch.from_numpy(noise).movedim(-1, 1)[None]
        self.eps = ConditionEps.draw(*noise.shape[:3], seed=VIDEO_SEED, arc=arc)

    def conditions(self, start: np.ndarray, end: np.ndarray, *, edges: bool = True) -> torch.Tensor:
        """Conditions [1, 13, 32, h, w] of two anchors, uint8 [H, W, 3]; without `edges` of a black edge video."""
        ends = (to_signed(picture)[None] for picture in (start, end))
        video = self.edges if edges else np.zeros_like(self.edges)
        return self.pipe.encode_conditions(*ends, to_signed(video)[None], self.eps)

    def fill(self, conditions: torch.Tensor, degradation: float = DEGRADATION) -> np.ndarray:
        """The arc's frames, uint8 [46, H, W, 3]. degradation: share of fresh noise."""
        return self.fill_padded(conditions, degradation)[:ARC_FRAMES]

    def fill_padded(self, conditions: torch.Tensor, degradation: float = DEGRADATION) -> np.ndarray:
        """All frames of the model, uint8 [num_frames, H, W, 3]; the next arc of a chain starts from the last one."""
        fresh = draw_noise(self.warped.shape, derive_seed(VIDEO_SEED, self.arc, 1))
        noise = blend_noise(self.warped, fresh, degradation)
        latents = self.pipe(
            conditions,
            noise.to(self.pipe.transformer.dtype),
            self.models.positive,
            self.models.negative,
            num_inference_steps=self.settings.num_inference_steps,
            guidance_scale=self.settings.guidance_scale,
        )
        return self.pipe.decode_video(latents)


def without_end(conditions: torch.Tensor) -> torch.Tensor:
    """The same conditions with nothing in place of the end anchor."""
    taken = conditions.clone()
    taken[:, END, : conditions.shape[2] // 2] = 0
    return taken


def load_video_vae(paths: Paths, preset: Preset) -> AutoencoderKLCogVideoX:
    return load_model("cogvideox_vae", AutoencoderKLCogVideoX, paths["cogvideox_vae"], DTYPES[preset.dtype])


@torch.no_grad()
def video_round_trip(vae: AutoencoderKLCogVideoX, video: np.ndarray, num_frames: int) -> np.ndarray:
    """An arc uint8 [46, H, W, 3], padded as for the model, through the video VAE, posterior means: the same shape."""
    pixels = to_signed(video[edge_frame_indices(num_frames)]).movedim(0, 1)[None].to(vae.dtype)
    output = vae.decode(vae.encode(pixels).latent_dist.mean).sample[0].float()
    frames = ((output.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return frames.movedim(0, -1).numpy()[:ARC_FRAMES]


def as_rgb(edges: np.ndarray) -> np.ndarray:
    """uint8 [..., H, W] -> [..., H, W, 3]."""
    return np.repeat(edges[..., None], 3, axis=-1)
