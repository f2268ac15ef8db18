"""The three scripts end to end: files, bytes, the same command again, and the published example."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from models.flux.lora import lora_targets
from models.weights import load_preset
from tests.support.helpers import (
    ALIGN,
    ANCHORS,
    DATA,
    GGI,
    assert_same,
    assert_whole,
    call,
    contents,
    forbid_models,
    probe_video,
    write_picture,
)
from tests.support.scenes import make_scene
from tests.support.small import LATENT_SIZE, SIZE, small_weights
from tests.support.stages import (
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
from utils.files import read_json
from utils.images import read_image
from utils.runs import MANIFEST

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


@pytest.mark.parametrize("name, double_blocks, single_blocks", [("lora", 2, 1), ("controlnet.lora", 2, 0)])
def test_loras_have_the_references_keys_in_bfloat16(loras: Path, name: str, double_blocks: int, single_blocks: int):
    early, late = (load_file(loras / "town" / f"checkpoint-{step}" / f"{name}.safetensors") for step in (2, 4))
    double = r"double_blocks\.\d+\.processor\.(qkv|proj)_lora[12]\.(down|up)\.weight"
    single = r"single_blocks\.[1-4]\.processor\.(qkv|proj)_lora\.(down|up)\.weight"
    assert all(re.fullmatch(f"{double}|{single}", key) for key in late)
    assert len(late) == 8 * double_blocks + 4 * single_blocks
    assert {str(tensor.dtype) for tensor in late.values()} == {"torch.bfloat16"}
    assert early.keys() == late.keys()
    still = {key for key in late if (early[key] == late[key]).all()}
    unused = "double_blocks.1.processor.proj_lora2"  # the ControlNet's last text output is unused
    assert still == ({f"{unused}.{factor}.weight" for factor in ("down", "up")} if name != "lora" else set())


def test_all_double_and_four_single_blocks_carry_loras():
    sizes = {"num_layers": 3, "num_single_layers": 6, "num_attention_heads": 3, "attention_head_dim": 64}
    blocks = {".".join(name.split(".")[:2]) for name in lora_targets(sizes)}
    single = {f"single_transformer_blocks.{i}" for i in (1, 2, 3, 4)}
    assert blocks == single | {f"transformer_blocks.{i}" for i in range(3)}


def test_anchors_of_every_arc(anchored: Path):
    folder = anchored / "multiviews" / RUN
    anchors = [f"image_{k:02d}.png" for k in range(NUM_ARCS + 1)]
    beside = [f"{name}_{k:02d}.png" for name in ("warped_x", "mask") for k in range(1, NUM_ARCS + 1)]
    assert {p.name for p in folder.iterdir()} == {*anchors, *beside, "contact_sheet.png", MANIFEST}
    pictures = [read_image(folder / name) for name in anchors]
    assert {picture.shape for picture in pictures} == {(*SIZE[::-1], 3)}
    assert all(picture.std() > 1 for picture in pictures)
    assert (pictures[0] != pictures[1]).any() and (pictures[1] != pictures[2]).any()
    mask = read_image(folder / "mask_01.png")
    assert set(np.unique(mask)) == {0, 255}
    # The mask covers the pixels that receive no colour: they are black in the warped anchor.
    assert (mask[(read_image(folder / "warped_x_01.png") == 0).all(-1)] == 255).mean() > 0.95
    manifest = read_json(folder / MANIFEST)
    assert manifest["finished"] and manifest["arguments"]["seed"] == 1


def test_video_of_every_arc(filmed: Path):
    folder = filmed / "multiviews" / RUN / VIDEO
    numbered = [f"{i:04d}.png" for i in range(46 * NUM_ARCS)]
    others = {"chain", "page", "video.mp4", "contact_sheet.png", "index.html", MANIFEST}
    assert {p.name for p in folder.iterdir()} == {*numbered, *others}
    frames = [read_image(folder / name) for name in numbered]
    assert {frame.shape for frame in frames} == {(*SIZE[::-1], 3)}
    metadata, count = probe_video(folder / "video.mp4")
    assert count == 45 * NUM_ARCS + 1
    assert metadata["codec"] == "h264" and metadata["pix_fmt"].startswith("yuv420p")
    assert metadata["fps"] == 12 and metadata["size"] == SIZE
    manifest = read_json(folder / MANIFEST)
    assert manifest["finished"] and manifest["prompt"] == PROMPT
    for arc in range(NUM_ARCS):
        noise = np.load(filmed / f"arc{arc}" / "noises_{}x{}.npy".format(*LATENT_SIZE), allow_pickle=False)
        assert noise.shape == (13, *LATENT_SIZE[::-1], 16) and noise.dtype == np.float32


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
    """When a folder of weights gets other contents, results of the old ones do not count as done."""
    with small_weights():
        weights = shutil.copytree(load_preset("tiny").cogvideox, tmp_path / "weights")
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
        # The run lies outside its scene; its manifest names the scene's folder.
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
