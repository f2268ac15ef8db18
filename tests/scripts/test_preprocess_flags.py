"""Flags of preprocess.py: sizes that follow from one another, cameras, and the path for nerfstudio's viewer."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

import preprocess
from models.weights import load_preset
from sag_generate_anchor_view import anchor_size
from tests.scene.preprocess_common import BOXES, SMALL, run_main, write_boxes, write_path
from utils.cameras.read import read_cameras
from utils.cli import InputError
from utils.layout import Scene, fit_sizes, same_aspect
from utils.particles import elements_per_cell

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])

Size = tuple[int, int]


@pytest.mark.parametrize(
    ("edges", "maps", "latents"),
    [
        ((1080, 720), (360, 240), (90, 60)),
        ((1081, 720), (360, 240), (90, 60)),
        ((108, 72), (360, 240), (90, 60)),
        ((1280, 720), (384, 216), (96, 54)),
        ((1920, 1080), (384, 216), (96, 54)),
        ((720, 1280), (216, 384), (54, 96)),
        ((1024, 1024), (296, 296), (74, 74)),
        ((832, 480), (416, 240), (104, 60)),
    ],
)
def test_maps_and_latents_follow_from_the_edges(edges: Size, maps: Size, latents: Size) -> None:
    assert fit_sizes(edges) == (maps, latents)
    assert fit_sizes(edges, maps) == (maps, latents) == fit_sizes(edges, None, latents)


def test_any_size_has_maps_of_its_aspect_and_even_latents() -> None:
    for edges in np.random.default_rng(0).integers(64, 4000, (500, 2)).tolist():
        maps, latents = fit_sizes(edges)
        assert same_aspect(edges, maps) and elements_per_cell(maps, latents) == 4
        assert latents[0] % 2 == latents[1] % 2 == 0


def test_what_is_given_stays() -> None:
    assert fit_sizes((1080, 720), (720, 480)) == ((720, 480), (90, 60))
    assert fit_sizes((1080, 720), (180, 120)) == ((180, 120), (90, 60))
    assert fit_sizes((1280, 720), (320, 180)) == ((320, 180), (64, 36))
    assert fit_sizes((1080, 720), None, (45, 30)) == ((360, 240), (45, 30))
    assert fit_sizes((1080, 720), None, (48, 32)) == ((192, 128), (48, 32))
    assert fit_sizes((1280, 720), None, (80, 45)) == ((320, 180), (80, 45))
    assert fit_sizes((1280, 720), (300, 200), (75, 50)) == ((300, 200), (75, 50))


@pytest.mark.parametrize(
    ("edges", "maps", "latents", "telling"),
    [
        ((1280, 720), (360, 240), None, "maps of 384x216 and latents of 96x54 fit"),
        ((1280, 720), (384, 216), (90, 60), "96x54 does, for a video of 768x432"),
        ((1280, 8), None, None, "at least 16 pixels"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(edges: Size, maps: Size, latents: Size, telling: str) -> None:
    with pytest.raises(InputError, match=telling):
        preprocess.choose_sizes(argparse.Namespace(edge_size=edges, map_size=maps, latent_size=latents))


def test_sizes_that_follow_are_said(capsys) -> None:
    args = argparse.Namespace(edge_size=(720, 1280), map_size=None, latent_size=None)
    preprocess.choose_sizes(args)
    assert (args.map_size, args.latent_size) == ((216, 384), (54, 96))
    assert "maps of 216x384 and latents of 54x96, for a video of 432x768" in capsys.readouterr().out
    args = argparse.Namespace(edge_size=(1080, 720), map_size=None, latent_size=None)
    preprocess.choose_sizes(args)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("edges", "full"),
    [
        ((1080, 720), (1072, 720)),
        ((1280, 720), (1280, 720)),
        ((1920, 1080), (1920, 1072)),
        ((720, 1280), (720, 1280)),
        ((1024, 1024), (1024, 1024)),
        ((832, 480), (832, 480)),
    ],
)
def test_anchors_have_the_edges_aspect_or_a_note(edges: Size, full: Size, capsys) -> None:
    scene = Scene(Path("town"), (), edges, fit_sizes(edges)[0])
    args = argparse.Namespace(width=None, height=None)
    assert anchor_size(args, load_preset("full"), scene) == full and not capsys.readouterr().err
    assert anchor_size(args, load_preset("tiny"), scene) == (144, 96)
    assert ("stretch" in capsys.readouterr().err) == (edges != (1080, 720))


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    return write_boxes(tmp_path / "boxes.glb", *BOXES, up="y"), write_path(tmp_path / "cameras.json")


def test_a_camera_path_for_the_viewer(monkeypatch, tmp_path: Path, inputs: tuple[Path, Path], capsys) -> None:
    scene, cameras = inputs
    out, written = tmp_path / "out", tmp_path / "camera_paths" / "walk.json"
    command = ("--scene", scene, "--cameras", cameras, "--output", out, *SMALL, "--write_camera_path", written)
    assert run_main(monkeypatch, *command) == 0
    used, back = read_cameras(out / "cameras.json"), read_cameras(written)
    assert (back.size, back.fps, back.up) == (used.size, used.fps, used.up)
    for name in ("c2w", "focal", "center"):
        np.testing.assert_allclose(getattr(back, name), getattr(used, name), rtol=0, atol=1e-6)
    first = written.read_bytes()
    written.unlink()
    assert run_main(monkeypatch, *command) == 0 and written.read_bytes() == first  # a finished run writes it, too
    for other in (scene, cameras, out / "cameras.json", out):
        assert run_main(monkeypatch, *command[:-1], other) == 2
        assert "name another file" in capsys.readouterr().err


def test_axes_that_look_wrong_are_named_with_the_flag(
    monkeypatch, tmp_path: Path, inputs: tuple[Path, Path], capsys
) -> None:
    scene, cameras = inputs
    right = read_cameras(cameras)
    data = json.loads(cameras.read_text())
    for frame in data["frames"]:
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ FLIP).tolist()
    cameras.write_text(json.dumps(data))
    command = ("--scene", scene, "--cameras", cameras, *SMALL, "--output")
    assert run_main(monkeypatch, *command, tmp_path / "a") == 0
    assert "--camera_axes opencv" in capsys.readouterr().err
    assert run_main(monkeypatch, *command, tmp_path / "b", "--camera_axes", "opencv") == 0
    assert "camera_axes" not in capsys.readouterr().err
    np.testing.assert_array_equal(read_cameras(tmp_path / "b" / "cameras.json").c2w, right.c2w)


def test_flags_of_cameras_need_cameras(monkeypatch, tmp_path: Path, inputs: tuple[Path, Path], capsys) -> None:
    command = ("--scene", inputs[0], "--path", "orbit", "--output", tmp_path / "out", *SMALL)
    for flags in (("--fov", 40), ("--camera_axes", "opencv"), ("--cameras_up", "z")):
        assert run_main(monkeypatch, *command, *flags) == 2
        assert "not with --path" in capsys.readouterr().err
