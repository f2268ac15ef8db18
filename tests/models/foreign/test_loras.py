"""LoRAs of other programs: every program's names give the same weights, and the same as in diffusers."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from models.flags import weighted_file
from models.flux.lora import check_lora
from models.flux.other_loras import OtherLora, merge_lora, read_other_lora
from tests.support.helpers import ALIGN, ANCHORS, call
from tests.support.small import resized, small_preset
from tests.support.stages import QUICK_ANCHORS, new_scene, train
from utils.cli import InputError
from utils.files import read_json
from utils.images import read_image
from utils.layout import MANIFEST, anchor_run_name

State = dict[str, torch.Tensor]
RANK, ALPHA = 4, 2.0
# the original's names of layers -> diffusers' layers that together have the same rows
LAYERS = {
    "double_blocks.1.img_attn.qkv": ["transformer_blocks.1.attn." + part for part in ("to_q", "to_k", "to_v")],
    "double_blocks.0.txt_attn.qkv": ["transformer_blocks.0.attn.add_" + part + "_proj" for part in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.1.txt_mlp.2": ["transformer_blocks.1.ff_context.net.2"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks.1.linear1": [
        "single_transformer_blocks.1." + part for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
    "img_in": ["x_embedder"],
}


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel.from_pretrained(small_preset().flux, subfolder="transformer").float()
    return resized(model, num_layers=2, num_single_layers=2).eval().requires_grad_(False)


def sizes(model: FluxTransformer2DModel, layers: list[str]) -> tuple[int, int]:
    """(in, out features) of layers stacked into one."""
    matrices = [model.get_submodule(name).weight for name in layers]
    return matrices[0].shape[1], sum(len(matrix) for matrix in matrices)


@pytest.fixture(scope="module")
def original(transformer: FluxTransformer2DModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer of the original: (down, up)}."""
    torch.manual_seed(1)
    pairs = {}
    for name, layers in LAYERS.items():
        features, out = sizes(transformer, layers)
        pairs[name] = (torch.randn(RANK, features), torch.randn(out, RANK))
    return pairs


def swapped(name: str, up: torch.Tensor) -> torch.Tensor:
    """diffusers' order of (scale, shift)."""
    return torch.cat(up.chunk(2)[::-1]) if name.startswith("final_layer.ada") else up


def separate(model: FluxTransformer2DModel, pairs: dict) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The same under diffusers' names."""
    found = {}
    for name, (down, up) in pairs.items():
        rows = [len(model.get_submodule(layer).weight) for layer in LAYERS[name]]
        parts = swapped(name, up).split(rows)
        found |= {layer: (down, part) for layer, part in zip(LAYERS[name], parts, strict=True)}
    return found


def write_names(
    pairs: dict, spell: Callable[[str], str], factors: tuple[str, str], alpha: float | None = ALPHA
) -> State:
    state = {}
    for name, pair in pairs.items():
        for factor, tensor in zip(factors, pair, strict=True):
            state[f"{spell(name)}.{factor}.weight"] = tensor.clone()
        if alpha is not None:
            state[f"{spell(name)}.alpha"] = torch.tensor(alpha)
    return state


def under(prefix: str, name: str) -> str:
    return prefix + name.replace(".", "_")


AB, DOWN_UP = ("lora_A", "lora_B"), ("lora_down", "lora_up")
PROGRAMS = {  # program -> (whether it uses diffusers' names, how it writes them, factors)
    "kohya": (False, lambda name: under("lora_unet_", name), DOWN_UP),
    "ComfyUI": (False, lambda name: f"diffusion_model.{name}", AB),
    "ComfyUI, model": (False, lambda name: f"model.diffusion_model.{name}", DOWN_UP),
    "BFL": (False, lambda name: name, AB),
    "fal": (False, lambda name: f"base_model.model.{name}", AB),
    "diffusers": (True, lambda name: f"transformer.{name}", AB),
    "ai-toolkit": (True, lambda name: f"transformer.{name}", DOWN_UP),
    "peft": (True, lambda name: f"base_model.model.{name}", AB),
    "DDP": (True, lambda name: f"module.{name}", ("lora_A.default", "lora_B.default")),
    "OneTrainer": (True, lambda name: under("lora_transformer_", name), DOWN_UP),
    "LyCORIS": (True, lambda name: under("lora_unet_", name), DOWN_UP),
}


def save(path: Path, state: State, metadata: dict | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata)
    return path


def updates(lora: OtherLora) -> State:
    return {name: up.float() @ down for name, (down, up) in lora.factors.items()}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("alpha", [ALPHA, None])
