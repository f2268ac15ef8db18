"""Pictures carried along the geometry, and composited over frames."""

import cv2
import numpy as np
import pytest

from utils.cameras.path import look_at
from utils.layout import ARC_STEPS
from utils.meshes.mesh import build_geometry
from utils.scene.carry import Picture, carry, carry_to_anchor, carry_to_arc, fill_holes
from utils.scene.composite import composite, match_colours
from utils.scene.raycast import RayCaster
from utils.scene.views import View

SIZE = (96, 64)  # pixels
WALL = np.array([[-9, 5, -6], [9, 5, -6], [9, 5, 6], [-9, 5, 6]], float)  # 5 m in front of the origin, Z up
POST = np.array([[-0.4, 3, -6], [0.4, 3, -6], [0.4, 3, 6], [-0.4, 3, 6]], float)
QUAD = np.array([[0, 1, 2], [0, 2, 3]])


def view_from(
    eye: tuple[float, float, float], towards: tuple[float, float, float] = (0, 5, 0), focal: float = 60
) -> View:
    c2w = look_at(np.array([eye], float), np.array([towards], float), np.array([0, 0, 1.0]), "test")[0]
    return View(c2w, focal, focal, SIZE[0] / 2, SIZE[1] / 2, *SIZE)


def waves(period: float = 24.0) -> np.ndarray:
    """A smooth picture, uint8 [64, 96, 3]."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    angles = 2 * np.pi * np.stack([x, y, x + y], -1) / period
    return np.round(127 + 80 * np.sin(angles)).astype(np.uint8)


def flat(level: int) -> np.ndarray:
    return np.full((SIZE[1], SIZE[0], 3), level, np.uint8)


@pytest.fixture(scope="module")
def wall() -> RayCaster:
    return RayCaster(build_geometry([("wall", WALL, QUAD)], "+z"))


@pytest.fixture(scope="module")
def wall_and_post() -> RayCaster:
    return RayCaster(build_geometry([("wall", WALL, QUAD), ("post", POST, QUAD)], "+z"))


def test_a_picture_carried_to_its_own_view_is_itself(wall):
    carried = carry(wall, [Picture(waves(), view_from((0, 0, 0)))], view_from((0, 0, 0)))
    assert carried.seen.all()
    np.testing.assert_allclose(carried.colours, waves(), atol=0.51)


def test_there_and_back_returns_within_the_resampling_error(wall):
    here, there = view_from((0, 0, 0)), view_from((1, 0.3, 0.2))
    once = carry(wall, [Picture(waves(), here)], there)
    back = carry(wall, [Picture(np.round(once.colours).astype(np.uint8), there)], here)
    inner = cv2.erode(np.uint8(back.seen & (back.colours.sum(-1) > 0)), np.ones((9, 9)), borderValue=0) > 0
    assert inner.mean() > 0.4
    assert np.abs(back.colours - waves())[inner].max() < 8  # of an amplitude of 80; a shift by one pixel gives 20


def test_what_is_hidden_or_outside_is_not_seen(wall_and_post):
    looking_away = view_from((0, 0, 0), (0, -5, 0))
    assert not carry(wall_and_post, [Picture(waves(), looking_away)], view_from((0, 0, 0))).seen.any()
    left, right = view_from((-1.5, 0, 0)), view_from((1.5, 0, 0))
    alone = carry(wall_and_post, [Picture(flat(200), left)], right)
    assert 0.02 < (~alone.seen).mean() < 0.9 and not alone.colours[~alone.seen].any()
    both = carry(wall_and_post, [Picture(flat(200), left), Picture(flat(50), view_from((2.5, 0, 0)), 1e-3)], right)
    gained = both.seen & ~alone.seen
    assert gained.any()
    np.testing.assert_allclose(both.colours[gained], 50, atol=0.5)


def test_the_nearer_in_time_counts_more_and_the_sharper_before_it(wall):
    target = view_from((0, 0, 0))
    near, far = view_from((0, 1, 0)), view_from((0, -15, 0))  # the far one shows the wall at a quarter of the size
    mixed = carry(wall, [Picture(flat(200), target, 0.75), Picture(flat(100), near, 0.25)], target)
    middle = np.s_[24:40, 36:60]
    assert np.ptp(mixed.colours[middle]) < 1 and 170 < mixed.colours[middle].mean() < 180
    sharp = carry(wall, [Picture(flat(200), far, 0.9), Picture(flat(100), target, 0.1)], target)
    assert sharp.colours[middle].mean() < 105


def test_no_seam_runs_through_a_face(wall):
    """Two pictures of unlike brightness, one of which ends in the middle of the wall."""
    target, beside = view_from((0, 0, 0)), view_from((4, 0, 0), (4, 5, 0))
    carried = carry(wall, [Picture(flat(100), target), Picture(flat(200), beside)], target)
    row = carried.colours[32, :, 0]
    assert row.min() < 101 and row.max() > 145
    assert np.abs(np.diff(row)).max() < 12


def test_a_finer_source_is_averaged_not_sampled(wall):
    stripes = np.repeat(np.tile(np.uint8([0, 255]), SIZE[0] // 2)[None, :, None], SIZE[1], 0).repeat(3, 2)
    carried = carry(wall, [Picture(stripes, view_from((0, 2, 0)))], view_from((0, -25, 0)))
    inner = cv2.erode(np.uint8(carried.seen), np.ones((5, 5)), borderValue=0) > 0
    assert inner.any() and np.abs(carried.colours[inner] - 127.5).max() < 30


def test_grazing_and_magnified_colours_and_those_at_borders_are_not_sure(wall, wall_and_post):
    target = view_from((0, 0, 0))
    assert carry(wall, [Picture(waves(), target)], target).sure.all()
    grazing = carry(wall, [Picture(waves(), view_from((-8.5, 4.6, 0), (0, 5, 0)))], target)
    assert grazing.seen.any() and not grazing.sure.any()
    magnified = carry(wall, [Picture(waves(), view_from((0, -6.5, 0)))], target)
    assert magnified.seen.all() and not magnified.sure.any()
    posted = carry(wall_and_post, [Picture(waves(), target)], target)
    assert posted.seen.all() and 0 < (~posted.sure).mean() < 0.15


def test_anchors_reach_every_frame_and_holes_are_filled(wall_and_post):
    views = [view_from((x, 0, 0)) for x in np.linspace(-2, 2, 46)]
    video = carry_to_arc(wall_and_post, views, {0: flat(180), 1: flat(180)}, 0)
    assert video.frames.shape == (46, 64, 96, 3)
    assert not video.seen.all() and np.abs(video.frames.astype(int) - 180).max() <= 3  # of inpainting
    assert video.seen[0].all() and video.seen[-1].all()


def test_an_anchor_is_seen_by_all_others_without_black_holes(wall_and_post):
    views = {0: view_from((-1, 0, 0)), 1: view_from((0, 0, 0)), 2: view_from((1, 0, 0))}
    along = [views[0]] + [views[min(2, 1 + k // ARC_STEPS)] for k in range(2 * ARC_STEPS)]
    pictures = {0: flat(90), 1: flat(200), 2: flat(160)}
    assert carry_to_anchor(wall_and_post, along, {1: flat(200)}, 1) is None  # no other one
    alone, seen_alone = carry_to_anchor(wall_and_post, along, {0: flat(90), 1: flat(200)}, 1)
    assert not seen_alone.all() and np.abs(alone - 90.0).max() <= 3  # also where nothing is seen
    both, seen_both = carry_to_anchor(wall_and_post, along, pictures, 1)
    assert seen_both[~seen_alone].any() and both.min() >= 87 and both.max() <= 163


def test_a_composite_takes_sure_pixels_and_matches_the_colour_of_the_rest():
    rng = np.random.default_rng(0)
    truth = np.clip(waves()[None].astype(int), 0, 255).astype(np.uint8)
    generated = np.clip(truth.astype(int) - 30 + rng.integers(-9, 10, truth.shape), 0, 255).astype(np.uint8)
    sure = np.ones((1, 64, 96), bool)
    sure[:, 24:40, 40:56] = False
    mixed = composite(generated, truth, sure)
    far = cv2.erode(np.uint8(sure[0]), np.ones((7, 7))) > 0
    assert (mixed[0][far] == truth[0][far]).all()
    hole = mixed[0][26:38, 42:54].astype(int) - truth[0][26:38, 42:54]
    assert abs(hole.mean()) < 3 < 8 < abs((generated.astype(int) - truth)[0, 26:38, 42:54].mean())
    assert hole.std() > 3  # with detail of its own, not smeared
    matched = match_colours(generated, truth, sure).astype(int) - truth
    assert abs(matched.mean()) < 3 and matched[0][far].std() > 3


def test_without_sure_pixels_frames_stay_as_they_are():
    frames, none = waves()[None], np.zeros((1, 64, 96), bool)
    carried = flat(0)[None], none
    assert (composite(frames, *carried) == frames).all() and (match_colours(frames, *carried) == frames).all()


def test_inpainting_touches_holes_alone():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    holes = np.zeros((20, 30), bool)
    np.testing.assert_array_equal(fill_holes(picture, holes), picture)
    np.testing.assert_array_equal(fill_holes(picture, ~holes), picture)
    holes[5:9, 5:9] = True
    filled = fill_holes(picture, holes)
    np.testing.assert_array_equal(filled[~holes], picture[~holes])
    flat = np.full_like(picture, 77)
    flat[holes] = 0
    np.testing.assert_allclose(fill_holes(flat, holes), 77, atol=3)
