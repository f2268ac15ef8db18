"""The memory plan compared with what networks really hold, its choices, and the modes' effect on results."""

import argparse
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from peft import get_peft_model_state_dict

from benchmarks.memory.counting import (
    LiveBytes,
    count_activations,
    empty_model,
    held_bytes,
    kept_bytes,
    materialize,
    without_data,
)
from benchmarks.memory.plans import flux_builders, video_builders, with_lora
from models.flags import MEMORY_MODES
from models.flux.alignment import FlowObjective, FlowSample, load_trainable
from models.flux.lora import add_lora, set_lora
from models.flux.network import FluxModels, Text, encode_flux_prompts, load_flux, place_flux, velocity
from models.inbetween.pipeline import load_inbetween
from models.latents import draw_noise, pack, to_signed
from models.loading.networks import component_config, load_encoders
from models.runtime.memory import (
    FP8,
    INT8,
    NF4,
    OFFLOADED,
    ON_DEMAND,
    PLACEMENTS,
    RESIDENT,
    Phase,
    Plan,
    block_linears,
    choose_mode,
    look_up_plan,
    lossy_placements,
    place,
    place_pipeline,
    placement_on,
    quantise,
)
from models.weights import FLUX_STAGE, GGI_STAGE, load_preset, locate
from tests.support.helpers import GOLDEN, ROOT, profiled_peak
from utils.cli import InputError
from utils.files import read_json
from utils.images import read_image

FULL = ROOT / "configs" / "full"
PATHS = {
    "flux_transformer": FULL / "flux",
    "flux_vae": FULL / "flux",
    "flux_text": FULL / "flux",
    "controlnet": FULL / "controlnet",
    "cogvideox_vae": FULL / "cogvideox",
    "cogvideox_text": FULL / "cogvideox",
}
INVENTORY = GOLDEN / "8_inventory"
GB = 10**9
TABLE = re.sub(r"( GB): [^|]+?( \|)", r"\1\2", (ROOT / "README.md").read_text())  # without the words after the peaks
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny_paths() -> dict[str, Path]:
    return locate(argparse.Namespace(), load_preset("tiny"), FLUX_STAGE)


def empty_flux(dtype: torch.dtype = torch.bfloat16) -> FluxTransformer2DModel:
    return empty_model(
        lambda: FluxTransformer2DModel.from_config(read_json(FULL / "flux/transformer/config.json")), dtype
    )


# --- weights ---


@pytest.mark.parametrize(
    ("config", "cls", "inventory"),
    [
        ("flux/transformer", FluxTransformer2DModel, "flux_dev_transformer"),
        ("controlnet", FluxControlNetModel, "controlnet_flux_hed_v3_depth2"),
    ],
)
def test_configurations_are_those_of_the_released_files(config: str, cls: type, inventory: str):
    model = empty_model(lambda: cls.from_config(read_json(FULL / config / "config.json")), torch.bfloat16)
    wanted = json.loads((INVENTORY / f"{inventory}.json").read_text())["n_params"]
    assert sum(parameter.numel() for parameter in model.parameters()) == wanted
    assert held_bytes(model) == kept_bytes(model, RESIDENT) == 2 * wanted


