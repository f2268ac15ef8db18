"""Training sharded over two processes (FSDP2, on a CPU: tests/support/sharded.py) and data-parallel training agree."""

import csv
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from models.runtime.memory import advise_on_oom
from models.runtime.sharding import require_shardable, sharding_plugin
from tests.support import toy_training
from tests.support.helpers import ALIGN, ROOT, call, end, forget_accelerator, start_module, words, write_picture
from tests.support.sharded import launch_environment
from utils.cli import InputError
from utils.layout import LOSS_FILE, STATE_FOLDER

slow = pytest.mark.slow


def launch(script: str, sharded: bool, *arguments: object) -> None:
    """Run a script in two processes on the small weights."""
    program = ("tests.support.sharded", script) if sharded else (script,)
    result = end(start_module(*program, *words("--mixed_precision", "no", *arguments), processes=2))
    assert result.returncode == 0, result.stderr[-4000:]


def losses(folder: Path) -> list[float]:
    with (folder / LOSS_FILE).open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def names(folder: Path) -> set[str]:
    """Names of all files except those of states, whose formats differ."""
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
        pytest.raises(OSError, match="free some, or use a larger GPU or more of them"),
        advise_on_oom("training", "full", ["full"], sharded=True),
    ):
        raise torch.OutOfMemoryError


@slow
def test_other_trainings_say_that_they_are_not_sharded(tmp_path: Path):
    flags = ("--output_dir", str(tmp_path / "run"), "--mixed_precision", "no")
    result = end(start_module("tests.support.sharded", "tests.support.toy_training", *flags, processes=2))
    assert result.returncode != 0 and "this training cannot be sharded" in result.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_fsdp(monkeypatch)
    with pytest.raises(InputError, match=r"configs/fsdp\.yaml needs two GPUs or more"):
        toy_training.main(["--output_dir", str(tmp_path / "run")])
    forget_accelerator()
    assert not (tmp_path / "run").exists()


def test_alignment_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    as_fsdp(monkeypatch)
    picture = write_picture(tmp_path / "town.png")
    command = ("--path_image", picture, "--pfix", "town", "--output_dir", tmp_path / "loras")
    assert call(ALIGN, *command) == 2
    assert "launch it with configs/ddp.yaml" in capsys.readouterr().err
    assert not (tmp_path / "loras").exists()
