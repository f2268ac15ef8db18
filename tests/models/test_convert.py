"""Reference-format files -> diffusers: commands, strict loading, LoRAs in stock diffusers, memory while merging."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXTransformer3DModel,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models import convert
from models.convert import merge_ggi
from models.flux.lora import check_lora
from models.flux.network import FluxModels, Text, velocity
from models.loading import keymaps
from models.loading.files import load_ggi_transformer, load_reference_file, reference_config
from tests.models.parity_models import load_lora
from tests.support.helpers import GOLDEN, profiled_peak
from utils.cli import InputError

GGI = GOLDEN / "6_ggi" / "G2_9f_mask_notiling" / "transformer"


def command(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["models.convert", *map(str, args)])
    convert.main()


@pytest.mark.parametrize(
    ("kind", "file", "cls"),
    [
        ("flux", "flux_tiny", FluxTransformer2DModel),
        ("controlnet", "controlnet_tiny", FluxControlNetModel),
        ("autoencoder", "ae_tiny", AutoencoderKL),
    ],
)
def test_command_writes_what_diffusers_loads(monkeypatch, tmp_path, kind, file, cls):
    source = GOLDEN / "3_flux" / f"{file}.safetensors"
    command(monkeypatch, kind, source, tmp_path / "out")
    model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    direct = load_reference_file(kind, source).state_dict()
    assert all(torch.equal(tensor, direct[key]) for key, tensor in model.state_dict().items())
    read = json.loads(json.dumps(reference_config(kind, source)))
    assert read == {key: json.loads(json.dumps(model.config[key])) for key in read}


def test_a_command_never_overwrites(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        command(monkeypatch, "ggi", GGI, tmp_path)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
@pytest.mark.parametrize("kind", ["flux", "controlnet", "autoencoder"])
def test_keys_must_fit_exactly(tmp_path, kind, change):
    name = {"flux": "flux_tiny", "controlnet": "controlnet_tiny", "autoencoder": "ae_tiny"}[kind]
    tensors = load_file(GOLDEN / "3_flux" / f"{name}.safetensors")
    key = "encoder.conv_out.bias" if kind == "autoencoder" else "double_blocks.1.img_attn.proj.bias"
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["surplus.weight"] = torch.zeros(2)
    else:
        tensors[key] = torch.zeros(3)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=f"not a {kind} checkpoint"):
        load_reference_file(kind, tmp_path / "bad.safetensors")


def test_merging_equals_peft(monkeypatch, tmp_path):
    """The merged transformer computes what peft computes with an unmerged LoRA."""
    command(monkeypatch, "ggi", GGI, tmp_path / "merged")
    merged, info = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    again = load_ggi_transformer(tmp_path / "merged", torch.float32).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in merged.state_dict().items())

    apart = CogVideoXTransformer3DModel.from_config(json.loads((GGI / "config.json").read_text()))
    tensors = load_file(GGI / "diffusion_pytorch_model.safetensors")
    rank = next(tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key)
    apart.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    apart.load_state_dict(tensors, strict=True)
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 3, 48, 6, 10),
        "encoder_hidden_states": torch.randn(1, 10, 24),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    with torch.no_grad():
        difference = (merged(**inputs)[0] - apart.eval()(**inputs)[0]).abs().max()
    assert difference < 1e-5
    assert not torch.equal(
        merged.transformer_blocks[0].attn1.to_q.weight, tensors["transformer_blocks.0.attn1.to_q.base_layer.weight"]
    )


def test_in_channels_must_be_48(tmp_path):
    config = json.loads((GGI / "config.json").read_text()) | {"in_channels": 32}
    with pytest.raises(ValueError, match="in_channels 32"):
        keymaps.ggi_transformer(config, {})


def deep_checkpoint(folder: Path, files: int) -> int:
    """A GGI checkpoint of 16 MB in peft naming, in `files` files; returns the bytes of the merged result."""
    with torch.device("meta"):
        sizes = {"num_attention_heads": 4, "num_layers": 8, "text_embed_dim": 64, "time_embed_dim": 64}
        model = CogVideoXTransformer3DModel(in_channels=48, use_rotary_positional_embeddings=True, **sizes)
        merged = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
        model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    tensors = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in model.state_dict().items()}
    keys = sorted(tensors, key=lambda key: tensors[key].numel())  # so that files have nearly one size
    folder.mkdir()
    for i in range(files):
        save_file({key: tensors[key] for key in keys[i::files]}, folder / f"diffusion_pytorch_model-{i}.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(model.config)))
    return merged


def test_merging_holds_one_shard_and_one_file(tmp_path):
    """Peak of torch's allocations and maps: the shard being written, a file being read, and a layer in float32."""
    merged = deep_checkpoint(tmp_path / "source", files=16)
    file = max(path.stat().st_size for path in (tmp_path / "source").iterdir())
    layer = 3 * 4 * 256**2  # the product, the matrix that it is added to and one factor
    assert merged > 15e6 > 4 * (file + layer)
    for shard in (2**30, merged // 8):
        folder = tmp_path / f"out{shard}"
        peak = profiled_peak(lambda shard=shard, folder=folder: merge_ggi(tmp_path / "source", folder, shard))
        assert 0.9 * min(shard, merged) < peak < min(shard, merged) + file + layer
        assert load_ggi_transformer(folder, torch.bfloat16).config.in_channels == 48


def load_flux() -> FluxModels:
    files = {"flux": "flux_tiny", "controlnet": "controlnet_tiny", "autoencoder": "ae_tiny"}
    return FluxModels(
        *(load_reference_file(kind, GOLDEN / "3_flux" / f"{file}.safetensors") for kind, file in files.items())
    )


def one_velocity(models: FluxModels) -> torch.Tensor:
    torch.manual_seed(0)
    text = Text(torch.randn(1, 12, 32), torch.randn(1, 16))
    with torch.no_grad():
        return velocity(models, torch.randn(1, 48, 64), 0.7, text, torch.rand(1, 3, 96, 128), guidance=4.0)


def test_every_residual_of_a_controlnet_is_used():
    """With four double blocks, the residuals of the last two change the velocity, too."""
    models = load_flux()
    torch.manual_seed(1)
    models.controlnet = FluxControlNetModel.from_config({**models.controlnet.config, "num_layers": 4})
    models.transformer = FluxTransformer2DModel.from_config({**models.transformer.config, "num_layers": 5})
    for parameter in models.controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = one_velocity(models)
    for block in models.controlnet.controlnet_blocks[2:]:
        torch.nn.init.zeros_(block.weight)
        torch.nn.init.zeros_(block.bias)
        after = one_velocity(models)
        assert (after - before).abs().max() > 1e-3
        before = after


def test_loras_load_in_stock_diffusers(monkeypatch, tmp_path):
    """Converted LoRAs, and FLUX's as the reference names it, do in diffusers what ours do on fused projections."""
    paths = {
        "lora": GOLDEN / "4_lora" / "lora.safetensors",
        "controlnet_lora": GOLDEN / "4_lora" / "controlnet.lora.safetensors",
    }
    flux, fused = load_flux(), load_flux()
    without = one_velocity(flux)
    for kind, path in paths.items():
        command(monkeypatch, kind, path, tmp_path / f"{kind}.safetensors")
    pipeline = FluxPipeline(None, flux.vae, None, None, None, None, flux.transformer)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="converted")
    flux.controlnet.load_lora_adapter(tmp_path / "controlnet_lora.safetensors", prefix=None)
    stock = one_velocity(flux)
    pipeline.delete_adapters("converted")
    pipeline.load_lora_weights(paths["lora"])
    reference_names = one_velocity(flux)

    for model, path in ((fused.transformer, paths["lora"]), (fused.controlnet, paths["controlnet_lora"])):
        load_lora(model, check_lora(path, model.config))
    ours = one_velocity(fused)
    assert (ours - without).abs().max() > 0.1
    assert (ours - stock).abs().max() < 1e-4
    assert (ours - reference_names).abs().max() < 1e-4


