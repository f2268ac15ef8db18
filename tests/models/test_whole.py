"""`python -m models.weights check` on damaged and incomplete weights; the stages report the same errors."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import weights
from tests.support.helpers import ANCHORS, GGI, call, exit_code
from tests.support.mutations import damage_many
from tests.support.small import small_checkpoints, small_weights
from tests.support.stages import QUICK_VIDEO, draw, new_scene

MODEL = "diffusion_pytorch_model.safetensors"
Change = Callable[[Path], object]


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1000])


def rename(name: str, new: str) -> Change:
    return lambda folder: (folder / name).rename(folder / new)


def pickle_beside(folder: Path) -> None:
    torch.save({}, folder / "vae" / "diffusion_pytorch_model.bin")


def pickle_instead(folder: Path) -> None:
    remove(f"vae/{MODEL}")(folder)
    pickle_beside(folder)


def shard(folder: Path, *, index: bool = True) -> Path:
    """Split the transformer's weights into two files."""
    folder = folder / "transformer"
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in places if places[key] == name}, folder / name, {"format": "pt"})
    if index:
        (folder / f"{MODEL}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / names[1]


def lose_a_shard(folder: Path) -> None:
    shard(folder).unlink()


def change_tensors(part: str, change: Callable[[dict], dict]) -> Change:
    def apply(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        save_file(change(load_file(file)), file, {"format": "pt"})

    return apply


def change_json(name: str, **values: object) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def change_config(part: str, **values: object) -> Change:
    return change_json(f"{part}/config.json", **values)


def to_integers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(torch.int8) for key, value in tensors.items()}


def to_scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """8-bit floats with a scale beside, under names that transformers leaves out."""
    return {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()} | {"scaled_fp8": torch.ones(1)}


def halve_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer_2" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"] = data["model"]["vocab"][: len(data["model"]["vocab"]) // 2]
    path.write_text(json.dumps(data))


WHOLE = {"nothing": lambda folder: None, "shards": shard}
FLUX_FAULTS = {
    "T5 without its vocabulary": (remove("tokenizer_2/tokenizer.json"), "tokenizer_2/spiece.model is missing"),
    "CLIP without its vocabulary": (remove("tokenizer/tokenizer.json"), "tokenizer/vocab.json is missing"),
    "no tokenizer_config.json": (remove("tokenizer/tokenizer_config.json"), "tokenizer_config.json is missing"),
    "half a vocabulary": (halve_vocabulary, "tokens, the text encoder"),
    "a damaged tokenizer": (write("tokenizer_2/tokenizer.json", b"{}"), "tokenizer_2 cannot be loaded"),
    "no model_index.json": (remove("model_index.json"), "model_index.json is missing"),
    "no scheduler": (remove("scheduler/scheduler_config.json"), "scheduler_config.json is missing"),
    "an encoder without config": (remove("text_encoder/config.json"), "text_encoder/config.json is missing"),
    "no config": (remove("transformer/config.json"), "transformer/config.json is missing"),
    "damaged config": (write("vae/config.json", b'{"a": '), "vae/config.json is not valid JSON"),
    "config that is no text": (write("vae/config.json", b"\xff\xfe\x00"), "vae/config.json is not valid JSON"),
    "a shard lost": (lose_a_shard, "diffusion_pytorch_model-00002-of-00002.safetensors is missing"),
    "the index lost": (partial(shard, index=False), f"{MODEL}.index.json is missing"),
    "a file cut short": (cut(f"transformer/{MODEL}"), f"transformer/{MODEL} is not a readable safetensors file"),
    "an encoder cut short": (cut("text_encoder/model.safetensors"), "text_encoder/model.safetensors is not a"),
    "a web page": (write(f"vae/{MODEL}", b"\n<!DOCTYPE html><html>"), f"vae/{MODEL} is a web page"),
    "a pointer": (write(f"vae/{MODEL}", b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "an empty file": (write(f"vae/{MODEL}", b""), f"vae/{MODEL} is not a readable safetensors file"),
    "a pickle beside": (pickle_beside, "diffusion_pytorch_model.bin is a pickle"),
    "a pickle instead": (pickle_instead, "diffusion_pytorch_model.bin is a pickle"),
    "a variant": (
        rename(f"vae/{MODEL}", "vae/diffusion_pytorch_model.fp16.safetensors"),
        "only the variant fp16 (diffusion_pytorch_model.fp16.safetensors): rename it",
    ),
    "no weights": (remove(f"vae/{MODEL}"), f"vae/{MODEL} is missing"),
    "a tensor lost": (change_tensors("transformer", lambda t: dict([*t.items()][1:])), "missing keys"),
    "a tensor of another size": (
        change_tensors("transformer", lambda t: t | {"proj_out.bias": torch.zeros(3)}),
        "proj_out.bias has shape (3,)",
    ),
    "integers without their scales": (
        change_tensors("transformer", to_integers),
        "holds torch.int8, and no quantization_config says how to read it",
    ),
    "an encoder in integers": (change_tensors("text_encoder", to_integers), "text_encoder: "),
    "an encoder with scales": (change_tensors("text_encoder_2", to_scaled), "scaled_fp8 scales weights of 8 bits"),
    "an encoder's tensor lost": (
        change_tensors("text_encoder_2", lambda t: {k: v for k, v in t.items() if "wo" not in k}),
        "does not hold a whole T5EncoderModel",
    ),
    "an encoder's layer left out": (change_config("text_encoder_2", num_layers=1), "holds 2 layers, its config.json"),
    "an encoder of another program": (
        change_json("model_index.json", text_encoder=["os", "system"]),
        "names system of os for text_encoder; CLIPTextModel of transformers is needed",
    ),
    "another encoder": (change_json("model_index.json", text_encoder_2=["transformers", "T5Model"]), "names T5Model"),
    "an unknown tokenizer": (change_json("model_index.json", tokenizer=["transformers", "X"]), "has no attribute X"),
    "a network as scheduler": (
        change_json("model_index.json", scheduler=["diffusers", "AutoencoderKL"]),
        "AutoencoderKL is no scheduler",
    ),
    "a shift of NaN": (
        change_json("scheduler/scheduler_config.json", shift=float("nan")),
        "scheduler_config.json says shift nan",
    ),
    "infinity in a list": (change_config("vae", latents_mean=[0, float("inf")]), "says latents_mean inf"),
    "a scale of zero": (change_config("vae", scaling_factor=0), "says scaling_factor 0, which must be above 0"),
    "a scale of NaN": (change_config("vae", scaling_factor=float("nan")), "says scaling_factor nan"),
    "a number that is text": (change_config("transformer", num_layers="2"), "says num_layers '2', not a number"),
    "a switch that is text": (change_config("vae", force_upcast="no"), "says force_upcast 'no', not true or false"),
    "tokens without end": (change_config("text_encoder", max_position_embeddings="x"), "does not fit the text"),
    "a config of another size": (change_config("transformer", num_layers=3), "missing keys"),
    "a config that builds nothing": (change_config("transformer", joint_attention_dim=-1), "is not a whole"),
    "no heads": (change_config("transformer", num_attention_heads=0), "num_attention_heads 0, which must be above 0"),
    "another network": (change_config("transformer", _class_name="UNet"), "holds UNet; FluxTransformer2DModel is"),
}  # fmt: skip


@pytest.fixture
def check(capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run `check` on the small weights: exit code, standard output, and the one line of an error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with small_weights():
            code = exit_code(partial(weights.main, ["check", "--weights", "tiny", *map(str, arguments)]))
        out, err = capfd.readouterr()
        assert len(err.splitlines()) == bool(code), err
        return code, out, err

    return run


def flux_copy(folder: Path) -> Path:
    return shutil.copytree(small_checkpoints() / "tiny" / "flux", folder / "flux")


@pytest.mark.parametrize("change", WHOLE.values(), ids=WHOLE)
def test_whole_weights(tmp_path: Path, change: Change, check):
    change(flux_copy(tmp_path))
    assert check("--flux", tmp_path / "flux")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("change", "telling"), FLUX_FAULTS.values(), ids=FLUX_FAULTS)
def test_faults_are_named(tmp_path: Path, change: Change, telling: str, check):
    change(flux_copy(tmp_path))
    code, out, err = check("--flux", tmp_path / "flux")
    assert code == 2 and telling in err and telling in out
    assert str(tmp_path / "flux") in err


def test_files_and_folders_of_other_parts(tmp_path: Path, check):
    folder = small_checkpoints() / "tiny" / "cogvideox" / "vae"
    code, _, err = check("--flux_transformer", folder, "--cogvideox_vae", folder / MODEL)
    assert code == 2
    assert f"{folder} holds AutoencoderKLCogVideoX; FluxTransformer2DModel is needed" in err
    assert f"{folder / MODEL} is a file; a folder in diffusers format" in err
    flux = small_checkpoints() / "tiny" / "flux"
    assert f"{flux / 'model_index.json'} names CLIPTextModel of transformers" in check("--cogvideox", flux)[2]
    torch.save({}, tmp_path / "flux.pt")
    assert "flux.pt is a pickle" in check("--flux_transformer", tmp_path / "flux.pt")[2]


@pytest.mark.slow
def test_a_schedule_says_all_that_it_decides(tmp_path: Path, check):
    folder = shutil.copytree(small_checkpoints() / "tiny" / "cogvideox", tmp_path / "cogvideox")
    path = folder / "scheduler" / "scheduler_config.json"
    schedule = json.loads(path.read_text())
    for changed, telling in (
        ({"prediction_type": "noise"}, "cannot be used: prediction_type given as noise"),
        ({"beta_schedule": "linearly"}, "cannot be used: linearly"),
        ({"timestep_spacing": "even"}, "cannot be used: even"),
        ({"prediction_type": "epsilon"}, "cannot be used: its steps give NaN"),  # at a signal of zero
        ({"num_train_timesteps": float("inf")}, "says num_train_timesteps inf"),
        ({"prediction_type": None}, "cannot be used"),
        ({"lambda_min_clipped": -float("inf")}, ""),  # as a scheduler of another class has it
    ):
        path.write_text(json.dumps(schedule | changed))
        code, _, err = check("--cogvideox", folder)
        assert code == (2 if telling else 0) and telling in err and (str(path) in err or not telling)
    del schedule["prediction_type"]
    path.write_text(json.dumps(schedule))
    assert f"{path} says no prediction_type" in check("--cogvideox", folder)[2]


@pytest.mark.parametrize("lost", [MODEL, "config.json"])
def test_the_inbetween_transformer(tmp_path: Path, lost: str, check):
    folder = tmp_path / "checkpoint-7" / "transformer"
    shutil.copytree(small_checkpoints() / "tiny" / "cogvideox" / "transformer", folder)
    assert check("--model_path", tmp_path, "--epoch", 7)[0] == 0
    (folder / lost).unlink()
    code, _, err = check("--model_path", tmp_path, "--epoch", 7)
    assert code == 2 and str(folder) in err


def test_two_files_with_one_tensor(tmp_path: Path, check):
    folder = tmp_path / "checkpoint-7" / "transformer"
    shutil.copytree(small_checkpoints() / "tiny" / "cogvideox" / "transformer", folder)
    shutil.copy(folder / MODEL, folder / "older.safetensors")
    code, _, err = check("--model_path", tmp_path, "--epoch", 7)
    assert code == 2 and "older.safetensors" in err and "both hold" in err


@pytest.mark.slow
def test_no_damaged_file_ends_in_a_traceback():
    """Try 60 kinds of damage; `python -m tests.support.mutations` draws more."""
    outcomes = Counter(outcome.split(":")[0] for _, outcome in damage_many(small_checkpoints() / "tiny", 60, seed=0))
    assert outcomes.keys() == {"InputError", "FloatingPointError", "loaded"}


# The stages report the same, before they load the text encoders


@pytest.mark.slow
def test_stages_say_it_first(tmp_path: Path, one_arc: Path, loras: Path, capfd: pytest.CaptureFixture, monkeypatch):
    from models.flux import network
    from models.inbetween import pipeline

    for module in (network, pipeline):
        monkeypatch.setattr(module, "load_encoders", lambda *_: pytest.fail("a text encoder was loaded"))
    flux, video = flux_copy(tmp_path), tmp_path / "checkpoint-7" / "transformer"
    shutil.copytree(small_checkpoints() / "tiny" / "cogvideox" / "transformer", video)
    change_tensors(".", lambda tensors: dict([*tensors.items()][1:]))(video)
    halve_vocabulary(flux)
    views = next((one_arc / "multiviews").iterdir())
    for telling, arguments in (
        ("tokens, the text encoder", (ANCHORS, *draw(new_scene(tmp_path / "scene", 1), loras, "--flux_text", flux))),
        ("missing keys", (GGI, "--target", views, *QUICK_VIDEO, "--model_path", tmp_path, "--epoch", 7)),
    ):
        capfd.readouterr()
        assert call(*arguments) == 2
        assert telling in capfd.readouterr().err
