"""All of train_ggi.py: bad input, killed and distributed runs, and the files that they write."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

import ggi
from models.inbetween.backbones import check_size
from models.inbetween.training import load_start, new_transformer
from models.loading.files import load_ggi_transformer
from models.weights import Preset, find_inbetween
from tests.support.clips import TRAIN, WEIGHTS, arguments, weights_of, write_lora
from tests.support.helpers import call, forbid_models, kill_at, run, words
from tests.support.small import HEIGHT, SIZE, WIDTH, small_preset
from utils.cli import InputError
from utils.data.flow import check_flow
from utils.files import read_json
from utils.images import read_image, write_image
from utils.runs import MANIFEST

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def preset() -> Preset:
    return small_preset()


@pytest.fixture
def transformer(preset: Preset) -> CogVideoXTransformer3DModel:
    """Other random weights of the small architecture."""
    return new_transformer(read_json(Path(preset.ggi_transformer) / "config.json"), seed=0)


# Bad input: one line, exit code 2, no model


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path, preset) -> Callable:
    forbid_models(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def check(*arguments: object, telling: tuple = ()) -> None:
        output = tmp_path / "output"
        capfd.readouterr()
        code = call(TRAIN, "--output_dir", output, "--cache_dir", output.with_name("cache"), *arguments)
        error = capfd.readouterr().err
        assert code == 2, error
        assert error.startswith("error: ") and len(error.splitlines()) == 1, error
        assert not output.exists()
        for word in telling:
            assert str(word) in error

    return check


def folder_with(folder: Path, count: int = 46, size: tuple[int, int] = SIZE) -> Path:
    """A dataset of one clip, `x`, of plain pictures."""
    for i in range(count):
        write_image(folder / "x" / f"{i:03d}.png", np.zeros((size[1], size[0], 3), np.uint8))
    return folder


def test_missing_and_empty_datasets(refuse, tmp_path):
    refuse("--dataset", tmp_path / "nothing", telling=("nothing", "is not a folder"))
    (tmp_path / "empty").mkdir()
    refuse("--dataset", tmp_path / "empty", telling=("empty", "holds no clips"))


def test_short_and_small_clips(refuse, tmp_path):
    short = folder_with(tmp_path / "short", count=45)
    refuse("--dataset", short, telling=("clip x has 45 frames", "46"))
    refuse("--dataset", folder_with(tmp_path / "long"), "--stride", 2, telling=("46 frames", "91"))
    refuse(
        "--dataset",
        folder_with(tmp_path / "small", size=(WIDTH - 1, HEIGHT)),
        telling=(f"{WIDTH - 1}x{HEIGHT}", "never enlarged"),
    )


def test_unreadable_clips(refuse, tmp_path):
    pictures = folder_with(tmp_path / "pictures")
    (pictures / "x" / "000.png").write_bytes(b"no picture")
    refuse("--dataset", pictures, telling=("000.png", "cannot be read"))
    odd = folder_with(tmp_path / "odd")
    write_image(odd / "x" / "045.png", np.zeros((100, 144, 3), np.uint8))
    refuse("--dataset", odd, telling=("045.png", "144x100"))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v.mp4").write_bytes(b"no video" * 100)
    refuse("--dataset", tmp_path / "videos", telling=("v.mp4", "cannot be read as a video"))


def test_captions_that_do_not_fit(refuse, tmp_path):
    dataset, captions = folder_with(tmp_path / "clips"), tmp_path / "captions.json"
    for text, telling in (
        ("{}", "no caption for clip x"),
        ("[1]", "must be {id: caption}"),
        ('{"x": 1}', "must be {id: caption}"),
        ("{", "not valid JSON"),
        ('{"x": "\\ud83d"}', "half a character"),
    ):
        captions.write_text(text)
        refuse("--dataset", dataset, "--captions", captions, telling=(telling,))
    refuse("--dataset", dataset, "--captions", tmp_path / "none.json", telling=("none.json",))
    (tmp_path / "c.csv").write_text("name,text\nx,y\n")
    refuse("--dataset", dataset, "--captions", tmp_path / "c.csv", telling=("columns id and caption",))


def test_flags_that_do_not_go_together(refuse, tmp_path):
    dataset = folder_with(tmp_path / "clips")
    refuse("--dataset", dataset, "--clips", 3, telling=("--clips",))
    refuse("--dataset", "synthetic", "--stride", 2, telling=("--stride", "synthetic"))
    refuse("--dataset", dataset, "--lora", tmp_path / "none.safetensors", telling=("none.safetensors",))
    refuse("--dataset", dataset, "--init_from", tmp_path, telling=("config.json is missing",))
    refuse("--dataset", dataset, "--caption_dropout", 2, telling=("--caption_dropout",))


def test_networks_that_are_not_installed(refuse, tmp_path):
    dataset = folder_with(tmp_path / "clips")
    refuse("--dataset", dataset, "--flow", "raft", telling=("128 pixels", f"{WIDTH}x{HEIGHT}"))
    if importlib.util.find_spec("controlnet_aux") is None:
        refuse("--dataset", dataset, "--edges", "hed", telling=("pip install controlnet_aux",))
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(InputError, match="pip install torchvision"):
            check_flow("raft", (720, 480))


def test_full_weights_that_are_not_at_hand(refuse, tmp_path):
    dataset = folder_with(tmp_path / "clips", size=(720, 480))
    refuse("--weights", "full", "--edges", "lines", "--dataset", dataset, telling=("cogvideox_vae", "HF_HUB_OFFLINE"))


def test_start_weights_that_cannot_be_trained(refuse, tmp_path, transformer):
    dataset = folder_with(tmp_path / "clips")
    for change, telling in (
        ({"in_channels": 33}, "33 input channels"),
        ({"sample_width": 20}, f"160x{HEIGHT}"),
        ({"temporal_compression_ratio": 8}, "97"),
        ({"_class_name": "Other"}, "holds Other; CogVideoXTransformer3DModel is needed"),
    ):
        config = {**transformer.config, "_class_name": "CogVideoXTransformer3DModel"} | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        refuse("--dataset", dataset, "--init_from", tmp_path, "--from_scratch", telling=(telling,))


# The whole script


def tensors_below(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a cache. Files of equal tensors can differ: the order in a safetensors header is random."""
    files = folder.glob("*/*.safetensors")
    parts = {file.relative_to(folder): load_file(file) for file in files}  # maps the files, hence the clones
    return {f"{file}:{key}": value.clone() for file, part in parts.items() for key, value in part.items()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Four steps without interruption, by the real command."""
    folder = tmp_path_factory.mktemp("trained")
    result = run(TRAIN, *arguments(dataset, folder, 4, "--train_batch_size", 2))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(folder / "run" / "checkpoint-4")
    return folder


@slow
def test_ggi_finds_what_was_trained(trained, preset, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", words("ggi.py", "--target", "x", "--model_path", trained / "run", "--epoch", 2)[4:]
    )
    args = ggi.parse_args()
    folder = find_inbetween(preset, args.model_path, args.epoch)
    assert folder == trained / "run" / "checkpoint-2" / "transformer"
    args.width, args.height, args.num_frames = *preset.video_size, preset.num_frames
    check_size(args, read_json(folder / "config.json"))
    found = load_ggi_transformer(folder, torch.float32).state_dict()
    before = load_start(Path(preset.ggi_transformer)).state_dict()
    same = [name for name in before if torch.equal(found[name], before[name])]
    assert set(same) <= {"patch_embed.pos_embedding"}, same


@slow
def test_sheet_losses_and_manifest(trained):
    sheet = read_image(trained / "run" / "samples" / "000004.png")
    assert sheet.shape[1] == 8 * 180 and sheet.std() > 10
    rows = (trained / "run" / "loss.csv").read_text().splitlines()
    assert len(rows) == 5
    manifest = read_json(trained / "run" / MANIFEST)
    assert manifest["finished"] and manifest["weights"].keys() == {"cogvideox_vae", "cogvideox_text", "start"}
    assert manifest["arguments"]["clips"]["count"] == 2


@slow
def test_a_killed_run_goes_on_to_the_same_weights(trained, dataset, tmp_path, capfd):
    """Also with a damaged cache: the damaged file is made again, the others are not touched."""
    cache = shutil.copytree(dataset.with_name("cache"), tmp_path / "cache")
    command = arguments(dataset, tmp_path, 4, "--train_batch_size", 2, "--cache_dir", cache)
    kill_at(tmp_path / "run" / "checkpoint-2", TRAIN, *command)
    damaged, *others = sorted(cache.glob("clips-*/*.safetensors"))
    whole, times = tensors_below(cache), [path.stat().st_mtime_ns for path in others]
    damaged.write_bytes(damaged.read_bytes()[:1000])

    assert call(TRAIN, *command) == 0
    assert f"{damaged} is damaged" in capfd.readouterr().err
    assert_equal(tensors_below(cache), whole)
    assert [path.stat().st_mtime_ns for path in others] == times
    assert_equal(weights_of(tmp_path, 4), weights_of(trained, 4))


@slow
def test_a_finished_run_says_so(trained, dataset, monkeypatch, capsys):
    forbid_models(monkeypatch)
    assert call(TRAIN, *arguments(dataset, trained, 4, "--train_batch_size", 2)) == 0
    assert "is finished" in capsys.readouterr().out
    assert call(TRAIN, *arguments(dataset, trained, 4, "--train_batch_size", 2, "--seed", 1)) == 2
    assert "other arguments (seed" in capsys.readouterr().err


@slow
def test_two_processes_are_one(trained, dataset, tmp_path, preset):
    """They also divide the encoding: the cache is made again, the same as by one process."""
    cache = tmp_path / "cache"
    command = arguments(dataset, tmp_path, 4, "--train_batch_size", 1, "--cache_dir", cache)
    result = run(TRAIN, *command, processes=2)
    assert result.returncode == 0, result.stderr
    assert_equal(tensors_below(cache), tensors_below(dataset.with_name("cache")))
    one, two = weights_of(trained, 4), weights_of(tmp_path, 4)
    start = load_file(Path(preset.ggi_transformer) / WEIGHTS)
    moved = max((one[name] - start[name].float()).abs().max() for name in one)
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    assert moved > 1e-3 and apart.mean() < 0.02 * moved


@slow
def test_from_scratch_and_lora(dataset, tmp_path, transformer, preset):
    lora = write_lora(tmp_path / "lora.safetensors", transformer)
    scratch = ("--from_scratch", "--ema_decay", 0.5, "--mixed_precision", "no", "--gradient_checkpointing")
    assert call(TRAIN, *arguments(dataset, tmp_path, 2, *scratch, "--lora", lora)) == 0
    found = weights_of(tmp_path, 2)
    stored = load_file(Path(preset.ggi_transformer) / WEIGHTS)
    assert found.keys() == stored.keys()
    assert "lora" in read_json(tmp_path / "run" / MANIFEST)["weights"]
    key = "transformer_blocks.0.attn1.to_q.weight"
    factors = load_file(lora)
    update = factors[f"transformer.{key.replace('weight', 'lora_B.weight')}"]
    update = update @ factors[f"transformer.{key.replace('weight', 'lora_A.weight')}"]
    distance = (found[key] - transformer.state_dict()[key] - update).abs().max()  # the seed is the fixture's
    assert 0 < distance < 0.05
