"""The three scripts end to end on the tiny weights: files, bytes, flags, and going on after a kill or a full disk."""

import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor

import models.anchors
from models.inbetween import CogVideoXInbetweenPipeline
from models.weights import WEIGHTS, load_preset
from tests.helpers import (
    ALIGN,
    ANCHORS,
    DATA,
    GGI,
    ROOT,
    SECONDS,
    assert_same,
    assert_whole,
    call,
    contents,
    forbid_models,
    kill_at,
    probe_video,
    run,
    words,
    write_picture,
)
from tests.scenes import make_scene
from tests.stages import (
    NUM_ARCS,
    PROMPT,
    QUICK_LORA,
    QUICK_VIDEO,
    RUN,
    STATE,
    VIDEO,
    anchor_run,
    draw,
    last_line,
    new_scene,
    train,
)
from utils.arcs import anchor_run_name
from utils.images import read_image, write_image
from utils.runs import MANIFEST, read_json

pytestmark = pytest.mark.slow

# What each script writes


def test_alignment_writes_loras_references_and_losses(loras: Path):
    folder = loras / "town"
    for step in (2, 4):
        files = {path.name for path in (folder / f"checkpoint-{step}").iterdir()}
        assert files == {"lora.safetensors", "controlnet.lora.safetensors", "state"}
    assert {path.name for path in (folder / "references").iterdir()} == {"00_picture.png", "00_picture.edges.png"}
    assert np.array_equal(read_image(folder / "references" / "00_picture.png"), read_image(loras / "../picture.png"))
    with (folder / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert read_image(folder / "loss.png").std() > 0
    manifest = read_json(folder / MANIFEST)
    assert manifest["finished"] and manifest["steps"] == 4
    assert manifest["arguments"]["learning_rate"] == 0.01
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("name, double_blocks, single_blocks", [("lora", 3, 4), ("controlnet.lora", 2, 0)])
def test_loras_have_the_references_keys_in_bfloat16(loras: Path, name: str, double_blocks: int, single_blocks: int):
    early, late = (load_file(loras / "town" / f"checkpoint-{step}" / f"{name}.safetensors") for step in (2, 4))
    double = r"double_blocks\.\d+\.processor\.(qkv|proj)_lora[12]\.(down|up)\.weight"
    single = r"single_blocks\.[1-4]\.processor\.(qkv|proj)_lora\.(down|up)\.weight"
    assert all(re.fullmatch(f"{double}|{single}", key) for key in late)
    assert len(late) == 8 * double_blocks + 4 * single_blocks
    assert {str(tensor.dtype) for tensor in late.values()} == {"torch.bfloat16"}
    assert early.keys() == late.keys()
    still = {key for key in late if (early[key] == late[key]).all()}
    unused = "double_blocks.1.processor.proj_lora2"  # the ControlNet's last text output goes nowhere
    assert still == ({f"{unused}.{factor}.weight" for factor in ("down", "up")} if name != "lora" else set())


def test_anchors_of_every_arc(anchored: Path):
    folder = anchored / "multiviews" / RUN
    anchors = [f"image_{k:02d}.png" for k in range(NUM_ARCS + 1)]
    beside = [f"{name}_{k:02d}.png" for name in ("warped_x", "mask") for k in range(1, NUM_ARCS + 1)]
    assert {p.name for p in folder.iterdir()} == {*anchors, *beside, "contact_sheet.png", MANIFEST}
    pictures = [read_image(folder / name) for name in anchors]
    assert {picture.shape for picture in pictures} == {(96, 144, 3)}
    assert all(picture.std() > 1 for picture in pictures)
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()
    mask = read_image(folder / "mask_01.png")
    assert set(np.unique(mask)) == {0, 255}
    # Where nothing arrives the warped anchor is black, and the mask covers it.
    assert (mask[(read_image(folder / "warped_x_01.png") == 0).all(-1)] == 255).mean() > 0.95
    manifest = read_json(folder / MANIFEST)
    assert manifest["finished"] and manifest["arguments"]["seed"] == 1


def test_video_of_every_arc(filmed: Path):
    folder = filmed / "multiviews" / RUN / VIDEO
    numbered = [f"{i:04d}.png" for i in range(46 * NUM_ARCS)]
    assert {p.name for p in folder.iterdir()} == {*numbered, "chain", "video.mp4", "contact_sheet.png", MANIFEST}
    frames = [read_image(folder / name) for name in numbered]
    assert {frame.shape for frame in frames} == {(96, 144, 3)}
    metadata, count = probe_video(folder / "video.mp4")
    assert count == 45 * NUM_ARCS + 1
    assert metadata["codec"] == "h264" and metadata["pix_fmt"].startswith("yuv420p")
    assert metadata["fps"] == 12 and metadata["size"] == (144, 96)
    manifest = read_json(folder / MANIFEST)
    assert manifest["finished"] and manifest["prompt"] == PROMPT
    for arc in range(NUM_ARCS):
        noise = np.load(filmed / f"arc{arc}" / "noises_18x12.npy", allow_pickle=False)
        assert noise.shape == (13, 12, 18, 16) and noise.dtype == np.float32


# The same command again


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, filmed: Path):
    loras, scene = tmp_path / "loras", new_scene(tmp_path / "scene")
    shutil.copy(write_picture(tmp_path / "first" / "picture.png"), tmp_path / "picture.png")
    assert call(ALIGN, *train(loras)) == 0
    assert call(ANCHORS, *draw(scene, loras)) == 0
    assert call(GGI, "--target", scene / "multiviews" / RUN, *QUICK_VIDEO) == 0
    assert_same(contents(scene), contents(filmed))


