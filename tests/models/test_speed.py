"""Speed-ups of denoising and decoding, on the tiny networks: that they take effect, and what they change."""

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from torch import nn
from torch.profiler import profile

from benchmarks.memory.counting import default_dtype
from benchmarks.memory.steps import anchor_step, ggi_step
from models.flux.anchors import sample_anchor
from models.flux.lora import add_lora
from models.flux.network import FluxModels, Text, anchor_schedule, guided_velocity, load_flux, velocity
from models.inbetween.pipeline import CogVideoXInbetweenPipeline, load_inbetween, prepare_vae
from models.latents import draw_noise, pack, unpack
from models.loading.networks import load_model
from models.runtime.convolution import OneDnnConv3d, use_onednn
from models.runtime.memory import FP8, RESIDENT
from models.runtime.rotary import CogVideoXComplexAttention, FluxComplexAttention, turn, use_complex_rotary
from models.runtime.speed import (
    attention_kernel,
    compile_blocks,
    first_block_cache,
    require_attention,
    require_compilable,
)
from models.settings import AnchorSettings
from models.weights import FLUX_STAGE, GGI_STAGE, load_preset, locate
from tests.support.helpers import ROOT
from utils.cli import InputError, heavy_imports

Fill = Callable[..., tuple[torch.Tensor, int]]
STEPS = 15


def load_pipe() -> CogVideoXInbetweenPipeline:
    preset = load_preset("tiny")
    paths = locate(argparse.Namespace(), preset, GGI_STAGE)
    return load_inbetween(paths, Path(preset.ggi_transformer), "cpu", torch.float32, tiling=False)


@pytest.fixture(scope="module")
def fill() -> Fill:
    """Denoise an arc with a threshold and a seed: its latents, and how often the last block ran."""
    pipe = load_pipe()
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    text = draw_noise((1, config.max_text_seq_length, config.text_embed_dim), 3)

    def fill(threshold: float | None, seed: int = 1) -> tuple[torch.Tensor, int]:
        runs = []
        conditions, noise = draw_noise((1, 13, 32, 12, 18), seed), draw_noise((1, 13, 16, 12, 18), seed + 1)
        hook = pipe.transformer.transformer_blocks[-1].attn1.register_forward_hook(lambda *_: runs.append(1))
        with hook, first_block_cache(pipe.transformer, threshold):
            return pipe(conditions, noise, text, text, num_inference_steps=STEPS), len(runs)

    return fill


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
def test_complex_positions_give_the_same_video(batch: int, dtype: torch.dtype):
    transformer = load_pipe().transformer.to(dtype)
    assert transformer.config.use_rotary_positional_embeddings
    assert isinstance(transformer.transformer_blocks[0].attn1.processor, CogVideoXComplexAttention)
    with default_dtype(dtype), torch.no_grad():
        step = ggi_step(transformer, (144, 96), 49, batch)
        ours = step()[0]
        use_complex_rotary(transformer, False)
        assert torch.equal(step()[0], ours)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_positions_give_the_same_velocity(dtype: torch.dtype, lora: bool):
    """With LoRAs, one layer computes queries, keys and values."""
    models = load_flux(locate(argparse.Namespace(), load_preset("tiny"), FLUX_STAGE), "cpu", dtype)
    networks = (models.transformer, models.controlnet)
    if lora:
        for network in networks:
            add_lora(network, 4)
    with default_dtype(dtype), torch.no_grad():
        step = anchor_step(models, (144, 96), 32, 2)
        theirs = step()
        for network in networks:
            use_complex_rotary(network)
        assert isinstance(models.controlnet.transformer_blocks[0].attn.processor, FluxComplexAttention)
        assert torch.equal(step(), theirs)


def test_masks_are_refused():
    transformer = load_pipe().transformer
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    tokens = torch.zeros(1, 3, width)
    with pytest.raises(ValueError, match="an attention mask"):
        transformer.transformer_blocks[0].attn1(tokens, tokens, attention_mask=torch.ones(1, 6))


