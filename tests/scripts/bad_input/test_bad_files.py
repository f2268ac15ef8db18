"""Bad input: exit code 2 and one line that says what is wrong, before a model is loaded, and nothing is written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.weights import WEIGHTS
from tests.scripts.bad_input.common import Refuse, align, anchors, names, video
from tests.support.helpers import ALIGN, ANCHORS, GGI, ROOT, forbid_models, words
from tests.support.helpers import call_shipped as call
from tests.support.scenes import make_scene
from utils.files import read_json
from utils.runs import MANIFEST

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_noise_that_is_not_finite(scene: Path, views: Path, value: float, refuse: Refuse):
    noise = np.zeros((13, 12, 18, 16), np.float32)
    noise[4, 3, 2, 1] = value
    np.save(scene / "arc0" / "noises_18x12.npy", noise)
    refuse(*video(scene, views), telling=("noises_18x12.npy", "not finite"))


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