def test_every_program_s_names_give_the_same_weights(
    transformer, original: dict, program: str, alpha: float | None, tmp_path: Path, capsys: pytest.CaptureFixture
):
    theirs, spell, factors = PROGRAMS[program]
    wanted = separate(transformer, original)
    path = save(tmp_path / "a.safetensors", write_names(wanted if theirs else original, spell, factors, alpha))
    found = updates(read_other_lora(path, 1.0, transformer.config))
    assert capsys.readouterr().err == "" and found.keys() == wanted.keys()
    for name, (down, up) in wanted.items():
        torch.testing.assert_close(found[name], (alpha or RANK) / RANK * up @ down)


def test_xlabs_names(transformer, original: dict, tmp_path: Path):
    """As this project's LoRAs, where q, k and v are one layer, too."""
    names = {
        "double_blocks.1.processor.qkv_lora1": "double_blocks.1.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2",
    }
    state = write_names({new: original[old] for new, old in names.items()}, str, ("down", "up"), None)
    down, up = original["single_blocks.1.linear1"]
    hidden = len(transformer.single_transformer_blocks[1].attn.to_q.weight)
    state |= write_names({"single_blocks.1.processor.qkv_lora": (down, up[: 3 * hidden])}, str, ("down", "up"), None)
    found = updates(read_other_lora(save(tmp_path / "a.safetensors", state), 1.0, transformer.config))
    wanted = separate(transformer, original)
    assert len(found) == 3 + 3 + 1 + 1 + 3
    for name, update in found.items():
        torch.testing.assert_close(update, wanted[name][1] @ wanted[name][0])
    converted = FluxLoraLoaderMixin.lora_state_dict(dict(state))
    for name, update in found.items():
        theirs = [converted[f"transformer.{name}.lora_{factor}.weight"] for factor in "BA"]
        torch.testing.assert_close(update, theirs[0] @ theirs[1])


def test_kohya_s_are_converted_as_diffusers_does(tmp_path: Path):
    """At the published width, the only one that diffusers' converter supports."""
    config = {"num_layers": 1, "num_single_layers": 1, "in_channels": 64, "joint_attention_dim": 64}
    config |= {"num_attention_heads": 24, "attention_head_dim": 128, "pooled_projection_dim": 64}
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    layers = {re.sub(r"blocks\.1", "blocks.0", name): targets for name, targets in LAYERS.items()}
    layers = {name: [re.sub(r"blocks\.1", "blocks.0", target) for target in layers[name]] for name in layers}
    torch.manual_seed(2)
    pairs = {}
    for name, targets in layers.items():
        features, out = sizes(model, targets)
        pairs[name] = (torch.randn(2, features), torch.randn(out, 2))
    state = write_names(pairs, lambda name: under("lora_unet_", name), DOWN_UP, 1.0)
    found = read_other_lora(save(tmp_path / "a.safetensors", state), 1.0, model.config)
    converted = FluxLoraLoaderMixin.lora_state_dict(dict(state))
    # outside of the blocks diffusers leaves out `transformer.` before the name, and alpha of the last layer
    blocks = {name: name.startswith(("transformer_blocks", "single_transformer_blocks")) for name in found.factors}
    prefixes = {name: "transformer." * inside for name, inside in blocks.items()}
    assert {key.split(".lora_")[0] for key in converted} == {prefixes[name] + name for name in found.factors}
    for name, (down, up) in found.factors.items():
        theirs = [converted[f"{prefixes[name]}{name}.lora_{factor}.weight"] for factor in "BA"]
        scale = 2.0 if name in ("norm_out.linear", "proj_out") else 1.0
        torch.testing.assert_close(scale * (up @ down)[:64], (theirs[0] @ theirs[1])[:64])


