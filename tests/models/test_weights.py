"""Presets, access checks, strict loading, components given by the user, and captions by a tiny BLIP-2."""

import argparse
import dataclasses
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    OPTConfig,
    T5Tokenizer,
)

from models.flags import resolve_device
from models.flux.network import encode_flux_prompts, load_flux
from models.inbetween.pipeline import encode_video_prompts, load_inbetween
from models.inbetween.stage import caption_image
from models.loading.networks import component_config, load_model
from models.weights import (
    FLUX_STAGE,
    GGI_STAGE,
    WEIGHTS,
    Preset,
    add_weight_flags,
    caption_source,
    load_preset,
    locate,
    weight_hashes,
)
from tests.support.helpers import GOLDEN
from utils.cli import InputError
from utils.files import read_json


@pytest.fixture(scope="module")
def tiny():
    return load_preset("tiny")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No test may depend on what this machine has downloaded, or use the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_weight_flags(parser, FLUX_STAGE + GGI_STAGE)
    return parser.parse_args(list(flags))


def test_full_preset_is_the_papers():
    full = load_preset("full")
    assert (full.resolution, full.mask_dilations, full.video_size, full.num_frames) == (1024, 12, (720, 480), 49)
    assert full.flux.startswith("black-forest-labs/FLUX.1-dev@") and full.image_size is None


def test_tiny_preset_points_into_its_folder(tiny):
    assert Path(tiny.flux).is_dir() and Path(tiny.ggi_transformer, "config.json").is_file()
    assert tiny.mask_dilations == max(1, round(12 * tiny.image_size[0] / 1072)) == 2


def test_absent_weights_are_named_before_anything_loads():
    with pytest.raises(
        InputError, match=r"FLUX.1-dev@\w+ is not in the local cache and HF_HUB_OFFLINE is set; .*--flux_transformer"
    ):
        locate(parse(), load_preset("full"), FLUX_STAGE)


def test_unreachable_hub_says_what_to_do(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match="cannot be reached; go online, or pass a local copy with --flux_vae"):
        locate(parse(), load_preset("full"), ["flux_vae"])


def test_gated_repository_says_where_to_accept(monkeypatch):
    import httpx2 as httpx
    from huggingface_hub.errors import GatedRepoError

    def gated(self, repo, **_):
        response = httpx.Response(403, request=httpx.Request("GET", f"https://huggingface.co/{repo}"))
        raise GatedRepoError("gated", response=response)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", gated)
    with pytest.raises(InputError, match=r"accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev"):
        locate(parse(), load_preset("full"), ["flux_transformer"])


def test_a_path_that_is_nothing_is_named():
    with pytest.raises(InputError, match=r"controlnet: \./nowhere does not exist"):
        locate(parse("--controlnet", "./nowhere"), load_preset("full"), ["controlnet"])


def cached(hub: Path, repo: str, commit: str, tiny) -> Path:
    """A snapshot of CogVideoX in the hub's cache."""
    folder = hub / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    return shutil.copytree(tiny.cogvideox, folder)


@pytest.mark.parametrize("repo", ["THUDM/CogVideoX-5b-I2V", "zai-org/CogVideoX-5b-I2V"])
def test_a_repository_has_two_names(tmp_path, tiny, repo):
    full = load_preset("full")
    folder = cached(tmp_path / "hub", repo, full.cogvideox.partition("@")[2], tiny)
    assert locate(parse(), full, GGI_STAGE) == {name: folder for name in GGI_STAGE}


def test_what_a_snapshot_lacks_is_named(tmp_path, tiny):
    full = load_preset("full")
    folder = cached(tmp_path / "hub", "THUDM/CogVideoX-5b-I2V", full.cogvideox.partition("@")[2], tiny)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer/spiece\.model is missing: .* and HF_HUB_OFFLINE is set"):
        locate(parse(), full, GGI_STAGE)


def test_another_commit_in_the_cache_is_named(tmp_path, tiny):
    full, taken = load_preset("full"), "zai-org/CogVideoX-5b-I2V@" + "b" * 40
    folder = cached(tmp_path / "hub", "zai-org/CogVideoX-5b-I2V", "b" * 40, tiny)
    with pytest.raises(InputError, match=f"the cache holds another commit: --cogvideox {taken} takes it"):
        locate(parse(), full, GGI_STAGE)
    assert locate(parse("--cogvideox", taken), full, ["cogvideox_vae"]) == {"cogvideox_vae": folder}


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "Invalid credentials"),
        (
            403,
            {"X-Error-Message": "Your token has no access to gated repos"},
            "Your token has no access to gated repos",
        ),
        (429, {"X-Error-Message": "We had to rate limit you"}, "429"),
    ],
)
def test_the_hub_is_quoted(monkeypatch, status, headers, said):
    import httpx2 as httpx
    from huggingface_hub.utils import hf_raise_for_status

    def refuse(self, repo, **_):
        request = httpx.Request("GET", f"https://huggingface.co/api/models/{repo}/auth-check")
        hf_raise_for_status(httpx.Response(status, headers=headers, request=request))

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", refuse)
    with pytest.raises(InputError, match=said) as error:
        locate(parse(), load_preset("full"), ["flux_transformer"])
    assert "cannot be reached" not in str(error.value)


