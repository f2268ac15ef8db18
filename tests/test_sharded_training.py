"""Training sharded over two processes (FSDP2, on a CPU: tests/sharded.py) against data-parallel training."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from models.runtime.memory import naming_smaller_mode
from models.runtime.sharding import require_shardable, sharding_plugin
from tests.clips import TRAIN, WEIGHTS, weights_of
from tests.helpers import ALIGN, ROOT, call, end, start_module, words, write_picture
from tests.sharded import launch_environment
from tests.small import small_checkpoints
from utils.cli import InputError
from utils.images import read_image
from utils.layout import LOSS_FILE, STATE_FOLDER

slow = pytest.mark.slow


def launch(script: str, sharded: bool, *arguments: object) -> None:
    """Run a script in two processes on the small weights."""
    program = ("tests.sharded", script) if sharded else (script,)
    result = end(start_module(*program, *words("--mixed_precision", "no", *arguments), processes=2))
    assert result.returncode == 0, result.stderr[-4000:]


def losses(folder: Path) -> list[float]:
    with (folder / LOSS_FILE).open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def names(folder: Path) -> set[str]:
    """Of all files but those of states, whose formats differ."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if f"{STATE_FOLDER}/" not in name and "tfevents" not in name}


def as_fsdp(patch: pytest.MonkeyPatch) -> None:
    for name, value in launch_environment("fsdp").items():
        if "FSDP" in name:
            patch.setenv(name, value)


# --- configurations ---


@pytest.mark.parametrize(("name", "kind"), [("fsdp", DistributedType.FSDP), ("ddp", DistributedType.MULTI_GPU)])
def test_configurations_are_accelerates(name: str, kind: DistributedType):
    config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 2
    environment = launch_environment(name, "--num_processes", "8")
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if name == "fsdp" else None)


def test_the_plugin_is_what_the_configuration_says(monkeypatch: pytest.MonkeyPatch):
    as_fsdp(monkeypatch)
    plugin = sharding_plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and not plugin.cpu_ram_efficient_loading
    assert plugin.transformer_cls_names_to_wrap is None  # the objectives name them
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="fsdp_version: 2"):
        sharding_plugin()


def test_sharding_needs_the_full_mode(monkeypatch: pytest.MonkeyPatch):
    require_shardable("low", "fp16")
    as_fsdp(monkeypatch)
    require_shardable("auto", "bf16")
    with pytest.raises(InputError, match="--memory low does not go with sharded training"):
        require_shardable("low", "bf16")
    with pytest.raises(InputError, match="--mixed_precision fp16 does not go with sharded training"):
        require_shardable("auto", "fp16")
    with (
        pytest.raises(OSError, match="free some, or use a larger card or more of them"),
        naming_smaller_mode("training", "full", sharded=True),
    ):
        raise torch.OutOfMemoryError


@slow
def test_other_trainings_say_that_they_are_not_sharded(tmp_path: Path):
    flags = ("--output_dir", str(tmp_path / "run"), "--mixed_precision", "no")
    result = end(start_module("tests.sharded", "tests.toy_training", *flags, processes=2))
    assert result.returncode != 0 and "this training cannot be sharded" in result.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    as_fsdp(monkeypatch)
    picture = write_picture(tmp_path / "town.png")
    command = ("--path_image", picture, "--pfix", "town", "--output_dir", tmp_path / "loras")
    assert call(ALIGN, *command, "--memory", "balanced") == 2
    assert "does not go with sharded training" in capsys.readouterr().err
    assert call(ALIGN, *command) == 2
    assert "configs/fsdp.yaml needs two GPUs or more" in capsys.readouterr().err
    assert not (tmp_path / "loras").exists()


# --- train_ggi.py ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A dataset of one clip."""
    folder = shutil.copytree(dataset, tmp_path_factory.mktemp("dataset") / "clips")
    shutil.rmtree(folder / "town")
    return folder


