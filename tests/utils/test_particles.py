"""Warped noise is Gaussian and white, and follows the correspondences."""

import numpy as np
import pytest

from tests.support.helpers import ROOT
from tests.support.scenes import pan_map
from tests.utils.noise_common import CENTRES, EVERYWHERE, LATENT, MAP
from utils.correspondence import read_map, source_positions
from utils.layout import Arc
from utils.noise import arc_noise
from utils.particles import warp_noise

SAMPLE = ROOT.parent / "shared" / "data" / "sampleA"


def cell_sources(correspondences: list, earlier: int, later: int, latent_size: tuple[int, int]):
    """Sources in frame `earlier` of the elements of each latent cell of frame `later`.

    Returns (position [cells, S rows, S columns, 2] in latent cells of the earlier frame; usable bool [cells]).
    """
    (height, width), (w, h) = correspondences[0][1].shape, latent_size
    scale = width // w
    position, valid = correspondences[later - 1]
    position = np.where(valid[..., None], position, 0)
    for step, step_valid in correspondences[earlier : later - 1][::-1]:
        x, y = np.clip(position - 0.5, 0, [width - 2, height - 2]).astype(int).transpose(2, 0, 1)
        right, down = np.moveaxis(position - 0.5 - np.stack([x, y], axis=-1), -1, 0)[..., None]
        corners = [(y + dy, x + dx) for dy in (0, 1) for dx in (0, 1)]
        a, b, c, d = (step[corner] for corner in corners)
        torn = np.ptp([a, b, c, d], axis=0).max(-1) >= 4
        valid = valid & np.all([step_valid[corner] for corner in corners], axis=0) & ~torn
        position = (a * (1 - right) + b * right) * (1 - down) + (c * (1 - right) + d * right) * down
        position = np.where(valid[..., None], position, 0)
    valid = valid & (position >= 0).all(-1) & (position < [width, height]).all(-1)
    position = (position / scale).reshape(h, scale, w, scale, 2).swapaxes(1, 2).reshape(h * w, scale, scale, 2)
    return position, valid.reshape(h, scale, w, scale).all((1, 3)).ravel()


def tracking(correspondences: list, noise: np.ndarray, lag: int, first: int = 0) -> float:
    """Measured correlation with the noise `lag` frames before, as a share of an exact integral's.

    A cell whose footprint has shares c_s of the earlier cells s and the area J would have the correlation
    sqrt(J sum(c²)) with the mix of their noise. Cells torn by a discontinuity, or partly hidden, do not count.
    """
    _, h, w, channels = noise.shape
    measured, ideal = 0.0, 0.0
    for later in range(first + lag, len(noise)):
        position, usable = cell_sources(correspondences, later - lag, later, (w, h))
        scale = position.shape[1]
        ramp = (np.arange(scale) + 0.5) / scale - 0.5
        right = (position * ramp[:, None]).mean((1, 2)) / (ramp**2).mean()  # least-squares slopes over the cell
        down = (position * ramp[:, None, None]).mean((1, 2)) / (ramp**2).mean()
        area = right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0]
        spread = np.ptp(position, axis=(1, 2)).max(-1)
        usable &= (area > 0.05) & (spread < 3.5 * np.sqrt(np.maximum(area, 0.05))) & (spread < 6)
        x, y = np.floor(position[usable]).astype(int).reshape(-1, scale**2, 2).transpose(2, 0, 1)
        source = y * w + x
        share = (source[:, :, None] == source[:, None]).mean((1, 2))  # sum(c²)
        carried = noise[later - lag].reshape(h * w, channels)[source].mean(1) / np.sqrt(share)[:, None]
        measured += (carried * noise[later].reshape(h * w, channels)[usable]).mean(-1).sum()
        ideal += np.minimum(np.sqrt(share * area[usable]), 1).sum()
    return measured / ideal


def assert_white(noise: np.ndarray) -> None:
    """Every frame: zero mean, variance within 2 %, autocorrelation below .02 up to two cells away."""
    for frame in noise.astype(np.float64):
        h, w, _ = frame.shape
        assert abs(frame.mean()) < 0.02
        assert abs(frame.var() - 1) < 0.02
        for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 1), (1, 2), (2, 2)):
            assert abs((frame[dy:, dx:] * frame[: h - dy, : w - dx]).mean()) < 0.02, (dy, dx)


def zoom(factor: float) -> np.ndarray:
    """Positions of a picture that is magnified by `factor` about its middle."""
    middle = np.array(MAP) / 2
    return (CENTRES - middle) / factor + middle