def test_devices():
    assert resolve_device("auto") in ("cpu", "cuda")
    with pytest.raises(InputError, match="no such device"):
        resolve_device("abacus")
    with pytest.raises(InputError, match="no such CUDA device"):
        resolve_device("cuda:99")


def test_components_go_before_their_repository(tiny):
    flux, own = "checkpoints/elsewhere", str(Path(tiny.flux))
    args = parse("--flux", own, "--flux_vae", str(Path(tiny.flux, "vae")))
    located = locate(args, dataclasses.replace(tiny, flux=flux), FLUX_STAGE)
    assert located["flux_transformer"] == Path(own) and located["flux_vae"] == Path(own, "vae")
    hashes = weight_hashes(located)
    assert set(hashes["flux_transformer"]) == {"diffusion_pytorch_model.safetensors"}
    assert set(hashes["flux_text"]) == {"text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}


def test_a_reference_format_file_is_a_component():
    path = GOLDEN / "3_flux" / "flux_tiny.safetensors"
    model = load_model("flux_transformer", FluxTransformer2DModel, path, torch.float32)
    assert model.config._name_or_path == str(path)  # which errors name
    config = component_config("flux_transformer", path)
    assert config["num_layers"] == len(model.transformer_blocks)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("change", ["missing", "unexpected", "truncated"])
def test_loading_is_strict(tmp_path, tiny, change):
    shutil.copytree(tiny.controlnet, tmp_path / "net")
    file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["x_embedder.bias"]
    elif change == "unexpected":
        tensors["surplus.weight"] = torch.zeros(1)
    save_file(tensors, file, {"format": "pt"})
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="controlnet: "):
        load_model("controlnet", FluxControlNetModel, tmp_path / "net", torch.float32)


def test_tiny_flux_in_bfloat16(tiny):
    paths = locate(parse(), tiny, FLUX_STAGE)
    models = load_flux(paths, "cpu", torch.bfloat16)
    assert models.transformer.dtype == models.controlnet.dtype == torch.bfloat16
    texts = encode_flux_prompts(paths["flux_text"], ["", "a red house", ""], "cpu", torch.float32, 32)
    assert set(texts) == {"", "a red house"}
    assert texts[""].tokens.shape == (1, 32, 64) and not texts[""].same_as(texts["a red house"])


class Reached(Exception):
    """The transformer was called with all of its inputs on its own device."""


def test_video_inputs_follow_the_transformer(tiny):
    """Embeddings come from the CPU and must follow the transformer; the meta device stands in for a GPU."""
    paths = locate(parse(), tiny, GGI_STAGE)
    pipe = load_inbetween(paths, Path(tiny.ggi_transformer), "meta", torch.bfloat16, tiling=False)

    def check(module, args, inputs):
        tensors = [x for x in inputs.values() if torch.is_tensor(x)] + list(inputs["image_rotary_emb"])
        assert {x.device.type for x in tensors} == {"meta"}
        assert inputs["encoder_hidden_states"].dtype == torch.bfloat16
        raise Reached

    pipe.transformer.register_forward_pre_hook(check, with_kwargs=True)
    conditions, noise = (torch.zeros(1, 13, c, 12, 18, device="meta") for c in (32, 16))
    embeds = encode_video_prompts(paths["cogvideox_text"], ["a", ""], "cpu", torch.float32, 32)
    with pytest.raises(Reached):
        pipe(conditions, noise, embeds["a"], embeds[""], num_inference_steps=2)


def test_the_scheduler_is_ddim(tiny):
    paths = locate(parse(), tiny, GGI_STAGE)
    pipe = load_inbetween(paths, Path(tiny.ggi_transformer), "cpu", torch.float32, tiling=False)
    assert type(pipe.scheduler).__name__ == "CogVideoXDDIMScheduler"
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr


def tiny_blip2(folder: Path) -> None:
    """A random BLIP-2 with the files of the published one."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -2.0) for c in string.ascii_letters)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=28, patch_size=14, **sizes).to_dict(),
        qformer_config=Blip2QFormerConfig(vocab_size=32, encoder_hidden_size=16, **sizes).to_dict(),
        text_config=OPTConfig(
            vocab_size=len(tokenizer), hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=len(tokenizer) - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)


def test_captions_come_from_blip2(tmp_path):
    tiny_blip2(tmp_path / "blip2")
    assert caption_source(str(tmp_path / "blip2")) == tmp_path / "blip2"
    image = np.random.default_rng(0).integers(0, 256, (96, 144, 3), np.uint8)
    first, second = (caption_image(image, tmp_path / "blip2", "cpu", torch.float32, seed=1) for _ in range(2))
    assert isinstance(first, str) and first == second


def test_no_caption_model_says_how_to_give_a_prompt():
    with pytest.raises(InputError, match="give --prompt"):
        caption_source(None)


def test_presets_are_complete():
    fields = {field.name: field.default for field in dataclasses.fields(Preset) if field.name != "name"}
    needed = {name for name, default in fields.items() if default is dataclasses.MISSING}
    for name in ("full", "tiny"):
        assert read_json(WEIGHTS / name / "preset.json").keys() == needed and load_preset(name).name == name
    video = read_json(WEIGHTS / "wan_vace" / "preset.json")
    found = dataclasses.asdict(load_preset("full", "wan_vace"))
    assert video.keys() <= fields.keys() and found["wan"] == video["wan"] and found["flux"] == load_preset("full").flux
