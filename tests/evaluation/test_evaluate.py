"""evaluate.py on run folders, folders of frames and video files: same numbers, one JSON object, one-line errors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

import evaluate
from synthetic.demo import true_frames
from synthetic.reference import style_of
from tests.support.helpers import DATA, ROOT, exit_code
from tests.support.scenes import make_scene
from utils.cli import InputError
from utils.evaluation.measure import METRICS, Missing, load_targets, measure
from utils.files import files_sha256, write_json
from utils.images import write_image, write_video
from utils.layout import CAMERAS_FILE, SCENE_FILE, VIDEO_FILE, find_scene, frame_path, load_scene
from utils.runs import MANIFEST, warn_of_another_scene
from utils.videos.read import read_frames

SAMPLE, REFERENCE = ROOT / "assets" / "sampleA", ROOT / "assets" / "references" / "boxtown.png"
SIZE = (36, 24)  # width, height
FLAT = (72, 12)  # the same for tests of lines, which are detected at 720x120 pixels
GEOMETRIC = ("anchors_error", "temporal_1", "temporal_8", "temporal_24", "flicker", "seams")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the script."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return exit_code(evaluate.main)


def draw(count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames that all differ: a square that moves over a gradient."""
    y, x = np.indices(size[::-1])
    frames = np.repeat(np.stack([40 + x * 2 + y] * count)[..., None], 3, axis=-1).astype(np.uint8)
    for k, frame in enumerate(frames):
        frame[4:12, k % (size[0] - 8) : k % (size[0] - 8) + 8] = (200, k, 30)
    return frames


def write_frames(folder: Path, frames: np.ndarray, first: int = 0) -> Path:
    for k, frame in enumerate(frames):
        write_image(frame_path(folder, first + k), frame)
    return folder


def write_lossless(path: Path, frames: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"codec": "libx264rgb", "quality": None, "pixelformat": "rgb24", "macro_block_size": 1}
    with imageio.get_writer(path, fps=12, output_params=["-qp", "0"], ffmpeg_log_level="quiet", **options) as writer:
        for frame in frames:
            writer.append_data(frame)
    return path


def as_run(frames: np.ndarray) -> np.ndarray:
    """91 frames as the 92 that ggi.py writes: the second arc has its own version of the shared frame, here black."""
    return np.concatenate([frames[:46], np.zeros_like(frames[:1]), frames[46:]])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arcs without a mesh, like the folders of the paper's authors."""
    return make_scene(tmp_path_factory.mktemp("evaluate") / "scene", num_arcs=2)


# --- reading ---


def test_every_form_of_a_video_gives_the_same_frames(tmp_path: Path):
    frames = draw(91)
    forms = [
        write_frames(tmp_path / "short", frames),
        write_frames(tmp_path / "from_one", frames, first=1),
        write_frames(tmp_path / "run", as_run(frames)),
        write_lossless(tmp_path / "short.mp4", frames),
        write_lossless(tmp_path / "long.mp4", as_run(frames)),
    ]
    write_image(forms[2] / "contact_sheet.png", frames[0])  # not a frame
    write_json(forms[2] / MANIFEST, {"finished": True})
    for form in forms:
        np.testing.assert_array_equal(read_frames(form, 2), frames, err_msg=str(form))


def test_one_arc_has_46_frames_either_way(tmp_path: Path):
    np.testing.assert_array_equal(read_frames(write_frames(tmp_path / "frames", draw(46)), 1), draw(46))


def test_a_video_that_ggi_wrote_decodes(tmp_path: Path):
    write_video(tmp_path / VIDEO_FILE, draw(91), 12)
    found = read_frames(tmp_path / VIDEO_FILE, 2)
    assert found.shape == (91, 24, 36, 3)


def test_a_run_knows_its_scene(tmp_path: Path):
    home = tmp_path / "town"
    run = home / "multiviews" / "anchors" / "d0.5_e1350_n30"
    (home / "arc0").mkdir(parents=True)
    write_frames(run, draw(1))
    assert [find_scene(p) for p in (run, run.parent, run / VIDEO_FILE, run.parent / "x.mp4")] == [home] * 4
    elsewhere = tmp_path / "elsewhere" / "video"
    write_frames(elsewhere, draw(1))
    write_json(elsewhere / MANIFEST, {"scene": str(home)})
    assert find_scene(elsewhere) == find_scene(elsewhere / VIDEO_FILE) == home
    with pytest.raises(InputError, match="pass --scene"):
        find_scene(tmp_path / "a" / "b" / "c.mp4")


def test_a_video_of_another_scene_is_warned_of(tmp_path: Path, capsys):
    home = make_scene(tmp_path / "town", num_arcs=1)
    scene = load_scene(home)
    for arguments, warned in (
        ({"edges_sha256": files_sha256(scene.edge_paths)}, False),
        ({"scene_sha256": files_sha256(scene.anchor_inputs)}, False),
        ({"edges_sha256": "another"}, True),
        ({"scene_sha256": "another"}, True),
        ({}, False),
    ):
        write_json(home / MANIFEST, {"arguments": arguments})
        warn_of_another_scene(home, scene)
        assert ("made for another scene" in capsys.readouterr().err) == warned


