"""The demo's contact sheet and side-by-side video, from plain pictures in place of generated ones."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from synthetic import demo
from synthetic.demo import MP4_FILE, SHEET_FILE, SHEET_WIDTH, demo_sheet, true_frames
from synthetic.styles import make_style
from tests.support.helpers import ROOT, exit_code, probe_video
from tests.support.scenes import make_scene
from utils.files import write_json
from utils.images import read_image, write_image
from utils.layout import ARC_FRAMES, CAMERAS_FILE, SCENE_FILE, VIDEO_FILE, anchor_path, frame_path, load_scene
from utils.meshes.mesh import build_geometry
from utils.meshes.write import write_glb
from utils.runs import MANIFEST

SAMPLE, BOXTOWN = ROOT / "assets" / "sampleA", ROOT / "assets" / "references" / "boxtown.png"
SIZE = (48, 32)  # width, height
GREEN = (20, 180, 60)


def make_run(folder: Path, num_arcs: int, video: str = "d0.5_e1350_n30") -> Path:
    """A run folder with plain anchors and a finished plain video."""
    plain = np.full((SIZE[1], SIZE[0], 3), GREEN, np.uint8)
    for k in range(num_arcs + 1):
        write_image(anchor_path(folder, k), plain)
    for k in range(num_arcs * ARC_FRAMES):
        write_image(frame_path(folder / video, k), plain)
    (folder / video / VIDEO_FILE).write_bytes(b"a video")  # only its name counts here
    write_json(folder / video / MANIFEST, {"finished": True, "fps": 12})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", 2)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's mesh and path, under small edges."""
    scene = make_scene(tmp_path_factory.mktemp("sheet") / "scene", 2)
    for name in (SCENE_FILE, CAMERAS_FILE):
        shutil.copy(SAMPLE / name, scene / name)
    return scene


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
    return exit_code(demo.main)


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.slow
def test_sheet_and_video_with_and_without_true_frames(monkeypatch, capsys, tmp_path: Path, run: Path, scene: Path):
    """A picture of unknown style has no true frames: two panels instead of three, and a row less."""
    before = files(run)
    assert call(monkeypatch, "--run", run, "--scene", scene, "--reference", BOXTOWN) == 0
    video, sheet = map(Path, capsys.readouterr().out.splitlines())
    assert (video.name, sheet.name) == (MP4_FILE, SHEET_FILE)
    assert files(run) - before == {video.relative_to(run), sheet.relative_to(run)}  # and no temporary file
    metadata, frames = probe_video(video)
    assert frames == 91 and metadata["fps"] == 12
    width, height = metadata["size"]
    assert width == 3 * 432 and height > 288
    known = read_image(sheet)
    assert 0.95 * SHEET_WIDTH <= known.shape[1] <= SHEET_WIDTH
    assert (known == GREEN).all(-1).mean() > 0.3  # three large anchors and a row of frames

    reference = tmp_path / "photo.png"
    shutil.copy(BOXTOWN, reference)
    assert call(monkeypatch, "--run", run, "--scene", scene, "--reference", reference) == 0
    printed = capsys.readouterr()
    assert "no true frames" in printed.err and [video, sheet] == [*map(Path, printed.out.splitlines())]
    assert probe_video(video)[0]["size"][0] == 2 * 432
    assert read_image(sheet).shape[0] < known.shape[0]


def test_true_frames_are_the_sample_in_the_style():
    """Shared frames occur once; the boundary between sky and town lies on drawn edges."""
    style = make_style(200_069)
    frames = true_frames(load_scene(SAMPLE), style, (36, 24))
    assert frames.shape == (91, 24, 36, 3) and frames.dtype == np.uint8
    steps = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    assert (steps > 0).all() and steps.max() < 25  # the camera moves, and never jumps
    assert np.abs(frames[0].astype(float) - frames[-1]).mean() > steps.max()


