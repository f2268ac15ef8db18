"""NaN and infinity stop a run: in weights, LoRAs, losses, latents and pictures; nothing that holds them is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.finite import are_finite, require_finite_weights
from models.flux.network import to_bytes
from models.latents import find_or_make
from models.loading.files import read_lora
from tests.support.helpers import ALIGN, ANCHORS, GGI, call
from tests.support.small import small_checkpoints
from tests.support.stages import QUICK_VIDEO, draw, new_scene, train
from tests.support.toy_training import WEIGHTS, Line
from tests.support.toy_training import main as train_line
from utils.cli import InputError

NAN, INFINITY = float("nan"), float("inf")
FLUX, COGVIDEOX = Path("flux"), Path("cogvideox")
Fail = Callable[..., str]


def spoil(folder: Path, part: Path, target: Path, value: float) -> str:
    """Copy a part of the small weights to `target` with one number changed; returns the name of the tensor."""
    shutil.copytree(folder / "tiny" / part, target)
    file = next(target.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(key for key, tensor in tensors.items() if tensor.ndim > 1)[-1]
    tensors[name] = tensors[name].clone()
    tensors[name].flatten()[-1] = value
    save_file(tensors, file, {"format": "pt"})
    return name


@pytest.fixture
def fail(capfd: pytest.CaptureFixture) -> Fail:
    """Run a script that stops with exit code 3; returns its last line."""

    def run(script: str, *arguments: object) -> str:
        capfd.readouterr()
        assert call(script, *arguments) == 3
        error = capfd.readouterr().err
        assert "Traceback" not in error
        line = error.strip().splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return run


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_one_number_among_many_is_found(value: float, dtype: torch.dtype):
    good = torch.linspace(-3, 3, 1000).to(dtype)
    bad = good.clone()
    bad[500] = value
    other = [torch.arange(3), torch.empty(0), torch.empty(2, device="meta")]
    assert are_finite([good, bad, *other]) == [True, False, True, True, True]


def test_the_weight_is_named():
    line = Line()
    require_finite_weights(line)
    line.line.weight.data[0, 1] = NAN
    with pytest.raises(FloatingPointError, match=r"weights of Line: line\.weight holds NaN or infinity"):
        require_finite_weights(line)


def test_pictures_that_are_not_numbers_are_not_black():
    pictures = torch.zeros(1, 3, 4, 4)
    assert to_bytes(pictures).max() == 127
    pictures[0, 0, 0, 0] = NAN
    with pytest.raises(FloatingPointError, match="the decoded pictures hold NaN"):
        to_bytes(pictures)


@pytest.mark.parametrize("content", [b"half a file", None])
def test_latents_that_cannot_be_used_are_made_again(tmp_path: Path, content: bytes | None):
    path = tmp_path / "latents.safetensors"
    if content:
        path.write_bytes(content)
    else:
        save_file({"latents": torch.tensor([NAN])}, path)
    assert find_or_make(path, lambda: torch.ones(2)).tolist() == [1, 1]
    assert find_or_make(path, lambda: torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("tensor", "error", "telling"),
    [
        (torch.tensor([[1, NAN]]), FloatingPointError, "a.down.weight holds NaN"),
        (torch.zeros(2, 2, dtype=torch.int8), InputError, "holds torch.int8"),
        (torch.zeros(0, 2), InputError, "rank 0"),
    ],
)
def test_loras_that_hold_no_numbers(tmp_path: Path, tensor: torch.Tensor, error: type, telling: str):
    save_file({"a.down.weight": tensor}, tmp_path / "a.safetensors")
    with pytest.raises(error, match=telling):
        read_lora(tmp_path / "a.safetensors")


def test_loras_in_8_bits_are_read(tmp_path: Path):
    values = torch.tensor([[0.5, -2.0]])
    save_file({"a": values.to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors")[0]["a"].tolist() == values.tolist()


# Trainings


def test_a_training_stops_before_the_checkpoint_that_would_hold_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, forward = tmp_path / "run", Line.forward
    calls = []

    def diverge(self, x, y):
        calls.append(1)
        values = forward(self, x, y)
        return values | {"loss": values["loss"] * (NAN if len(calls) == 5 else 1)}

    monkeypatch.setattr(Line, "forward", diverge)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 5: --learning_rate 0\.05 is too high"):
        train_line(["--output_dir", str(folder)])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert all(are_finite(load_file(folder / "checkpoint-3" / WEIGHTS).values()))


def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The loss of a step, computed before its update, does not show it."""
    folder = tmp_path / "run"
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: self.param_groups[0]["params"][0].data.fill_(NAN))
    with pytest.raises(FloatingPointError, match="the trained weights hold NaN or infinity at step 1"):
        train_line(["--output_dir", str(folder), "--max_train_steps", "1"])
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_an_alignment_that_diverges_keeps_its_last_good_checkpoint(tmp_path: Path, fail: Fail):
    steps = ("--max_train_steps", 60, "--checkpointing_steps", 1, "--learning_rate", 1e4)
    assert "--learning_rate 10000 is too high" in fail(ALIGN, *train(tmp_path / "loras", *steps))
    kept = list((tmp_path / "loras" / "town").glob("checkpoint-*/*.safetensors"))
    assert all(all(are_finite(load_file(file).values())) for file in kept)


