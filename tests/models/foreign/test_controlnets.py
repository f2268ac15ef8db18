"""ControlNets of other makers: their inputs and residuals, compared with diffusers' own pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxTransformer2DModel,
)

from models.flux.alignment import FlowObjective, flow_sample
from models.flux.lora import add_lora, check_lora, save_lora
from models.flux.network import FluxModels, Text, encode_control, velocity
from models.latents import pack
from models.runtime.rotary import use_complex_rotary
from models.settings import AnchorSettings, control_mode
from tests.support.helpers import ALIGN, ANCHORS, call
from tests.support.small import HEIGHT, WIDTH, resized, small_preset
from tests.support.stages import QUICK_ANCHORS, draw, new_scene, train
from utils.images import read_image
from utils.layout import anchor_run_name, lora_paths

KINDS = {  # as their configurations are published, but for the sizes
    "XLabs": {},
    "InstantX Union": {"conditioning_embedding_channels": None, "num_single_layers": 2, "num_mode": 7},
    "Shakker Union-Pro-2.0": {"conditioning_embedding_channels": None, "patch_size": 1},
}


def small(component: str, cls: type):
    preset = small_preset()
    root = Path(preset.controlnet if component == "controlnet" else preset.flux)
    return cls.from_pretrained(root if component == "controlnet" else root / component).float()


def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Draw all weights at random, also those that are zero in a new ControlNet."""
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return randomise(resized(small("transformer", FluxTransformer2DModel), num_layers=4, num_single_layers=4))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """A VAE whose posterior has no variance: the pipeline's sample is its mean."""
    network = small("vae", AutoencoderKL).requires_grad_(False)
    network.encoder.conv_out.weight[16:], network.encoder.conv_out.bias[16:] = 0, -40
    return network


def control_of(kind: str) -> FluxControlNetModel:
    torch.manual_seed(1)
    return randomise(resized(small("controlnet", FluxControlNetModel), **KINDS[kind]))


@pytest.fixture(params=KINDS)
def models(request: pytest.FixtureRequest, transformer: FluxTransformer2DModel, vae: AutoencoderKL) -> FluxModels:
    control = control_of(request.param)
    return FluxModels(transformer, control, vae, control_mode=4 if control.union else None)


