"""Bad input: exit code 2 and one line that says what is wrong, before a model is loaded, and nothing is written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.flux.lora import lora_targets
from models.loading.keymaps import lora_from_peft
from models.weights import WEIGHTS
from tests.helpers import ALIGN, ANCHORS, GGI, ROOT, forbid_models, words, write_picture
from tests.helpers import call_shipped as call
from tests.scenes import make_scene
from utils.files import read_json
from utils.layout import anchor_path
from utils.runs import MANIFEST

Refuse = Callable[..., None]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Refuse:
    """Call a script and make sure that it refuses in one line, holding all `telling` words."""
    forbid_models(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capfd.readouterr()

    def check(script: str, *arguments: object, telling: tuple = ()) -> None:
        code = call(script, *arguments)
        error = capfd.readouterr().err
        assert code == 2, error
        assert error.startswith("error: ") and len(error.splitlines()) == 1, error
        for word in telling:
            assert str(word) in error

    return check


def write_lora(folder: Path, rank: int = 4, **other: int) -> None:
    """Zeros in the shape of a LoRA for the tiny weights, or for models of an `other` config."""
    folder.mkdir(parents=True)
    for name, part in (("lora", "flux/transformer"), ("controlnet.lora", "controlnet")):
        config = read_json(WEIGHTS / "tiny" / part / "config.json") | other
        state = {}
        for target, (features, out) in lora_targets(config).items():
            state[f"{target}.lora_A.weight"] = torch.zeros(rank, features)
            state[f"{target}.lora_B.weight"] = torch.zeros(out, rank)
        save_file(lora_from_peft(state), folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "town" / "checkpoint-100")
    write_lora(folder / "town" / "checkpoint-400")
    write_lora(folder / "wide" / "checkpoint-400", attention_head_dim=48)
    return folder


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return make_scene(tmp_path / "scene")


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """A folder with the anchors of one arc, outside of the scene."""
    for k in range(2):
        write_picture(anchor_path(tmp_path / "views", k), 144, 96, seed=k)
    return tmp_path / "views"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_picture(tmp_path / "picture.png")


def names(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def anchors(scene: Path, loras: Path, *arguments: object) -> tuple:
    return (ANCHORS, "--target", scene, "--pfix", "town", "--loras", loras, "--seed", 1, *arguments)


def video(scene: Path, views: Path, *arguments: object) -> tuple:
    return (GGI, "--target", views, "--scene", scene, "--prompt", "a town", *arguments)


def align(picture: Path, *arguments: object) -> tuple:
    return (ALIGN, "--path_image", picture, "--pfix", "new", "--output_dir", picture.parent / "out", *arguments)


# The scene


def cut(path: Path) -> None:
    """The first half of a file, as an interrupted copy leaves it."""
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


# LoRAs


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


# Prompts


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


# Pictures


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


# Sizes


@pytest.mark.parametrize("flag, value", [("--width", 150), ("--height", 100)])
def test_anchor_size_that_the_model_cannot_do(scene: Path, loras: Path, flag: str, value: int, refuse: Refuse):
    refuse(*anchors(scene, loras, flag, value), telling=(f"{flag} {value}", "multiple of 16"))


@pytest.mark.parametrize(
    "flags, telling",
    [
        (("--width", 160), ("160x96", "144x96")),
        (("--height", 112), ("144x112", "144x96")),
        (("--num_frames", 53), ("53", "49")),
        (("--num_frames", 1), ("--num_frames 1", "49")),
    ],
)
def test_video_size_that_the_model_cannot_do(scene: Path, views: Path, flags: tuple, telling: tuple, refuse: Refuse):
    refuse(*video(scene, views, *flags), telling=telling)


def test_maps_that_no_latents_fit(tmp_path: Path, views: Path, refuse: Refuse):
    scene = make_scene(tmp_path / "odd", map_size=(70, 48))
    refuse(*video(scene, views), telling=("18x12", "70x48"))


# Noise


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_noise_that_is_not_finite(scene: Path, views: Path, value: float, refuse: Refuse):
    noise = np.zeros((13, 12, 18, 16), np.float32)
    noise[4, 3, 2, 1] = value
    np.save(scene / "arc0" / "noises_18x12.npy", noise)
    refuse(*video(scene, views), telling=("noises_18x12.npy", "not finite"))


# Places


def test_read_only_output(scene: Path, views: Path, loras: Path, picture: Path, tmp_path: Path, refuse: Refuse):
    (tmp_path / "out").mkdir()
    folders = (scene, views, tmp_path / "out")
    before = names(tmp_path)
    for folder in folders:
        folder.chmod(0o555)
    try:
        refuse(*anchors(scene, loras), telling=(scene, "read-only", "write elsewhere"))
        refuse(*video(scene, views), telling=(views, "read-only", "write elsewhere"))
        refuse(*align(picture), telling=("out", "read-only", "write elsewhere"))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert [path for path in names(tmp_path) if "noises" not in path.name] == before


def test_output_is_a_file(scene: Path, views: Path, loras: Path, picture: Path, tmp_path: Path, refuse: Refuse):
    for command in (anchors(scene, loras), video(scene, views), align(picture)):
        refuse(*command, "--output_dir", picture, telling=(picture, "not a folder"))


def test_folder_with_other_files(picture: Path, tmp_path: Path, refuse: Refuse):
    folder = tmp_path / "out" / "new"
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").write_bytes(b"precious")
    refuse(*align(picture), telling=(folder, MANIFEST, "--overwrite"))
    for content in ("{", json.dumps([1])):
        (folder / MANIFEST).write_text(content)
        refuse(*align(picture), telling=(folder / MANIFEST, "JSON"))
    assert (folder / "holiday.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_name_of_a_lora_is_one_folder_name(picture: Path, name: str, refuse: Refuse):
    # Else --overwrite removes the folder of all LoRAs, or the one around it.
    refuse(*align(picture, "--pfix", name, "--overwrite"), telling=("--pfix",))


# Weights and devices


def test_weights_that_are_not_there(scene: Path, views: Path, loras: Path, tmp_path: Path, refuse: Refuse):
    nowhere = tmp_path / "nowhere"
    for flag in ("--flux", "--controlnet", "--flux_vae", "--flux_text", "--flux_transformer"):
        refuse(*anchors(scene, loras, flag, nowhere), telling=(nowhere, "does not exist"))
    for flag in ("--cogvideox", "--cogvideox_vae", "--cogvideox_text"):
        refuse(*video(scene, views, flag, nowhere), telling=(nowhere, "does not exist"))
    refuse(*video(scene, views, "--model_path", nowhere), telling=(nowhere, "checkpoint-1350", "--model_path"))
    refuse(*anchors(scene, loras, "--flux", "nobody/nothing"), telling=("nobody/nothing", "HF_HUB_OFFLINE"))


@pytest.mark.parametrize("flag", ["--flux", "--controlnet", "--flux_transformer"])
def test_folder_without_the_models_that_carry_lora(
    scene: Path, loras: Path, tmp_path: Path, flag: str, refuse: Refuse
):
    (tmp_path / "empty").mkdir()
    refuse(*anchors(scene, loras, flag, tmp_path / "empty"), telling=(tmp_path / "empty", "missing"))


@pytest.mark.parametrize("flag", ["--flux_vae", "--flux_text", "--cogvideox_vae", "--cogvideox_text"])
def test_folder_without_other_weights(
    scene: Path, views: Path, loras: Path, tmp_path: Path, flag: str, capfd: pytest.CaptureFixture
):
    (tmp_path / "empty").mkdir()
    before = names(scene), names(views)
    command = anchors(scene, loras) if flag.startswith("--flux") else video(scene, views)
    assert call(*command, flag, tmp_path / "empty") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and str(tmp_path / "empty") in error
    assert ([path for path in names(scene) if "noises" not in path.name], names(views)) == before


def test_transformer_without_edge_channels(scene: Path, views: Path, tmp_path: Path, refuse: Refuse):
    folder = tmp_path / "model" / "checkpoint-1350" / "transformer"
    shutil.copytree(WEIGHTS / "tiny" / "cogvideox" / "transformer", folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"in_channels": 32}))
    refuse(*video(scene, views, "--model_path", tmp_path / "model"), telling=("32", "48"))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NO_CUDA), "cuda:99", "gpu"])
def test_device_that_is_not_there(scene: Path, views: Path, loras: Path, picture: Path, device: str, refuse: Refuse):
    for command in (anchors(scene, loras), video(scene, views), align(picture)):
        refuse(*command, "--device", device, telling=(f"--device {device}",))


@NO_CUDA
def test_attention_kernel_that_the_device_lacks(scene: Path, views: Path, loras: Path, picture: Path, refuse: Refuse):
    for command in (align(picture), anchors(scene, loras), video(scene, views)):
        refuse(*command, "--attention", "cudnn", telling=("--attention cudnn: cpu has no such kernel",))


def test_edge_detector_that_is_not_installed(picture: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "controlnet_aux" else find(name))
    refuse(*align(picture, "--edges", "hed"), telling=("controlnet_aux", "--edges lines"))


# Values that the command line itself refuses: argparse shows the usage before its one line


@pytest.mark.parametrize(
    "script, flags",
    [
        (ALIGN, ("--max_train_steps", "0")),
        (ALIGN, ("--seed", "-1")),
        (ALIGN, ("--seed", str(2**64))),
        (ANCHORS, ("--seed", "-2")),
        (ANCHORS, ("--seed", str(2**64))),
        (ANCHORS, ("--num_steps", "2.5")),
        (ANCHORS, ("--weights", "huge")),
        (GGI, ("--degradation", "1.5")),
        (GGI, ("--degradation", "nan")),
        (GGI, ("--seed", str(2**64))),
        (GGI, ("--fps", "0")),
        (GGI, ("--guidance_scale", "nan")),
        (GGI, ("--guidance_scale", "0.5")),
        (GGI, ("--epoch", "7")),  # of the tiny weights there is one
        (ANCHORS, ("--guidance", "inf")),
        (ANCHORS, ("--device", "mps")),
        (ALIGN, ("--learning_rate", "-1")),
        (ALIGN, ("--learning_rate", "nan")),
        (ALIGN, ("--rank", "0x")),
        (ALIGN, ("--device", "mps")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_value_out_of_range(
    script: str,
    flags: tuple,
    scene: Path,
    views: Path,
    loras: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
):
    forbid_models(monkeypatch)
    _, *command = {ALIGN: align(picture), ANCHORS: anchors(scene, loras), GGI: video(scene, views)}[script]
    assert call(script, *command, *flags) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "error: " in last and flags[0] in last


# As a user sees it


@pytest.mark.parametrize(
    "script, flags",
    [
        (ALIGN, ("--path_image", "nowhere.png", "--pfix", "x")),
        (ANCHORS, ("--target", "nowhere", "--pfix", "x")),
        (GGI, ("--target", "nowhere")),
    ],
)
def test_wrong_path_fails_before_torch_is_imported(script: str, flags: tuple):
    command = [sys.executable, "-X", "importtime", f"{script}.py", *words(*flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    imported = re.findall(r"^import time:.*\| +(\S+)$", result.stderr, re.MULTILINE)
    said = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2
    assert len(said) == 1 and said[0].startswith("error: ") and "nowhere" in said[0]
    assert "argparse" in imported and not {"torch", "diffusers", "transformers"} & set(imported)
