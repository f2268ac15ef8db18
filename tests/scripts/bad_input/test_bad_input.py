"""Bad input: exit code 2 and one line that says what is wrong, before a model is loaded, and nothing is written."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.scripts.bad_input.common import Refuse, align, anchors, names, video, write_lora
from tests.support.helpers import GGI, write_picture
from tests.support.scenes import make_scene
from utils.layout import anchor_path


def cut(path: Path) -> None:
    """Cut a file to its first half, as an interrupted copy leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_map(path: Path, size: tuple[int, int] = (72, 48), channels: int = 3, dtype: type = np.uint16) -> None:
    cv2.imwrite(str(path), np.zeros((size[1], size[0], channels), dtype))


BROKEN_SCENES = {
    "missing folder": (lambda s: shutil.rmtree(s), ["scene", "does not exist"]),
    "no arcs": (lambda s: shutil.rmtree(s / "arc0"), ["holds no arcs"]),
    "gap between arcs": (lambda s: (s / "arc0").rename(s / "arc1"), ["arc0"]),
    "gap in the frames": (lambda s: (s / "arc0/hed/0007.png").unlink(), ["0007.png", "missing"]),
    "gap in the maps": (lambda s: (s / "arc0/corres/0019.png").unlink(), ["0019.png", "missing"]),
    "no end map": (lambda s: (s / "arc0/corres_end.png").unlink(), ["corres_end.png", "missing"]),
    "no frames at all": (lambda s: shutil.rmtree(s / "arc0/hed"), ["0001.png", "missing"]),
    "frame too many": (lambda s: shutil.copy(s / "arc0/hed/0046.png", s / "arc0/hed/0047.png"), ["0047.png"]),
    "unreadable frame": (lambda s: (s / "arc0/hed/0011.png").write_bytes(b"no picture"), ["0011.png"]),
    "cut frame": (lambda s: cut(s / "arc0/hed/0012.png"), ["0012.png"]),
    "frame of another size": (
        lambda s: write_picture(s / "arc0/hed/0030.png", 80, 48),
        ["0030.png", "80x48", "72x48"],
    ),
    "unreadable map": (lambda s: (s / "arc0/corres/0004.png").write_bytes(b"no picture"), ["0004.png"]),
    "empty map": (lambda s: (s / "arc0/corres/0004.png").write_bytes(b""), ["0004.png"]),
    "cut map": (lambda s: cut(s / "arc0/corres/0031.png"), ["0031.png"]),
    "8-bit map": (lambda s: write_map(s / "arc0/corres/0046.png", dtype=np.uint8), ["0046.png", "16-bit", "uint8"]),
    "grey map": (lambda s: write_map(s / "arc0/corres_end.png", channels=1), ["corres_end.png", "1 channel"]),
    "map of another size": (lambda s: write_map(s / "arc0/corres/0008.png", (80, 48)), ["0008.png", "80x48", "72x48"]),
}


@pytest.mark.parametrize("case", BROKEN_SCENES)
def test_broken_scene(case: str, scene: Path, views: Path, loras: Path, refuse: Refuse):
    damage, telling = BROKEN_SCENES[case]
    damage(scene)
    before = names(scene.parent)
    refuse(*anchors(scene, loras), telling=telling)
    refuse(*video(scene, views), telling=telling)
    assert names(scene.parent) == before


def test_lora_that_is_not_there(scene: Path, loras: Path, tmp_path: Path, refuse: Refuse):
    refuse(*anchors(scene, loras, "--pfix", "twon"), telling=("twon", "town (epochs 100, 400)", "wide (epochs 400)"))
    refuse(*anchors(scene, loras, "--epoch", 300), telling=("checkpoint-300", "epochs 100, 400"))
    refuse(*anchors(scene, tmp_path / "empty"), telling=("no LoRA",))
    half = shutil.copytree(loras, tmp_path / "half")
    (half / "town" / "checkpoint-400" / "controlnet.lora.safetensors").unlink()
    refuse(*anchors(scene, half), telling=("controlnet.lora.safetensors",))


