"""Training of the in-between transformer: start weights, the objective, what a step sees, and what is saved.

All weights are trained except a given LoRA (the reference freezes that of Go-with-the-Flow in the network); it is
merged into the saved weights. The network predicts v; the loss is on the clean latents that follow from it, x0 =
sqrt(ᾱ) x_t - sqrt(1 - ᾱ) v, weighted by 1/(1 - ᾱ), as in diffusers' CogVideoX training example.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import (
    get_3d_rotary_pos_embed,
    get_resize_crop_region_for_grid,
)

from models.finite import require_finite_tensors
from models.inbetween.clip_cache import END_DRAWS, ClipCache, Tensors
from models.inbetween.frozen_lora import add_frozen_lora
from models.inbetween.pipeline import CHANNELS, LATENT_CHANNELS, CogVideoXInbetweenPipeline, load_video_vae
from models.latents import draw_noise
from models.loading.files import Shards, build, load_ggi_transformer
from models.loading.keymaps import merge_tensor, merged_names
from models.runtime.runtime import Runtime
from models.runtime.sharding import whole_state
from models.runtime.training import Training
from models.settings import InbetweenTrainSettings, TrainSettings
from utils.cli import InputError
from utils.files import read_json
from utils.images import contact_sheet
from utils.layout import LATENT_FRAMES, resample_indices
from utils.noise import blend_noise
from utils.runs import derive_seed

PATCH_WEIGHT = "patch_embed.proj.weight"
SHEET_CLIPS = 2
SHEET_COLUMNS, SHEET_STEPS, SHEET_ALPHA = 8, 10, 0.5


# --- start weights ---


def check_start(config: Mapping, size: tuple[int, int], num_frames: int) -> None:
    """Raise InputError unless a transformer of this config can be trained at `size`, (width, height) in pixels."""
    if config.get("_class_name") != "CogVideoXTransformer3DModel" or config.get("patch_size_t"):
        raise InputError("the start weights are not a CogVideoX 1.0 transformer (see their config.json)")
    if config["in_channels"] not in (2 * LATENT_CHANNELS, CHANNELS):
        raise InputError(f"the start weights have {config['in_channels']} input channels; 32 or 48 can be trained")
    frames = (LATENT_FRAMES - 1) * config["temporal_compression_ratio"] + 1
    if num_frames != frames:
        raise InputError(
            f"these weights make {num_frames} frames; an arc's {LATENT_FRAMES} latent frames are {frames}"
        )
    trained = (8 * config["sample_width"], 8 * config["sample_height"])
    if config["use_learned_positional_embeddings"] and trained != size:
        raise InputError(f"the start weights have positions for {trained[0]}x{trained[1]}, not {size[0]}x{size[1]}")


def load_start(folder: Path) -> CogVideoXTransformer3DModel:
    """Load a folder's transformer in float32, with 48 input channels.

    An image-to-video transformer has 32 input channels; the 16 for edges are added as zeros.
    """
    config = read_json(folder / "config.json")
    if config["in_channels"] == CHANNELS:
        return load_ggi_transformer(folder, torch.float32).requires_grad_(True)
    shards = Shards(folder)
    state = {name: shards[name].float() for name in shards}
    try:
        weight = state[PATCH_WEIGHT]
        state[PATCH_WEIGHT] = torch.cat([weight, torch.zeros_like(weight[:, :LATENT_CHANNELS])], dim=1)
        return build(CogVideoXTransformer3DModel, config | {"in_channels": CHANNELS}, state).requires_grad_(True)
    except (KeyError, ValueError) as error:
        raise InputError(f"{folder} is not a CogVideoX transformer: {error}") from error


def new_transformer(config: Mapping, seed: int) -> CogVideoXTransformer3DModel:
    """A transformer of this architecture with random float32 weights and 48 input channels."""
    torch.manual_seed(seed)
    return CogVideoXTransformer3DModel.from_config({**config, "in_channels": CHANNELS})


# --- what is saved ---


def save_transformer(transformer: CogVideoXTransformer3DModel, folder: Path, dtype: torch.dtype) -> None:
    """Write a plain CogVideoX transformer with the LoRA merged in, as ggi.py loads it.

    Call it in every process if the transformer is sharded; the first one writes.
    """
    if not (state := whole_state(transformer)):
        return
    merged = {name: merge_tensor(state, name).to("cpu", dtype, copy=True) for name in merged_names(state)}
    require_finite_tensors(merged, "trained transformer", f"too large for {dtype}: use --dtype bfloat16")
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    build(CogVideoXTransformer3DModel, config, merged).save_pretrained(folder)


# --- the objective ---


def rotary_positions(config: Mapping, h: int, w: int, frames: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines [frames h/2 w/2, head size] for latents of h x w, as diffusers' pipeline makes them."""
    if not config["use_rotary_positional_embeddings"]:
        return None
    patch = config["patch_size"]
    grid = (h // patch, w // patch)
    crops = get_resize_crop_region_for_grid(grid, config["sample_width"] // patch, config["sample_height"] // patch)
    return get_3d_rotary_pos_embed(config["attention_head_dim"], crops, grid, frames)


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Let autocast drop its copy of each weight after use; at full size, all copies would take 11 GB.

    The results are the same: no weight is used twice in a pass.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class InbetweenObjective(torch.nn.Module):
    """Transformer and noise schedule: the loss of a batch."""

    _no_split_modules: ClassVar = ["CogVideoXBlock"]  # FSDP gathers the weights of one such block at a time

    def __init__(self, transformer: CogVideoXTransformer3DModel, scheduler: CogVideoXDDIMScheduler):
        super().__init__()
        self.transformer, self._scheduler = transformer, scheduler

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        conditions: torch.Tensor,
        text: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> Tensors:
        """Scalars `loss` (weighted, on x0) and `x0_error` (mean squared error of x0).

        latents: clean, [B, F, 16, h, w]. noise: N(0, 1), the same shape. conditions: [B, F, 32, h, w], images | edges.
        text: [B, T, D]. timesteps: int64 [B].
        """
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        frames, _, h, w = latents.shape[1:]
        rotary = rotary_positions(self.transformer.config, h, w, frames)
        with uncached_casts():
            velocity = self.transformer(
                hidden_states=torch.cat([noisy, conditions], dim=2),
                encoder_hidden_states=text,
                timestep=timesteps,
                image_rotary_emb=rotary and tuple(part.to(latents.device) for part in rotary),
                return_dict=False,
            )[0]
        predicted = self._scheduler.get_velocity(velocity.float(), noisy, timesteps)  # the same formula gives x0
        errors = (predicted - latents).square().flatten(1).mean(dim=1)
        weights = 1 / (1 - self._scheduler.alphas_cumprod.to(errors)[timesteps])
        return {"loss": (weights * errors).mean(), "x0_error": errors.detach().mean()}


# --- what a step sees ---


def mix_channels(noise: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Make another sample of warped noise [F, C, h, w] by a random rotation or reflection of its channels.

    The channels are independent samples warped in the same way, so any orthogonal mix of them has their distribution,
    in space and in time. The matrix is uniform: Q of the QR decomposition of a Gaussian, signs fixed by R's diagonal.
    """
    q, r = np.linalg.qr(rng.standard_normal((noise.shape[1],) * 2))
    matrix = torch.from_numpy(q * np.sign(np.diag(r))).to(noise)
    return torch.einsum("ij,fjhw->fihw", matrix, noise)


def conditions_of(clip: Tensors, start: int, end: int, edges: torch.Tensor) -> torch.Tensor:
    """Conditions [13, 32, h, w]: (start, zeros …, end) | edges. start, end: which noised copy of each end image."""
    images = torch.zeros_like(edges)
    images[0], images[-1] = clip["start"][start], clip["end"][end]
    return torch.cat([images, edges], dim=1)


def posterior_draw(stored: torch.Tensor, seed: int) -> torch.Tensor:
    """mean + deviation ε of stored [2, F, 16, h, w]."""
    mean, deviation = stored
    return mean + deviation * draw_noise(mean.shape, seed)


def draw_item(cache: ClipCache, item_seed: Sequence[int], caption_dropout: float, num_timesteps: int) -> Tensors:
    """One training example: the arguments of `InbetweenObjective`, without the batch dimension.

    The seed decides everything: clip, caption or none, end images, α of the noise ~ U(0, 1), timestep, rotation of
    channels, noise.
    """
    rng = np.random.default_rng(item_seed)
    number, timestep = int(rng.integers(len(cache))), int(rng.integers(num_timesteps))
    start, end = rng.integers(END_DRAWS, size=2)
    alpha, dropped = float(rng.random()), rng.random() < caption_dropout
    clip = cache.clip(number)
    warped = mix_channels(clip["noise"], rng)
    edges = posterior_draw(clip["edges"], derive_seed(*item_seed, 1))
    return {
        "latents": posterior_draw(clip["video"], derive_seed(*item_seed, 2)),
        "noise": blend_noise(warped, draw_noise(warped.shape, derive_seed(*item_seed, 3)), alpha),
        "conditions": conditions_of(clip, start, end, edges),
        "text": cache.text("" if dropped else cache.caption(number)),
        "timesteps": torch.tensor(timestep),
    }


def draw_batch(
    cache: ClipCache, step_seed: Sequence[int], items: Iterable[int], caption_dropout: float, num_timesteps: int
) -> Tensors:
    """The batch of one step. items: numbers in the global batch; each depends on `step_seed` and its number alone."""
    drawn = [draw_item(cache, (*step_seed, item), caption_dropout, num_timesteps) for item in items]
    return {name: torch.stack([item[name] for item in drawn]) for name in drawn[0]}


# --- sample sheets ---


def paint_sheet(
    transformer: CogVideoXTransformer3DModel,
    vae: AutoencoderKLCogVideoX,
    scheduler: CogVideoXDDIMScheduler,
    cache: ClipCache,
    numbers: Iterable[int],
    autocast: torch.dtype | None,
) -> np.ndarray:
    """Clips as the VAE reconstructs them, and as the transformer fills them in: uint8 [H, W, 3].

    Few steps and no guidance: this shows progress, not the best quality. The networks share a device.
    """
    pipe = CogVideoXInbetweenPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    rows = []
    with torch.autocast(vae.device.type, autocast, enabled=autocast is not None, cache_enabled=False):
        for number in numbers:
            clip, text = cache.clip(number), cache.text(cache.caption(number))[None]
            noise = blend_noise(clip["noise"], draw_noise(clip["noise"].shape, number), SHEET_ALPHA)
            made = pipe(
                conditions_of(clip, 0, 0, clip["edges"][0])[None],
                noise[None],
                text,
                text,
                num_inference_steps=SHEET_STEPS,
                guidance_scale=1.0,
            )
            for label, latents in (("clip through the VAE", clip["video"][:1]), ("generated", made)):
                frames = pipe.decode_video(latents)
                label = f"{label}: {cache.caption(number)}"
                rows.append((label, [frames[i] for i in resample_indices(len(frames), SHEET_COLUMNS)]))
    return contact_sheet(rows)


# --- the stage ---


class InbetweenTraining(Training):
    """The in-between transformer, ready to be trained by `fit` on a cache of clips.

    paths: components of GGI_STAGE, and `start`: the folder of the start weights. lora: the frozen LoRA from
    `read_frozen_lora`; empty for none.
    """

    def __init__(
        self,
        runtime: Runtime,
        paths: Mapping[str, Path],
        cache: ClipCache,
        lora: Tensors,
        settings: TrainSettings,
        own: InbetweenTrainSettings,
    ):
        self.runtime, self.paths, self.cache, self.caption_dropout = runtime, paths, cache, own.caption_dropout
        config = read_json(paths["start"] / "config.json")
        start = new_transformer(config, settings.seed) if own.from_scratch else load_start(paths["start"])
        if lora:
            add_frozen_lora(start, lora, runtime.dtype if runtime.autocast else torch.float32)
        if runtime.preset.name == "full" if own.gradient_checkpointing is None else own.gradient_checkpointing:
            start.enable_gradient_checkpointing()
        self.transformer, self.scheduler = start, load_scheduler(paths["cogvideox_text"])
        super().__init__(
            InbetweenObjective(start, self.scheduler),
            self.draw_batch,
            self.save_weights,
            self.paint,
            runtime.attention,
        )

    def draw_batch(self, step_seed: Sequence[int], items: Iterable[int]) -> Tensors:
        steps = len(self.scheduler.alphas_cumprod)
        return draw_batch(self.cache, step_seed, items, self.caption_dropout, steps)

    def save_weights(self, folder: Path) -> None:
        save_transformer(self.transformer, folder / "transformer", self.runtime.dtype)

    def paint(self) -> np.ndarray:
        vae = load_video_vae(self.runtime, self.paths)  # loaded only for the sheet, to save memory
        numbers = range(min(SHEET_CLIPS, len(self.cache)))
        return paint_sheet(self.transformer, vae, self.scheduler, self.cache, numbers, self.runtime.autocast)


def load_scheduler(path: Path) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler.from_pretrained(path, subfolder="scheduler", local_files_only=True)