def bytes_by_hand(model: torch.nn.Module, how: str) -> int:
    """Counted again from names and shapes alone, in bfloat16. model: empty."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    matrices = {n for n, s in shapes.items() if len(s) == 2 and n.startswith(blocks) and ".lora_" not in n}
    other = sum(2 * shape.numel() for name, shape in shapes.items() if name not in matrices)
    if how == INT8:
        return other + sum(shapes[name].numel() + 4 * shapes[name][0] for name in matrices)
    if how == NF4:
        return other + sum(shapes[name].numel() // 2 + 4 * shapes[name].numel() // 64 + 64 for name in matrices)
    if how == FP8:
        wide = {n for n in shapes if "norm" in n or n.startswith("proj_out.") or ".lora_" in n}
        return sum((2 if name in wide else 1) * shape.numel() for name, shape in shapes.items())
    return sum(2 * shape.numel() for shape in shapes.values())


@pytest.mark.parametrize("how", [RESIDENT, FP8, INT8, NF4])
def test_weights_of_every_mode_are_sums_over_the_configuration(how: str):
    assert kept_bytes(empty_flux(), how) == bytes_by_hand(empty_flux(), how)


@pytest.mark.parametrize("how", [FP8, INT8, NF4])
def test_networks_hold_what_was_counted(how: str, tiny_paths: dict[str, Path]):
    models = load_flux(tiny_paths, "cpu", torch.bfloat16)
    for name, model in (("flux_transformer", models.transformer), ("controlnet", models.controlnet)):
        cls, config = type(model), component_config(name, tiny_paths[name])
        counted = kept_bytes(empty_model(lambda cls=cls, config=config: _with_lora(cls, config), torch.bfloat16), how)
        add_lora(model, 4)
        before = held_bytes(model)
        place(model, how, "cpu")
        assert held_bytes(model) == counted < 0.8 * before


def _with_lora(cls: type, config: dict) -> torch.nn.Module:
    model = cls.from_config(config)
    add_lora(model, 4)
    return model


# --- activations ---


@slow
def test_activations_are_those_of_a_real_step(tiny_paths: dict[str, Path]):
    """The same code with data, under the profiler. No ControlNet: a CPU's convolutions allocate workspace."""
    models, tokens, control, text = _inputs(tiny_paths, torch.float32)

    def step() -> None:
        with torch.no_grad():
            velocity(models, tokens, 0.5, text, control, guidance=4.0, control_weight=0)

    step()
    peak = profiled_peak(step)
    with without_data(torch.float32):
        materialize(models.transformer)
        tokens, control = torch.empty(tokens.shape), torch.empty(control.shape)
        text = Text(torch.empty(text.tokens.shape), torch.empty(text.pooled.shape))
        counted = count_activations(step, models.transformer)
    assert counted == pytest.approx(peak, rel=0.1)


# --- plans ---


def full_size_plans() -> dict[str, Plan]:
    """Plans from the table, which `tests/benchmarks/test_memory_table.py` compares with the counts."""
    pixels = {"alignment": 1024 * 1024, "anchors": 1072 * 720, "ggi": 720 * 480}
    return {stage: look_up_plan("full", stage, pixels=count) for stage, count in pixels.items()}


def test_full_size_plans_meet_the_targets():
    """They also equal the table of README.md."""
    limits = {"alignment": (80, 22, 14), "anchors": (80, 22, 12), "ggi": (80, 22, 10)}
    said = {"alignment": (28.5, 16.1, 10.6), "anchors": (27.4, 18.7, 1.9), "ggi": (15.7, 13.9, 4.5)}
    for stage, plan in full_size_plans().items():
        peaks = [max(phase.total for phase in plan[mode]) for mode in MEMORY_MODES]
        assert tuple(round(peak / GB, 1) for peak in peaks) == said[stage]
        for peak, limit in zip(peaks, limits[stage], strict=True):
            assert peak < limit * GB, (stage, peaks)
        assert " | ".join(f"{peak:.1f} GB" for peak in said[stage]) in TABLE


@slow
def test_weights_of_every_phase_are_sums_over_the_configurations():
    """For every stage and mode at full size, except for offloaded layers."""
    flux, video = flux_builders(PATHS), video_builders(FULL / "cogvideox", FULL / "inbetween")
    flux |= {name: with_lora(flux[name], 16) for name in ("transformer", "controlnet")}
    built = {"alignment": flux, "anchors": flux, "ggi": video}
    at_work = {"encoding": "vae", "denoising": "transformer", "decoding": "vae"}
    for stage, plan in full_size_plans().items():
        for mode in MEMORY_MODES:
            kept = {name: how for name, how in PLACEMENTS[stage][mode].items() if name != "text"}
            for phase in plan[mode][1:]:
                present = [n for n, how in kept.items() if how != ON_DEMAND or n == at_work[phase.name]]
                wanted = 0
                for name in present:
                    if kept[name] != OFFLOADED:
                        model = empty_model(built[stage][name], torch.bfloat16)
                        wanted += bytes_by_hand(model, kept[name]) + sum(2 * b.numel() for b in model.buffers())
                streamed = phase.weights - wanted
                at_work_streamed = phase.name != "training" and kept[at_work[phase.name]] == OFFLOADED
                assert 0 < streamed < 0.3 * GB if at_work_streamed else streamed == 0, (stage, mode, phase)


