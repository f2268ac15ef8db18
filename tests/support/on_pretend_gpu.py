"""The stages give the same on a pretend GPU and on the CPU; `test_devices.py` runs this file in a new process."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler

from models.flux.anchors import decode_anchor, encode_warped, sample_anchor
from models.flux.lora import add_lora
from models.flux.network import encode_flux_prompts, load_flux, place_flux
from models.inbetween import training as inbetween_training
from models.inbetween.pipeline import CogVideoXInbetweenPipeline, ConditionEps, encode_video_prompts, load_inbetween
from models.inbetween.stage import ArcInputs
from models.inbetween.stages import WanVaceStage
from models.latents import draw_noise, to_signed
from models.loading.networks import load_model
from models.runtime.memory import PLACEMENTS, RESIDENT
from models.runtime.rotary import use_complex_rotary
from models.runtime.runtime import plain_runtime
from models.settings import AnchorSettings, WanVaceSettings
from models.weights import FLUX_STAGE, GGI_STAGE, load_preset, locate
from tests.support.helpers import ROOT
from tests.support.pretend_gpu import DEVICE, PretendGpu
from tests.support.small import HEIGHT, LATENT_SIZE, WIDTH, small_preset
from tests.support.wan import wan_paths
from utils.images import read_image
from utils.layout import ARC_FRAMES

PRESET = small_preset()
PATHS = locate(argparse.Namespace(), PRESET, (*FLUX_STAGE, *GGI_STAGE))
TRANSFORMER = Path(PRESET.ggi_transformer)
PICTURE = read_image(ROOT / "assets/references/boxtown.png")[:HEIGHT, :WIDTH]
FRAMES, LATENT_FRAMES = 9, 3  # of videos: fewer than an arc has
LATENTS = LATENT_SIZE[::-1]
FLOAT = torch.float32


def test_mixing_is_an_error():
    with PretendGpu():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert torch.equal((there + there.to("cpu").to(DEVICE)).cpu(), 2 * here)
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + here
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.nn.Linear(3, 3).to(DEVICE)(here)


def draw_anchor(device: str, mode: str) -> np.ndarray:
    texts = encode_flux_prompts(PATHS["flux_text"], ["a town", ""], device, FLOAT, PRESET.max_sequence_length)
    models = load_flux(PATHS, device, FLOAT)
    torch.manual_seed(0)
    for network in (models.transformer, models.controlnet):
        add_lora(network, 4)
        use_complex_rotary(network)
    place_flux(models, PLACEMENTS["anchors"][mode])
    noise = draw_noise((1, 16, *LATENTS), 0)
    replacement = encode_warped(models, PICTURE, np.zeros(PICTURE.shape[:2], np.uint8), noise)  # no holes
    control = to_signed(PICTURE)[None]
    settings = AnchorSettings(num_steps=3, num_replacement=2)
    latents = sample_anchor(models, noise, control, texts["a town"], texts[""], settings, replacement)
    return decode_anchor(models, latents.cpu())


@pytest.mark.parametrize("mode", ["full", "balanced"])
def test_anchors(mode: str):
    wanted = draw_anchor("cpu", mode)
    with PretendGpu():
        found = draw_anchor(DEVICE, mode)
    assert abs(found.astype(int) - wanted).max() <= 1


def encode_ends(pipe: CogVideoXInbetweenPipeline) -> torch.Tensor:
    end, edges = to_signed(PICTURE)[None], to_signed(np.stack([PICTURE] * FRAMES))[None]
    return pipe.encode_conditions(end, end, edges, ConditionEps.draw(LATENT_FRAMES, *LATENTS, seed=0, arc=0))


def make_video(device: str, mode: str) -> tuple[np.ndarray, set[str]]:
    """Frames of an arc, and where the VAE was while it was denoised."""
    embeds = encode_video_prompts(PATHS["cogvideox_text"], ["a town", ""], device, FLOAT, 32)
    pipe = load_inbetween(PATHS, TRANSFORMER, device, FLOAT, PLACEMENTS["ggi"][mode], tiling=False)
    seen = set()

    def look(pipe, step: int, timestep: int, tensors: dict) -> dict:
        seen.add(pipe.vae.device.type)
        return tensors

    noise = draw_noise((1, LATENT_FRAMES, 16, *LATENTS), 0)
    latents = pipe(encode_ends(pipe), noise, embeds["a town"], embeds[""], num_inference_steps=2, on_step=look)
    return pipe.decode_video(latents.cpu()), seen


def test_video():
    wanted, _ = make_video("cpu", "full")
    with PretendGpu():
        for mode, where in (("full", {DEVICE}), ("balanced", {"cpu"})):  # `balanced`: one network at a time
            found, seen = make_video(DEVICE, mode)
            assert abs(found.astype(int) - wanted).max() <= 1
            assert seen == where


def fill_by_wan(device: str, mode: str, conditions: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, set[str]]:
    """Frames of an arc by Wan VACE, latents of its video, and where its VAE was while the arc was denoised.

    conditions: diffusers makes them by torch.tensor(…, device=…), which the pretend GPU lacks.
    """
    kept = PLACEMENTS["wan_vace"][mode] | {"text": RESIDENT}
    runtime = replace(plain_runtime(load_preset("full", "wan_vace"), "wan_vace", "float32", device), placement=kept)
    settings = WanVaceSettings(num_inference_steps=2)
    stage = WanVaceStage(runtime, wan_paths(), ["a town"], settings, (WIDTH, HEIGHT))
    seen = set()
    stage.pipe.transformer.register_forward_pre_hook(lambda *_: seen.add(stage.pipe.vae.device.type))
    frames = np.stack([PICTURE] * ARC_FRAMES)
    arc = ArcInputs(0, PICTURE, PICTURE, frames, None, "a town")
    encoded = stage.encode(stage.padded(frames)).cpu()
    stage.pipe.maybe_free_model_hooks()
    return stage.decode(stage.denoise(arc, conditions).cpu()), encoded, seen


def test_video_by_wan():
    conditions = draw_noise((1, 96, 13, *LATENTS), 1)
    frames, encoded, _ = fill_by_wan("cpu", "full", conditions)
    with PretendGpu():
        for mode, where in (("full", {DEVICE}), ("balanced", {"cpu"})):
            found, latents, seen = fill_by_wan(DEVICE, mode, conditions)
            assert abs(found.astype(int) - frames).max() <= 1
            assert (latents - encoded).abs().max() < 1e-3
            assert seen == where


def train(device: str) -> tuple[float, np.ndarray]:
    """The loss after a step, and a sample sheet."""
    transformer = inbetween_training.load_start(TRANSFORMER).to(device)
    transformer.enable_gradient_checkpointing()
    scheduler = CogVideoXDDIMScheduler.from_pretrained(PATHS["cogvideox_text"], subfolder="scheduler")
    vae = load_model("cogvideox_vae", AutoencoderKLCogVideoX, PATHS["cogvideox_vae"], FLOAT).to(device)
    cache = OneClip()
    batch = inbetween_training.draw_batch(cache, (0, 0), [0], 0.1, 1000)
    objective = inbetween_training.InbetweenObjective(transformer, scheduler)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        loss = objective(**{name: value.to(device) for name, value in batch.items()})["loss"]
        loss.backward()
        optimizer.step()
    return loss.item(), inbetween_training.paint_sheet(transformer, vae, scheduler, cache, [0], None)


class OneClip:
    """A cache of encoded clips that holds one clip of noise."""

    def __len__(self) -> int:
        return 1

    def clip(self, number: int) -> dict[str, torch.Tensor]:
        frames = LATENT_FRAMES
        shapes = {"video": (2, frames), "edges": (2, frames), "start": (4,), "end": (4,), "noise": (frames,)}
        return {name: draw_noise((*shape, 16, *LATENTS), 0) for name, shape in shapes.items()}

    def caption(self, number: int) -> str:
        return "a town"

    def text(self, caption: str) -> torch.Tensor:
        return draw_noise((32, 64), 0)


def test_training_of_the_inbetween_model():
    loss, sheet = train("cpu")
    with PretendGpu():
        found, found_sheet = train(DEVICE)
    assert found == pytest.approx(loss, rel=1e-4)
    assert abs(found_sheet.astype(int) - sheet).max() <= 2