def test_lora_of_another_shape(scene: Path, loras: Path, tmp_path: Path, refuse: Refuse):
    refuse(*anchors(scene, loras, "--pfix", "wide"), telling=("wide", "lora.safetensors", "192", "144"))
    folder = tmp_path / "swapped" / "town" / "checkpoint-400"
    folder.mkdir(parents=True)
    flux, controlnet = "lora.safetensors", "controlnet.lora.safetensors"
    source = loras / "town" / "checkpoint-400"
    shutil.copy(source / flux, folder / controlnet)
    shutil.copy(source / controlnet, folder / flux)
    refuse(*anchors(scene, tmp_path / "swapped"), telling=("does not fit",))


def test_loras_of_several_ranks(scene: Path, tmp_path: Path, refuse: Refuse):
    for name, rank in (("a", 4), ("b", 8)):
        write_lora(tmp_path / "loras" / name / "checkpoint-400", rank)
    command = anchors(scene, tmp_path / "loras", "--pfix", "a", "b")
    refuse(*command, telling=("LoRAs of several ranks ({'a': [4, 4], 'b': [8, 8]})",))


@pytest.mark.parametrize("case", ["no tensors", "other tensors", "cut", "no safetensors"])
def test_lora_that_is_none(scene: Path, loras: Path, tmp_path: Path, case: str, refuse: Refuse):
    copy = shutil.copytree(loras, tmp_path / "loras")
    path = copy / "town" / "checkpoint-400" / "lora.safetensors"
    {
        "no tensors": lambda: save_file({}, path),
        "other tensors": lambda: save_file({"conv_in.weight": torch.zeros(3)}, path),
        "cut": lambda: cut(path),
        "no safetensors": lambda: path.write_bytes(b"<html>not found</html>"),
    }[case]()
    refuse(*anchors(scene, copy), telling=(path,))
    assert not (scene / "multiviews").exists()


def test_wrong_number_of_prompts(scene: Path, loras: Path, picture: Path, refuse: Refuse):
    refuse(*anchors(scene, loras, "--prompt", "a", "b", "c"), telling=("3 prompts", "2 anchors"))
    refuse(*align(picture, "--prompt", "a", "b"), telling=("--prompt", "2 value(s)", "1 picture(s)"))
    refuse(*align(picture, "--path_edges", picture, picture), telling=("--path_edges", "2 value(s)"))


def test_no_prompt_and_no_caption_model(scene: Path, views: Path, refuse: Refuse):
    without = ("--target", views, "--scene", scene)
    refuse(GGI, *without, telling=("no --prompt", "give --prompt", "''"))
    missing = views / "no model"
    refuse(GGI, *without, "--caption_model", missing, telling=("give --prompt", missing))
    assert not list(views.glob("d0*"))


def test_reference_picture(picture: Path, tmp_path: Path, refuse: Refuse):
    refuse(*align(tmp_path / "nowhere.png"), telling=("nowhere.png", "does not exist"))
    small = write_picture(tmp_path / "small.png", 100, 90)
    refuse(*align(small), telling=("small.png", "100x90", "144", "too small"))
    refuse(*align(picture, "--resolution", 208), telling=("picture.png", "200x160", "208"))
    refuse(*align(picture, "--path_edges", small), telling=("small.png", "100x90", "200x160"))
    refuse(*align(picture, "--resolution", 8), telling=("--resolution 8", "16"))
    cut(picture)
    refuse(*align(picture), telling=("picture.png", "cannot be read"))
    assert not (tmp_path / "out").exists()


def test_edge_frames_too_small_for_the_full_weights(tmp_path: Path, loras: Path, refuse: Refuse):
    scene = make_scene(tmp_path / "small", edge_size=(72, 12), map_size=(72, 12))
    refuse(*anchors(scene, loras, "--weights", "full"), telling=("too small", "64x0", "16"))


def test_anchors_of_a_run(scene: Path, views: Path, refuse: Refuse):
    refuse(*video(scene, views / "nowhere"), telling=("nowhere", "does not exist"))
    refuse(GGI, "--target", views, "--prompt", "", telling=("--scene",))
    third = write_picture(anchor_path(views, 2), 144, 96)
    refuse(*video(scene, views), telling=("image_02.png", "2 anchors"))
    third.unlink()
    cut(anchor_path(views, 1))
    refuse(*video(scene, views), telling=("image_01.png", "cannot be read"))
    anchor_path(views, 1).unlink()
    refuse(*video(scene, views), telling=("image_01.png", "missing"))