PLAN = {
    "full": [Phase("text", 1 * GB, 0), Phase("work", 20 * GB, 4 * GB)],
    "balanced": [Phase("text", 1 * GB, 0), Phase("work", 10 * GB, 4 * GB, 1 * GB)],
    "low": [Phase("text", 9 * GB, 0), Phase("work", 1 * GB, 4 * GB)],
}


@pytest.mark.parametrize(
    ("wanted", "room", "chosen"),
    [
        ("auto", 80, "full"),
        ("auto", 24, "full"),
        ("auto", 23, "balanced"),
        ("auto", 10, "low"),
        ("low", 80, "low"),
        ("balanced", 16, "balanced"),
    ],
)
def test_the_fastest_mode_that_fits(wanted: str, room: int, chosen: str):
    assert choose_mode(wanted, PLAN, room * GB, "cuda") == chosen


@pytest.mark.parametrize(
    ("wanted", "room", "said"),
    [
        ("full", 22, "--memory full needs 24.0 GB, cuda has room for 22.0 GB: use --memory balanced"),
        ("balanced", 12, "--memory balanced needs 15.0 GB, cuda has room for 12.0 GB: use --memory low"),
        ("auto", 8, "--memory auto needs 9.0 GB, cuda has room for 8.0 GB: no mode fits"),
    ],
)
def test_what_does_not_fit_names_the_mode_that_would(wanted: str, room: int, said: str):
    with pytest.raises(InputError, match=said):
        choose_mode(wanted, PLAN, room * GB, "cuda")


def test_a_cpu_streams_nothing():
    assert placement_on("cuda", "anchors", "low") == PLACEMENTS["anchors"]["low"]
    assert set(PLACEMENTS["anchors"]["low"].values()) == {OFFLOADED}
    assert (
        placement_on("cpu:0", "anchors", "low")
        == placement_on("cpu", "anchors", "low")
        == PLACEMENTS["anchors"]["full"]
    )
    assert lossy_placements(PLACEMENTS["anchors"]["low"]) == {}
    assert lossy_placements(PLACEMENTS["anchors"]["balanced"]) == {"kept": {"transformer": FP8}}


# --- what the modes do to results ---


def _inputs(paths: dict[str, Path], dtype: torch.dtype):
    preset = load_preset("tiny")
    text = encode_flux_prompts(paths["flux_text"], [""], "cpu", dtype, preset.max_sequence_length)[""]
    control = torch.rand(1, 3, 96, 144, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return load_flux(paths, "cpu", dtype), pack(draw_noise((1, 16, 12, 18), 1)), control, text


@pytest.mark.parametrize(("how", "most"), [(FP8, 0.05), (INT8, 0.01), (NF4, 0.08)])
def test_lossy_modes_stay_near(how: str, most: float, tiny_paths: dict[str, Path]):
    """Relative error of a velocity, compared with the same networks in float32; bfloat16 alone gives 0.008."""
    models, tokens, control, text = _inputs(tiny_paths, torch.float32)

    def predict(models: FluxModels) -> torch.Tensor:
        with torch.no_grad():
            return velocity(models, tokens, 0.7, text, control, guidance=4.0)

    before = predict(models)
    place_flux(models, {"transformer": how, "controlnet": how})
    distance = ((predict(models) - before).norm() / before.norm()).item()
    assert 1e-4 < distance < most


def test_streamed_networks_compute_the_same_and_take_other_loras(tmp_path: Path, tiny_paths: dict[str, Path]):
    """With diffusers' hooks and the CPU in place of the GPU, so without streams and pinned copies."""
    _, tokens, control, text = _inputs(tiny_paths, torch.float32)
    found = []
    for how in (RESIDENT, OFFLOADED):
        models = load_flux(tiny_paths, "cpu", torch.float32)
        networks = (models.transformer, models.controlnet)
        for model in networks:
            add_lora(model, 4)
        place_flux(models, {"transformer": how, "controlnet": how, "vae": how})
        for seed in (1, 2):
            for model in networks:
                shapes = {n: p.shape for n, p in get_peft_model_state_dict(model).items()}
                set_lora(model, {name: 0.1 * draw_noise(tuple(shape), seed) for name, shape in shapes.items()})
            with torch.no_grad():
                found.append(velocity(models, tokens, 0.7, text, control, guidance=4.0))
    hooked = [m for m in models.transformer.modules() if getattr(m, "_diffusers_hook", None)]
    assert len(hooked) >= len(block_linears(models.transformer))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]) and not torch.equal(*found[:2])


