"""Soft edges: where lines lie, how wide they are, what counts as an edge, and what the command refuses."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.support.helpers import ROOT
from utils.cli import InputError
from utils.edges import check_edge_detector, edge_detector, hed_edges, resize_edges, scribble, soft_edges

BACKGROUND, SQUARE = (90, 110, 140), (200, 180, 120)


def square(width: int, height: int) -> np.ndarray:
    """A rectangle over the middle half of the picture; its sides lie at one and three quarters of each axis."""
    image = np.full((height, width, 3), BACKGROUND, np.uint8)
    image[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = SQUARE
    return image


def town(width: int, height: int) -> np.ndarray:
    """A small picture with lines in many directions: sky, a hill, a house with windows, a textured ground."""
    image = np.full((height * 4, width * 4, 3), (150, 190, 230), np.uint8)
    unit = np.array([width, height]) * 4
    shapes = [
        ([(0, 0.5), (0.4, 0.2), (0.9, 0.55), (0, 0.55)], (90, 130, 90)),
        ([(0, 0.7), (1, 0.62), (1, 1), (0, 1)], (170, 160, 130)),
        ([(0.3, 0.4), (0.7, 0.35), (0.7, 0.8), (0.3, 0.75)], (210, 200, 190)),
        ([(0.26, 0.42), (0.5, 0.15), (0.75, 0.37)], (150, 70, 60)),
        ([(0.4, 0.5), (0.5, 0.49), (0.5, 0.6), (0.4, 0.6)], (40, 50, 70)),
    ]
    for corners, colour in shapes:
        cv2.fillPoly(image, [(np.array(corners) * unit).astype(np.int32)], colour)
    ground = image[height * 3 :]
    grain = np.random.default_rng(0).integers(-20, 20, ground.shape)
    ground[:] = np.clip(ground + grain, 0, 255)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def lines_across(values: np.ndarray) -> list[tuple[float, int]]:
    """(centre, width) of every run above 127 in a row or column, in pixels with the origin at the outer corner."""
    inside = np.flatnonzero(values > 127)
    runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    return [(float(run.mean()) + 0.5, len(run)) for run in runs if len(run)]


@pytest.mark.parametrize(
    ("width", "height", "thin", "thick"), [(1080, 720, 3, 8), (2048, 1024, 6, 16), (144, 96, 1, 2), (64, 64, 1, 2)]
)
def test_lines_lie_on_the_sides_of_a_square(width: int, height: int, thin: int, thick: int) -> None:
    edges = soft_edges(square(width, height))
    assert edges.shape == (height, width, 3)
    assert edges.dtype == np.uint8
    assert (edges == edges[..., :1]).all()
    for values, length in ((edges[height // 2, :, 0], width), (edges[:, width // 2, 0], height)):
        found = lines_across(values)
        assert [centre for centre, _ in found] == pytest.approx([length / 4, length * 3 / 4], abs=1)
        assert all(thin <= line_width <= thick for _, line_width in found)


def test_outline_is_closed_and_bright() -> None:
    edges = soft_edges(square(540, 360))[..., 0]
    regions, _ = cv2.connectedComponents((edges <= 127).astype(np.uint8), connectivity=4)
    assert regions - 1 == 2  # inside and outside do not touch
    assert (edges.max(axis=1)[90:270] > 240).all()


def test_slanted_lines_are_as_bright_as_upright_ones() -> None:
    image = np.full((360, 540, 3), BACKGROUND, np.uint8)
    cv2.fillPoly(image, [np.array([(270, 60), (390, 180), (270, 300), (150, 180)])], SQUARE)
    edges = soft_edges(image)[..., 0]
    assert (edges.max(axis=1)[80:280] > 240).all()


def test_colours_of_one_brightness_have_an_edge() -> None:
    lab = np.full((240, 360, 3), (60, 30, 0), np.float32)
    lab[:, 180:, 1] = -30
    image = np.round(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB) * 255).astype(np.uint8)
    [(centre, _)] = lines_across(soft_edges(image)[120, :, 0])
    assert centre == pytest.approx(180, abs=1)


def test_thin_line_is_drawn_once() -> None:
    image = np.full((720, 1080, 3), BACKGROUND, np.uint8)
    image[359:361] = 255
    assert lines_across(soft_edges(image)[:, 540, 0]) == [(360, pytest.approx(5, abs=3))]


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 90)])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (96, 144), (300, 1200)])
def test_one_colour_is_black(colour: tuple[int, int, int], size: tuple[int, int]) -> None:
    assert not soft_edges(np.full((*size, 3), colour, np.uint8)).any()


@pytest.mark.parametrize(("width", "height"), [(144, 96), (540, 360), (1080, 720)])
def test_noise_does_not_fill_the_picture(width: int, height: int) -> None:
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 3))
    flat = soft_edges(np.clip(120 + noise, 0, 255).astype(np.uint8))
    assert (flat > 127).mean() < 0.005
    clean, noisy = soft_edges(square(width, height)), soft_edges((square(width, height) + noise).astype(np.uint8))
    assert (noisy > 127).mean() == pytest.approx((clean > 127).mean(), rel=0.15)


def test_fine_texture_is_weaker_than_an_outline() -> None:
    image = square(720, 480)
    rng = np.random.default_rng(0)
    inside = image[120:360, 180:540]
    inside[:] = np.clip(inside + rng.choice([-25, 25], (120, 180, 1)).repeat(2, 0).repeat(2, 1), 0, 255)
    edges = soft_edges(image)[..., 0]
    assert (edges[130:350, 190:530] > 127).mean() < 0.03
    assert edges[240, 177:184].max() > 200


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(144, 96), (360, 240), (1300, 700)])
def test_mirrored_image_gives_mirrored_edges(width: int, height: int) -> None:
    image = town(width, height)
    edges = soft_edges(image).astype(int)
    assert 0.02 < (edges > 127).mean() < 0.2
    for mirror in (np.s_[:, ::-1], np.s_[::-1]):
        mirrored = soft_edges(np.ascontiguousarray(image[mirror])).astype(int)
        assert (np.abs(mirrored - edges[mirror]) > 2).mean() < 1e-3


def test_same_image_gives_the_same_bytes_and_stays_as_it_was() -> None:
    image = town(360, 240)
    before = image.copy()
    assert soft_edges(image).tobytes() == soft_edges(image.copy()).tobytes()
    assert (image == before).all()


def test_resize_is_pillows_default() -> None:
    edges = soft_edges(town(360, 240))
    for width, height in ((720, 480), (144, 96), (360, 240)):
        resized = resize_edges(edges, width, height)
        assert resized.dtype == np.uint8
        assert (resized == np.array(Image.fromarray(edges).resize((width, height)))).all()
        assert (resized == np.array(Image.fromarray(edges).resize((width, height), Image.Resampling.BICUBIC))).all()


@pytest.mark.parametrize("function", [soft_edges, hed_edges, lambda image: resize_edges(image, 8, 8)])
@pytest.mark.parametrize(
    ("image", "offence"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"\(8, 8, 4\)"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
    ],
)
def test_wrong_arrays_are_named(function, image: np.ndarray, offence: str) -> None:
    with pytest.raises(ValueError, match=offence):
        function(image)


def test_detectors_by_name() -> None:
    assert edge_detector("lines") is soft_edges
    for name in ("canny", "", "LINES"):
        with pytest.raises(InputError, match="lines or hed"):
            check_edge_detector(name)


def run_edges(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run the command in a Python that cannot import controlnet_aux, unless the folder `path` holds one."""
    hide = "" if path else "sys.modules['controlnet_aux'] = None; "
    code = f"import sys, runpy; {hide}runpy.run_module('utils.edges', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_command_writes_the_edges(tmp_path: Path) -> None:
    image = town(144, 96)
    Image.fromarray(image).save(tmp_path / "town.png")
    output = tmp_path / "new" / "edges.png"
    command = [sys.executable, "-m", "utils.edges", str(tmp_path / "town.png"), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert (np.array(Image.open(output)) == soft_edges(image)).all()
    assert [path.name for path in output.parent.iterdir()] == ["edges.png"]  # no temporary file is left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "output", "message"),
    [
        ("absent.png", "edges.png", "absent.png does not exist"),
        ("text.png", "edges.png", "cannot be read as an image"),
        ("good.png", "edges.jpg", "must be a file name that ends in .png"),
        ("good.png", "text.png/edges.png", "is not a folder"),
        ("good.png", "good.png", "is the picture itself"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, image: str, output: str, message: str) -> None:
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    done = run_edges(tmp_path / image, tmp_path / output)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_hed_without_its_package(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    done = run_edges(tmp_path / "good.png", tmp_path / "edges.png", "--edges", "hed")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install controlnet_aux" in done.stderr and "--edges lines" in done.stderr
    assert not (tmp_path / "edges.png").exists()


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("brightness", [255, 120])
def test_scribble_is_a_thin_dark_line_in_the_middle_of_a_soft_one(width: int, brightness: int) -> None:
    edges = np.zeros((48, 64, 3), np.uint8)
    edges[:, 30 : 30 + width] = brightness
    drawn = scribble(edges)
    assert drawn.shape == edges.shape and drawn.dtype == np.uint8 and (drawn == drawn[..., :1]).all()
    row = 255 - drawn[24, :, 0].astype(float)
    assert (row @ np.arange(64)) / row.sum() == pytest.approx(30 + (width - 1) / 2, abs=0.1)
    assert 0.5 * brightness < row.max() <= brightness + 1
    assert (row > row.max() / 2).sum() <= 2
    assert (row[:27] == 0).all() and (row[34 + width :] == 0).all()


def test_scribble_of_nothing_is_white() -> None:
    assert (scribble(np.zeros((16, 16, 3), np.uint8)) == 255).all()


STAND_IN = """
from PIL import Image
class HEDdetector:
    @classmethod
    def from_pretrained(cls, name):
        if {broken}:
            raise OSError("no network")
        assert name == "lllyasviel/Annotators"
        return lambda image: Image.new("RGB", (64, 128), (10, 200, 30))
"""


@pytest.mark.parametrize("broken", [False, True])
def test_hed_with_a_stand_in_for_its_package(tmp_path: Path, broken: bool) -> None:
    (tmp_path / "controlnet_aux.py").write_text(STAND_IN.format(broken=broken))
    Image.new("RGB", (30, 20)).save(tmp_path / "good.png")
    done = run_edges(tmp_path / "good.png", tmp_path / "edges.png", "--edges", "hed", path=tmp_path)
    if broken:
        assert done.returncode == 2
        assert "no network" in done.stderr and "--edges lines" in done.stderr
    else:
        assert done.returncode == 0
        edges = np.array(Image.open(tmp_path / "edges.png"))
        assert edges.shape == (20, 30, 3) and (edges == (10, 200, 30)).all()