def draw_inputs(models: FluxModels) -> tuple[torch.Tensor, Text, torch.Tensor]:
    """Packed noise, an encoded prompt, and edges as a picture."""
    torch.manual_seed(2)
    width = models.transformer.config.joint_attention_dim
    text = Text(torch.randn(1, 7, width), torch.randn(1, models.transformer.config.pooled_projection_dim))
    return pack(torch.randn(1, 16, HEIGHT // 8, WIDTH // 8)), text, torch.rand(1, 3, HEIGHT, WIDTH) * 2 - 1


def test_the_velocity_is_that_of_diffusers_pipeline(models: FluxModels):
    tokens, text, edges = draw_inputs(models)
    pipeline = FluxControlNetPipeline(
        FlowMatchEulerDiscreteScheduler(), models.vae, None, None, None, None, models.transformer, models.controlnet
    )
    pipeline.set_progress_bar_config(disable=True)
    seen = {}
    hooks = [
        models.transformer.register_forward_hook(lambda m, a, k, out: seen.update(k, out=out[0]), with_kwargs=True),
        models.controlnet.register_forward_hook(lambda m, a, k, out: seen.update(control=k), with_kwargs=True),
    ]
    pipeline(
        prompt_embeds=text.tokens,
        pooled_prompt_embeds=text.pooled,
        control_image=edges,
        control_mode=models.control_mode,
        controlnet_conditioning_scale=0.6,
        guidance_scale=4.0,
        latents=tokens,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=1,
        output_type="latent",
    )
    [hook.remove() for hook in hooks]
    with torch.no_grad():
        control = encode_control(models, edges)
        found = velocity(models, tokens, seen["timestep"], text, control, guidance=4.0, control_weight=0.6)
        without = velocity(models, tokens, seen["timestep"], text, control, guidance=4.0, control_weight=0)
    given = control if control.shape[1] == 3 else pack(control)
    torch.testing.assert_close(given, seen["control"]["controlnet_cond"], atol=1e-4, rtol=0)
    torch.testing.assert_close(found, seen["out"], atol=1e-4, rtol=1e-4)
    assert (found - without).abs().mean() > 0.01


def test_both_branches_of_guidance_go_in_one_batch(models: FluxModels):
    tokens, text, edges = draw_inputs(models)
    use_complex_rotary(models.controlnet)
    with torch.no_grad():
        control = encode_control(models, edges)
        one = velocity(models, tokens, 0.5, text, control, guidance=4.0)
        both = Text(text.tokens.expand(2, -1, -1), text.pooled.expand(2, -1))
        two = velocity(models, tokens.expand(2, -1, -1), 0.5, both, control.expand(2, -1, -1, -1), guidance=4.0)
    torch.testing.assert_close(two, one.expand(2, -1, -1), atol=1e-4, rtol=1e-4)


def test_a_mode_changes_the_picture(transformer: FluxTransformer2DModel, vae: AutoencoderKL):
    models = FluxModels(transformer, control_of("InstantX Union"), vae)
    tokens, text, edges = draw_inputs(models)
    with torch.no_grad():
        control, found = encode_control(models, edges), []
        for models.control_mode in (0, 3):
            found.append(velocity(models, tokens, 0.5, text, control, guidance=4.0))
    assert (found[0] - found[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_lora_of_a_controlnet_is_trained(
    kind: str, transformer: FluxTransformer2DModel, vae: AutoencoderKL, tmp_path: Path
):
    control = control_of(kind)
    models = FluxModels(transformer, control, vae, control_mode=0 if control.union else None)
    tokens, text, edges = draw_inputs(models)
    parameters = add_lora(control, 2)
    for parameter in parameters:
        parameter.requires_grad_()
        torch.nn.init.normal_(parameter)
    sample = flow_sample(tokens, torch.randn_like(tokens), torch.tensor([0.5]))
    with torch.no_grad():
        read = encode_control(models, edges)
    FlowObjective(models)(sample, text, read)["loss"].backward()
    # only the text output of the last double block is unused
    idle = {n for n, p in control.named_parameters() if ".lora_" in n and (p.grad is None or not p.grad.any())}
    assert all(f"transformer_blocks.{control.config.num_layers - 1}.attn.to_add_out" in name for name in idle)
    save_lora(control, tmp_path / "a.safetensors", torch.float32)
    assert check_lora(tmp_path / "a.safetensors", control.config)


def test_modes_have_names():
    assert [control_mode(text) for text in ("canny", "depth", "0", "11")] == [0, 2, 0, 11]
    assert AnchorSettings().control_mode is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["InstantX Union", "Shakker Union-Pro-2.0"])
def test_alignment_and_anchors_with_such_a_controlnet(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    control_of(kind).save_pretrained(tmp_path / "net")
    scene, loras = new_scene(tmp_path / "scene", 1), tmp_path / "loras"
    flags = ("--controlnet", tmp_path / "net")
    modes = ("--control_mode", "canny") if "num_mode" in KINDS[kind] else ()
    wrong = () if modes else ("--control_mode", "0")
    for script, arguments in ((ALIGN, train(loras, *flags)), (ANCHORS, draw(scene, loras, *flags))):
        if script == ANCHORS:
            assert call(script, *arguments[: -len(flags)], "--control_mode", 0) == 2  # another ControlNet's LoRA
        assert call(script, *arguments, *wrong) == 2
        assert "modes" in capfd.readouterr().err
        assert call(script, *arguments, *modes) == 0, capfd.readouterr().err
    assert all(path.exists() for path in lora_paths(loras, "town", 4))
    first = scene / "multiviews" / anchor_run_name("town", [QUICK_ANCHORS[3]] * 2, 4, 1, 2) / "image_00.png"
    edges = read_image(first)
    other = ("--control_mode", "tile") if modes else ("--control_weight", 0)
    assert call(ANCHORS, *draw(scene, loras, *flags), *other, "--output_dir", tmp_path / "other") == 0
    assert (edges != read_image(tmp_path / "other" / first.parent.name / first.name)).any(-1).mean() > 0.1
