"""The three scripts when killed, on a full disk and without memory for a decoder: no partial file, and they resume."""

import json
import re
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

import models.flux.anchors
from models.inbetween.pipeline import CogVideoXInbetweenPipeline
from tests.support.helpers import ALIGN, ANCHORS, GGI, assert_same, assert_whole, call, contents, kill_at, run
from tests.support.stages import NUM_ARCS, QUICK_VIDEO, RUN, STATE, VIDEO, draw, last_line, new_scene, train
from utils.files import read_json
from utils.runs import MANIFEST

pytestmark = pytest.mark.slow

# Killed in the middle


@pytest.mark.parametrize("moment", ["run.json", "checkpoint-2", "checkpoint-6"])
def test_killed_alignment_goes_on(tmp_path: Path, long_lora: Path, moment: str):
    arguments = train(tmp_path / "loras", "--max_train_steps", 12)
    folder, finished = tmp_path / "loras" / "town", long_lora / "town"
    kill_at(folder / moment, ALIGN, *arguments)
    for leftover in (".checkpoint-4.1.abcdef.tmp/lora.safetensors", "references/.00_picture.1.abcdef.tmp.png"):
        (folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (folder / leftover).write_bytes(b"half a file")
    if moment != "run.json":
        # loss.csv grows with every checkpoint: its rows so far must be right.
        assert_whole(folder, contents(finished, "loss."), "loss.")
        assert (finished / "loss.csv").read_bytes().startswith((folder / "loss.csv").read_bytes())
    assert call(ALIGN, *arguments) == 0
    assert_same(contents(folder, STATE), contents(finished, STATE))


@pytest.fixture(scope="module")
def long_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "loras"
    assert call(ALIGN, *train(folder, "--max_train_steps", 12)) == 0
    return folder


def test_losses_stay_complete_when_stopped_between_files(tmp_path: Path, loras: Path, monkeypatch: pytest.MonkeyPatch):
    from models.runtime import training

    def stop(folder: Path, losses: list[float], last: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_losses", stop)
        assert call(ALIGN, *train(tmp_path / "loras")) == 130
    assert call(ALIGN, *train(tmp_path / "loras")) == 0
    assert_same(contents(tmp_path / "loras", STATE), contents(loras, STATE))


def test_killed_anchors_go_on(tmp_path: Path, loras: Path):
    arguments = lambda name: draw(tmp_path / name, loras, "--num_steps", 15, "--num_replacement", 2)  # noqa: E731
    whole, killed = (new_scene(tmp_path / name) / "multiviews" / RUN for name in ("whole", "killed"))
    kill_at(killed / "image_01.png", ANCHORS, *arguments("killed"))
    assert not (killed / "image_02.png").exists()
    (killed / ".image_02.1.abcdef.tmp.png").write_bytes(b"half a picture")
    assert call(ANCHORS, *arguments("whole")) == 0
    assert_whole(killed, contents(whole), "latents_")
    drawn = (killed / "image_01.png").stat().st_mtime_ns
    assert call(ANCHORS, *arguments("killed")) == 0
    assert (killed / "image_01.png").stat().st_mtime_ns == drawn, "finished anchors are not drawn again"
    assert_same(contents(killed), contents(whole))


@pytest.mark.parametrize("moment", ["0060.png", "video.mp4"])
def test_killed_video_goes_on(tmp_path: Path, anchored: Path, filmed: Path, moment: str):
    scene = shutil.copytree(anchored, tmp_path / "scene")
    folder, finished = scene / "multiviews" / RUN / VIDEO, filmed / "multiviews" / RUN / VIDEO
    arguments = ("--target", scene / "multiviews" / RUN, *QUICK_VIDEO)
    kill_at(folder / moment, GGI, *arguments)
    assert_whole(folder, contents(finished), "latents_")
    for leftover in (".0050.1.abcdef.tmp.png", "chain/.start_01.1.abcdef.tmp.png"):
        (folder / leftover).parent.mkdir(exist_ok=True)
        (folder / leftover).write_bytes(b"half a picture")
    assert call(GGI, *arguments) == 0
    assert_same(contents(folder), contents(finished))


# A full disk


def run_with_room_for(size: int, script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script that may write no file of more than `size` bytes, which fails as a full disk does."""
    return run(script, *arguments, prepare=[partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))])


def assert_failed(result: subprocess.CompletedProcess) -> None:
    """Exit code 3; after the progress bar, one line with the error and no traceback."""
    assert result.returncode == 3, result.stderr
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    assert errors == lines[-1:] and errors[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("file", ["lora.safetensors", "state/optimizer.bin"])
def test_alignment_on_a_full_disk(tmp_path: Path, loras: Path, file: str):
    """With room for two thirds of a file."""
    folder, limit = tmp_path / "loras", (loras / "town" / "checkpoint-2" / file).stat().st_size * 2 // 3
    assert call(ALIGN, *train(folder, "--max_train_steps", 2)) == 0
    before = contents(folder, "loss.")
    arguments = train(folder, "--report_to", "none")
    result = run_with_room_for(limit, ALIGN, *arguments)
    assert_failed(result)
    assert_same(contents(folder, "loss."), before)
    assert call(ALIGN, *arguments) == 0
    assert_same(contents(folder, STATE), contents(loras, STATE))


@pytest.mark.parametrize("share, kept", [(0.8, 0), (1.5, 3)], ids=["first anchor", "contact sheet"])
def test_anchors_on_a_full_disk(tmp_path: Path, loras: Path, anchored: Path, share: float, kept: int):
    scene = new_scene(tmp_path / "scene")
    folder, finished = scene / "multiviews" / RUN, anchored / "multiviews" / RUN
    limit = int(share * (finished / "image_00.png").stat().st_size)
    assert_failed(run_with_room_for(limit, ANCHORS, *draw(scene, loras)))
    assert (folder / MANIFEST).exists() and len(list(folder.glob("image_*.png"))) == kept
    assert not list(folder.glob(".*"))
    if kept:
        assert_whole(folder, contents(finished))
    assert call(ANCHORS, *draw(scene, loras)) == 0
    assert_same(contents(folder), contents(finished))


@pytest.mark.parametrize("share", [0.3, 0.97], ids=["early", "at the very end"])
def test_video_on_a_full_disk(tmp_path: Path, filmed: Path, share: float):
    scene = shutil.copytree(filmed, tmp_path / "scene")
    folder, finished = scene / "multiviews" / RUN / VIDEO, filmed / "multiviews" / RUN / VIDEO
    limit = int(share * (finished / "video.mp4").stat().st_size)
    for name in ("video.mp4", "contact_sheet.png"):
        (folder / name).unlink()
    manifest = read_json(folder / MANIFEST)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"finished": False}))
    arguments = ("--target", scene / "multiviews" / RUN, *QUICK_VIDEO)
    result = run_with_room_for(limit, GGI, *arguments)
    assert not (folder / "video.mp4").exists(), "a video that could not be written whole"
    assert_failed(result)
    assert_whole(folder, contents(finished))
    assert not list(folder.glob(".*"))
    assert call(GGI, *arguments) == 0
    assert_same(contents(folder), contents(finished))


# No room for a decoder


def test_a_failed_decode_costs_no_denoising(
    tmp_path: Path, anchored: Path, filmed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(*arguments):
        raise torch.OutOfMemoryError("a decoder that needs too much")

    command = ("--target", anchored / "multiviews" / RUN, *QUICK_VIDEO, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(CogVideoXInbetweenPipeline, "decode_video", fail)
        assert call(GGI, *command, "--memory", "full") == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: out of memory") and "--memory balanced" in message
    denoised, denoise = [], CogVideoXInbetweenPipeline.__call__
    monkeypatch.setattr(CogVideoXInbetweenPipeline, "__call__", lambda *a, **k: denoised.append(1) or denoise(*a, **k))
    assert call(GGI, *command) == 0
    assert len(denoised) == NUM_ARCS - 1
    assert_same(contents(tmp_path / VIDEO), contents(filmed / "multiviews" / RUN / VIDEO))


def test_a_failed_decode_of_an_anchor_costs_no_denoising(
    tmp_path: Path, anchored: Path, loras: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(*arguments):
        raise torch.OutOfMemoryError("a decoder that needs too much")

    command = draw(anchored, loras, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(models.flux.anchors, "decode_anchor", fail)
        assert call(ANCHORS, *command, "--memory", "full") == 3
    assert "--memory low" in last_line(capsys.readouterr().err)  # balanced would draw other pictures
    assert (tmp_path / RUN / "latents_00.safetensors").exists()
    denoised, sample = [], models.flux.anchors.sample_anchor
    monkeypatch.setattr(models.flux.anchors, "sample_anchor", lambda *a, **k: denoised.append(1) or sample(*a, **k))
    assert call(ANCHORS, *command) == 0
    assert len(denoised) == NUM_ARCS
    assert_same(contents(tmp_path / RUN), contents(anchored / "multiviews" / RUN))