# --- bad input ---


def missing_frame(folder: Path) -> Path:
    frame_path(write_frames(folder / "run", draw(91)), 17).unlink()
    return folder / "run"


def unfinished_run(folder: Path) -> Path:
    write_json(write_frames(folder / "run", draw(92)) / MANIFEST, {"finished": False})
    return folder / "run"


def run_without_its_last_frame(folder: Path) -> Path:
    write_json(write_frames(folder / "run", draw(91)) / MANIFEST, {"finished": True})
    return folder / "run"


def other_size(folder: Path) -> Path:
    write_image(frame_path(write_frames(folder / "run", draw(91)), 60), draw(1, (40, 24))[0])
    return folder / "run"


def damaged_frame(folder: Path) -> Path:
    path = frame_path(write_frames(folder / "run", draw(91)), 60)
    path.write_bytes(path.read_bytes()[:60])
    return folder / "run"


def same_number(folder: Path) -> Path:
    write_image(write_frames(folder / "run", draw(91)) / "60.png", draw(1)[0])
    return folder / "run"


def another_length(folder: Path) -> Path:
    return write_frames(folder / "run", draw(46))


def short_video(folder: Path) -> Path:
    return write_lossless(folder / "video.mp4", draw(60))


def cut_video(folder: Path) -> Path:
    write_video(folder / "video.mp4", np.random.default_rng(0).integers(0, 256, (91, 48, 64, 3), dtype=np.uint8), 12)
    data = (folder / "video.mp4").read_bytes()
    (folder / "video.mp4").write_bytes(data[: len(data) // 2])
    return folder / "video.mp4"


def damaged_video(folder: Path) -> Path:
    write_video(folder / "video.mp4", np.random.default_rng(0).integers(0, 256, (91, 48, 64, 3), dtype=np.uint8), 12)
    data = bytearray((folder / "video.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (folder / "video.mp4").write_bytes(data)
    return folder / "video.mp4"


def no_video(folder: Path) -> Path:
    (folder / "video.mp4").write_bytes(b"nothing that decodes" * 100)
    return folder / "video.mp4"


def picture(folder: Path) -> Path:
    write_image(folder / "one.png", draw(1)[0])
    return folder / "one.png"


def empty_folder(folder: Path) -> Path:
    (folder / "run").mkdir()
    return folder / "run"


PROBLEMS = {
    missing_frame: "0017.png is missing",
    unfinished_run: "not finished",
    run_without_its_last_frame: "has 91 frames, but a run of 2 arc(s) has 92",
    other_size: "0060.png is 40x24, but",
    damaged_frame: "0060.png cannot be read",
    same_number: "have the same number",
    another_length: "has 46 frames, but a video of the scene's 2 arc(s) has 91 or 92",
    short_video: "has 60 frames",
    cut_video: "does not decode to its end",
    damaged_video: "does not decode to its end",
    no_video: "cannot be read as a video",
    picture: "is a picture",
    empty_folder: "holds no numbered frames",
}


@pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make.__name__)
def test_bad_videos_are_one_line(monkeypatch, capfd, tmp_path: Path, scene: Path, make):
    assert call(monkeypatch, "--video", make(tmp_path), "--scene", scene) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and PROBLEMS[make] in err


def test_bad_arguments_are_one_line(monkeypatch, capfd, tmp_path: Path, scene: Path):
    video = write_frames(tmp_path / "run", draw(91))
    small = write_frames(tmp_path / "small", draw(91, (30, 20)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    cases = {
        "does not exist": ("--video", tmp_path / "nowhere", "--scene", scene),
        "pass --scene": ("--video", video),
        "scene folder": ("--video", video, "--scene", tmp_path / "nowhere"),
        "holds no arcs": ("--video", video, "--scene", tmp_path),
        "nowhere.png does not exist": ("--video", video, "--scene", scene, "--reference", tmp_path / "nowhere.png"),
        "cannot be read as an image": ("--video", video, "--scene", scene, "--reference", tmp_path / "broken.png"),
        "is 30x20, the video 36x24": ("--video", video, "--scene", scene, "--ground_truth", small),
        "video": ("--video", video, "--scene", scene, "--ground_truth", tmp_path / "nowhere.mp4"),
        "--video": ("--json",),
    }
    for words, arguments in cases.items():
        assert call(monkeypatch, *arguments) == 2, arguments
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize("damage", ("cut", "another path"))
def test_damaged_geometry_is_one_line(monkeypatch, capfd, tmp_path: Path, scene: Path, damage: str):
    folder = tmp_path / "scene"
    shutil.copytree(scene, folder)
    shutil.copy(SAMPLE / CAMERAS_FILE, folder)
    shutil.copy(SAMPLE / SCENE_FILE, folder)
    if damage == "cut":
        (folder / SCENE_FILE).write_bytes((SAMPLE / SCENE_FILE).read_bytes()[:1000])
    else:
        cameras = json.loads((SAMPLE / CAMERAS_FILE).read_text())
        write_json(folder / CAMERAS_FILE, cameras | {"frames": cameras["frames"][:46]})
    assert call(monkeypatch, "--video", write_frames(tmp_path / "run", draw(91)), "--scene", folder) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


# --- measuring ---


def test_every_metric_is_explained():
    text = (ROOT / "docs" / "metrics.md").read_text()
    for metric in METRICS:
        assert f"`{metric.name}`" in text and f"| {metric.unit}" in text.replace("grey ", ""), metric
        assert metric.range.replace("-", "−") in text


@pytest.mark.slow
def test_a_scene_without_a_mesh_says_what_is_missing(monkeypatch, capsys, tmp_path: Path, scene: Path):
    run = write_frames(tmp_path / "run", draw(91, FLAT))
    assert call(monkeypatch, "--video", run, "--scene", scene) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["metric", *(metric.name for metric in METRICS)]
    table = {line.split()[0]: line for line in lines}
    assert all(table[name].endswith("n/a: needs scene.glb") for name in (*GEOMETRIC, "structure_psnr_d"))
    assert table["style_colour"].endswith("n/a: needs --reference")
    assert table["fidelity_psnr"].endswith("n/a: needs --ground_truth")
    assert float(table["structure_recall"].split()[1]) >= 0


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_form_or_the_time(monkeypatch, capsys, tmp_path: Path, scene: Path):
    frames = draw(91, FLAT)
    truth = write_frames(tmp_path / "truth", np.roll(frames, 1, axis=2))
    results = []
    for video in (
        write_frames(tmp_path / "run", as_run(frames)),
        write_lossless(tmp_path / "video.mp4", frames),
        tmp_path / "run",
    ):
        words = ("--video", video, "--scene", scene, "--reference", REFERENCE, "--ground_truth", truth, "--json")
        assert call(monkeypatch, *words) == 0
        results.append(json.loads(capsys.readouterr().out))
        assert results[-1].pop("video") == str(video)
    assert results[0] == results[1] == results[2]
    assert set(results[0]) == {"frames", "arcs", "size", "metrics", "missing"}
    assert results[0]["frames"] == 91 and results[0]["size"] == list(FLAT)
    assert {name for name, value in results[0]["metrics"].items() if value is None} == set(results[0]["missing"])
    assert set(GEOMETRIC) <= set(results[0]["missing"]) and results[0]["metrics"]["fidelity_psnr"] < 40


@pytest.mark.slow
def test_true_frames_of_the_sample_as_a_user_measures_them(tmp_path: Path):
    """The command in its own process; only JSON on stdout, progress on stderr."""
    frames = true_frames(load_scene(SAMPLE), style_of(REFERENCE), (108, 72))
    run = write_frames(tmp_path / "run", as_run(frames))
    words = ["--video", run, "--scene", SAMPLE, "--reference", REFERENCE, "--ground_truth", run, "--json"]
    line = [sys.executable, "evaluate.py", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, timeout=400)
    values = json.loads(done.stdout)["metrics"]
    assert "geometry" in done.stderr and "error" not in done.stderr
    assert values["fidelity_psnr"] == 100 and values["fidelity_ssim"] == 1
    assert values["structure_f1"] > 0.6
    assert all(values[name] < 4 for name in GEOMETRIC)
    assert values["style_colour"] < 15 and values["style_texture"] < 3


@pytest.mark.slow
def test_targets_serve_many_videos(tmp_path: Path, scene: Path):
    """Lines are detected once; networks are not loaded unless their metrics are requested."""
    frames, targets = draw(91, FLAT), load_targets(load_scene(scene), FLAT)
    first, second = (measure(video, targets, networks=False) for video in (frames, frames[::-1]))
    assert list(first) == [metric.name for metric in METRICS]
    assert first["style_clip"] == Missing("not asked for")
    assert first["structure_f1"] != second["structure_f1"]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "sampleA").is_dir(), reason="the paper's example is not here")
def test_the_papers_example_says_what_it_lacks(monkeypatch, capsys, tmp_path: Path):
    frames = np.repeat(draw(1, FLAT), 138, axis=0)
    run = write_frames(tmp_path / "run", frames)
    assert call(monkeypatch, "--video", run, "--scene", DATA / "sampleA", "--reference", REFERENCE, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["frames"] == 136 and result["arcs"] == 3
    assert all(result["missing"][name] == "needs scene.glb" for name in GEOMETRIC)
    assert result["metrics"]["structure_recall"] is not None and result["metrics"]["style_colour"] > 0
