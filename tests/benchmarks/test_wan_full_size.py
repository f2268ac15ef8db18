"""Wan VACE at full size, on the meta device: its tensors are those that are published, and what a step costs.

Names and sizes are listed by hand from the original model and from diffusers' script that converts it; the files
themselves were not read.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import cpu_attention
from benchmarks.memory.counting import empty_model, held_bytes, materialize, without_data
from benchmarks.memory.plans import encoder_builder, video_builders
from benchmarks.memory.steps import ggi_step
from benchmarks.memory.wan import CONFIGS, wan_builders, wan_step
from benchmarks.setup import setup_of
from models.loading.files import build_empty
from tests.support.helpers import ROOT
from utils.files import read_json
from utils.layout import LATENT_FRAMES

Shapes = dict[str, tuple[int, ...]]
SIZES = {  # width, width of the feed-forward layers, blocks, blocks of control
    "1.3B": (1536, 8960, 30, 15),
    "14B": (5120, 13824, 40, 8),
}


def linear(name: str, out: int, features: int) -> Shapes:
    return {f"{name}.weight": (out, features), f"{name}.bias": (out,)}


def block_shapes(prefix: str, width: int, wide: int) -> Shapes:
    """One block: two attentions with normalised queries and keys, a feed-forward layer, and its modulation."""
    shapes = {f"{prefix}.scale_shift_table": (1, 6, width)}
    for attention in ("attn1", "attn2"):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{prefix}.{attention}.{layer}", width, width)
        shapes |= {f"{prefix}.{attention}.norm_{part}.weight": (width,) for part in "qk"}
    shapes |= {f"{prefix}.norm2.weight": (width,), f"{prefix}.norm2.bias": (width,)}
    return shapes | linear(f"{prefix}.ffn.net.0.proj", wide, width) | linear(f"{prefix}.ffn.net.2", width, wide)


def published(width: int, wide: int, blocks: int, controls: int) -> Shapes:
    shapes = {"scale_shift_table": (1, 2, width)} | linear("proj_out", 64, width)
    for name, channels in (("patch_embedding", 16), ("vace_patch_embedding", 96)):
        shapes |= {f"{name}.weight": (width, channels, 1, 2, 2), f"{name}.bias": (width,)}
    for name, features in (("time_embedder", 256), ("text_embedder", 4096)):
        shapes |= linear(f"condition_embedder.{name}.linear_1", width, features)
        shapes |= linear(f"condition_embedder.{name}.linear_2", width, width)
    shapes |= linear("condition_embedder.time_proj", 6 * width, width)
    for i in range(blocks):
        shapes |= block_shapes(f"blocks.{i}", width, wide)
    for i in range(controls):
        shapes |= block_shapes(f"vace_blocks.{i}", width, wide) | linear(f"vace_blocks.{i}.proj_out", width, width)
    return shapes | linear("vace_blocks.0.proj_in", width, width)


@pytest.mark.parametrize("name", SIZES)
def test_tensors_of_the_transformer_are_all_taken(name: str):
    from diffusers import WanVACETransformer3DModel

    config = read_json(CONFIGS / name / "config.json")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in published(*SIZES[name]).items()}
    build_empty(WanVACETransformer3DModel, config, tensors)  # raises for a key or a shape too many or too few
    del tensors["vace_blocks.0.proj_in.bias"]
    with pytest.raises(ValueError, match=r"missing keys \['vace_blocks.0.proj_in.bias'\]"):
        build_empty(WanVACETransformer3DModel, config, tensors)


def test_sizes_of_all_networks():
    from transformers import UMT5EncoderModel

    counts = {}
    for name in SIZES:
        network = empty_model(wan_builders(name)["transformer"], torch.bfloat16)
        counts[name] = sum(p.numel() for p in network.parameters()) / 1e9
        kept = held_bytes(network) - 2e9 * counts[name]
        assert 0 < kept < 0.02 * held_bytes(network)  # modulation and norms are kept in float32
    text = empty_model(encoder_builder(CONFIGS, "text_encoder", UMT5EncoderModel), torch.bfloat16)
    counts["umT5"] = sum(p.numel() for p in text.parameters()) / 1e9
    assert counts == pytest.approx({"1.3B": 2.15, "14B": 17.3, "umT5": 5.68}, rel=0.01)
    vae = empty_model(wan_builders("1.3B")["vae"], torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert vae.config.z_dim == len(vae.config.latents_mean) == len(vae.config.latents_std) == 16
    assert vae.config.latents_mean[0] == -0.7571 and vae.config.latents_std[-1] == 1.9160


def operations(step) -> float:
    """In 10^12 floating-point operations."""
    with FlopCounterMode(display=False, custom_mapping=cpu_attention()) as counter:
        step()
    return counter.get_total_flops() / 1e12


@pytest.mark.slow
def test_operations_of_a_step_beside_those_of_cogvideox():
    """At 720x480, without guidance; by hand for Wan: its matrices and its attention."""
    setup, size, found = setup_of("full"), (720, 480), {}
    builders = {name: wan_builders(name)["transformer"] for name in SIZES}
    builders["cogvideox"] = video_builders(setup.paths["cogvideox_vae"], setup.inbetween)["transformer"]
    for name, build in builders.items():
        network = empty_model(build, torch.bfloat16)
        with without_data(torch.bfloat16), torch.no_grad():
            materialize(network)
            step = ggi_step(network, size, 49, 1) if name == "cogvideox" else wan_step(network, size)
            found[name] = operations(step)
    tokens, text = LATENT_FRAMES * 30 * 45, 512
    for name, (width, wide, blocks, controls) in SIZES.items():
        per_token = 4 * width**2 + 2 * width**2 + 2 * width * wide  # self-attention, half of the other, feed-forward
        per_block = 2 * tokens * per_token + 2 * text * 2 * width**2 + 4 * tokens * width * (tokens + text)
        hints = 2 * tokens * width**2 * (controls + 1)
        assert found[name] == pytest.approx(((blocks + controls) * per_block + hints) / 1e12, rel=0.01)
    page = (ROOT / "docs" / "wan_vace.md").read_text()
    assert all(f" {count:.0f} TFLOP" in page for count in found.values())