def test_positions_turn_pairs_of_neighbours():
    x = draw_noise((1, 2, 5, 8), 0)
    pairs = x.clone().unflatten(-1, (-1, 2))
    turn(x, torch.polar(torch.ones(5, 4), torch.full((5, 4), torch.pi / 2)))
    torch.testing.assert_close(x, torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2))


@pytest.mark.slow
def test_a_cache_that_never_holds_changes_nothing(fill: Fill):
    (exact, all_runs), (cached, runs) = fill(None), fill(1e-9)
    assert all_runs == runs == STEPS
    assert torch.equal(exact, cached)


@pytest.mark.slow
def test_steps_are_skipped_and_the_latents_stay_near(fill: Fill):
    (exact, _), (near, some), (far, few) = fill(None), fill(0.2), fill(0.6)
    assert 1 <= few < some < STEPS
    distances = [((found - exact).norm() / exact.norm()).item() for found in (near, far)]
    assert 0 < distances[0] < distances[1] < 0.5


@pytest.mark.slow
def test_every_arc_begins_with_an_empty_cache(fill: Fill):
    first, _ = fill(0.2)
    fill(0.2, 7)
    assert torch.equal(fill(0.2)[0], first)


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch cannot compile from a path with spaces")
def test_compiled_blocks_compute_the_same():
    transformer = load_pipe().transformer
    step = ggi_step(transformer, (144, 96), 49, 1)
    with torch.no_grad():
        before = step()[0]
        compile_blocks(transformer)
        assert isinstance(transformer.transformer_blocks[0].attn1.processor, CogVideoXAttnProcessor2_0)
        torch.testing.assert_close(step()[0], before, rtol=1e-3, atol=1e-4)


def test_blocks_that_are_not_as_loaded_are_not_compiled():
    require_compilable(RESIDENT, "cuda")
    with pytest.raises(InputError, match="--compile goes with --memory full: the transformer would be kept fp8"):
        require_compilable(FP8, "cuda")


# --- true CFG in one batch ---


@pytest.fixture(scope="module")
def flux() -> FluxModels:
    return load_flux(locate(argparse.Namespace(), load_preset("tiny"), FLUX_STAGE), "cpu", torch.float32)


