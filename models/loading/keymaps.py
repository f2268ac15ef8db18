"""Names and sizes: how reference-format state dicts map onto diffusers' models. Pure functions on dicts of tensors.

Everything also works on meta tensors, so full-size key lists can be checked without memory. Sizes are read from the
tensors, never assumed. What tensors do not show (the split of the rotary axes, the latent scale) comes from the
file's metadata or else from the published models. Every key must be known: a key left over is an error.
"""

import re
from collections.abc import Iterable, Mapping

import torch

StateDict = dict[str, torch.Tensor]
# A rule: a pattern for the whole source key, and the names that its rows go to, in order (one name: just a renaming).
Rules = list[tuple[str, list[str]]]

MLP_RATIO = 4  # fixed in diffusers' Flux blocks

_EMBEDDER_RULES: Rules = [
    (rf"{source}\.{layer}_layer\.(weight|bias)", [rf"time_text_embed.{target}.linear_{i}.\1"])
    for source, target in (
        ("time_in", "timestep_embedder"),
        ("guidance_in", "guidance_embedder"),
        ("vector_in", "text_embedder"),
    )
    for i, layer in ((1, "in"), (2, "out"))
] + [
    (r"img_in\.(weight|bias)", [r"x_embedder.\1"]),
    (r"txt_in\.(weight|bias)", [r"context_embedder.\1"]),
]

_DOUBLE = r"double_blocks\.(\d+)\."
_DOUBLE_RULES: Rules = [
    rule
    for stream, norm, qkv, q_norm, out, ff in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), "norm_{}", "to_out.0", "ff"),
        (
            "txt",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "norm_added_{}",
            "to_add_out",
            "ff_context",
        ),
    )
    for rule in (
        (rf"{_DOUBLE}{stream}_mod\.lin\.(weight|bias)", [rf"transformer_blocks.\1.{norm}.linear.\2"]),
        (rf"{_DOUBLE}{stream}_attn\.qkv\.(weight|bias)", [rf"transformer_blocks.\1.attn.{x}.\2" for x in qkv]),
        (
            rf"{_DOUBLE}{stream}_attn\.norm\.query_norm\.scale",
            [rf"transformer_blocks.\1.attn.{q_norm.format('q')}.weight"],
        ),
        (
            rf"{_DOUBLE}{stream}_attn\.norm\.key_norm\.scale",
            [rf"transformer_blocks.\1.attn.{q_norm.format('k')}.weight"],
        ),
        (rf"{_DOUBLE}{stream}_attn\.proj\.(weight|bias)", [rf"transformer_blocks.\1.attn.{out}.\2"]),
        (rf"{_DOUBLE}{stream}_mlp\.0\.(weight|bias)", [rf"transformer_blocks.\1.{ff}.net.0.proj.\2"]),
        (rf"{_DOUBLE}{stream}_mlp\.2\.(weight|bias)", [rf"transformer_blocks.\1.{ff}.net.2.\2"]),
    )
]

_SINGLE = r"single_blocks\.(\d+)\."
_SINGLE_TO = r"single_transformer_blocks.\1"
_SINGLE_RULES: Rules = [
    (rf"{_SINGLE}modulation\.lin\.(weight|bias)", [rf"{_SINGLE_TO}.norm.linear.\2"]),
    (
        rf"{_SINGLE}linear1\.(weight|bias)",
        [rf"{_SINGLE_TO}.attn.to_{x}.\2" for x in "qkv"] + [rf"{_SINGLE_TO}.proj_mlp.\2"],
    ),
    (rf"{_SINGLE}linear2\.(weight|bias)", [rf"{_SINGLE_TO}.proj_out.\2"]),
    (rf"{_SINGLE}norm\.query_norm\.scale", [rf"{_SINGLE_TO}.attn.norm_q.weight"]),
    (rf"{_SINGLE}norm\.key_norm\.scale", [rf"{_SINGLE_TO}.attn.norm_k.weight"]),
]

_HINT_NAMES = [
    "conv_in",
    *(f"blocks.{i}" for i in range(6)),
    "conv_out",
]  # XLabs: convolutions 0, 2, … 14, SiLU between