def test_the_same_seed_gives_the_same_lora(tmp_path: Path, loras: Path):
    assert call(ALIGN, *train(tmp_path / "loras")) == 0
    assert_same(contents(tmp_path / "loras"), contents(loras))


@pytest.mark.parametrize("script", [ALIGN, ANCHORS, GGI])
def test_a_finished_run_says_so(
    script: str, loras: Path, filmed: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    arguments = {
        ALIGN: train(loras),
        ANCHORS: draw(filmed, loras),
        GGI: ("--target", filmed / "multiviews" / RUN, *QUICK_VIDEO),
    }[script]
    forbid_models(monkeypatch)
    before = contents(filmed), contents(loras)
    assert call(script, *arguments) == 0
    assert "is finished" in capsys.readouterr().out
    assert (contents(filmed), contents(loras)) == before


@pytest.mark.parametrize("script", [ALIGN, ANCHORS, GGI])
def test_other_arguments_are_refused_unless_overwrite(
    script: str, tmp_path: Path, loras: Path, one_arc: Path, capsys: pytest.CaptureFixture
):
    shutil.copy(loras.parent / "picture.png", tmp_path)
    scene = shutil.copytree(one_arc, tmp_path / "scene")
    views = scene / "multiviews" / anchor_run(1)
    first, other, folder, flag = {
        ALIGN: (train(tmp_path / "loras"), ("--learning_rate", 0.02), tmp_path / "loras" / "town", "learning_rate"),
        ANCHORS: (draw(scene, loras), ("--guidance", 2), views, "guidance"),
        GGI: (("--target", views, *QUICK_VIDEO), ("--guidance_scale", 2), views / VIDEO, "guidance_scale"),
    }[script]
    assert call(script, *first) == 0
    before, manifest = contents(folder), (folder / MANIFEST).read_bytes()
    capsys.readouterr()
    assert call(script, *first, *other) == 2
    error = capsys.readouterr().err
    assert flag in error and "--overwrite" in error
    assert_same(contents(folder), before)
    assert (folder / MANIFEST).read_bytes() == manifest
    assert call(script, *first, *other, "--overwrite") == 0
    assert contents(folder).keys() == before.keys() and contents(folder) != before


def test_new_anchors_leave_the_videos_alone(tmp_path: Path, loras: Path, one_arc: Path):
    """A video lies in a folder of its own inside the anchors' folder."""
    scene = shutil.copytree(one_arc, tmp_path / "scene")
    views = scene / "multiviews" / anchor_run(1)
    assert call(ANCHORS, *draw(scene, loras)) == 0
    (views / VIDEO).mkdir()
    (views / VIDEO / "video.mp4").touch()
    assert call(ANCHORS, *draw(scene, loras), "--guidance", 2, "--overwrite") == 0
    assert (views / VIDEO / "video.mp4").exists()


def test_other_fps_encode_the_frames_again(tmp_path: Path, one_arc: Path, capsys: pytest.CaptureFixture):
    target = one_arc / "multiviews" / anchor_run(1)
    command = ("--target", target, *QUICK_VIDEO, "--output_dir", tmp_path)
    assert call(GGI, *command) == 0
    frame = (tmp_path / VIDEO / "0010.png").stat().st_mtime_ns
    assert call(GGI, *command, "--fps", 24) == 0
    assert probe_video(tmp_path / VIDEO / "video.mp4")[0]["fps"] == 24
    assert (tmp_path / VIDEO / "0010.png").stat().st_mtime_ns == frame


def test_finished_runs_notice_other_weights(tmp_path: Path, one_arc: Path, capsys: pytest.CaptureFixture):
    """The same folder of weights, filled anew: what was made with the old ones is not passed off as done."""
    weights = shutil.copytree(Path(load_preset("tiny").cogvideox), tmp_path / "weights")
    target = one_arc / "multiviews" / anchor_run(1)
    command = ("--target", target, *QUICK_VIDEO, "--output_dir", tmp_path / "out", "--cogvideox", weights)
    assert call(GGI, *command) == 0
    file = weights / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: 1.01 * tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    capsys.readouterr()
    assert call(GGI, *command) == 2
    assert "other weights (cogvideox_vae)" in capsys.readouterr().err


def test_more_steps_go_on_to_the_same_weights(tmp_path: Path, loras: Path, capsys: pytest.CaptureFixture):
    halfway = train(tmp_path / "loras", "--max_train_steps", 2)
    assert call(ALIGN, *halfway) == 0
    assert_whole(tmp_path / "loras", contents(loras), "loss.")
    assert call(ALIGN, *train(tmp_path / "loras")) == 0
    assert_same(contents(tmp_path / "loras", STATE), contents(loras, STATE))


def test_resume_from_a_named_checkpoint(tmp_path: Path, loras: Path, capsys: pytest.CaptureFixture):
    copy = shutil.copytree(loras, tmp_path / "loras")
    shutil.copy(loras.parent / "picture.png", tmp_path)
    (copy / "town" / "checkpoint-4" / "lora.safetensors").write_bytes(b"to be made again")
    assert call(ALIGN, *train(copy, "--resume_from_checkpoint", 2)) == 0
    assert_same(contents(copy, STATE), contents(loras, STATE))
    capsys.readouterr()
    for wrong in (3, "none"):
        assert call(ALIGN, *train(copy, "--resume_from_checkpoint", wrong)) == 2
        assert "[2, 4]" in capsys.readouterr().err


def test_seed_of_the_newest_unfinished_run_is_taken_again(
    tmp_path: Path, loras: Path, one_arc: Path, capsys: pytest.CaptureFixture
):
    scene = shutil.copytree(one_arc, tmp_path / "scene")
    unfinished = scene / "multiviews" / anchor_run(1)
    wanted = contents(unfinished)
    manifest = read_json(unfinished / MANIFEST)
    (unfinished / MANIFEST).write_text(json.dumps(manifest | {"finished": False}))
    (unfinished / "image_01.png").unlink()

    # Other arguments: not the run to go on with.
    assert call(ANCHORS, *draw(scene, loras, "--seed", -1, "--guidance", 2)) == 0
    drawn = int(re.search(r"seed (\d+)", capsys.readouterr().out)[1])
    assert 0 <= drawn <= 100_000
    assert (scene / "multiviews" / anchor_run(1, drawn) / "image_01.png").exists()

    assert call(ANCHORS, *draw(scene, loras, "--seed", -1)) == 0
    out = capsys.readouterr().out
    assert "seed 1," in out and "unfinished" in out and last_line(out) == str(unfinished)
    assert_same(contents(unfinished), wanted)

    # All are finished now: a new seed.
    assert call(ANCHORS, *draw(scene, loras, "--seed", -1)) == 0
    assert "unfinished" not in capsys.readouterr().out
    assert len(list((scene / "multiviews").iterdir())) == 3


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
    from models import training

    def stop(folder: Path, losses: list[float]) -> None:
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


def write_less_than(size: int) -> Callable[[], None]:
    """For `preexec_fn`: no file may grow beyond `size` bytes, which fails as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def assert_failed(result: subprocess.CompletedProcess) -> None:
    """Exit code 3; after the progress bar, one line that is an error and no traceback."""
    assert result.returncode == 3, result.stderr
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    assert errors == lines[-1:] and errors[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr


# Alignment writes lora.safetensors of 130 KB and its optimizer's state of 740 KB.
@pytest.mark.parametrize("limit", [90_000, 400_000], ids=["lora", "optimizer"])
def test_alignment_on_a_full_disk(tmp_path: Path, loras: Path, limit: int):
    folder = tmp_path / "loras"
    assert call(ALIGN, *train(folder, "--max_train_steps", 2)) == 0
    before = contents(folder, "loss.")
    arguments = train(folder, "--report_to", "none")
    result = run(ALIGN, *arguments, preexec_fn=write_less_than(limit))
    assert_failed(result)
    assert_same(contents(folder, "loss."), before)
    assert call(ALIGN, *arguments) == 0
    assert_same(contents(folder, STATE), contents(loras, STATE))


@pytest.mark.parametrize("share, kept", [(0.5, 0), (1.5, 3)], ids=["first anchor", "contact sheet"])
def test_anchors_on_a_full_disk(tmp_path: Path, loras: Path, anchored: Path, share: float, kept: int):
    scene = new_scene(tmp_path / "scene")
    folder, finished = scene / "multiviews" / RUN, anchored / "multiviews" / RUN
    limit = int(share * (finished / "image_00.png").stat().st_size)
    assert_failed(run(ANCHORS, *draw(scene, loras), preexec_fn=write_less_than(limit)))
    assert len(list(folder.glob("image_*.png"))) == kept
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
    result = run(GGI, *arguments, preexec_fn=write_less_than(limit))
    assert not (folder / "video.mp4").exists(), "a video that could not be written whole"
    assert_failed(result)
    assert_whole(folder, contents(finished))
    assert not list(folder.glob(".*"))
    assert call(GGI, *arguments) == 0
    assert_same(contents(folder), contents(finished))


# Results elsewhere


def test_output_dir_with_a_read_only_scene(tmp_path: Path, loras: Path, one_arc: Path):
    scene = new_scene(tmp_path / "scene", num_arcs=1)
    before = sorted(scene.rglob("*"))
    folders = [scene, *(path for path in before if path.is_dir())]
    views, videos = tmp_path / "views", tmp_path / "videos"
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert call(ANCHORS, *draw(scene, loras, "--output_dir", views)) == 0
        (views / anchor_run(1)).chmod(0o555)
        # The run does not lie in its scene; its manifest knows where that is.
        assert call(GGI, "--target", views / anchor_run(1), *QUICK_VIDEO, "--output_dir", videos) == 0
    finally:
        for folder in (*folders, views / anchor_run(1)):
            folder.chmod(0o755)
    assert sorted(scene.rglob("*")) == before
    assert_same(contents(views / anchor_run(1)), contents(one_arc / "multiviews" / anchor_run(1), VIDEO))
    assert probe_video(videos / VIDEO / "video.mp4")[1] == 46


def test_another_scene_in_the_same_output_dir_is_no_finished_run(tmp_path: Path, loras: Path):
    first = new_scene(tmp_path / "first", num_arcs=1)
    second = make_scene(tmp_path / "second", 1, edge_size=(144, 96), pan=(-0.3, 0.2))
    views = tmp_path / "views"
    assert call(ANCHORS, *draw(first, loras, "--output_dir", views)) == 0
    before = contents(views)
    assert call(ANCHORS, *draw(second, loras, "--output_dir", views)) == 2
    assert_same(contents(views), before)


def test_run_named_relative_to_its_folder(tmp_path: Path, one_arc: Path, monkeypatch: pytest.MonkeyPatch):
    scene = shutil.copytree(one_arc, tmp_path / "scene")
    run_folder = scene / "multiviews" / anchor_run(1)
    for cwd, target in ((run_folder.parent, run_folder.name), (run_folder, ".")):
        monkeypatch.chdir(cwd)
        assert call(GGI, "--target", target, *QUICK_VIDEO) == 0
    assert (run_folder / VIDEO / "video.mp4").exists()


# Every flag changes the result


@pytest.fixture(scope="module")
def flag_lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("flags") / "loras"
    assert call(ALIGN, *train(folder, "--max_train_steps", 2)) == 0
    return contents(folder / "town", STATE)


@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "exterior"),
        ("--learning_rate", 0.02),
        ("--rank", 8),
        ("--resolution", 96),
        ("--train_batch_size", 2),
        ("--gradient_accumulation_steps", 2),
        ("--mixed_precision", "bf16"),
        ("--seed", 1),
    ],
    ids=lambda flags: flags[0],
)
def test_alignment_flag(tmp_path: Path, flag_lora: dict[str, bytes], flags: tuple):
    assert call(ALIGN, *train(tmp_path / "loras", "--max_train_steps", 2, "--report_to", "none", *flags)) == 0
    found = contents(tmp_path / "loras" / "town", STATE)
    assert found.keys() == flag_lora.keys()
    for name in ("lora", "controlnet.lora"):
        path = f"checkpoint-2/{name}.safetensors"
        assert found[path] != flag_lora[path]


def test_alignment_takes_several_pictures_and_ready_edges(tmp_path: Path, flag_lora: dict[str, bytes]):
    pictures = [write_picture(tmp_path / f"{name}.png", seed=i) for i, name in enumerate(("a", "b"))]
    edges = tmp_path / "edges.png"
    write_image(edges, np.full((160, 200, 3), 90, np.uint8))
    arguments = ("--path_image", *pictures, "--prompt", "exterior", "interior", "--path_edges", edges, edges)
    # argparse keeps the last --path_image.
    assert call(ALIGN, *train(tmp_path / "loras", "--max_train_steps", 2, *arguments)) == 0
    folder = tmp_path / "loras" / "town"
    names = {"00_a.png", "00_a.edges.png", "01_b.png", "01_b.edges.png"}
    assert {path.name for path in (folder / "references").iterdir()} == names
    assert (read_image(folder / "references" / "01_b.edges.png") == 90).all()
    path = "checkpoint-2/controlnet.lora.safetensors"
    assert (folder / path).read_bytes() != flag_lora[path]


def test_event_log_only_where_wanted(tmp_path: Path, loras: Path):
    assert list((loras / "town").rglob("*tfevents*"))
    assert call(ALIGN, *train(tmp_path / "loras", "--max_train_steps", 1, "--report_to", "none")) == 0
    assert not list((tmp_path / "loras").rglob("*tfevents*"))


ANCHOR_FLAGS = [
    ("--prompt", "a city"),
    ("--neg_prompt", "rain"),
    ("--num_steps", 4),
    ("--guidance", 2),
    ("--true_gs", 2),
    ("--timestep_to_start_cfg", 0),
    ("--control_weight", 0.4),
    ("--lora_weight", 0.5),
    ("--epoch", 2),
    ("--seed", 2),
    ("--dtype", "bfloat16"),
    ("--width", 128),
    ("--height", 80),
]
LATER_ANCHOR_FLAGS = [("--num_replacement", 3), ("--use_else_noise",), ("--prompt", PROMPT, "a city")]


@pytest.mark.parametrize("flags", ANCHOR_FLAGS + LATER_ANCHOR_FLAGS, ids=lambda flags: " ".join(map(str, flags)))
def test_anchor_flag(tmp_path: Path, loras: Path, one_arc: Path, flags: tuple):
    before = one_arc / "multiviews" / anchor_run(1)
    assert call(ANCHORS, *draw(one_arc, loras, "--output_dir", tmp_path, *flags)) == 0
    (after,) = tmp_path.iterdir()
    changed = [
        (before / name).read_bytes() != (after / name).read_bytes() for name in ("image_00.png", "image_01.png")
    ]
    assert changed == [flags not in LATER_ANCHOR_FLAGS, True]


def test_run_is_named_after_its_arguments(tmp_path: Path, loras: Path, one_arc: Path):
    prompts = ("it's a town / 2", "another")
    arguments = ("--output_dir", tmp_path, "--prompt", *prompts, "--epoch", 2, "--seed", 77, "--num_replacement", 1)
    assert call(ANCHORS, *draw(one_arc, loras, *arguments)) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == anchor_run_name("town", prompts, 2, 77, 1)
    assert re.fullmatch(r"town_pit_s_a_town___2-[0-9a-f]{8}_e002_s000077_r01_ip1", folder.name)


@pytest.fixture(scope="module")
def flag_video(tmp_path_factory: pytest.TempPathFactory, one_arc: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("flags")
    target = one_arc / "multiviews" / anchor_run(1)
    assert call(GGI, "--target", target, *QUICK_VIDEO, "--output_dir", folder) == 0
    return contents(folder / VIDEO)


@pytest.mark.parametrize(
    "flags, frames_change, name",
    [
        (("--prompt", "green walls"), True, VIDEO),
        (("--degradation", 0.0), True, "d0.0_e1350_n2"),
        (("--num_inference_steps", 3), True, "d0.5_e1350_n3"),
        (("--guidance_scale", 1), True, VIDEO),
        (("--seed", 1), True, VIDEO),
        (("--dtype", "bfloat16"), True, VIDEO),
        (("--fps", 24), False, VIDEO),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_video_flag(
    tmp_path: Path, one_arc: Path, flag_video: dict[str, bytes], flags: tuple, frames_change: bool, name: str
):
    target = one_arc / "multiviews" / anchor_run(1)
    assert call(GGI, "--target", target, *QUICK_VIDEO, "--output_dir", tmp_path, *flags) == 0
    found = contents(tmp_path / name)
    assert found.keys() == flag_video.keys()
    assert found["video.mp4"] != flag_video["video.mp4"]
    frames = [f"{i:04d}.png" for i in range(46)]
    assert all((found[frame] != flag_video[frame]) == frames_change for frame in frames)
    assert probe_video(tmp_path / name / "video.mp4")[0]["fps"] == (24 if "--fps" in flags else 12)


def test_chain_changes_later_arcs_only(unchained: Path, filmed: Path):
    target = filmed / "multiviews" / RUN
    changed = [
        (unchained / VIDEO / name).read_bytes() != (target / VIDEO / name).read_bytes()
        for name in (f"{i:04d}.png" for i in range(92))
    ]
    assert not any(changed[:46]) and all(changed[46:])


def test_low_memory_changes_no_frame(filmed: Path, anchored: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert (
        call(GGI, "--target", anchored / "multiviews" / RUN, *QUICK_VIDEO, "--offload", "--output_dir", tmp_path) == 0
    )
    assert "memory low: text " in capsys.readouterr().err
    assert_same(contents(tmp_path / VIDEO), contents(filmed / "multiviews" / RUN / VIDEO))


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
        patch.setattr(models.anchors, "decode_anchor", fail)
        assert call(ANCHORS, *command, "--memory", "full") == 3
    assert "--memory low" in last_line(capsys.readouterr().err)  # balanced would draw other pictures
    assert (tmp_path / RUN / "latents_00.safetensors").exists()
    denoised, sample = [], models.anchors.sample_anchor
    monkeypatch.setattr(models.anchors, "sample_anchor", lambda *a, **k: denoised.append(1) or sample(*a, **k))
    assert call(ANCHORS, *command) == 0
    assert len(denoised) == NUM_ARCS
    assert_same(contents(tmp_path / RUN), contents(anchored / "multiviews" / RUN))


@pytest.mark.parametrize("script", [ALIGN, ANCHORS, GGI])
def test_attention_flag(script: str, tmp_path: Path, loras: Path, one_arc: Path, monkeypatch: pytest.MonkeyPatch):
    """That kernel and no other is allowed while the transformer works, when its blocks are computed again, too."""
    video = ("--target", one_arc / "multiviews" / anchor_run(1), *QUICK_VIDEO)
    block, command = {
        ALIGN: (FluxTransformerBlock, train(tmp_path / "loras", "--max_train_steps", 1)),
        ANCHORS: (FluxTransformerBlock, (*draw(one_arc, loras), "--output_dir", tmp_path)),
        GGI: (CogVideoXBlock, (*video, "--output_dir", tmp_path)),
    }[script]
    allowed, forward = [], block.forward

    def watched(self, hidden_states, *arguments, **options):
        if not isinstance(hidden_states, FakeTensor):  # of the plan
            allowed.append((torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return forward(self, hidden_states, *arguments, **options)

    monkeypatch.setattr(block, "forward", watched)
    assert call(script, *command, "--attention", "flash") == 0
    assert set(allowed) == {(False, True)}


def test_scene_flag_and_given_noise(tmp_path: Path, one_arc: Path, flag_video: dict[str, bytes]):
    views = shutil.copytree(one_arc / "multiviews" / anchor_run(1), tmp_path / "views")
    (views / MANIFEST).unlink()
    scene = new_scene(tmp_path / "scene", num_arcs=1)
    rng = np.random.default_rng(5)
    np.save(scene / "arc0" / "noises_18x12.npy", rng.standard_normal((13, 12, 18, 16), dtype=np.float32))
    assert call(GGI, "--target", views, "--scene", scene, *QUICK_VIDEO) == 0
    found = contents(views / VIDEO)
    assert found.keys() == flag_video.keys() and found["0000.png"] != flag_video["0000.png"]


def altered(source: Path, target: Path) -> Path:
    """A copy of a model's folder with other weights."""
    shutil.copytree(source, target)
    (weights,) = target.glob("*.safetensors")
    save_file({key: 0.9 * tensor for key, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    return target


@pytest.mark.parametrize("flag, part", [("--controlnet", "controlnet"), ("--flux_vae", "flux/vae")])
def test_other_weights_for_anchors(tmp_path: Path, loras: Path, one_arc: Path, flag: str, part: str):
    model = altered(WEIGHTS / "tiny" / part, tmp_path / "model")
    assert call(ANCHORS, *draw(one_arc, loras, "--output_dir", tmp_path / "views", flag, model)) == 0
    before, after = one_arc / "multiviews" / anchor_run(1), tmp_path / "views" / anchor_run(1)
    assert (before / "image_00.png").read_bytes() != (after / "image_00.png").read_bytes()


def test_another_transformer_for_the_video(tmp_path: Path, one_arc: Path, flag_video: dict[str, bytes]):
    altered(WEIGHTS / "tiny" / "cogvideox" / "transformer", tmp_path / "model" / "checkpoint-7" / "transformer")
    target = one_arc / "multiviews" / anchor_run(1)
    other = ("--model_path", tmp_path / "model", "--epoch", 7, "--output_dir", tmp_path)
    assert call(GGI, "--target", target, *QUICK_VIDEO, *other) == 0
    assert (tmp_path / "d0.5_e7_n2" / "0020.png").read_bytes() != flag_video["0020.png"]


# Two processes

SLOW_SECOND_PROCESS = """
import os, time
import sag_distribution_alignment as script
from utils.cli import run_script

if os.environ["RANK"] == "1":  # it comes last to every renaming
    replace = os.replace
    os.replace = lambda *paths: (time.sleep(0.5), replace(*paths))[1]
run_script(script.main)
"""


def test_two_processes_write_one_checkpoint(tmp_path: Path):
    single, double = tmp_path / "single", tmp_path / "double"
    assert call(ALIGN, *train(single, "--max_train_steps", 2, "--train_batch_size", 2)) == 0
    (tmp_path / "script.py").write_text(SLOW_SECOND_PROCESS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "script.py")]
    command = [sys.executable, *launch, *words(*train(double, "--max_train_steps", 2))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert result.returncode == 0, result.stderr
    assert contents(double, "random_states").keys() == contents(single, "random_states").keys()
    losses = [np.loadtxt(folder / "town" / "loss.csv", delimiter=",", skiprows=1) for folder in (single, double)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


# The published example


@pytest.mark.skipif(not (DATA / "sampleA").is_dir(), reason="the published example is not here")
def test_published_example(tmp_path: Path):
    made = []
    for name in ("first", "second"):
        scene = shutil.copytree(DATA / "sampleA", tmp_path / name / "sampleA", copy_function=shutil.copyfile)
        for folder in (scene, *(path for path in scene.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        loras = tmp_path / name / "loras"
        picture = ("--path_image", DATA / "references" / "spatown.png")
        assert call(ALIGN, *picture, "--pfix", "town", "--output_dir", loras, *QUICK_LORA) == 0
        assert call(ANCHORS, *draw(scene, loras)) == 0
        (views,) = (scene / "multiviews").iterdir()
        assert call(GGI, "--target", views, *QUICK_VIDEO) == 0
        assert len(list(views.glob("image_*.png"))) == 4
        assert len(list((views / VIDEO).glob("0*.png"))) == 138
        assert probe_video(views / VIDEO / "video.mp4")[1] == 136
        made.append(contents(tmp_path / name))
    assert_same(*made)
