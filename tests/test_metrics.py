"""Metrics give known answers and are best for the true frames of a town; each kind of damage moves its own ones."""

from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from synthetic.render import make_world, paint, trace
from synthetic.styles import make_style
from tests.helpers import ROOT
from utils.cameras.read import read_cameras
from utils.evaluation.consistency import anchor_error, flicker, sample, seams, temporal_error, warped_error
from utils.evaluation.covisibility import Covisibility, frame_pairs, load_covisibility, make_covisibility
from utils.evaluation.measure import inverse_depth
from utils.evaluation.networks import depth_psnr
from utils.evaluation.pictures import colour_distance, line_score, psnr, ssim, texture_distance, thin, video_lines
from utils.layout import CAMERAS_FILE, SCENE_FILE
from utils.scene.load import load_geometry
from utils.scene.mesh import build_geometry, turn
from utils.scene.raycast import RayCaster
from utils.scene.views import View, correspondence, make_views, resize_view

SAMPLE = ROOT / "assets" / "sampleA"
SIZE = (72, 48)  # width, height
EDGE_SIZE = (1080, 720)


@pytest.fixture(scope="module")
def path_views() -> list[View]:
    return [resize_view(view, SIZE) for view in make_views(read_cameras(SAMPLE / CAMERAS_FILE), EDGE_SIZE)]


@pytest.fixture(scope="module")
def town():
    return make_world(turn(load_geometry(SAMPLE / SCENE_FILE), "+z"))


@pytest.fixture(scope="module")
def truth(town, path_views) -> np.ndarray:
    """91 exact frames."""
    frames = np.stack([paint(trace(town, view), make_style(200_000)) for view in path_views])
    frames.setflags(write=False)
    return frames


@pytest.fixture(scope="module")
def covisibility(town, path_views) -> Covisibility:
    return make_covisibility(town.caster, path_views)