FLUX_RULES: Rules = [
    *_EMBEDDER_RULES,
    *_DOUBLE_RULES,
    *_SINGLE_RULES,
    (r"final_layer\.linear\.(weight|bias)", [r"proj_out.\1"]),
    (r"final_layer\.adaLN_modulation\.1\.(weight|bias)", [r"norm_out.linear.\1"]),
]

CONTROLNET_RULES: Rules = [
    *_EMBEDDER_RULES,
    *_DOUBLE_RULES,
    (r"(controlnet_blocks\.\d+\.(?:weight|bias))", [r"\1"]),
    (r"pos_embed_input\.(weight|bias)", [r"controlnet_x_embedder.\1"]),
    *(
        (rf"input_hint_block\.{2 * i}\.(weight|bias)", [rf"input_hint_block.{n}.\1"])
        for i, n in enumerate(_HINT_NAMES)
    ),
]


def rename(source: Mapping[str, torch.Tensor], rules: Rules) -> StateDict:
    """Apply `rules` to every key. Raises ValueError for a key that no rule knows.

    A key with several targets is split evenly by rows, except that the last target takes the remaining rows (FLUX's
    `linear1` holds `hidden` rows each of q, k and v, then the MLP's).
    """
    compiled = [(re.compile(pattern), targets) for pattern, targets in rules]
    result = {}
    for key, tensor in source.items():
        match, targets = next(((m, t) for p, t in compiled if (m := p.fullmatch(key))), (None, None))
        if match is None:
            raise ValueError(f"unexpected key {key!r} with shape {tuple(tensor.shape)}")
        names = [match.expand(target) for target in targets]
        result.update(zip(names, _split_rows(tensor, len(names)), strict=True))
    return result


