"""Metrics along exact correspondences."""

import numpy as np
import pytest

from tests.evaluation.metrics_common import EDGE_SIZE, SAMPLE, noisy, plane_views
from utils.cameras.read import read_cameras
from utils.evaluation.consistency import anchor_error, flicker, sample, seams, temporal_error, warped_error
from utils.evaluation.covisibility import Covisibility, frame_pairs, make_covisibility
from utils.evaluation.pictures import psnr
from utils.layout import CAMERAS_FILE
from utils.scene.views import correspondence, make_views, resize_view


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
    """A wide video's lattice pixels have the positions that they have among all pixels."""
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
