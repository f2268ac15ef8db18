"""Damage changes the metrics that should detect it, and no others."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from synthetic.render import paint, trace
from synthetic.styles import make_style
from tests.evaluation.metrics_common import SAMPLE, noisy, shift
from utils.evaluation.consistency import anchor_error, flicker, seams, temporal_error
from utils.evaluation.covisibility import Covisibility
from utils.evaluation.pictures import colour_distance, line_score, psnr, ssim, texture_distance, video_lines
from utils.scene.views import resize_view


@pytest.fixture(scope="module")
def truth(town, path_views) -> np.ndarray:
    """91 exact frames."""
    frames = np.stack([paint(trace(town, view), make_style(200_000)) for view in path_views])
    frames.setflags(write=False)
    return frames


def brightness_noise(frames: np.ndarray, amount: float) -> np.ndarray:
    return noisy(frames, amount * np.random.default_rng(0).standard_normal(len(frames)))


def grain(frames: np.ndarray, amount: float) -> np.ndarray:
    return noisy(frames, amount * np.random.default_rng(1).standard_normal(frames.shape))


def drift(frames: np.ndarray, amount: float) -> np.ndarray:
    return noisy(frames, np.linspace(-amount, amount, len(frames)))


def jump(frames: np.ndarray, amount: float) -> np.ndarray:
    """Change the brightness from the second arc on."""
    return noisy(frames, amount * (np.arange(len(frames)) > 45))


def blur(frames: np.ndarray, amount: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), amount) for frame in frames])


def recolour(frames: np.ndarray, amount: float) -> np.ndarray:
    """Blend the frames with themselves with exchanged channels."""
    return np.round((1 - amount) * frames + amount * frames[..., [2, 0, 1]]).astype(np.uint8)


def shuffle(frames: np.ndarray, share: float) -> np.ndarray:
    """Frames in another order: the first `share` of them are permuted."""
    count = int(share * len(frames))
    return np.concatenate([frames[np.random.default_rng(2).permutation(count)], frames[count:]])


ALONG: dict[str, Callable] = {
    "anchors": anchor_error,
    "temporal_1": lambda f, c: temporal_error(f, c, 1),
    "temporal_8": lambda f, c: temporal_error(f, c, 8),
    "temporal_24": lambda f, c: temporal_error(f, c, 24),
    "flicker": flicker,
    "seams": seams,
}


def measure(name: str, frames: np.ndarray, truth: np.ndarray, covisibility: Covisibility) -> float:
    """One metric, lower being better; the reference is a true frame. Some look at a sixth of the frames."""
    if name in ALONG:
        return ALONG[name](frames, covisibility)
    some, true = frames[::6], truth[::6]
    return {
        "colour": lambda: colour_distance(frames, truth[30]),
        "texture": lambda: texture_distance(some, truth[30]),
        "psnr": lambda: -psnr(frames, truth),
        "ssim": lambda: -ssim(some, true),
    }[name]()


@pytest.fixture(scope="module")
def best(truth, covisibility) -> dict[str, float]:
    return {n: measure(n, truth, truth, covisibility) for n in (*ALONG, "colour", "texture", "psnr", "ssim")}


@pytest.mark.slow
def test_true_frames_are_nearly_consistent(best):
    assert best["psnr"] == -100 and best["ssim"] == pytest.approx(-1)
    assert all(best[name] < 4 for name in ("anchors", "temporal_1", "temporal_8", "temporal_24", "flicker"))
    assert best["seams"] == pytest.approx(1, abs=0.15) and best["colour"] < 6


# Damage, its amounts, the metrics that every amount raises, and those that it leaves alone (docs/metrics.md).
CLOSE, LATER = ("temporal_1", "temporal_8", "flicker", "psnr"), ("temporal_24", "anchors", "psnr")


DAMAGE = {
    "brightness noise": (brightness_noise, (2, 5, 10), (*CLOSE, "temporal_24"), ("texture",)),
    "grain": (grain, (4, 8, 16), (*CLOSE, *LATER, "texture", "ssim"), ("seams",)),
    "drift": (drift, (6, 12, 24), (*LATER, "temporal_8"), ("flicker", "temporal_1")),
    "jump": (jump, (4, 8, 16), ("seams", "anchors", "psnr"), ("flicker", "texture")),
    "blur": (blur, (0.6, 1.2, 2.4), ("texture", "psnr", "ssim"), ("flicker", "temporal_1", "seams")),
    "shift": (shift, (1, 2, 4), ("psnr", "ssim", "temporal_24"), ("colour", "flicker", "seams")),
    "palette": (recolour, (0.25, 0.5, 1.0), ("colour", "psnr"), ("flicker", "temporal_1", "anchors", "seams")),
    "order": (shuffle, (0.2, 0.5, 1.0), (*CLOSE, "ssim"), ("colour", "texture")),
}


UNMOVED = 1.0  # levels, Delta E or ratio


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_moves_its_own_metrics(kind: str, truth, covisibility, best):
    damage, amounts, raised, left = DAMAGE[kind]
    videos = [damage(truth, amount) for amount in amounts]
    found = [{n: measure(n, video, truth, covisibility) for n in (*raised, *left)} for video in videos]
    for name in raised:
        series = [best[name], *(values[name] for values in found)]
        assert all(a < b for a, b in pairwise(series)), (name, series)
    for name in left:
        assert all(values[name] < best[name] + UNMOVED for values in found), (name, best[name], found)


@pytest.mark.slow
def test_the_right_frames_have_the_scenes_lines(town, path_views):
    """At 360 pixels, against the lines of the scene: moved, mixed-up and blurred frames lose them."""
    from utils.evaluation.pictures import scene_lines

    numbers = (0, 30, 60, 90)
    frames = np.stack(
        [paint(trace(town, resize_view(path_views[k], (360, 240))), make_style(200_000)) for k in numbers]
    )
    paths = [SAMPLE / f"arc{int(k > 45)}" / "hed" / f"{k + 1:04d}.png" for k in numbers]
    lines = scene_lines(paths, (360, 240))

    def f1(video: np.ndarray) -> float:
        return line_score(video_lines(video), lines).f1

    right = f1(frames)
    assert right > 0.6
    assert right > f1(shift(frames, 1)) > f1(shift(frames, 4))
    assert right > f1(blur(frames, 2)) > f1(blur(frames, 6))
    assert f1(frames[::-1]) < 0.5 * right
    assert f1(recolour(frames, 1.0)) == pytest.approx(right, abs=0.1)


@pytest.mark.slow
def test_networks_of_the_real_classes(tmp_path: Path):
    """CLIP and the depth network, tiny and random: a picture is most like itself; depth has the picture's size."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
    )

    from utils.evaluation.networks import load_clip, load_depth

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, intermediate_size=64, image_size=32, patch_size=8, projection_dim=16)
    CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path / "clip")
    backbone = Dinov2Config(
        **small, image_size=70, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    )
    depth = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(depth).save_pretrained(tmp_path / "depth")
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    similarity = load_clip(tmp_path / "clip")
    assert similarity(frames[:1], frames[0]) == pytest.approx(1) and similarity(frames, frames[0]) < 1
    found = load_depth(tmp_path / "depth")(frames[0])
    assert found.shape == (40, 60) and np.isfinite(found).all()
