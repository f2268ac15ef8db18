"""Noise files and the command that makes them."""

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.helpers import ROOT
from tests.support.scenes import make_scene, pan_map
from tests.utils.noise_common import CENTRES, EVERYWHERE, LATENT
from utils.cli import InputError
from utils.files import write_json
from utils.layout import Arc, load_scene
from utils.noise import arc_noise, blend_noise, load_or_make_noise
from utils.particles import elements_per_cell, warp_noise

SMALL = (18, 12)  # latent size that divides the 72x48 maps of make_scene


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


def test_missing_noise_has_the_seed_of_its_scene(arc: Arc):
    write_json(arc.folder.parent / "preprocess.json", {"arguments": {"seed": 5}})
    made = load_or_make_noise(arc, SMALL)
    assert np.array_equal(made, arc_noise(arc, SMALL, seed=5)) and not np.array_equal(made, arc_noise(arc, SMALL))


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


def command(*arguments: object, **options) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "utils.noise", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.slow
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


@pytest.mark.slow
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