def ggi_arguments(dataset: Path, folder: Path) -> tuple:
    """Four steps of two batches, with averaged weights, a checkpoint every two steps and one sheet."""
    places = ("--output_dir", folder / "run", "--cache_dir", dataset.with_name("cache"), "--dataset", dataset)
    steps = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--sheet_steps", 4, "--warmup_steps", 0)
    return (*places, *steps, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--ema_decay", 0.5)


@pytest.fixture(scope="module")
def sharded(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch(TRAIN, True, *ggi_arguments(clip, folder))
    return folder


@slow
def test_sharded_training_is_data_parallel_training(sharded: Path, clip: Path, tmp_path: Path):
    """The order of sums differs: losses to 1e-6, weights to 1e-4 of how far they moved (measured: 2e-6)."""
    launch(TRAIN, False, *ggi_arguments(clip, tmp_path))
    assert names(sharded / "run") == names(tmp_path / "run")
    assert losses(sharded / "run") == pytest.approx(losses(tmp_path / "run"), abs=1e-6)
    start = load_file(small_checkpoints() / "tiny/cogvideox/transformer" / WEIGHTS)
    for step in (2, 4):
        found, wanted = weights_of(sharded, step), weights_of(tmp_path, step)
        assert found.keys() == wanted.keys()
        apart = sum((found[name] - wanted[name]).square().sum() for name in wanted).sqrt()
        moved = sum((wanted[name] - start[name].float()).square().sum() for name in wanted).sqrt()
        assert apart < 1e-4 * moved, (apart, moved)
    sheets = [read_image(folder / "run" / "samples" / "000004.png").astype(int) for folder in (sharded, tmp_path)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 2


@slow
def test_sharded_training_goes_on_exactly(sharded: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "copy"
    shutil.copytree(sharded, folder)
    shutil.rmtree(folder / "run" / "checkpoint-4")
    assert call(TRAIN, "--mixed_precision", "no", *ggi_arguments(clip, folder)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was sharded (configs/fsdp.yaml); this one is not sharded" in error
    launch(TRAIN, True, *ggi_arguments(clip, folder))
    found, wanted = weights_of(folder, 4), weights_of(sharded, 4)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert losses(folder / "run") == losses(sharded / "run")
    assert names(folder / "run") == names(sharded / "run")


# --- sag_distribution_alignment.py ---


@slow
def test_sharded_alignment(tmp_path: Path):
    """As data-parallel alignment (LoRA in bfloat16: to its rounding), and resumed to the same bytes."""
    picture = write_picture(tmp_path / "town.png")
    steps = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--gradient_accumulation_steps", 2)
    command = ("--path_image", picture, "--pfix", "town", "--report_to", "none", "--learning_rate", 1e-3, *steps)
    for name, sharded in (("fsdp", True), ("ddp", False)):
        launch(ALIGN, sharded, *command, "--output_dir", tmp_path / name)
    fsdp, ddp = tmp_path / "fsdp" / "town", tmp_path / "ddp" / "town"
    assert names(fsdp) == names(ddp)
    assert losses(fsdp) == pytest.approx(losses(ddp), abs=1e-6)
    for file in ("lora.safetensors", "controlnet.lora.safetensors"):
        found, wanted = (load_file(folder / "checkpoint-4" / file) for folder in (fsdp, ddp))
        assert found.keys() == wanted.keys()
        apart = sum((found[name].float() - wanted[name].float()).square().sum() for name in wanted).sqrt()
        assert apart < 1e-4 * sum(tensor.float().square().sum() for tensor in wanted.values()).sqrt()
    shutil.copytree(fsdp, tmp_path / "again" / "town")
    shutil.rmtree(tmp_path / "again" / "town" / "checkpoint-4")
    launch(ALIGN, True, *command, "--output_dir", tmp_path / "again")
    for file in ("lora.safetensors", "controlnet.lora.safetensors", f"../{LOSS_FILE}"):
        assert (tmp_path / "again/town/checkpoint-4" / file).read_bytes() == (
            fsdp / "checkpoint-4" / file
        ).read_bytes()
