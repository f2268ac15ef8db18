"""Noise warping: every frame is white for any map, the noise follows the maps, files are whole or refused."""

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.scenes import make_scene, pan_map
from utils.cli import InputError
from utils.correspondence import read_map, source_positions
from utils.layout import Arc, load_scene
from utils.noise import arc_noise, blend_noise, load_or_make_noise
from utils.particles import elements_per_cell, warp_noise

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT.parent / "shared" / "data" / "sampleA"
SMALL = (18, 12)  # latent size that divides the 72x48 maps of make_scene
LATENT, MAP = (90, 60), (360, 240)
CENTRES = np.stack(np.indices(MAP[::-1])[::-1], axis=-1) + 0.5
EVERYWHERE = np.ones(MAP[::-1], bool)


# The statistics


def cell_sources(correspondences: list, earlier: int, later: int, latent_size: tuple[int, int]):
    """Where the elements of each latent cell of frame `later` come from in frame `earlier`.

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
    """Measured correlation with the noise `lag` frames before, as a share of what an exact integral would have.

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
    """Maps that no camera would make, and a few that one might: name -> (positions, valid)."""
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


# Every frame is white


@pytest.mark.parametrize("name", HARD_MAPS)
def test_white_for_any_map(name: str):
    assert_white(warp_noise([HARD_MAPS[name]] * 3, LATENT, seed=1))


def test_white_after_different_maps_in_turn():
    assert_white(warp_noise(list(HARD_MAPS.values()), LATENT, seed=2))


def test_covariance_is_the_identity():
    # Channels are independent samples of the same plan: with many of them the whole covariance can be looked at.
    rng = np.random.default_rng(0)
    maps = [(rng.uniform(-1, 13, (12, 12, 2)), rng.random((12, 12)) < 0.8) for _ in range(4)]
    noise = warp_noise(maps, (6, 6), seed=0, channels=40_000)
    for frame in noise.reshape(5, 36, -1):
        assert np.abs(frame @ frame.T / frame.shape[1] - np.eye(36)).max() < 0.035  # 5 sigma for the variances
    lag = noise[3].reshape(36, -1) @ noise[4].reshape(36, -1).T / 40_000
    assert np.linalg.svd(lag, compute_uv=False).max() < 1.05  # never more than fully correlated with the frame before


# It follows the maps


def test_identity_keeps_the_noise():
    noise = warp_noise([(CENTRES, EVERYWHERE)] * 3, LATENT, seed=0)
    assert all(np.array_equal(noise[0], later) for later in noise[1:])


def test_whole_cell_pan_shifts_the_noise():
    noise = warp_noise([pan_map(MAP, np.array([4, 8]))], LATENT, seed=0)
    # Cells on the border also take in a little of what has just left the frame.
    np.testing.assert_allclose(noise[1, 1:-2, 1:-1], noise[0, 3:, 2:], rtol=1e-5, atol=1e-6)


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


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the published example is not here")
@pytest.mark.parametrize("index", range(3))
def test_follows_a_real_camera(index: int):
    arc = Arc(index, SAMPLE / f"arc{index}")
    noise = arc_noise(arc, LATENT)
    maps = [source_positions(read_map(path)) for path in arc.corres_paths]
    assert tracking(maps, noise, lag=1) >= 0.94
    assert tracking(maps, noise, lag=4) >= 0.88
    assert_white(noise)


# Seeds and sizes


def test_seed_fixes_every_byte():
    maps = [HARD_MAPS["random everything"], HARD_MAPS["zoom out 1.1"]]
    noise = warp_noise(maps, LATENT, seed=[3, 1])
    assert noise.dtype == np.float32 and noise.shape == (3, 60, 90, 16)
    assert noise.tobytes() == warp_noise(maps, LATENT, seed=[3, 1]).tobytes()
    assert abs((noise * warp_noise(maps, LATENT, seed=[3, 2])).mean()) < 0.02


def test_arcs_and_seeds_have_their_own_noise(tmp_path: Path):
    arcs = load_scene(make_scene(tmp_path, num_arcs=2)).arcs
    noises = [arc_noise(arc, SMALL, seed) for arc in arcs for seed in (0, 1)]
    assert noises[0].shape == (13, 12, 18, 16)
    correlation = np.corrcoef([noise.ravel() for noise in noises]) - np.eye(4)
    assert np.abs(correlation).max() < 0.05


