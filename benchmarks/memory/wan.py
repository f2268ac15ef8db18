"""The memory plan of Wan VACE, for its two sizes, counted from configs/full/wan as in `benchmarks/memory/plans.py`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACETransformer3DModel
from transformers import UMT5EncoderModel

from benchmarks.memory.counting import default_dtype, empty_model, materialize, without_data
from benchmarks.memory.plans import combine_phases, count_work, from_files, text_phases
from benchmarks.memory.steps import Pass
from benchmarks.memory.table import BF16, DEVICE, entry_of
from models.inbetween.wan_loading import TEXT_TOKENS, set_tiles
from models.inbetween.wan_vace import NUM_FRAMES, WanVaceInbetweenPipeline
from models.runtime.memory import Plan
from models.weights import ROOT, load_preset
from utils.files import read_json
from utils.layout import LATENT_FRAMES

CONFIGS = ROOT / "configs" / "full" / "wan"
SIZES = ("1.3B", "14B")


def wan_builders(name: str, configs: Path = CONFIGS) -> dict[str, Callable[[], torch.nn.Module]]:
    """{network: function that builds it}, in the precisions in which they are loaded. name: 1.3B or 14B."""

    def transformer() -> torch.nn.Module:
        model = WanVACETransformer3DModel.from_config(read_json(configs / name / "config.json"))
        for key, parameter in model.named_parameters():
            if not {*key.split(".")}.isdisjoint(model._keep_in_fp32_modules):
                parameter.data = parameter.data.float()
        return model

    def vae() -> torch.nn.Module:
        with default_dtype(torch.float32):
            return AutoencoderKLWan.from_config(read_json(configs / "vae" / "config.json"))

    return {
        "transformer": from_files("wan_transformer", configs / name, transformer),
        "vae": from_files("wan_vae", configs / "vae", vae),
    }


def wan_step(network: WanVACETransformer3DModel, size: tuple[int, int]) -> Pass:
    """One pass of the transformer; guidance runs its two branches one after the other. size: width, height."""
    config, latent = network.config, (LATENT_FRAMES, size[1] // 8, size[0] // 8)
    arguments = {
        "hidden_states": torch.randn(1, config.in_channels, *latent, device=network.device),
        "timestep": torch.full((1,), 500.0, device=network.device),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.text_dim, device=network.device),
        "control_hidden_states": torch.randn(1, config.vace_in_channels, *latent, device=network.device),
    }
    return lambda: network(**arguments)


def plan_wan(name: str, size: tuple[int, int], dtype: torch.dtype, device: str) -> Plan:
    """Plan stage 3 by Wan VACE. name: 1.3B or 14B. size: width, height of the video in pixels."""
    builders = wan_builders(name)
    networks = [empty_model(build, dtype) for build in builders.values()]
    with without_data(dtype), torch.no_grad():
        network, vae = map(materialize, networks)
        pipe = WanVaceInbetweenPipeline(None, None, vae, UniPCMultistepScheduler(), network)
        set_tiles(pipe, load_preset("full", "wan_vace").vae_tiling)
        pixels = torch.empty(1, 3, NUM_FRAMES, *size[::-1], dtype=torch.float32)
        mask = torch.empty(1, 1, NUM_FRAMES, *size[::-1], dtype=torch.float32)
        latents = torch.empty(1, vae.config.z_dim, LATENT_FRAMES, size[1] // 8, size[0] // 8, dtype=torch.float32)
        encode = partial(pipe.prepare_video_latents, pixels, mask, [[]], None, torch.device("cpu"))
        phases = {
            "encoding": count_work({"vae": vae}, encode, device, streamed=False),
            "denoising": count_work({"transformer": network}, wan_step(network, size), device),
            "decoding": count_work({"vae": vae}, lambda: pipe.decode_latents(latents), device, streamed=False),
        }
    text = text_phases(CONFIGS, {"text_encoder": UMT5EncoderModel}, dtype, TEXT_TOKENS, device)
    return combine_phases("wan_vace", builders, dtype, phases, text, device)


def count_wan() -> dict[str, dict]:
    """The table: {size: its entry, and the transformer's width}, at the preset's size."""
    size = load_preset("full", "wan_vace").video_size
    table = {}
    for name in SIZES:
        config = read_json(CONFIGS / name / "config.json")
        width = config["num_attention_heads"] * config["attention_head_dim"]
        plan = plan_wan(name, size, BF16, DEVICE)
        table[name] = {"width": width} | entry_of(plan, pixels=size[0] * size[1], frames=NUM_FRAMES, batch=1)
    return table
