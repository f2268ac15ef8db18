"""ggi.py --backbone wan_vace, end to end on a small random Wan VACE."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.scene.preprocess_common import BOXES, SMALL, run_main, write_boxes, write_path
from tests.support.helpers import (
    GGI,
    assert_same,
    assert_whole,
    call,
    contents,
    forbid_models,
    kill_at,
    probe_video,
    run,
    start,
    write_picture,
)
from tests.support.scenes import make_scene
from tests.support.small import HEIGHT, WIDTH
from tests.support.wan import wan_folder
from utils.files import read_json
from utils.images import read_image, resize_image, write_image
from utils.layout import load_scene
from utils.runs import MANIFEST

pytestmark = pytest.mark.slow

VIDEO = "wan_vace_edges_d1.0_n2"
ARCS = 3


def new_target(folder: Path, arcs: int) -> Path:
    """A scene with anchors, which are any pictures."""
    target = make_scene(folder, arcs, edge_size=(72, 48)) / "multiviews" / "run"
    for k in range(arcs + 1):
        write_picture(target / f"image_{k:02d}.png", 72, 48, seed=k)
    return target


def fill(target: Path, *arguments: object) -> tuple:
    networks = ("--weights", "full", "--wan", wan_folder(), "--dtype", "float32")
    short = ("--width", WIDTH, "--height", HEIGHT, "--num_inference_steps", 2, "--prompt", "a town")
    return ("--backbone", "wan_vace", "--target", target, *networks, *short, *arguments)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of three arcs with its video; made by the real command."""
    target = new_target(tmp_path_factory.mktemp("wan") / "scene", ARCS)
    result = run(GGI, *fill(target))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(target / VIDEO / name) for name in ("video.mp4", "contact_sheet.png")]
    return target


def test_frames_video_and_contact_sheet(target: Path):
    folder = target / VIDEO
    assert len(list(folder.glob("[0-9]*.png"))) == 46 * ARCS
    metadata, frames = probe_video(folder / "video.mp4")
    assert (metadata["size"], frames) == ((WIDTH, HEIGHT), 45 * ARCS + 1)
    assert read_image(folder / "contact_sheet.png").std() > 0
    manifest = read_json(folder / MANIFEST)
    assert manifest["finished"] and {"wan_transformer", "wan_vae", "wan_text"} == manifest["weights"].keys()
    assert manifest["arguments"]["backbone"] == "wan_vace" and "noise_sha256" not in manifest["arguments"]
    assert not list(target.parents[1].rglob("noises*"))  # warped noise has no weight


def test_killed_then_continued_by_two_processes(tmp_path: Path, target: Path):
    command = fill(target, "--output_dir", tmp_path)
    kill_at(tmp_path / VIDEO / "0000.png", GGI, *command, begin=partial(start, processes=2))
    assert_whole(tmp_path / VIDEO, contents(target / VIDEO), "latents")
    result = run(GGI, *command, processes=2)
    assert result.returncode == 0, result.stderr
    assert_same(contents(tmp_path / VIDEO), contents(target / VIDEO))