def test_every_size_that_divides_the_map():
    maps = [pan_map((72, 48), np.array([1.0, 0.0]))]
    assert elements_per_cell((360, 240), (18, 12)) == 20
    for latent_size in ((72, 48), (36, 24), (9, 6), (3, 2)):
        assert warp_noise(maps, latent_size, seed=0).shape == (2, *latent_size[::-1], 16)


@pytest.mark.parametrize("latent_size", [(70, 60), (90, 80), (180, 60), (720, 480), (91, 61)])
def test_other_sizes_are_refused_with_the_numbers(latent_size: tuple[int, int]):
    with pytest.raises(InputError, match=rf"{latent_size[0]}x{latent_size[1]} .* 360x240"):
        warp_noise([(CENTRES, EVERYWHERE)], latent_size, seed=0)


def test_maps_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(48, 72\)"):
        warp_noise([(CENTRES, EVERYWHERE), pan_map((72, 48), np.zeros(2))], LATENT, seed=0)
    with pytest.raises(ValueError, match="at least one"):
        warp_noise([], LATENT, seed=0)


# Mixing


def test_blend_keeps_the_variance():
    warped, fresh = np.random.default_rng(0).standard_normal((2, 1_000_000), dtype=np.float32)
    assert np.array_equal(blend_noise(warped, fresh, 0.0), warped)
    assert np.array_equal(blend_noise(warped, fresh, 1.0), fresh)
    for alpha in (0.2, 0.5, 0.8):
        mixed = blend_noise(warped, fresh, alpha)
        assert mixed.dtype == np.float32
        assert abs(mixed.var() - 1) < 0.01
        assert abs((mixed * fresh).mean() - alpha / np.hypot(alpha, 1 - alpha)) < 0.01
    with pytest.raises(ValueError, match="shape"):
        blend_noise(warped[:10], fresh, 0.5)
    with pytest.raises(ValueError, match="alpha"):
        blend_noise(warped, fresh, 1.5)


def test_blend_takes_tensors():
    torch = pytest.importorskip("torch")
    warped, fresh = np.random.default_rng(0).standard_normal((2, 100), dtype=np.float32)
    mixed = blend_noise(torch.from_numpy(warped), torch.from_numpy(fresh), 0.5)
    assert mixed.dtype == torch.float32
    np.testing.assert_allclose(mixed.numpy(), blend_noise(warped, fresh, 0.5), rtol=1e-6)
    half = blend_noise(torch.from_numpy(warped).bfloat16(), torch.from_numpy(fresh).bfloat16(), 0.5)
    assert half.dtype == torch.bfloat16


# Files


@pytest.fixture
def arc(tmp_path: Path) -> Arc:
    return load_scene(make_scene(tmp_path / "scene")).arcs[0]


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_made_once_then_read(arc: Arc):
    made = load_or_make_noise(arc, SMALL, seed=5)
    assert np.array_equal(made, arc_noise(arc, SMALL, seed=5))
    assert files_in(arc.folder) == {"hed", "corres", "corres_end.png", "noises_18x12.npy"}
    assert np.array_equal(np.load(arc.noise_path(SMALL), allow_pickle=False), made)
    other = -made
    np.save(arc.noise_path(SMALL), other)
    assert np.array_equal(load_or_make_noise(arc, SMALL), other)


