"""The first-block cache on the tiny networks: what it skips, and what that changes."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.anchors import AnchorSettings, decode_anchor, sample_anchor
from models.flux import FluxModels
from models.latents import draw_noise
from models.loading import encode_flux_prompts, load_flux, load_inbetween
from models.speed import first_block_cache
from models.weights import FLUX_STAGE, GGI_STAGE, load_preset, locate
from utils.metrics_image import psnr

Draw = Callable[[float | None], tuple[torch.Tensor, int]]


@pytest.fixture(scope="module")
def flux() -> tuple[FluxModels, Callable]:
    preset = load_preset("tiny")
    paths = locate(argparse.Namespace(), preset, FLUX_STAGE)
    texts = encode_flux_prompts(paths["flux_text"], ["", "fog"], "cpu", torch.float32, preset.max_sequence_length)
    models = load_flux(paths, "cpu", torch.float32)
    noise, control = draw_noise((1, 16, 12, 18), 1), draw_noise((1, 3, 96, 144), 2).clamp(-1, 1)

    def draw(threshold: float | None, negative: str = "fog") -> tuple[torch.Tensor, int]:
        """Latents of an anchor, and how often its last double block ran."""
        runs = []
        hook = models.transformer.transformer_blocks[-1].attn.register_forward_hook(lambda *_: runs.append(1))
        with hook, first_block_cache(models.transformer, threshold):
            latents = sample_anchor(models, noise, control, texts[""], texts[negative], AnchorSettings())
        return latents, len(runs)

    return models, draw


def test_a_cache_that_never_holds_changes_nothing(flux):
    _, draw = flux
    (exact, all_runs), (cached, runs) = draw(None), draw(1e-9)
    assert runs == all_runs == 25 + 24  # true CFG begins with the second step
    assert torch.equal(exact, cached)


def test_steps_are_skipped_and_the_picture_stays_near(flux):
    models, draw = flux
    (exact, all_runs), (near, some), (far, few) = draw(None), draw(0.05), draw(0.3)
    assert few < some < all_runs
    pictures = [decode_anchor(models, latents)[None] for latents in (exact, near, far)]
    assert 100 > psnr(pictures[1], pictures[0]) > max(30, psnr(pictures[2], pictures[0]))


def test_every_anchor_begins_with_an_empty_cache(flux):
    _, draw = flux
    first, _ = draw(0.1)
    draw(0.1, "")
    assert torch.equal(draw(0.1)[0], first)


@pytest.mark.slow
def test_video_steps_are_skipped():
    preset = load_preset("tiny")
    paths = locate(argparse.Namespace(), preset, GGI_STAGE)
    pipe = load_inbetween(paths, Path(preset.ggi_transformer), "cpu", torch.float32, tiling=False)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    conditions, noise = draw_noise((1, 13, 32, 12, 18), 1), draw_noise((1, 13, 16, 12, 18), 2)
    text = draw_noise((1, config.max_text_seq_length, config.text_embed_dim), 3)

    def fill(threshold: float | None) -> tuple[torch.Tensor, int]:
        runs = []
        hook = pipe.transformer.transformer_blocks[-1].attn1.register_forward_hook(lambda *_: runs.append(1))
        with hook, first_block_cache(pipe.transformer, threshold):
            return pipe(conditions, noise, text, text, num_inference_steps=20), len(runs)

    (exact, all_runs), (same, never), (near, some) = fill(None), fill(1e-9), fill(0.2)
    assert all_runs == never == 20 and 5 < some < 20
    assert torch.equal(exact, same)
    assert 0 < (near - exact).norm() / exact.norm() < 0.1
