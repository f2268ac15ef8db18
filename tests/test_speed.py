"""The first-block cache and compiled blocks on the tiny in-between transformer: what they change."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.inbetween import CogVideoXInbetweenPipeline
from models.latents import draw_noise
from models.loading import load_inbetween
from models.memory import FP8, RESIDENT
from models.speed import compile_blocks, first_block_cache, require_compilable
from models.steps import ggi_step
from models.weights import GGI_STAGE, load_preset, locate
from utils.cli import InputError

Fill = Callable[..., tuple[torch.Tensor, int]]
STEPS = 15


def load_pipe() -> CogVideoXInbetweenPipeline:
    preset = load_preset("tiny")
    paths = locate(argparse.Namespace(), preset, GGI_STAGE)
    return load_inbetween(paths, Path(preset.ggi_transformer), "cpu", torch.float32, tiling=False)


@pytest.fixture(scope="module")
def fill() -> Fill:
    """Latents of an arc by threshold and seed, and how often the last block ran."""
    pipe = load_pipe()
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    text = draw_noise((1, config.max_text_seq_length, config.text_embed_dim), 3)

    def fill(threshold: float | None, seed: int = 1) -> tuple[torch.Tensor, int]:
        runs = []
        conditions, noise = draw_noise((1, 13, 32, 12, 18), seed), draw_noise((1, 13, 16, 12, 18), seed + 1)
        hook = pipe.transformer.transformer_blocks[-1].attn1.register_forward_hook(lambda *_: runs.append(1))
        with hook, first_block_cache(pipe.transformer, threshold):
            return pipe(conditions, noise, text, text, num_inference_steps=STEPS), len(runs)

    return fill


def test_a_cache_that_never_holds_changes_nothing(fill: Fill):
    (exact, all_runs), (cached, runs) = fill(None), fill(1e-9)
    assert all_runs == runs == STEPS
    assert torch.equal(exact, cached)


def test_steps_are_skipped_and_the_latents_stay_near(fill: Fill):
    (exact, _), (near, some), (far, few) = fill(None), fill(0.2), fill(0.6)
    assert 1 <= few < some < STEPS
    distances = [((found - exact).norm() / exact.norm()).item() for found in (near, far)]
    assert 0 < distances[0] < distances[1] < 0.5


def test_every_arc_begins_with_an_empty_cache(fill: Fill):
    first, _ = fill(0.2)
    fill(0.2, 7)
    assert torch.equal(fill(0.2)[0], first)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    transformer = load_pipe().transformer
    step = ggi_step(transformer, (144, 96), 49, 1)
    with torch.no_grad():
        before = step()[0]
        compile_blocks(transformer)
        torch.testing.assert_close(step()[0], before, rtol=1e-3, atol=1e-4)


def test_blocks_that_are_not_as_loaded_are_not_compiled():
    require_compilable(RESIDENT)
    with pytest.raises(InputError, match="--compile goes with --memory full: the transformer would be kept fp8"):
        require_compilable(FP8)