@pytest.mark.parametrize(
    "extra",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 8, "alpha_pattern": {"proj_out": 1}, "rank_pattern": {"to_q": 2}},
    ],
)
def test_the_picture_is_that_of_diffusers(transformer, extra: dict, tmp_path: Path):
    """Saved by diffusers, which writes alpha into the header; drawn beside another LoRA."""
    torch.manual_seed(3)
    config = transformer.config
    copy = lambda: FluxTransformer2DModel.from_config(config)  # noqa: E731
    base = copy().eval().requires_grad_(False)
    names = ["to_q", "to_out.0", "proj_out", "x_embedder"]
    for i in range(2):
        trained = copy()
        trained.add_adapter(LoraConfig(r=RANK, target_modules=names, init_lora_weights=False, **extra))
        FluxPipeline.save_lora_weights(
            tmp_path / str(i), get_peft_model_state_dict(trained), **_collate_lora_metadata({"transformer": trained})
        )
    inputs = {
        "hidden_states": torch.randn(1, 6, 64),
        "encoder_hidden_states": torch.randn(1, 3, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([4.0]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    stock, ours = copy(), copy()
    for model in (stock, ours):
        model.load_state_dict(base.state_dict())
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, stock)
    for i, weight in enumerate((0.5, -1.5)):
        path = tmp_path / str(i) / "pytorch_lora_weights.safetensors"
        pipeline.load_lora_weights(path, adapter_name=f"adapter_{i}")
        merge_lora(ours, read_other_lora(path, weight, config))
    pipeline.set_adapters(["adapter_0", "adapter_1"], [0.5, -1.5])
    with torch.no_grad():
        wanted, found, without = (model(**inputs).sample for model in (stock, ours, base))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (without - wanted).abs().mean() > 0.01


def test_diffusers_pipeline_s_header_is_read(transformer, original: dict, tmp_path: Path):
    pairs = separate(transformer, original)
    layers = {"transformer_lora_layers": write_names(pairs, str, AB, None)}
    names = {"transformer_lora_adapter_metadata": {"r": RANK, "lora_alpha": 12, "target_modules": [*pairs]}}
    FluxPipeline.save_lora_weights(tmp_path, **layers, **names)
    found = updates(read_other_lora(tmp_path / "pytorch_lora_weights.safetensors", 1.0, transformer.config))
    for name, (down, up) in pairs.items():
        torch.testing.assert_close(found[name], 3 * up @ down)


@pytest.mark.parametrize(
    "header",
    [
        '{"lora_alpha": "much"}',
        '{"alpha_pattern": [1]}',
        '{"alpha_pattern": {"(": 1}}',
        '{"lora_alpha": []}',
        '{"lora_alpha": NaN}',
        '{"alpha_pattern": {"to_q": Infinity}}',
        '{"lora_alpha": 8',
    ],
)
def test_a_header_without_a_usable_alpha_is_refused(transformer, original: dict, header: str, tmp_path: Path):
    state = write_names(separate(transformer, original), lambda name: f"transformer.{name}", AB, None)
    path = save(tmp_path / "a.safetensors", state, {"lora_adapter_metadata": header})
    with pytest.raises(InputError, match="no usable alpha"):
        read_other_lora(path, 1.0, transformer.config)


def test_peft_s_configuration_beside_the_file_is_read(transformer, tmp_path: Path):
    torch.manual_seed(4)
    model = get_peft_model(
        FluxTransformer2DModel.from_config(transformer.config),
        LoraConfig(r=RANK, lora_alpha=12, target_modules=["to_k"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path)
    found = updates(read_other_lora(tmp_path / "adapter_model.safetensors", 1.0, transformer.config))
    wanted = {name: m.get_delta_weight("default") for name, m in model.named_modules() if name.endswith("attn.to_k")}
    assert len(found) == 4
    for name, update in found.items():
        torch.testing.assert_close(update, wanted[f"base_model.model.{name}"])


def test_what_does_not_fit_is_counted(transformer, original: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    state = write_names(original, lambda name: under("lora_unet_", name), DOWN_UP)
    fitting = len(state)
    state["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.zeros(2, 8)
    state["lora_unet_double_blocks_7_img_attn_proj.lora_up.weight"] = torch.zeros(8, 2)
    state["lora_unet_img_in.dora_scale"] = torch.zeros(1, 8)
    lora = read_other_lora(save(tmp_path / "a.safetensors", state), 1.0, transformer.config)
    assert len(lora.factors) == sum(map(len, LAYERS.values()))
    error = capsys.readouterr().err
    assert f"3 of {fitting + 3} tensors do not fit" in error and len(error.splitlines()) == 1
    wide = {key: torch.zeros(t.shape[0] + 1, *t.shape[1:]) for key, t in state.items() if t.ndim == 2}
    wide["transformer.x_embedder.lora_A.weight"] = torch.zeros(2, 128)  # Canny-dev's
    with pytest.raises(InputError, match=f"none of its {len(wide)} tensors fits"):
        read_other_lora(save(tmp_path / "b.safetensors", wide), 1.0, transformer.config)


def test_a_file_that_holds_a_lora_twice_adds_it_once(transformer, original: dict, tmp_path: Path):
    pairs = separate(transformer, original)
    state = write_names(pairs, lambda name: f"transformer.{name}", AB)
    state |= write_names(original, lambda name: under("lora_unet_", name), DOWN_UP)
    found = updates(read_other_lora(save(tmp_path / "a.safetensors", state), 1.0, transformer.config))
    torch.testing.assert_close(found["x_embedder"], ALPHA / RANK * pairs["x_embedder"][1] @ pairs["x_embedder"][0])


def test_8_bit_floats_are_read_and_integers_are_not(transformer, original: dict, tmp_path: Path):
    state = write_names(original, lambda name: under("lora_unet_", name), DOWN_UP)
    eight = {key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for key, tensor in state.items()}
    plain, rounded = (
        updates(read_other_lora(save(tmp_path / "a.safetensors", s), 1.0, transformer.config)) for s in (state, eight)
    )
    error = torch.cat([(plain[name] - rounded[name]).flatten() for name in plain])
    assert 0 < error.std() < 0.1 * torch.cat([update.flatten() for update in plain.values()]).std()
    bad = {
        "int8": {key: t.to(torch.int8) if t.ndim == 2 else t for key, t in state.items()},
        "rank 0": {key: t[:0] if "down" in key else t for key, t in state.items()},
        "holds no LoRA": {},
    }
    for words, tensors in bad.items():
        path = save(tmp_path / "b.safetensors", tensors)
        for read in (
            lambda p: read_other_lora(p, 1.0, transformer.config),
            lambda p: check_lora(p, transformer.config),
        ):
            with pytest.raises(InputError, match=words):
                read(path)
    state["lora_unet_img_in.lora_up.weight"][0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        read_other_lora(save(tmp_path / "a.safetensors", state), 1.0, transformer.config)


def test_a_lora_of_another_program_is_no_aligned_one(transformer, original: dict, tmp_path: Path):
    path = save(tmp_path / "a.safetensors", write_names(original, lambda name: under("lora_unet_", name), DOWN_UP))
    with pytest.raises(InputError, match="LoRAs of other programs go with --lora"):
        check_lora(path, transformer.config)


def test_a_weight_goes_behind_a_colon(tmp_path: Path):
    (tmp_path / "a:2").touch()
    (tmp_path / "b").touch()
    assert weighted_file(f"{tmp_path}/a:2") == (tmp_path / "a:2", 1.0)
    assert weighted_file(f"{tmp_path}/a:2:-0.5") == (tmp_path / "a:2", -0.5)
    assert weighted_file(f"{tmp_path}/b") == (tmp_path / "b", 1.0)


@pytest.mark.slow
def test_anchors_with_loras_of_others(original: dict, tmp_path: Path, capfd: pytest.CaptureFixture):
    """They change the pictures according to their weight, and are part of the run's identity."""
    scene = new_scene(tmp_path / "scene", 1)
    assert call(ALIGN, *train(tmp_path / "loras")) == 0
    pairs = {name: (down, 0.3 * up) for name, (down, up) in original.items()}
    path = save(tmp_path / "a.safetensors", write_names(pairs, lambda name: under("lora_unet_", name), DOWN_UP))
    name = anchor_run_name("town", [QUICK_ANCHORS[3]] * 2, 4, 1, 2)

    def draw(folder: str, *flags: object) -> int:
        arguments = ("--target", scene, "--pfix", "town", "--loras", tmp_path / "loras", "--seed", 1, *QUICK_ANCHORS)
        return call(ANCHORS, *arguments, "--output_dir", tmp_path / folder, *flags)

    def picture(folder: str) -> torch.Tensor:
        return torch.tensor(read_image(tmp_path / folder / name / "image_00.png")).int()

    for folder, flags in {
        "none": (), "zero": ("--lora", f"{path}:0"), "one": ("--lora", path),
        "half": ("--lora", f"{path}:0.5"), "halves": ("--lora", f"{path}:0.25", "--lora", f"{path}:0.25"),
    }.items():  # fmt: skip
        assert draw(folder, *flags) == 0, capfd.readouterr().err
    assert (picture("none") == picture("zero")).all() and (picture("half") - picture("halves")).abs().max() <= 1
    for folder in ("one", "half"):
        assert (picture("none") != picture(folder)).any(-1).float().mean() > 0.5
    assert (picture("one") != picture("half")).any(-1).float().mean() > 0.5
    manifest = read_json(tmp_path / "half" / name / MANIFEST)
    assert [entry["weight"] for entry in manifest["arguments"]["lora"]] == [0.5]
    assert re.fullmatch("[0-9a-f]{64}", manifest["arguments"]["lora"][0]["sha256"])
    assert manifest["lora"] == [str(path)]
    capfd.readouterr()
    assert draw("half", "--lora", f"{path}:0.5") == 0
    assert draw("half", "--lora", f"{path}:0.6") == 2 and "other arguments (lora was" in capfd.readouterr().err
    assert draw("half", "--lora", tmp_path / "no.safetensors") == 2
    assert "no.safetensors does not exist" in capfd.readouterr().err