def _split_rows(tensor: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    if parts < 4:
        return tensor.chunk(parts)
    hidden = tensor.shape[0] // (3 + MLP_RATIO)
    return tensor.split([hidden, hidden, hidden, tensor.shape[0] - 3 * hidden])


_WRAPPED = re.compile(r"(?:model\.)?diffusion_model\.")  # prefix of a transformer's names in files for ComfyUI
_SCALES = (".scale_weight", ".weight_scale")  # one factor per 8-bit matrix
_NO_WEIGHTS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")  # not needed for 16-bit products


def unwrapped(source: Mapping[str, torch.Tensor]) -> StateDict:
    """The transformer's tensors in a single file, without prefix and other networks; 8-bit floats become bfloat16."""
    if any(_WRAPPED.match(key) for key in source):  # the others are text encoders and a VAE
        source = {_WRAPPED.sub("", key, count=1): tensor for key, tensor in source.items() if _WRAPPED.match(key)}
    state = {key: tensor for key, tensor in source.items() if not key.endswith((*_SCALES, *_NO_WEIGHTS))}
    scales = {f"{key.rpartition('.')[0]}.weight": source[key] for key in source if key.endswith(_SCALES)}
    for key, tensor in state.items():
        if key in scales:
            state[key] = (tensor.float() * scales[key].float()).to(torch.bfloat16)
        elif tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            state[key] = tensor.to(torch.bfloat16)
    return state


def _count(source: Mapping[str, torch.Tensor], pattern: str) -> int:
    """Number of consecutive blocks; the group of `pattern` captures a block's index."""
    found = {int(m[1]) for key in source if (m := re.match(pattern, key))}
    if found != set(range(len(found))):
        raise ValueError(f"blocks {pattern!r} are not numbered without gaps: {sorted(found)}")
    return len(found)


def _flux_config(source: Mapping[str, torch.Tensor], params: dict) -> dict:
    hidden, in_channels = source["img_in.weight"].shape
    head_dim = source["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    if source["double_blocks.0.img_mlp.0.weight"].shape[0] != MLP_RATIO * hidden:
        raise ValueError(
            f"MLP width {source['double_blocks.0.img_mlp.0.weight'].shape[0]} is not {MLP_RATIO} x {hidden}"
        )
    published = [head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16]  # FLUX.1: 16, 56, 56 of 128
    return {
        "in_channels": in_channels,
        "num_layers": _count(source, r"double_blocks\.(\d+)\."),
        "num_single_layers": _count(source, r"single_blocks\.(\d+)\."),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": source["txt_in.weight"].shape[1],
        "pooled_projection_dim": source["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in source,
        "axes_dims_rope": tuple(params.get("axes_dim", published)),
    }


def flux_transformer(source: Mapping[str, torch.Tensor], params: dict | None = None) -> tuple[dict, StateDict]:
    """Original FLUX transformer -> (config, state dict) of `FluxTransformer2DModel`.

    params: the file's `flux_params` metadata, if it has any (`axes_dim`).
    """
    source = unwrapped(source)
    state = rename(source, FLUX_RULES)
    for part in ("weight", "bias"):  # the original stores (shift, scale), diffusers (scale, shift)
        shift, scale = state[f"norm_out.linear.{part}"].chunk(2)
        state[f"norm_out.linear.{part}"] = torch.cat([scale, shift])
    return _flux_config(source, params or {}), state


def flux_controlnet(source: Mapping[str, torch.Tensor], params: dict | None = None) -> tuple[dict, StateDict]:
    """XLabs ControlNet -> (config, state dict) of `FluxControlNetModel`."""
    config = _flux_config(source, params or {})
    config |= {"patch_size": 2, "conditioning_embedding_channels": source["input_hint_block.14.weight"].shape[0]}
    return config, rename(source, CONTROLNET_RULES)


_RESNET = r"(norm1|norm2|conv1|conv2)\.(weight|bias)"


def _autoencoder_rules(num_blocks: int) -> Rules:
    rules: Rules = [(r"((?:en|de)coder\.conv_(?:in|out)\.(?:weight|bias))", [r"\1"])]
    rules += [(r"(en|de)coder\.norm_out\.(weight|bias)", [r"\1coder.conv_norm_out.\2"])]
    for side in ("encoder", "decoder"):
        rules += [
            (rf"{side}\.mid\.block_{i + 1}\.{_RESNET}", [rf"{side}.mid_block.resnets.{i}.\1.\2"]) for i in (0, 1)
        ]
        for ours, theirs in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            rules += [
                (rf"{side}\.mid\.attn_1\.{theirs}\.(weight|bias)", [rf"{side}.mid_block.attentions.0.{ours}.\1"])
            ]
    for i in range(num_blocks):
        up = num_blocks - 1 - i  # the original counts decoder levels from the finest
        for source, target in (
            (rf"encoder\.down\.{i}", f"encoder.down_blocks.{i}"),
            (rf"decoder\.up\.{i}", f"decoder.up_blocks.{up}"),
        ):
            rules += [
                (rf"{source}\.block\.(\d+)\.{_RESNET}", [rf"{target}.resnets.\1.\2.\3"]),
                (rf"{source}\.block\.(\d+)\.nin_shortcut\.(weight|bias)", [rf"{target}.resnets.\1.conv_shortcut.\2"]),
                (rf"{source}\.(down|up)sample\.conv\.(weight|bias)", [rf"{target}.\1samplers.0.conv.\2"]),
            ]
    return rules


def flux_autoencoder(source: Mapping[str, torch.Tensor], params: dict | None = None) -> tuple[dict, StateDict]:
    """Original FLUX autoencoder -> (config, state dict) of `AutoencoderKL`.

    params: the file's `ae_params` metadata, if it has any (`scale_factor`, `shift_factor`).
    """
    params = params or {}
    blocks = _count(source, r"encoder\.down\.(\d+)\.")
    state = rename(source, _autoencoder_rules(blocks))
    for key, tensor in state.items():  # the original's attention projections are 1x1 convolutions
        if ".attentions.0.to_" in key and tensor.ndim == 4:
            state[key] = tensor[:, :, 0, 0]
    config = {
        "in_channels": source["encoder.conv_in.weight"].shape[1],
        "out_channels": source["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": tuple(source[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(blocks)),
        "layers_per_block": _count(source, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": source["decoder.conv_in.weight"].shape[1],
        "scaling_factor": params.get("scale_factor", 0.3611),
        "shift_factor": params.get("shift_factor", 0.1159),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return config, state


# --- LoRA: the reference's names <-> peft's names on the fused projections ---

LORA_MODULES = {
    r"double_blocks.{}.processor.qkv_lora1": "transformer_blocks.{}.attn.to_qkv",
    r"double_blocks.{}.processor.proj_lora1": "transformer_blocks.{}.attn.to_out.0",
    r"double_blocks.{}.processor.qkv_lora2": "transformer_blocks.{}.attn.to_added_qkv",
    r"double_blocks.{}.processor.proj_lora2": "transformer_blocks.{}.attn.to_add_out",
    r"single_blocks.{}.processor.qkv_lora": "single_transformer_blocks.{}.attn.to_qkv",
    r"single_blocks.{}.processor.proj_lora": "single_transformer_blocks.{}.proj_out",
}
SEPARATE = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
_LORA_FACTORS = {"down": "lora_A", "up": "lora_B"}


def _lora_rules(names: Iterable[tuple[str, str]], factors: Iterable[tuple[str, str]]) -> Rules:
    return [
        (re.escape(f"{module}.{factor}.weight").replace(r"\{\}", r"(\d+)"), [f"{to}.{to_factor}.weight".format(r"\1")])
        for module, to in names
        for factor, to_factor in factors
    ]


def lora_to_peft(source: Mapping[str, torch.Tensor]) -> StateDict:
    """The reference's LoRA names -> peft's, for models whose q, k, v are fused (`to_qkv`, `to_added_qkv`)."""
    return rename(source, _lora_rules(LORA_MODULES.items(), _LORA_FACTORS.items()))


def lora_from_peft(source: Mapping[str, torch.Tensor]) -> StateDict:
    """Inverse of `lora_to_peft`."""
    flip = lambda table: [(b, a) for a, b in table.items()]  # noqa: E731
    return rename(source, _lora_rules(flip(LORA_MODULES), flip(_LORA_FACTORS)))


def unfuse_lora(fused: Mapping[str, torch.Tensor]) -> StateDict:
    """LoRA on fused projections -> the same LoRA on separate q, k, v, for stock diffusers models.

    q, k and v share one `lora_A`; the rows of `lora_B` are divided among them.
    """
    result = {}
    for key, tensor in fused.items():
        name = next((name for name in SEPARATE if f".{name}." in key), None)
        if name is None:
            result[key] = tensor
            continue
        factors = [tensor.clone() for _ in range(3)] if "lora_A" in key else [t.contiguous() for t in tensor.chunk(3)]
        result |= {key.replace(name, part): factor for part, factor in zip(SEPARATE[name], factors, strict=True)}
    return result


# --- GGI: CogVideoX transformer with an unmerged LoRA in peft naming ---


def merged_names(source: Iterable[str]) -> list[str]:
    """Keys of the merged transformer: without LoRA factors, `base_layer` dropped from names."""
    return [key.replace(".base_layer.", ".") for key in source if ".lora_" not in key]


def with_base(name: str) -> str:
    """peft's name for the tensor `name` of a module that has a LoRA."""
    module, _, part = name.rpartition(".")
    return f"{module}.base_layer.{part}"


def merge_tensor(source: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """One tensor of the merged transformer: W + B A where the source has a LoRA (alpha = rank, so scale 1).

    The sum is computed in float32 and rounded once, to the dtype of W.
    """
    base = with_base(name)
    if base not in source:
        return source[name]
    module, _, part = name.rpartition(".")
    weight, down = source[base], f"{module}.lora_A.default.weight"
    if part != "weight" or down not in source:
        return weight
    update = source[f"{module}.lora_B.default.weight"].float() @ source[down].float()
    return update.add_(weight.float()).to(weight.dtype)


def ggi_transformer(config: dict, source: Mapping[str, torch.Tensor]) -> tuple[dict, StateDict]:
    """checkpoint-1350, in peft naming or already merged -> (config, state dict) of `CogVideoXTransformer3DModel`."""
    if config.get("in_channels") != 48:
        raise ValueError(
            f"config.json says in_channels {config.get('in_channels')}: GGI needs 48 (noise, images, edges)"
        )
    return config, {name: merge_tensor(source, name) for name in merged_names(source)}