def noisy(frames: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Frames with offsets, broadcast from [F] or as they are, added and clipped."""
    offsets = offsets.reshape(len(frames), *(1,) * 3) if offsets.ndim == 1 else offsets
    return np.clip(np.round(frames + offsets), 0, 255).astype(np.uint8)


def brightness_noise(frames: np.ndarray, amount: float) -> np.ndarray:
    return noisy(frames, amount * np.random.default_rng(0).standard_normal(len(frames)))


def grain(frames: np.ndarray, amount: float) -> np.ndarray:
    return noisy(frames, amount * np.random.default_rng(1).standard_normal(frames.shape))


def drift(frames: np.ndarray, amount: float) -> np.ndarray:
    return noisy(frames, np.linspace(-amount, amount, len(frames)))


def jump(frames: np.ndarray, amount: float) -> np.ndarray:
    """Another brightness from the second arc on."""
    return noisy(frames, amount * (np.arange(len(frames)) > 45))


def blur(frames: np.ndarray, amount: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), amount) for frame in frames])


def shift(frames: np.ndarray, amount: int) -> np.ndarray:
    return np.roll(frames, amount, axis=2)


def recolour(frames: np.ndarray, amount: float) -> np.ndarray:
    """A mix of the frames and themselves with exchanged channels."""
    return np.round((1 - amount) * frames + amount * frames[..., [2, 0, 1]]).astype(np.uint8)


def shuffle(frames: np.ndarray, share: float) -> np.ndarray:
    """Frames in another order: the first `share` of them are permuted."""
    count = int(share * len(frames))
    return np.concatenate([frames[np.random.default_rng(2).permutation(count)], frames[count:]])


# --- along the geometry ---


def plane_views(count: int, size: tuple[int, int] = (24, 16), slide: float = 0.0) -> tuple[RayCaster, list[View]]:
    """Cameras that look at a wall 10 m away and slide to the right by `slide` pixels a frame."""
    wall = np.array([[-500.0, -50, -10], [500, -50, -10], [500, 50, -10], [-500, 50, -10]])
    geometry = build_geometry([("wall", wall, np.array([[0, 1, 2], [0, 2, 3]]))], "+y")
    views = []
    for k in range(count):
        c2w = np.eye(4)
        c2w[0, 3] = k * slide * 10 / 20
        views.append(View(c2w, 20.0, 20.0, size[0] / 2, size[1] / 2, *size))
    return RayCaster(geometry), views


def flat(values: np.ndarray, size: tuple[int, int] = (24, 16)) -> np.ndarray:
    """Frames [F, H, W, 3] of one value each."""
    return np.broadcast_to(np.asarray(values).reshape(-1, 1, 1, 1), (len(values), size[1], size[0], 3)).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def still() -> Covisibility:
    """A camera at rest over two arcs: every pixel stays where it is."""
    return make_covisibility(*plane_views(91))


def test_pairs_are_those_that_metrics_ask_for():
    pairs = frame_pairs(91)
    assert len(set(pairs)) == len(pairs)
    assert {(0, 1), (0, 8), (0, 24), (0, 45), (45, 90), (2, 1), (90, 89)} <= set(pairs)
    assert not {(1, 0), (91, 90), (0, 90)} & set(pairs)


def test_a_camera_at_rest_sees_every_pixel_in_place(still: Covisibility):
    position, visible = still.warp(3, 4)
    y, x = np.indices((16, 24)) + 0.5
    np.testing.assert_allclose(position, np.stack([x, y], -1), atol=1e-5)
    assert visible[1:-1, 1:-1].all() and not visible[0].any() and not visible[:, -1].any()


def test_a_sliding_camera_over_a_wall():
    covisibility = make_covisibility(*plane_views(9, slide=0.5))
    position, _ = covisibility.warp(0, 8)
    np.testing.assert_allclose(position[5, 3], (3.5 + 4, 5.5), atol=1e-4)
    # A ramp painted on the wall, as each of the cameras sees it.
    x, k = np.arange(24).reshape(1, 1, -1, 1), np.arange(9).reshape(-1, 1, 1, 1)
    frames = np.broadcast_to(6 * x + 3 * k, (9, 16, 24, 3)).astype(np.uint8)
    assert temporal_error(frames, covisibility, 8) == pytest.approx(0, abs=1e-4)
    assert temporal_error(frames[::-1], covisibility, 8) == pytest.approx(48, abs=1e-3)


def test_a_lattice_looks_at_every_kth_pixel(town):
    """The places of a wide video's pixels are those that all its pixels have."""
    path = make_views(read_cameras(SAMPLE / CAMERAS_FILE), EDGE_SIZE)
    views = [resize_view(path[k], (840, 20)) for k in (0, 1)]
    covisibility = make_covisibility(town.caster, views)
    assert covisibility.step == 3 and covisibility.position.shape == (1, 7, 280, 2)
    full = correspondence(town.caster, *views)
    position, visible = covisibility.warp(0, 1)
    np.testing.assert_allclose(position[visible], covisibility.on_lattice(full.position)[visible], atol=1e-3)
    assert covisibility.on_lattice(full.visible)[visible].all() and visible.mean() > 0.3


def test_an_even_lattice_has_pixels_too():
    caster, views = plane_views(2, (721, 3))
    covisibility = make_covisibility(caster, [resize_view(view, (721, 10)) for view in views])
    picture = np.arange(7210).reshape(10, 721)
    assert covisibility.step == 3 and covisibility.on_lattice(picture)[0, :3].tolist() == [722, 725, 728]
    assert make_covisibility(caster, [resize_view(v, (480, 9)) for v in views]).on_lattice(picture)[0, 0] == 722


def test_occluded_and_mixed_pixels_do_not_count(town, path_views, covisibility: Covisibility):
    full = correspondence(town.caster, path_views[0], path_views[45])
    _, visible = covisibility.warp(0, 45)
    assert not (visible & ~full.visible).any()
    assert 0.2 < visible.mean() < full.visible.mean()


def test_geometry_is_read_as_written(covisibility: Covisibility, tmp_path: Path):
    covisibility.save(tmp_path / "geometry.npz")
    loaded = load_covisibility(tmp_path / "geometry.npz")
    for field in fields(Covisibility):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(covisibility, field.name))


