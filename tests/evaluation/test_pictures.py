"""Metrics of single frames."""

import cv2
import numpy as np
import pytest

from tests.evaluation.metrics_common import plane_views, shift
from utils.evaluation.measure import inverse_depth
from utils.evaluation.networks import depth_psnr
from utils.evaluation.pictures import colour_distance, line_score, psnr, ssim, texture_distance, thin, video_lines


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
    """Black and white in equal shares compared with middle grey: a deviation of 50 L compared with none."""
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
