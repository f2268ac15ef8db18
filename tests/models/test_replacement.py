"""Anchors carried into the denoising of an arc."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from models.inbetween.replacement import latent_coverage
from models.inbetween.stage import ArcInputs, InbetweenStage
from models.inbetween.stages import CogVideoXStage
from models.latents import to_signed
from models.runtime.runtime import plain_runtime
from models.settings import InbetweenSettings
from models.weights import GGI_STAGE, load_preset, locate
from tests.support.small import HEIGHT, LATENT_SIZE, SIZE, WIDTH, small_weights
from utils.layout import ARC_FRAMES, LATENT_FRAMES, edge_frame_indices
from utils.scene.carry import CarriedVideo

STEPS = 3


@pytest.fixture(scope="module")
def stage() -> InbetweenStage:
    with small_weights():
        preset = load_preset("tiny")
        paths = locate(argparse.Namespace(), preset, GGI_STAGE)
    settings = InbetweenSettings(num_inference_steps=STEPS, guidance_scale=1.0)
    runtime = plain_runtime(preset, "ggi", "float32")
    made = CogVideoXStage(runtime, paths, Path(preset.ggi_transformer), ["a town"], settings, SIZE)
    made.pipe.set_progress_bar_config(disable=True)
    return made


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def carried_as(frames: np.ndarray, seen: np.ndarray | bool) -> CarriedVideo:
    seen = np.broadcast_to(seen, frames.shape[:3])
    return CarriedVideo(frames, seen, seen)


def arc_with(carried: CarriedVideo | None) -> ArcInputs:
    noise = np.random.default_rng(5).standard_normal((LATENT_FRAMES, *LATENT_SIZE[::-1], 16)).astype(np.float32)
    edges = np.stack([picture(10 + i) for i in range(ARC_FRAMES)])
    return ArcInputs(0, picture(1), picture(2), edges, noise, "a town", carried)


def still() -> np.ndarray:
    """The start anchor in every frame, as a camera that stands still sees it."""
    return np.repeat(picture(1)[None], ARC_FRAMES, axis=0)


def test_a_static_camera_guided_in_all_steps_gives_the_round_trip_of_the_anchor(stage):
    guided = stage.with_settings(num_replacement=STEPS).denoise(arc_with(carried_as(still(), True)))
    with torch.no_grad():
        expected = stage.pipe.encode_video(to_signed(still()[edge_frame_indices(stage.num_frames)])[None])
    assert torch.equal(guided, expected)


def test_without_visibility_nothing_changes(stage):
    plain = stage.denoise(arc_with(None))
    unseen = stage.with_settings(num_replacement=STEPS).denoise(arc_with(carried_as(still(), False)))
    assert torch.equal(unseen, plain)


@pytest.mark.slow
def test_each_guided_step_brings_the_latents_nearer(stage):
    with torch.no_grad():
        target = stage.pipe.encode_video(to_signed(still()[edge_frame_indices(stage.num_frames)])[None])
    arc = arc_with(carried_as(still(), True))
    distances = [(stage.with_settings(num_replacement=n).denoise(arc) - target).norm() for n in range(STEPS + 1)]
    assert distances[0] > distances[1] > distances[2] > distances[3] == 0


def test_seen_cells_are_carried_and_unseen_ones_generated(stage):
    seen = np.zeros((ARC_FRAMES, HEIGHT, WIDTH), bool)
    seen[:, :, : WIDTH // 2] = True
    guided = stage.with_settings(num_replacement=STEPS).denoise(arc_with(carried_as(still(), seen)))
    with torch.no_grad():
        target = stage.pipe.encode_video(to_signed(still()[edge_frame_indices(stage.num_frames)])[None])
    half = LATENT_SIZE[0] // 2
    assert torch.equal(guided[..., :half], target[..., :half])
    assert (guided[..., half:] != target[..., half:]).all(dim=2).all()


def test_a_cell_needs_its_share_in_every_frame_of_its_group():
    seen = np.ones((9, 16, 16), bool)
    seen[0, :8, :8] = False  # the first frame alone
    seen[3, 8:, :8].flat[:20] = False  # 20 of 64 pixels, in one frame of the second group
    seen[6, 8:, 8:].flat[:30] = False
    mask = latent_coverage(seen, 0.6)
    assert mask.shape == (1, 3, 1, 2, 2)
    assert mask[0, 0, 0].tolist() == [[False, True], [True, True]]
    assert mask[0, 1, 0].all()
    assert mask[0, 2, 0].tolist() == [[True, True], [True, False]]
    assert not latent_coverage(seen, 0.7)[0, 1, 0, 1, 0]


def test_finishing_composes_as_the_settings_ask(stage):
    frames = np.stack([picture(100 + i) for i in range(ARC_FRAMES)])
    sure = np.zeros((ARC_FRAMES, HEIGHT, WIDTH), bool)
    sure[:, :, :20] = True
    arc = arc_with(CarriedVideo(still(), np.ones_like(sure), sure))
    assert (stage.finish(frames, arc) == frames).all()
    assert (stage.with_settings(composite="seen").finish(frames, arc) == still()).all()
    partly = stage.with_settings(composite="sure").finish(frames, arc)
    assert (partly[:, :, :18] == still()[:, :, :18]).all() and (partly[:, :, 20:] != still()[:, :, 20:]).any()
    matched = stage.with_settings(colour_match=True).finish(frames, arc)
    assert abs(matched.mean() - still().mean()) < 4 and (matched != still()).any()