def test_sampling_is_bilinear():
    image = np.array([[[0.0], [10.0]], [[20.0], [30.0]]])
    points = np.array([[0.5, 0.5], [1.0, 1.0], [1.5, 0.5], [0.0, 0.0], [2.0, 2.0]])
    assert sample(image, points).ravel().tolist() == [0, 15, 10, 0, 30]


def test_error_is_the_mean_difference_in_levels(still: Covisibility):
    frames = flat(np.r_[np.full(45, 100), np.full(46, 107)])
    assert warped_error(frames, still, 44, 45) == pytest.approx(7)
    assert anchor_error(frames, still) == pytest.approx(3.5)  # 0 to 45: 7, 45 to 90: 0
    assert temporal_error(frames, still, 24) == pytest.approx(7 * 24 / 67)


def test_flicker_is_the_deviation_of_noise_that_is_new_in_every_frame(still: Covisibility):
    noise = np.random.default_rng(0).normal(0, 12, (91, 16, 24, 3))
    assert flicker(noisy(np.full(noise.shape, 128.0), noise), still) == pytest.approx(12, rel=0.02)
    assert flicker(flat(np.tile([100, 101], 46)[:91]), still) == pytest.approx(2 * np.sqrt(np.pi / 12))


def test_a_drift_does_not_flicker(still: Covisibility):
    frames = flat(np.arange(91) * 2)
    assert flicker(frames, still) == 0
    assert [temporal_error(frames, still, d) for d in (1, 8, 24)] == [2, 16, 48]


def test_a_seam_is_a_step_larger_than_its_neighbours(still: Covisibility):
    steps = np.ones(90)
    assert seams(flat(np.cumsum(np.r_[0, steps])), still) == pytest.approx(1)
    steps[45] = 9  # from frame 45 to 46
    assert seams(flat(np.cumsum(np.r_[0, steps])), still) == pytest.approx(5)
    steps[45], steps[44] = 1, 9  # on the other side of the shared frame
    assert seams(flat(np.cumsum(np.r_[0, steps])), still) == pytest.approx(5)


def test_nothing_to_compare_is_nan(still: Covisibility):
    assert np.isnan(seams(flat(np.full(91, 7)), still))
    one_arc = make_covisibility(*plane_views(46))
    assert np.isnan(seams(flat(np.arange(46)), one_arc))
    apart = make_covisibility(*plane_views(46, slide=3))
    assert np.isnan(anchor_error(flat(np.arange(46)), apart)) and np.isnan(
        temporal_error(flat(np.arange(46)), apart, 8)
    )


def test_frames_of_another_size_are_refused(still: Covisibility):
    with pytest.raises(ValueError, match="the geometry is for uint8"):
        flicker(flat(np.zeros(91), (12, 8)), still)
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(flat(np.zeros(2)), flat(np.zeros(3)))


# --- single frames ---


def strokes(*columns: int) -> np.ndarray:
    lines = np.zeros((1, 20, 60), bool)
    lines[0, :, list(columns)] = True
    return lines


def test_lines_within_the_tolerance_agree():
    assert line_score(strokes(10, 30), strokes(10, 30)).f1 == 1
    assert line_score(strokes(11), strokes(10)).f1 == 1
    assert line_score(strokes(12), strokes(10)).f1 == 0
    score = line_score(strokes(10, 20, 30), strokes(10, 50))
    assert (score.precision, score.recall) == pytest.approx((1 / 3, 1 / 2)) and score.f1 == pytest.approx(0.4)