def broken_files() -> dict:
    good = np.zeros((13, 12, 18, 16), np.float32)
    nan, infinite = good.copy(), good.copy()
    nan[3, 2, 1, 0], infinite[-1] = np.nan, np.inf
    return {
        "nan": (nan, "not finite"),
        "infinite": (infinite, "not finite"),
        "one frame less": (good[:12], r"float32 \[12, 12, 18, 16\].*float32 \[13, 12, 18, 16\] is needed"),
        "channels first": (good.transpose(0, 3, 1, 2), r"\[13, 16, 12, 18\]"),
        "float64": (good.astype(np.float64), "float64"),
        "big-endian": (good.astype(">f4"), ">f4"),
        "objects": (np.array([{"a": 1}], dtype=object), "cannot be read"),
        "pickled": (pickle.dumps(good), "cannot be read"),
        "truncated": (good.tobytes()[:1000], "cannot be read"),
        "zip": (b"PK\x03\x04 and no more", "cannot be read"),
        "empty": (b"", "cannot be read"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_refused(arc: Arc, name: str):
    content, message = broken_files()[name]
    path = arc.noise_path(SMALL)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    stored = path.read_bytes()
    with pytest.raises(InputError, match=message) as refusal:
        load_or_make_noise(arc, SMALL)
    assert str(path) in str(refusal.value) and "--overwrite" in str(refusal.value)
    assert path.read_bytes() == stored


def test_read_only_folder_keeps_the_noise_in_memory(arc: Arc):
    arc.folder.chmod(0o555)
    try:
        noise = load_or_make_noise(arc, SMALL, seed=1)
    finally:
        arc.folder.chmod(0o755)
    assert np.array_equal(noise, arc_noise(arc, SMALL, seed=1))
    assert not arc.noise_path(SMALL).exists()


def test_interrupted_write_leaves_nothing(arc: Arc, monkeypatch: pytest.MonkeyPatch):
    before = files_in(arc.folder)

    def interrupt(file, array, **options):
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_or_make_noise(arc, SMALL)
    assert files_in(arc.folder) == before


# The command


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "utils.noise", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def test_command_makes_keeps_and_overwrites(tmp_path: Path):
    scene = make_scene(tmp_path, num_arcs=2)
    paths = [scene / f"arc{i}" / "noises_18x12.npy" for i in range(2)]
    first = command(scene, "--latent_size", "18x12")
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines() == [str(path) for path in paths]
    made = [path.read_bytes() for path in paths]
    assert np.array_equal(np.load(paths[1]), arc_noise(Arc(1, scene / "arc1"), SMALL, seed=0))

    paths[1].unlink()
    second = command(scene, "--latent_size", "18x12", "--seed", 3)
    assert second.returncode == 0 and second.stdout == first.stdout
    assert "kept" in second.stderr and str(paths[0]) in second.stderr and str(paths[1]) not in second.stderr
    assert paths[0].read_bytes() == made[0] and paths[1].read_bytes() != made[1]

    paths[0].write_bytes(b"nonsense")
    refused = command(scene, "--latent_size", "18x12")
    assert refused.returncode == 2 and refused.stdout == "" and len(refused.stderr.splitlines()) == 1
    assert str(paths[0]) in refused.stderr

    third = command(scene, "--latent_size", "18x12", "--overwrite")
    assert (third.returncode, third.stdout) == (0, first.stdout)
    assert [path.read_bytes() for path in paths] == made


def test_command_refuses_in_one_line(arc: Arc, tmp_path: Path):
    before = files_in(arc.folder)
    wrong_size = command(arc.folder.parent)  # 90x60 does not divide 72x48
    assert wrong_size.returncode == 2 and "90x60" in wrong_size.stderr and "72x48" in wrong_size.stderr
    missing = command(tmp_path / "nowhere")
    assert missing.returncode == 2 and "nowhere" in missing.stderr
    arc.folder.chmod(0o555)
    read_only = command(arc.folder.parent, "--latent_size", "18x12")
    arc.folder.chmod(0o755)
    assert read_only.returncode == 2 and "read-only" in read_only.stderr
    for refused in (wrong_size, missing, read_only):
        assert refused.stdout == "" and len(refused.stderr.splitlines()) == 1
    assert files_in(arc.folder) == before


def test_failing_disk_leaves_nothing(arc: Arc):
    before = files_in(arc.folder)

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    failed = command(arc.folder.parent, "--latent_size", "18x12", preexec_fn=small_files_only)
    assert failed.returncode == 3 and failed.stdout == "" and len(failed.stderr.splitlines()) == 1
    assert files_in(arc.folder) == before


def test_help_and_light_imports():
    shown = command("--help")
    assert shown.returncode == 0
    for words in ("--latent_size", "latent cells", "(default: 90x60)", "--seed", "--overwrite", "noises_18x12.npy"):
        assert words in shown.stdout
    check = "import sys, utils.noise; sys.exit(bool({'torch', 'diffusers', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, env={**os.environ}).returncode == 0