def test_rows_line_up_with_moments(scene: Path):
    """Column c of the frames' row is the moment that the edges' label names; anchors' moments are among them."""
    frames = np.zeros((91, 16, 24, 3), np.uint8)
    frames[:] = np.arange(91)[:, None, None, None]
    edges = [scene / "arc0" / "hed" / "0001.png"] * 91
    plain = np.zeros((16, 24, 3), np.uint8)
    sheet = demo_sheet(("plain", plain), [plain] * 3, edges, frames, None)
    cell = SHEET_WIDTH // 9
    middles = sheet[-cell // 3, cell // 2 :: cell][:9, 0]
    assert middles.tolist() == [0, 11, 22, 34, 45, 56, 68, 79, 90]
    for arcs, columns in ((1, 9), (3, 10), (12, 13)):
        sheet = demo_sheet(("plain", plain), [plain] * (arcs + 1), edges[:1] * (45 * arcs + 1),
                           np.zeros((45 * arcs + 1, 16, 24, 3), np.uint8), None)  # fmt: skip
        assert sheet.shape[1] <= SHEET_WIDTH and sheet.shape[1] > 0.9 * SHEET_WIDTH
        assert sheet.shape[0] > 16 * (SHEET_WIDTH // columns) // 24


BROKEN = {
    "no run folder": (lambda run: shutil.rmtree(run), "does not exist"),
    "an anchor is missing": (lambda run: anchor_path(run, 1).unlink(), "image_01.png is missing"),
    "no video": (lambda run: shutil.rmtree(run / "d0.5_e1350_n30"), "holds no video"),
    "unfinished video": (
        lambda run: write_json(run / "d0.5_e1350_n30" / MANIFEST, {"finished": False}),
        "is not finished",
    ),
    "no manifest": (lambda run: (run / "d0.5_e1350_n30" / MANIFEST).unlink(), "run.json is missing"),
    "a frame is missing": (lambda run: frame_path(run / "d0.5_e1350_n30", 60).unlink(), "0060.png is missing"),
    "a frame is damaged": (
        lambda run: frame_path(run / "d0.5_e1350_n30", 60).write_bytes(b"no"),
        "cannot be read as an image",
    ),
    "a frame of another size": (
        lambda run: write_image(frame_path(run / "d0.5_e1350_n30", 60), np.zeros((16, 16, 3), np.uint8)),
        "frames have one size",
    ),
    "two videos": (lambda run: make_run(run, 2, "d1.0_e1350_n30"), "choose one with --video"),
}


@pytest.mark.slow
@pytest.mark.parametrize("problem", BROKEN)
def test_bad_runs_are_one_line(monkeypatch, capsys, run: Path, problem: str):
    change, words = BROKEN[problem]
    change(run)
    before = files(run) if run.exists() else set()
    assert call(monkeypatch, "--run", run, "--scene", SAMPLE, "--reference", BOXTOWN) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message
    assert (files(run) if run.exists() else set()) == before


@pytest.mark.slow
def test_one_of_two_videos_can_be_named(monkeypatch, tmp_path: Path):
    run, scene = make_run(tmp_path / "run", 1), make_scene(tmp_path / "scene")
    make_run(run, 1, "d1.0_e1350_n30")
    arguments = ("--run", run, "--scene", scene, "--reference", anchor_path(run, 0))
    assert call(monkeypatch, *arguments, "--video", "d1.0_e1350_n30") == 0
    assert (run / "d1.0_e1350_n30" / SHEET_FILE).is_file() and not (run / "d0.5_e1350_n30" / SHEET_FILE).exists()
    assert call(monkeypatch, *arguments, "--video", "d0.7_e1350_n30") == 2


@pytest.mark.parametrize(
    ("scene", "reference", "words"),
    [("nowhere", BOXTOWN, "does not exist"), (SAMPLE, "nowhere.png", "does not exist")],
)
def test_bad_inputs_are_one_line(monkeypatch, capsys, run: Path, scene, reference, words: str):
    assert call(monkeypatch, "--run", run, "--scene", scene, "--reference", reference) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and words in message and len(message.splitlines()) == 1


def unrenderable(folder: Path, num_arcs: int, *copied: str) -> Path:
    """A scene folder with only some of the sample's mesh and path."""
    scene = make_scene(folder, num_arcs)
    for name in copied:
        shutil.copy(SAMPLE / name, scene / name)
    return scene


def without_classes(folder: Path) -> Path:
    scene = unrenderable(folder, 2, CAMERAS_FILE)
    corners = np.array([(0.0, 0, 0), (1, 0, 0), (0, 1, 0)])
    write_glb(scene / SCENE_FILE, build_geometry([("Cube.001", corners, np.array([(0, 1, 2)]))], "+z"))
    return scene


def y_up(folder: Path) -> Path:
    scene = unrenderable(folder, 2, CAMERAS_FILE, SCENE_FILE)
    cameras = scene / CAMERAS_FILE
    cameras.write_text(cameras.read_text().replace('"+z"', '"+y"'))
    return scene


UNRENDERABLE = {
    "no path": (1, lambda folder: unrenderable(folder, 1, SCENE_FILE), f"{CAMERAS_FILE}: preprocess.py writes it"),
    "another path": (
        1,
        lambda folder: unrenderable(folder, 1, CAMERAS_FILE, SCENE_FILE),
        "has 91 poses, but the edges have 46 frames",
    ),
    "no mesh": (2, lambda folder: unrenderable(folder, 2, CAMERAS_FILE), f"{SCENE_FILE}: preprocess.py writes it"),
    "a world of another up axis": (2, y_up, "this one is +y up"),
    "no classes": (2, without_classes, "objects of unknown class: Cube.001"),
}


@pytest.mark.parametrize("problem", UNRENDERABLE)
def test_a_scene_that_cannot_be_rendered_is_refused(monkeypatch, capsys, tmp_path: Path, problem: str):
    num_arcs, make, words = UNRENDERABLE[problem]
    run, scene = make_run(tmp_path / "run", num_arcs), make(tmp_path / "scene")
    assert call(monkeypatch, "--run", run, "--scene", scene, "--reference", BOXTOWN) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message
    assert not list(run.rglob("demo.*"))
