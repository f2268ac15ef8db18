"""LoRA on FLUX and its ControlNet, on the same layers as the reference.

q, k and v share one `down` matrix in the reference. diffusers' fused projections (`to_qkv`, `to_added_qkv`) give
exactly that with plain peft layers, and cost nothing once the separate weights of the fused blocks are dropped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from models.finite import require_finite_tensors
from models.loading.files import read_lora
from models.loading.keymaps import MLP_RATIO, lora_from_peft, lora_to_peft
from utils.cli import InputError
from utils.files import atomic_path

FluxModel = FluxTransformer2DModel | FluxControlNetModel
LoraState = Mapping[str, torch.Tensor]  # values under peft's names
SINGLE_BLOCKS = range(1, 5)  # the single-stream blocks that carry LoRA; all double-stream blocks do


def lora_targets(config: Mapping) -> dict[str, tuple[int, int]]:
    """{module name: (in, out features)} of every LoRA layer, from a model's config alone."""
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    targets = {}
    for i in range(config["num_layers"]):
        for name, out in (("to_qkv", 3), ("to_out.0", 1), ("to_added_qkv", 3), ("to_add_out", 1)):
            targets[f"transformer_blocks.{i}.attn.{name}"] = (hidden, out * hidden)
    for i in SINGLE_BLOCKS:
        if i < config["num_single_layers"]:
            targets[f"single_transformer_blocks.{i}.attn.to_qkv"] = (hidden, 3 * hidden)
            targets[f"single_transformer_blocks.{i}.proj_out"] = ((1 + MLP_RATIO) * hidden, hidden)
    return targets


def check_lora(path: Path, config: Mapping) -> dict[str, torch.Tensor]:
    """Read a LoRA file and make sure that it fits a model of this config; no model is needed.

    Keys are peft's names. Raises InputError naming the first key that is missing, unknown or of another shape.
    """
    tensors, _ = read_factors(path)
    try:
        state = lora_to_peft(tensors)
    except ValueError as error:
        raise InputError(
            f"{path} is not a LoRA of this project ({error}): LoRAs of other programs go with --lora"
        ) from error
    require_fit(path, state, config)
    return state


def read_factors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """`read_lora` without `module.` in front of names. Raises InputError when it holds nothing."""
    tensors, metadata = read_lora(path)
    if not tensors:
        raise InputError(f"{path} holds no LoRA")
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}, metadata


def read_loras(
    loras: Mapping[str, Sequence[Path]], configs: Sequence[Mapping]
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Read {name: one LoRA file per network} as {name: one LoRA per network}. configs: one per network.

    Raises InputError for a file that does not fit (`check_lora`), and if ranks differ.
    """
    states = {
        name: [check_lora(file, config) for file, config in zip(files, configs, strict=True)]
        for name, files in loras.items()
    }
    common_ranks(states)
    return states


def lora_rank(state: Mapping[str, torch.Tensor]) -> int:
    """Rank of a LoRA under peft's names; 0 if it has no lora_A."""
    return next((tensor.shape[0] for key, tensor in state.items() if "lora_A" in key and tensor.ndim), 0)


def common_ranks(loras: Mapping[str, Sequence[Mapping[str, torch.Tensor]]]) -> list[int]:
    """Rank of each network's LoRA in {name: one LoRA per network}. Raises InputError if names differ in rank."""
    ranks = {name: [lora_rank(state) for state in states] for name, states in loras.items()}
    first, *others = ranks.values()
    if any(other != first for other in others):
        raise InputError(f"LoRAs of several ranks ({ranks}): draw each in a command of its own")
    return first


def require_fit(source: object, state: Mapping[str, torch.Tensor], config: Mapping) -> None:
    """Raise InputError unless `state` (peft's names) is a complete LoRA for a model of this config."""
    if not any("lora_A" in key and tensor.ndim for key, tensor in state.items()):
        raise InputError(f"{source} holds no LoRA")
    rank, wanted = lora_rank(state), {}
    for name, (features, out) in lora_targets(config).items():
        wanted |= {f"{name}.lora_A.weight": (rank, features), f"{name}.lora_B.weight": (out, rank)}
    for key in sorted(wanted.keys() | state.keys()):
        found = tuple(state[key].shape) if key in state else None
        if found != wanted.get(key):
            raise InputError(
                f"{source} does not fit these weights: {key} is {found or 'missing'}, the model needs "
                f"{wanted.get(key) or 'no such layer'}; was it trained on other weights?"
            )


def add_lora(model: FluxModel, rank: int) -> list[torch.nn.Parameter]:
    """Fuse q, k, v where LoRA sits, add LoRA layers (down ~ N(0, 1/rank), up = 0), and return their parameters."""
    targets = lora_targets(model.config)
    for name in targets:
        if name.endswith("attn.to_qkv"):
            _fuse(model.get_submodule(name.removesuffix(".to_qkv")))
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian"))
    return lora_parameters(model)


def lora_parameters(model: FluxModel) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def train_loras(models: Sequence[FluxModel], *, checkpointing: bool = True) -> list[list[torch.nn.Parameter]]:
    """Make the LoRA layers trainable, in float32. Returns each model's parameters.

    checkpointing: recompute activations in the backward pass: less memory, more time, the same numbers.
    """
    loras = [[parameter.requires_grad_() for parameter in lora_parameters(model)] for model in models]
    cast_training_params(list(models), torch.float32)
    if checkpointing:
        for model in models:
            model.enable_gradient_checkpointing()
    return loras


def _fuse(attention: torch.nn.Module) -> None:
    attention.fuse_projections()
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        if hasattr(attention, name):
            delattr(attention, name)  # the fused layer holds a copy: at full size the originals are 2 GB


def set_lora(model: FluxModel, state: Mapping[str, torch.Tensor], weight: float = 1.0) -> None:
    """Copy values (peft names) into existing LoRA layers, whatever the model's placement.

    weight: `--lora_weight`. It multiplies both factors, as in the reference, so the strength is its square.
    """
    result = set_peft_model_state_dict(model, {key: weight * tensor for key, tensor in state.items()})
    if result.unexpected_keys:
        raise ValueError(f"LoRA keys that the model does not have: {result.unexpected_keys[:3]}")


def lora_state(model: FluxModel) -> dict[str, torch.Tensor]:
    """The LoRA under the reference's key names, in the dtype it is trained in."""
    state = {key: tensor.detach() for key, tensor in get_peft_model_state_dict(model).items()}
    return {key: tensor.contiguous() for key, tensor in lora_from_peft(state).items()}


def save_lora(model: FluxModel, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the LoRA as the reference does: its key names, bfloat16. Atomic."""
    with atomic_path(path) as temporary:
        state = {key: tensor.to("cpu", dtype) for key, tensor in lora_state(model).items()}
        require_finite_tensors(state, "trained LoRA", f"too large for {dtype}")
        save_file(state, temporary)


def save_loras_only(accelerator: Accelerator, models: Sequence[FluxModel]) -> None:
    """Make `save_state` and `load_state` of `accelerator` store only the LoRAs, in the dtype they are trained in."""

    def save(_: list, weights: list, folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            for i, model in enumerate(models):
                save_file(lora_state(model), Path(folder) / f"lora_{i}.safetensors")

    def load(modules: list, folder: str) -> None:
        modules.clear()
        for i, model in enumerate(models):
            set_lora(model, lora_to_peft(load_file(Path(folder) / f"lora_{i}.safetensors")))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