def test_lora_weight_counts_twice():
    """--lora_weight multiplies both factors: 0.5 leaves a quarter of the update."""
    path = GOLDEN / "4_lora" / "lora.safetensors"
    model = load_reference_file("flux", GOLDEN / "3_flux" / "flux_tiny.safetensors")
    load_lora(model, check_lora(path, model.config), weight=0.5)
    layer = model.transformer_blocks[0].attn.to_qkv
    factors = load_file(path)
    name = "double_blocks.0.processor.qkv_lora1"
    full = factors[f"{name}.up.weight"] @ factors[f"{name}.down.weight"]
    assert torch.allclose(layer.get_delta_weight("default"), full / 4, atol=1e-6)


def test_damaged_file_is_bad_input(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_reference_file("flux", tmp_path / "x.safetensors")


def spoil(change: str, tensors: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if name != key}
    changed = {"integers": {key: tensors[key].to(torch.int8)}, "NaN": {key: tensors[key] * torch.nan}}
    return {} if change == "empty" else kept | changed.get(change, {})


@pytest.mark.parametrize("change", ["NaN", "integers", "missing", "empty"])
@pytest.mark.parametrize("kind", ["ggi", "lora", "flux", "autoencoder"])
def test_nothing_damaged_is_converted(monkeypatch, tmp_path: Path, kind: str, change: str):
    source, key = {
        "ggi": (GGI / "diffusion_pytorch_model.safetensors", "norm_final.bias"),
        "lora": (GOLDEN / "4_lora" / "lora.safetensors", "double_blocks.0.processor.qkv_lora1.up.weight"),
        "flux": (GOLDEN / "3_flux" / "flux_tiny.safetensors", "img_in.weight"),
        "autoencoder": (GOLDEN / "3_flux" / "ae_tiny.safetensors", "decoder.conv_in.weight"),
    }[kind]
    folder = shutil.copytree(GGI, tmp_path / "in") if kind == "ggi" else tmp_path
    file = folder / source.name
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    save_file(spoil(change, load_file(source), key), file, metadata)
    with pytest.raises(FloatingPointError if change == "NaN" else InputError) as error:
        command(monkeypatch, kind, folder if kind == "ggi" else file, tmp_path / "out")
    assert str(folder) in str(error.value) and not (tmp_path / "out").exists()


def test_what_is_no_source_is_named(monkeypatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for kind, source, words in (
        ("ggi", tmp_path / "file", "file/config.json is missing"),
        ("flux", tmp_path, "is a folder; a .safetensors file is needed"),
    ):
        with pytest.raises(InputError, match=words):
            command(monkeypatch, kind, source, tmp_path / "out")