def random_text(models: FluxModels, seed: int) -> Text:
    config, length = models.transformer.config, load_preset("tiny").max_sequence_length
    shapes = (1, length, config.joint_attention_dim), (1, config.pooled_projection_dim)
    return Text(*(draw_noise(shape, seed + i) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize(("scale", "passes"), [(3.5, [1, 2, 2]), (1.0, [1, 1, 1])])
def test_both_branches_go_in_one_batch(flux: FluxModels, scale: float, passes: list[int]):
    """As many passes as steps, each with one branch or both, and the latents of two separate passes."""
    noise, control = draw_noise((1, 16, 12, 18), 1), draw_noise((1, 3, 96, 144), 2).clamp(-1, 1)
    positive, negative = random_text(flux, 3), random_text(flux, 5)
    batches: dict[str, list[int]] = {"transformer": [], "controlnet": []}
    hooks = [
        getattr(flux, name).register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        for name, sizes in batches.items()
    ]
    found = sample_anchor(flux, noise, control, positive, negative, AnchorSettings(num_steps=3, true_gs=scale))
    for hook in hooks:
        hook.remove()
    assert batches == {"transformer": passes, "controlnet": passes}

    tokens, schedule = pack(noise), anchor_schedule(3, 144, 96).tolist()
    with torch.no_grad():
        for i in range(3):
            branches = [
                velocity(flux, tokens, schedule[i], text, control, guidance=4.0, control_weight=0.8)
                for text in (positive, negative)
            ]
            pred = guided_velocity(branches[0], branches[1] if i and scale != 1 else None, scale)
            tokens = tokens + (schedule[i + 1] - schedule[i]) * pred
    torch.testing.assert_close(found, unpack(tokens, 12, 18), rtol=0, atol=1e-4)


# --- attention kernels ---


def test_a_kernel_is_in_effect_inside_its_block():
    """A mask with gradients uses torch's math kernel, unless that is not allowed."""
    query, mask = draw_noise((1, 3, 200, 64), 0), torch.zeros(200, 200, requires_grad=True)
    F.scaled_dot_product_attention(query, query, query, mask)
    with attention_kernel("flash"):
        F.scaled_dot_product_attention(query, query, query)
        with pytest.raises(RuntimeError, match="No available kernel"):
            F.scaled_dot_product_attention(query, query, query, mask)
    F.scaled_dot_product_attention(query, query, query, mask)


def test_a_kernel_that_the_device_lacks_is_refused():
    for name in (None, "flash"):
        require_attention(name, "cpu", torch.float32)
    with pytest.raises(InputError, match="--attention cudnn: cpu has no such kernel"):
        require_attention("cudnn", "cpu", torch.float32)


# --- start and end of a process ---


@pytest.mark.parametrize("error", [None, ImportError])
def test_garbage_is_looked_for_again_after_the_imports(monkeypatch: pytest.MonkeyPatch, error: type | None):
    monkeypatch.delitem(sys.modules, "diffusers")
    frozen = gc.get_freeze_count()
    try:
        with heavy_imports():
            assert not gc.isenabled()
            if error:
                raise error
    except ImportError:
        pass
    assert gc.isenabled() and gc.get_freeze_count() > frozen
    gc.unfreeze()


def test_what_is_there_already_is_not_kept_for_ever():
    """A second script in one process must not freeze the first one's networks, which may be garbage."""
    frozen = gc.get_freeze_count()
    with heavy_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.slow
def test_libraries_have_nothing_to_say():
    """Even with their warnings on, which the scripts switch off."""
    code = """
import argparse, torch
import models.flux.alignment, models.inbetween.training, benchmarks.memory.plans
from models.flux.network import load_flux
from models.weights import FLUX_STAGE, load_preset, locate
load_flux(locate(argparse.Namespace(), load_preset("tiny"), FLUX_STAGE), "cpu", torch.float32)
"""
    loud = os.environ | {f"{library}_VERBOSITY": "warning" for library in ("TRANSFORMERS", "DIFFUSERS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=loud, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


def kernels(layer: nn.Module, x: torch.Tensor) -> set[str]:
    with profile() as run, torch.no_grad():
        layer(x)
    return {event.key for event in run.key_averages()}


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_torchs(dtype: torch.dtype):
    layer, x = CogVideoXSafeConv3d(4, 5, 3, stride=(1, 2, 2)).to(dtype), draw_noise((1, 4, 4, 11, 12), 1).to(dtype)
    results = []
    for change in (lambda _: None, use_onednn):
        change(layer)
        source = x.clone().requires_grad_()
        layer.zero_grad()
        output = layer(source)
        output.square().sum().backward()
        results.append([output.detach(), source.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert type(layer) is OneDnnConv3d
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert ("aten::slow_conv3d_forward" in kernels(layer, x)) == (dtype == torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)


@needs_onednn
def test_small_videos_are_decoded_without_the_slow_loop():
    """Without `prepare_vae` they are decoded by it; if not, torch no longer needs our layer."""
    vae = load_model("cogvideox_vae", AutoencoderKLCogVideoX, Path(load_preset("tiny").cogvideox), torch.float32)
    latents = draw_noise((1, 16, 3, 4, 6), 0)
    with torch.no_grad():
        before = vae.decode(latents).sample
    assert "aten::slow_conv3d_forward" in kernels(vae.decoder, latents)
    prepare_vae(vae, tiling=False)
    assert "aten::slow_conv3d_forward" not in kernels(vae.decoder, latents)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(latents).sample, before, rtol=0, atol=1e-4)
