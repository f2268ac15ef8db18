"""The LoRA that stays frozen inside the in-between transformer while it is trained: Go-with-the-Flow's, as released.

It is read in diffusers' format or peft's, with the scale stated in the file or in the one beside it.
"""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

from models.inbetween.pipeline import CHANNELS
from models.loading.files import read_lora
from utils.cli import InputError
from utils.files import read_json
from utils.runs import is_first_process

Tensors = dict[str, torch.Tensor]


def read_frozen_lora(path: Path, config: Mapping) -> Tensors:
    """Read a LoRA file in diffusers' format as {module.lora_A.weight, module.lora_B.weight: tensor}.

    lora_B is multiplied by the scale alpha / rank. alpha: the module's own, else the adapter configuration's, else the
    rank, which is printed. Raises InputError unless the LoRA fits a transformer of this config.
    """
    tensors, metadata = read_lora(path)
    adapter = read_adapter(path, metadata)
    tensors = {key.removeprefix("base_model.model.").removeprefix("transformer."): t for key, t in tensors.items()}
    if not adapter and not any(key.endswith(".alpha") for key in tensors) and is_first_process():
        print(f"--lora {path} says no alpha: taken as its rank, so at full strength", file=sys.stderr)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config({**config, "in_channels": CHANNELS})
    sizes = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    state = {}
    for name in sorted({key.rpartition(".lora_A.")[0] or key.rpartition(".lora_B.")[0] for key in tensors} - {""}):
        down, up = (tensors.get(f"{name}.lora_{factor}.weight") for factor in "AB")
        fits = (
            down is not None
            and up is not None
            and down.ndim == up.ndim == 2
            and (up.shape[0], down.shape[1]) == tuple(sizes.get(name, ()))
        )
        if not fits or up.shape[1] != down.shape[0]:
            raise InputError(f"--lora {path} does not fit these weights at {name}")
        own = tensors.pop(f"{name}.alpha", None)
        scale = lora_scale(adapter, name, len(down)) if own is None else float(own) / len(down)
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * scale}
    unknown = sorted(tensors.keys() - state.keys())
    if unknown or not state:
        raise InputError(f"--lora {path} is not a LoRA in diffusers' format ({unknown[:1] or 'it is empty'})")
    return state


def read_adapter(path: Path, metadata: Mapping) -> Mapping:
    """The configuration of a LoRA: from its file's header, as diffusers writes it, or from peft's file beside it.

    metadata: from `read_lora`. Empty if there is none. Raises InputError when it is damaged.
    """
    beside = path.with_name("adapter_config.json")
    found = metadata.get(LORA_ADAPTER_METADATA_KEY, {})
    if not found and beside.is_file() and path.name.startswith("adapter_model"):
        found = read_json(beside)
    if not isinstance(found, Mapping):
        raise InputError(f"--lora {path}: its header's {LORA_ADAPTER_METADATA_KEY} is damaged")
    found = {key.removeprefix("transformer."): value for key, value in found.items()}
    alphas = found.get("alpha_pattern") or {}
    numbers = [found.get("lora_alpha", 1), *(alphas.values() if isinstance(alphas, Mapping) else [None])]
    if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in numbers):
        raise InputError(f"--lora {path}: its lora_alpha or alpha_pattern is not a number: it is damaged")
    return found


def lora_scale(adapter: Mapping, name: str, rank: int) -> float:
    """The factor of a module's LoRA, as peft computes it. adapter: from `read_adapter`."""
    alphas = adapter.get("alpha_pattern") or {}
    own = (alpha for key, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({key})", name))
    alpha = next(own, adapter.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


def add_frozen_lora(transformer: CogVideoXTransformer3DModel, state: Tensors, dtype: torch.dtype) -> None:
    """Add the LoRA's layers in `dtype`, frozen; everything else stays trainable."""
    transformer.load_lora_adapter(state, prefix=None, adapter_name="default")
    for name, parameter in transformer.named_parameters():
        frozen = ".lora_" in name
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.data = parameter.data.to(dtype)
