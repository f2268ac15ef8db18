"""Networks of the wrong kind are refused in one line, before anything is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, T5EncoderModel

from models.flux.network import encode_flux_prompts
from models.foreign import require_cogvideox, require_flux
from models.loading.networks import load_model
from models.weights import FLUX_STAGE, GGI_STAGE
from tests.scripts.bad_input.common import write_lora
from tests.support.helpers import ALIGN, ANCHORS, GGI, GOLDEN, call, forbid_models, write_picture
from tests.support.scenes import make_scene
from tests.support.small import small_preset
from utils.cli import InputError
from utils.files import read_json, write_json
from utils.layout import anchor_path

FLUX_FILE, VAE_FILE = (GOLDEN / "3_flux" / f"{name}.safetensors" for name in ("flux_tiny", "ae_tiny"))


@pytest.fixture
def flux(tmp_path: Path) -> dict[str, Path]:
    """{component: a copy that the test may change}."""
    preset = small_preset()
    shutil.copytree(preset.flux, tmp_path / "flux")
    shutil.copytree(preset.controlnet, tmp_path / "controlnet")
    return {name: tmp_path / ("controlnet" if name == "controlnet" else "flux") for name in FLUX_STAGE}


@pytest.fixture
def video(tmp_path: Path) -> dict[str, Path]:
    shutil.copytree(small_preset().cogvideox, tmp_path / "video")
    return dict.fromkeys(GGI_STAGE, tmp_path / "video")


def change(folder: Path, **entries: object) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | entries)


def test_networks_that_fit_are_taken(flux: dict[str, Path], video: dict[str, Path]):
    require_flux(flux)
    require_cogvideox(video, video["cogvideox_vae"] / "transformer")
    write_json(flux["controlnet"] / "config.json", {**read_json(flux["controlnet"] / "config.json"), "num_mode": 3})
    require_flux(flux, 2)


@pytest.mark.parametrize(
    ("part", "entries", "words"),
    [
        ("flux/transformer", {"in_channels": 384}, "FLUX.1 Fill-dev .in_channels 384.*needed: FLUX.1-dev"),
        ("flux/transformer", {"in_channels": 128, "out_channels": 64}, "Canny-dev or Depth-dev"),
        ("flux/transformer", {"in_channels": 80}, "no FLUX.1-dev .in_channels 80"),
        ("flux/transformer", {"out_channels": 32}, "out_channels 32"),
        ("flux/transformer", {"joint_attention_dim": 32}, "joint_attention_dim .* 32"),
        ("flux/transformer", {"num_attention_heads": None}, "num_attention_heads is None, not a whole number"),
        ("flux/text_encoder", {"hidden_size": 32}, "pooled_projection_dim"),
        ("flux/transformer", {"_class_name": "AutoencoderKL"}, "holds AutoencoderKL; needed: FluxTransformer2DModel"),
        ("flux/transformer", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised .bitsandbytes"),
        ("flux/transformer", {"quantization_config": {"quant_method": "quanto"}}, "quantised .quanto"),
        ("flux/text_encoder_2", {"quantization_config": {"quant_method": "gguf"}}, "quantised .gguf"),
        ("flux/transformer", {"axes_dims_rope": [16, 56, 56]}, "axes_dims_rope .* the sum 64"),
        ("controlnet", {"axes_dims_rope": "8, 28, 28"}, "controlnet: .* axes_dims_rope"),
        ("flux/vae", {"latent_channels": 4}, "latent_channels 4"),
        ("controlnet", {"num_attention_heads": 2}, "has width 128"),
        ("controlnet", {"in_channels": 16}, "in_channels 16"),
        ("controlnet", {"conditioning_embedding_channels": 32}, "conditioning_embedding_channels"),
        ("controlnet", {"pooled_projection_dim": 32}, "pooled_projection_dim"),
        ("controlnet", {"extra_condition_channels": 4}, "a mask, for inpainting"),
        ("controlnet", {"num_mode": 7}, "7 modes: choose one by --control_mode"),
        ("controlnet", {"num_layers": 0, "num_single_layers": 0}, "has no blocks, so it controls nothing"),
    ],
)
def test_what_is_no_flux_is_named(flux: dict[str, Path], tmp_path: Path, part: str, entries: dict, words: str):
    change(tmp_path / part, **entries)
    with pytest.raises(InputError, match=words) as error:
        require_flux(flux)
    assert "\n" not in str(error.value)


def test_modes_are_refused_where_there_are_none_or_fewer(flux: dict[str, Path], tmp_path: Path):
    with pytest.raises(InputError, match="has no modes; leave it out"):
        require_flux(flux, 0)
    change(tmp_path / "controlnet", num_mode=2)
    with pytest.raises(InputError, match=r"--control_mode 2: .* has 2 modes \(0 canny, 1 tile"):
        require_flux(flux, 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_text_encoders_that_bitsandbytes_quantised_are_read(flux: dict[str, Path], tmp_path: Path, bits: int):
    pytest.importorskip("bitsandbytes")
    plain = encode_flux_prompts(tmp_path / "flux", ["a town"], "cpu", torch.float32, 32)["a town"]
    folder = tmp_path / "flux" / "text_encoder_2"
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    quantised = T5EncoderModel.from_pretrained(folder, quantization_config=options)
    shutil.rmtree(folder)
    quantised.save_pretrained(folder)
    require_flux(flux)
    found = encode_flux_prompts(tmp_path / "flux", ["a town"], "cpu", torch.float32, 32)["a town"]
    assert 1e-4 < (found.tokens - plain.tokens).norm() / plain.tokens.norm() < {4: 0.2, 8: 0.03}[bits]


def test_a_controlnet_of_more_blocks_is_noted(flux: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    require_flux(flux)
    assert not capsys.readouterr().err
    change(tmp_path / "controlnet", num_layers=9)
    require_flux(flux)
    assert "has more blocks than the transformer: the last are left out" in capsys.readouterr().err


def test_a_transformer_without_guidance_is_noted(flux: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    change(tmp_path / "flux/transformer", guidance_embeds=False)
    require_flux(flux)
    assert "no distilled guidance, as FLUX.1-schnell" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "entries", "words"),
    [
        ("transformer", {"patch_size_t": 2}, "CogVideoX 1.5 .*CogVideoX-5B-I2V"),
        ("transformer", {"ofs_embed_dim": 512}, "ofs_embed_dim 512"),
        ("transformer", {"text_embed_dim": 32}, "text_embed_dim 32"),
        ("transformer", {"out_channels": 32}, "out_channels 32"),
        ("transformer", {"_class_name": "WanTransformer3DModel"}, "holds WanTransformer3DModel"),
        ("vae", {"latent_channels": 8}, "latent_channels 8"),
        ("vae", {"_class_name": "AutoencoderKL"}, "holds AutoencoderKL; needed: AutoencoderKLCogVideoX"),
        ("text_encoder", {"quantization_config": {"quant_method": "torchao"}}, "quantised .torchao"),
    ],
)
def test_what_is_no_cogvideox_is_named(video: dict[str, Path], tmp_path: Path, part: str, entries: dict, words: str):
    change(tmp_path / "video" / part, **entries)
    with pytest.raises(InputError, match=words):
        require_cogvideox(video, tmp_path / "video" / "transformer")


def weights(**changes: object) -> dict[str, torch.Tensor]:
    return {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4), **changes}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\3\0\0\0", "GGUF.*needed: a FLUX transformer"),
        (VAE_FILE, "holds a FLUX VAE; needed: a FLUX transformer"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.zeros(2, 2)}, "belongs into a folder"),
        ({"lora_unet_double_blocks_0_img_mod_lin.lora_up.weight": torch.zeros(2, 2)}, "holds a LoRA"),
        (weights(**{"x.weight.quant_state.bitsandbytes__nf4": torch.zeros(2)}), "bitsandbytes"),
        (weights(**{"x.weight": torch.zeros(2, dtype=torch.int8)}), "quantised to integers .I8"),
        ({"transformer_blocks.0.qkv_proj.qweight": torch.zeros(2, dtype=torch.uint8)}, "quantised to integers .U8"),
        ({"model.weight": torch.zeros(2)}, "unknown weights"),
        (b"<html>", "a.safetensors is "),
    ],
)
def test_a_file_is_taken_for_what_it_holds(flux: dict[str, Path], tmp_path: Path, content: object, words: str):
    path = tmp_path / "a.safetensors"
    if isinstance(content, dict):
        save_file(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    with pytest.raises(InputError, match=words):
        require_flux(flux | {"flux_transformer": path})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("scaled", [None, "scale_weight", "weight_scale"])
def test_files_of_8_bit_floats_are_read(tmp_path: Path, prefix: str, scaled: str | None):
    """As Comfy writes them: rounded to 8 bits, times a scale in newer files, beside other networks."""
    source = load_file(FLUX_FILE)
    stored = {"vae.encoder.conv_in.weight": torch.zeros(1), "text_encoders.x.weight": torch.zeros(1)} if prefix else {}
    for key, tensor in source.items():
        scale = 1.0
        if scaled and key.endswith(".weight") and tensor.dim() == 2:
            scale = float(tensor.abs().max()) / 448  # the largest 8-bit value
            stored[f"{prefix}{key.removesuffix('weight')}{scaled}"] = torch.tensor(scale)
        stored[prefix + key] = (tensor / scale).to(torch.float8_e4m3fn)
    if scaled == "scale_weight":
        stored[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(stored, tmp_path / "a.safetensors")
    whole = load_model("flux_transformer", FluxTransformer2DModel, FLUX_FILE, torch.float32).state_dict()
    found = load_model("flux_transformer", FluxTransformer2DModel, tmp_path / "a.safetensors", torch.float32)
    assert found.state_dict().keys() == whole.keys()
    for key, tensor in found.state_dict().items():
        # 3 bits behind the leading one; below 2^-6, or that of the scaled values, the grid is even
        torch.testing.assert_close(tensor, whole[key], rtol=2**-4, atol=2**-9)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., None]:
    """Call a script, which must end in one line that holds all `words`, with no network loaded."""
    forbid_models(monkeypatch)
    capfd.readouterr()

    def check(script: str, *arguments: object, words: tuple[str, ...]) -> None:
        assert call(script, *arguments) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines

    return check


def test_the_scripts_say_so_first(refuse: Callable, flux: dict[str, Path], video: dict[str, Path], tmp_path: Path):
    scene, picture = make_scene(tmp_path / "scene"), write_picture(tmp_path / "picture.png")
    for k in range(2):
        write_picture(anchor_path(tmp_path / "views", k), 48, 32, seed=k)
    write_lora(tmp_path / "loras" / "town" / "checkpoint-400")
    anchors = (ANCHORS, "--target", scene, "--pfix", "town", "--loras", tmp_path / "loras", "--seed", 1)
    align = (ALIGN, "--path_image", picture, "--pfix", "new", "--output_dir", tmp_path / "out")
    frames = (GGI, "--target", tmp_path / "views", "--scene", scene, "--prompt", "a town")
    vae = tmp_path / "flux" / "vae"
    for script in (anchors, align):
        refuse(*script, "--flux_transformer", vae, words=("holds AutoencoderKL", "FluxTransformer2DModel"))
        refuse(*script, "--flux_vae", FLUX_FILE, words=("holds a FLUX transformer; needed: a FLUX VAE",))
        refuse(*script, "--flux_text", FLUX_FILE, words=("is a file", "folder"))
        refuse(*script, "--control_mode", "canny", words=("has no modes",))
        refuse(*script, "--control_mode", "hed", words=("is neither a number nor one of canny, tile",))
    refuse(*frames, "--cogvideox_vae", VAE_FILE, words=("is a file", "folder"))
    refuse(*frames, "--cogvideox_vae", vae, words=("holds AutoencoderKL", "AutoencoderKLCogVideoX"))
    shutil.copytree(tmp_path / "video" / "transformer", tmp_path / "model" / "checkpoint-1350" / "transformer")
    change(tmp_path / "model" / "checkpoint-1350" / "transformer", patch_size_t=2)
    refuse(*frames, "--model_path", tmp_path / "model", words=("is CogVideoX 1.5",))