def test_streamed_text_encoders_compute_the_same(tiny_paths: dict[str, Path]):
    encoders = load_encoders("flux_text", FluxPipeline, tiny_paths["flux_text"], torch.float32)
    place_pipeline(encoders, OFFLOADED, "cpu")
    for encoder in (encoders.text_encoder, encoders.text_encoder_2):
        assert any(getattr(module, "_diffusers_hook", None) for module in encoder.modules())
    arguments = tiny_paths["flux_text"], ["a town", ""], "cpu", torch.float32, 32
    whole, streamed = (encode_flux_prompts(*arguments, how) for how in (RESIDENT, OFFLOADED))
    assert all(whole[prompt].same_as(streamed[prompt]) for prompt in whole)
    assert not whole["a town"].same_as(whole[""])


def test_gradients_pass_through_quantised_blocks(tiny_paths: dict[str, Path]):
    models, tokens, control, text = _inputs(tiny_paths, torch.float32)
    gradients = []
    for how in (RESIDENT, INT8):
        torch.manual_seed(0)
        if how == RESIDENT:
            parameters = add_lora(models.transformer, 4)
            torch.nn.init.normal_(next(p for n, p in models.transformer.named_parameters() if "lora_B" in n))
        else:
            quantise(models.transformer, INT8)
            models.transformer.to("cpu")
        prediction = velocity(models, tokens, 0.7, text, control, guidance=1.0)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(prediction.square().mean(), parameters)]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("how", [INT8, NF4])
def test_checkpointing_lets_go_of_what_quantised_layers_see(how: str, tiny_paths: dict[str, Path]):
    """A forward pass saves as many bytes for the backward pass as with networks in bfloat16."""
    held = []
    for kept in (RESIDENT, how):
        kept = {"transformer": kept, "controlnet": kept, "vae": RESIDENT}
        models, _ = load_trainable(tiny_paths, "cpu", torch.bfloat16, 4, 0, kept)
        tokens, control = torch.randn(4, 36, 64), torch.randn(4, 3, 96, 96)
        text = Text(torch.randn(4, 32, 64), torch.randn(4, models.transformer.config.pooled_projection_dim))
        sample = FlowSample(tokens, tokens, torch.full((4,), 0.5))
        with LiveBytes() as live, torch.autocast("cpu", torch.bfloat16):
            live.ignore(models.transformer)
            live.ignore(models.controlnet)
            loss = FlowObjective(models)(sample, text, control)["loss"]
            held.append(live.now)
        loss.backward()
    assert held[1] < 1.1 * held[0]


@pytest.mark.parametrize("how", [INT8, NF4])
def test_quantised_layers_compute_in_one_dtype(how: str):
    """Under a GPU's autocast the norms return float32."""
    block = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([torch.nn.Linear(128, 64)])}).bfloat16()
    x, linear = torch.randn(3, 128), block.transformer_blocks[0]
    wanted = linear(x.bfloat16())
    quantise(block, how)
    block.to("cpu")
    found = block.transformer_blocks[0](x)
    assert found.dtype == torch.bfloat16
    assert ((found - wanted).float().norm() / wanted.float().norm()) < (0.02 if how == INT8 else 0.2)


@slow
def test_tiles_of_the_video_autoencoder_stay_near():
    """Decode in tiles of half the height and a little more than half the width, as at full size."""
    picture = cv2.resize(read_image(ROOT / "assets/references/boxtown.png"), (180, 120), interpolation=cv2.INTER_AREA)
    video = to_signed(np.stack([picture[i : i + 96, 2 * i : 2 * i + 144] for i in range(9)]))[None]
    preset = load_preset("tiny")
    paths = locate(argparse.Namespace(), preset, GGI_STAGE)
    pipe = load_inbetween(paths, Path(preset.ggi_transformer), "cpu", torch.float32, tiling=False)
    with torch.no_grad():
        latents = pipe.encode_video(video)
    whole = pipe.decode_video(latents)
    pipe.vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=80)
    tiled = pipe.decode_video(latents)
    assert tiled.shape == whole.shape == (9, 96, 144, 3)
    assert 36 < cv2.PSNR(whole, tiled) < 60