def hard_maps() -> dict:
    """Maps that no camera gives, and a few that one might: name -> (positions, valid)."""
    rng = np.random.default_rng(7)
    anywhere = rng.uniform(-0.1, 1.1, CENTRES.shape) * MAP
    fold = CENTRES.copy()
    fold[..., 0] = abs(fold[..., 0] - 180)
    broken = CENTRES + 0.3
    broken[rng.random(EVERYWHERE.shape) < 0.2] = np.nan
    broken[rng.random(EVERYWHERE.shape) < 0.2] = [np.inf, -np.inf]
    return {
        "random positions": (anywhere, EVERYWHERE),
        "random mask": (CENTRES + 0.7, rng.random(EVERYWHERE.shape) < 0.5),
        "random everything": (anywhere, rng.random(EVERYWHERE.shape) < 0.3),
        "fold": (fold, EVERYWHERE),
        "zoom in 3": (zoom(3), EVERYWHERE),
        "zoom in 1.1": (zoom(1.1), EVERYWHERE),
        "zoom out 1.1": (zoom(1 / 1.1), EVERYWHERE),
        "zoom out 5": (zoom(0.2), EVERYWHERE),
        "jitter": (CENTRES + rng.normal(0, 1.5, CENTRES.shape), EVERYWHERE),
        "one point": (np.full(CENTRES.shape, 100.5), EVERYWHERE),
        "one valid element": (CENTRES, CENTRES.sum(-1) == CENTRES.sum(-1).min()),
        "not finite": (broken, EVERYWHERE),
    }


HARD_MAPS = hard_maps()


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD_MAPS)
def test_white_for_any_map(name: str):
    assert_white(warp_noise([HARD_MAPS[name]] * 3, LATENT, seed=1))


@pytest.mark.slow
def test_white_after_different_maps_in_turn():
    assert_white(warp_noise(list(HARD_MAPS.values()), LATENT, seed=2))


def test_covariance_is_the_identity():
    # Channels are independent samples of the same plan: with many of them the whole covariance can be tested.
    rng = np.random.default_rng(0)
    maps = [(rng.uniform(-1, 13, (12, 12, 2)), rng.random((12, 12)) < 0.8) for _ in range(4)]
    noise = warp_noise(maps, (6, 6), seed=0, channels=40_000)
    for frame in noise.reshape(5, 36, -1):
        assert np.abs(frame @ frame.T / frame.shape[1] - np.eye(36)).max() < 0.035  # 5 sigma for the variances
    lag = noise[3].reshape(36, -1) @ noise[4].reshape(36, -1).T / 40_000
    assert np.linalg.svd(lag, compute_uv=False).max() < 1.05  # never more than fully correlated with the frame before


def test_identity_keeps_the_noise():
    noise = warp_noise([(CENTRES, EVERYWHERE)] * 3, LATENT, seed=0)
    assert all(np.array_equal(noise[0], later) for later in noise[1:])


def test_whole_cell_pan_shifts_the_noise():
    noise = warp_noise([pan_map(MAP, np.array([4, 8]))], LATENT, seed=0)
    # Cells on the border also receive a little of the noise that has just left the frame.
    np.testing.assert_allclose(noise[1, 1:-2, 1:-1], noise[0, 3:, 2:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [(1.3, 0.4), (-2.21, 1.63), (0.2, -0.9)])
def test_twelve_step_pan_keeps_the_noise(shift: tuple[float, float]):
    maps = [pan_map(MAP, np.array(shift))] * 12
    assert tracking(maps, warp_noise(maps, LATENT, seed=0), lag=12) > 0.9


@pytest.mark.parametrize("factor", [0.8, 0.97, 1.03, 1.25])
def test_one_step_zoom_follows(factor: float):
    maps = [(zoom(factor), EVERYWHERE)] * 2
    assert tracking(maps, warp_noise(maps, LATENT, seed=0), lag=1) > 0.9


def test_nothing_valid_is_fresh_noise():
    noise = warp_noise([(CENTRES, ~EVERYWHERE)] * 2, LATENT, seed=0)
    assert_white(noise)
    assert abs((noise[0] * noise[1]).mean()) < 0.02
    assert abs((noise[1] * noise[2]).mean()) < 0.02


def test_disoccluded_cells_are_fresh_and_the_others_stay():
    valid = CENTRES[..., 0] >= 180
    before, after = warp_noise([(CENTRES, valid)], LATENT, seed=0)
    assert abs((before[:, :45] * after[:, :45]).mean()) < 0.02
    np.testing.assert_allclose(after[:, 46:], before[:, 46:], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the published example is not here")
@pytest.mark.parametrize("index", range(3))
def test_follows_a_real_camera(index: int):
    arc = Arc(index, SAMPLE / f"arc{index}")
    noise = arc_noise(arc, LATENT)
    maps = [source_positions(read_map(path)) for path in arc.corres_paths]
    assert tracking(maps, noise, lag=1) >= 0.94
    assert tracking(maps, noise, lag=4) >= 0.88
    assert_white(noise)


def test_seed_fixes_every_byte():
    maps = [HARD_MAPS["random everything"], HARD_MAPS["zoom out 1.1"]]
    noise = warp_noise(maps, LATENT, seed=[3, 1])
    assert noise.dtype == np.float32 and noise.shape == (3, 60, 90, 16)
    assert noise.tobytes() == warp_noise(maps, LATENT, seed=[3, 1]).tobytes()
    assert abs((noise * warp_noise(maps, LATENT, seed=[3, 2])).mean()) < 0.02