def test_videos_without_lines():
    assert np.isnan(line_score(strokes(), strokes(10)).precision) and line_score(strokes(), strokes(10)).recall == 0
    assert np.isnan(line_score(strokes(10), strokes()).recall)


@pytest.mark.parametrize("width", (360, 720, 1440))
def test_lines_of_a_clear_picture_at_any_size(width: int):
    """Rectangles: the outlines are found, whatever the size; moved by 1 % they are lost."""
    scale = width / 720
    picture, wanted = np.full((round(480 * scale), width, 3), 230, np.uint8), np.zeros((480, 720, 3), np.uint8)
    for low, high, colour in (((80, 60), (300, 400), (200, 60, 40)), ((420, 120), (640, 420), (40, 90, 180))):
        corners = [
            tuple(round(v * scale) for v in point) for point in (low, (high[0] - 1 / scale, high[1] - 1 / scale))
        ]
        cv2.rectangle(picture, *corners, colour, -1)
        cv2.rectangle(wanted, low, high, (255, 255, 255), 3)
    lines = thin(wanted)[None]
    assert line_score(video_lines(picture[None]), lines).f1 > 0.93
    moved = shift(picture[None], round(7 * scale))
    assert line_score(video_lines(moved), lines).f1 < 0.7


def test_equal_colours_have_no_distance_and_plain_ones_their_delta_e():
    red, grey = (np.full((1, 40, 60, 3), colour, np.uint8) for colour in ((200, 60, 40), (120, 120, 120)))
    lab = [cv2.cvtColor(p[0, :1, :1].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0, 0] for p in (red, grey)]
    assert colour_distance(red, red[0]) == pytest.approx(0, abs=1e-3)
    assert colour_distance(red, grey[0]) == pytest.approx(np.linalg.norm(lab[0] - lab[1]), rel=1e-4)
    assert texture_distance(red, grey[0]) == pytest.approx(0, abs=1e-3)


def test_colour_distance_knows_the_spread():
    """Black and white in equal shares against their middle: a deviation of 50 L against none."""
    board = np.zeros((1, 128, 128, 3), np.uint8)
    board[:, :, 64:] = 255
    assert colour_distance(board, np.full((8, 8, 3), 119, np.uint8)) == pytest.approx(50, abs=0.5)


def test_psnr_of_a_known_error():
    frames = np.full((2, 16, 16, 3), 100, np.uint8)
    assert psnr(frames, frames) == 100
    assert psnr(frames + np.uint8(5), frames) == pytest.approx(20 * np.log10(255 / 5))
    assert ssim(frames, frames) == pytest.approx(1)
    assert np.isnan(ssim(frames[:, :8], frames[:, :8]))


def test_psnr_d_forgives_scale_and_shift_only():
    true = np.random.default_rng(0).uniform(0.1, 1, (2, 20, 30))
    true = np.minimum(true, np.percentile(true, 98, axis=(1, 2), keepdims=True))
    assert depth_psnr(7 * true + 3, true) == pytest.approx(100)
    rough = [
        depth_psnr(true + amount * np.random.default_rng(1).standard_normal(true.shape), true)
        for amount in (0.05, 0.2)
    ]
    assert 100 > rough[0] > rough[1]
    assert depth_psnr(true, np.zeros_like(true)) == pytest.approx(100)  # nothing but sky: any constant fits


def test_inverse_depth_of_a_wall():
    caster, (view,) = plane_views(1)
    np.testing.assert_allclose(inverse_depth(caster, view), 0.1)


# --- true frames of a town, and damage ---

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


def test_true_frames_are_nearly_consistent(best):
    assert best["psnr"] == -100 and best["ssim"] == pytest.approx(-1)
    assert all(best[name] < 4 for name in ("anchors", "temporal_1", "temporal_8", "temporal_24", "flicker"))
    assert best["seams"] == pytest.approx(1, abs=0.15) and best["colour"] < 6


# Damage, its amounts, the metrics it raises with every amount, and those that docs/metrics.md says it leaves alone.
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