# Stages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "flag", "value"),
    [
        ("flux/transformer", "--flux_transformer", NAN),
        ("flux/vae", "--flux_vae", INFINITY),
        ("controlnet", "--controlnet", -INFINITY),
    ],
)
def test_networks_of_flux(tmp_path: Path, loras: Path, part: str, flag: str, value: float, fail: Fail):
    name = spoil(small_checkpoints(), Path(part), tmp_path / "spoilt", value)
    scene = new_scene(tmp_path / "scene", num_arcs=1)
    line = fail(ANCHORS, *draw(scene, loras, flag, tmp_path / "spoilt"))
    assert f"{name} holds NaN or infinity" in line and str(tmp_path / "spoilt") in line
    assert not (scene / "multiviews").exists()
    line = fail(ALIGN, *train(tmp_path / "new", flag, tmp_path / "spoilt"))
    assert f"{name} holds NaN or infinity" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_text_encoder_and_a_lora(tmp_path: Path, loras: Path, fail: Fail):
    scene = new_scene(tmp_path / "scene", num_arcs=1)
    flux = shutil.copytree(small_checkpoints() / "tiny" / "flux", tmp_path / "flux")
    shutil.rmtree(flux / "text_encoder_2")
    spoil(small_checkpoints(), Path("flux/text_encoder_2"), flux / "text_encoder_2", NAN)
    assert "weights of T5EncoderModel" in fail(ANCHORS, *draw(scene, loras, "--flux_text", flux))
    damaged = shutil.copytree(loras, tmp_path / "loras")
    file = damaged / "town" / "checkpoint-4" / "lora.safetensors"
    save_file({key: tensor * INFINITY for key, tensor in load_file(file).items()}, file)
    assert f"{file}: " in fail(ANCHORS, *draw(scene, damaged))
    assert not (scene / "multiviews").exists()


@pytest.mark.slow
def test_networks_of_the_video(tmp_path: Path, one_arc: Path, fail: Fail):
    views = next((one_arc / "multiviews").iterdir())
    command = ("--target", views, *QUICK_VIDEO, "--output_dir", tmp_path / "out")
    spoil(small_checkpoints(), Path("cogvideox/vae"), tmp_path / "vae", NAN)
    assert "weights of AutoencoderKLCogVideoX" in fail(GGI, *command, "--cogvideox_vae", tmp_path / "vae")
    spoil(small_checkpoints(), Path("cogvideox/transformer"), tmp_path / "checkpoint-7" / "transformer", INFINITY)
    line = fail(GGI, *command, "--model_path", tmp_path, "--epoch", 7)
    assert "weights of CogVideoXTransformer3DModel" in line and str(tmp_path / "checkpoint-7") in line
    assert not (tmp_path / "out").exists()