def test_a_finished_run_says_so(target: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    forbid_models(monkeypatch)
    assert call(GGI, *fill(target)) == 0
    assert "is finished" in capsys.readouterr().out


REFUSED = {
    ("--num_frames", 81): "--num_frames 81: an arc and its padding are 49 frames",
    ("--cache", 0.1): "--cache does not go with Wan VACE",
    ("--weights", "tiny"): "--weights tiny has no Wan VACE",
    ("--width", 50): "50x32: width and height must be multiples of 16",
    ("--control", "depth"): "preprocess.py --passes depth",
    ("--lora", "none.safetensors"): "--lora none.safetensors does not exist",
    ("--style_reference", "none.png"): "--style_reference none.png does not exist",
    ("--epoch", 2): "unrecognized arguments: --epoch 2",
    ("--composite",): "has no scene.glb",
    ("--num_replacement", 3): "there are 2 steps in all",
    ("--attention", "cudnn"): "--attention cudnn: cpu has no such kernel",
    ("--wan", "./nowhere"): "./nowhere does not exist",
}


@pytest.mark.parametrize("flags", REFUSED, ids=lambda flags: flags[0])
def test_refused_in_one_line(
    tmp_path: Path, target: Path, flags: tuple, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    forbid_models(monkeypatch)
    assert call(GGI, *fill(target, "--output_dir", tmp_path, *flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and REFUSED[flags] in error
    assert not list(tmp_path.iterdir())


def test_flags_of_wan_are_none_of_the_papers_model(target: Path, capsys: pytest.CaptureFixture):
    assert call(GGI, "--target", target, "--control", "edges") == 2
    assert "unrecognized arguments: --control edges" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["no file of weights", "of another model", "of another width", "with a stray key"])
def test_a_lora_that_does_not_fit_is_refused(tmp_path: Path, target: Path, kind: str, capsys: pytest.CaptureFixture):
    path, name = tmp_path / "lora.safetensors", "transformer.blocks.0.attn1.to_q"
    if kind == "of another model":
        name = "transformer.transformer_blocks.0.attn1.to_q"
    width = 32 if kind == "of another width" else 24
    state = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}
    if kind == "with a stray key":
        state["transformer.blocks.0.attn1.to_x.lora_A.weight"] = torch.ones(2, width)
    save_file(state, path)
    if kind == "no file of weights":
        path.write_bytes(b"no weights")
    flags = ("--lora", tmp_path / "lora.safetensors", "--output_dir", tmp_path / "out")
    assert call(GGI, *fill(target, *flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "lora.safetensors" in error


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A scene of one arc, with depth, and its video."""
    target = new_target(tmp_path_factory.mktemp("one") / "scene", 1)
    (arc,) = load_scene(target.parents[1]).arcs
    for number, path in enumerate(arc.control_paths("depth")):
        path.parent.mkdir(exist_ok=True)
        write_image(path, np.add.outer(np.arange(48), np.arange(72) + number).astype(np.uint16) * 300)
    assert call(GGI, *fill(target)) == 0
    return target, contents(target / VIDEO)


FLAGS = [
    ("--control", "depth"),
    ("--control_weight", 0.5),
    ("--latent_mask", "groups"),
    ("--degradation", 0.5),
    ("--flow_shift", 5),
    ("--guidance_scale", 2),
    ("--neg_prompt", "fog"),
    ("--seed", 1),
    ("--num_inference_steps", 3),
    ("--style_reference", "STYLE"),
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags[0])
def test_flag_changes_the_video(tmp_path: Path, one: tuple[Path, dict[str, bytes]], flags: tuple):
    target, before = one
    if flags[1] == "STYLE":
        flags = (flags[0], write_picture(tmp_path / "style.png"))
    assert call(GGI, *fill(target, "--output_dir", tmp_path / "out", *flags)) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "0020.png").read_bytes() != before["0020.png"]


def test_carried_anchors_guide_and_are_put_over(tmp_path: Path):
    mesh, cameras = write_boxes(tmp_path / "boxes.glb", *BOXES, up="y"), write_path(tmp_path / "path.json")
    scene = tmp_path / "scene"
    with pytest.MonkeyPatch.context() as patch:
        assert (
            run_main(patch, "--scene", mesh, "--cameras", cameras, "--output", scene, *SMALL, "--passes", "depth") == 0
        )
    target = scene / "multiviews" / "run"
    for k in (0, 1):
        write_picture(target / f"image_{k:02d}.png", 72, 48, seed=k)
    pictures = {}
    for flags in ((), ("--num_replacement", 2), ("--composite",), ("--colour_match",)):
        folder = tmp_path / "out" / "".join(map(str, flags))
        assert call(GGI, *fill(target, "--control", "depth", "--output_dir", folder, *flags)) == 0
        frame = folder / VIDEO.replace("edges", "depth") / "0000.png"
        pictures[flags] = read_image(frame).astype(int)
    anchor = resize_image(read_image(target / "image_00.png"), WIDTH, HEIGHT).astype(int)
    distance = {flags: np.abs(picture - anchor).mean() for flags, picture in pictures.items()}
    assert distance["--composite",] < 2 < distance[()]
    assert distance["--num_replacement", 2] != distance[()] != distance["--colour_match",]


def test_arcs_are_chained_only_when_asked(tmp_path: Path, target: Path):
    assert call(GGI, *fill(target, "--output_dir", tmp_path, "--chain")) == 0
    before, after = contents(target / VIDEO), contents(tmp_path / VIDEO)
    assert after["0010.png"] == before["0010.png"]
    assert after["0060.png"] != before["0060.png"]


def test_edges_of_another_aspect_are_stretched_with_a_word(
    tmp_path: Path, one: tuple[Path, dict[str, bytes]], capsys: pytest.CaptureFixture
):
    for height, told in ((HEIGHT, False), (48, True)):
        assert call(GGI, *fill(one[0], "--output_dir", tmp_path / f"{height}", "--height", height)) == 0
        assert ("edges of 72x48 are stretched to 48x48" in capsys.readouterr().err) == told


def test_size_is_the_preset_that_fits_the_edges(tmp_path: Path):
    from ggi import parse_args, prepare

    for edges, wanted in {(72, 48): (720, 480), (104, 60): (832, 480), (104, 104): (720, 480)}.items():
        scene = make_scene(tmp_path / f"{edges}", 1, edge_size=edges)
        (scene / "multiviews" / "run").mkdir(parents=True)
        args = parse_args(["--backbone", "wan_vace", "--target", str(scene / "multiviews" / "run")])
        prepare(args)
        assert (args.width, args.height, args.num_frames) == (*wanted, 49)
        shutil.rmtree(scene)
