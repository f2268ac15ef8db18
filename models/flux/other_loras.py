"""LoRAs of other programs on FLUX's transformer (`--lora`): kohya, ai-toolkit, diffusers, peft, ComfyUI, XLabs, BFL.

They differ in the names of layers and factors only. A table of all spellings takes any number of blocks of any width,
and reports what does not fit; diffusers' own converters, whose results are the same, refuse a LoRA as a whole. What
fits is merged into the weights, so that it costs nothing at inference and works in every memory mode.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from models.flux.lora import read_factors
from models.loading.keymaps import FLUX_RULES, LORA_MODULES, SEPARATE
from utils.cli import InputError
from utils.files import read_json
from utils.layout import lora_sources
from utils.runs import is_first_process

# name of a factor in a file: (module, which of the two)
_FACTOR = re.compile(r"(.+?)[._](?:lora[._])?(A|B|down|up)(?:\.default)?\.weight")
_PREFIX = re.compile(r"^(base_model\.model\.|transformer\.|(model\.)?diffusion_model\.|lora_(unet|transformer)_)+")
_SHIFT_FIRST = "adaLN_modulation"  # the original stores (shift, scale), diffusers (scale, shift)
METADATA = "lora_adapter_metadata"  # diffusers' key of peft's configuration, whose own keys begin with `transformer.`

Spellings = Mapping[str, list[str]]  # a layer's name -> the layers of diffusers among which its rows are divided


@dataclass(frozen=True)
class OtherLora:
    """Updates of a transformer's matrices: {layer: (down [rank, in], up [out, rank])}, to be added times `weight`."""

    path: Path
    weight: float
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Alphas:
    """peft's alphas: {pattern of layers: alpha}, the other layers' (None: rank), and whether √rank divides them."""

    layers: Mapping[re.Pattern, float]
    others: float | None
    by_root: bool

    def scale(self, layer: str, rank: int) -> float:
        """The factor of an update of this rank."""
        found = (alpha for pattern, alpha in self.layers.items() if pattern.fullmatch(layer))
        alpha = next(found, rank if self.others is None else self.others)
        return alpha / (rank**0.5 if self.by_root else rank)


def read_other_lora(path: Path, weight: float, config: Mapping) -> OtherLora:
    """Read a LoRA for a transformer of this config; no model is needed.

    Prints a warning with the number of tensors that do not fit. Raises InputError if none fits.
    """
    tensors, metadata = read_factors(path)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    sizes = {name: m.weight.shape for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    alphas = read_alphas(path, metadata)
    factors, used = {}, set()
    for module, targets, keys in find_modules(tensors, spell(config, sizes)):
        down, up = tensors[keys["down"]], tensors[keys["up"]]
        rows = [sizes[target][0] for target in targets]
        fits = down.ndim == up.ndim == 2 and down.shape == (up.shape[1], sizes[targets[0]][1])
        if not fits or up.shape[0] != sum(rows) or factors.keys() & {*targets}:
            continue
        if _SHIFT_FIRST in module:
            up = torch.cat(up.chunk(2)[::-1])
        alpha = tensors.get(keys["alpha"])
        scale = alphas.scale(targets[0], len(down)) if alpha is None else alpha.reshape(-1)[0].item() / len(down)
        factors |= {target: (scale * down.float(), part) for target, part in zip(targets, up.split(rows), strict=True)}
        used |= {*keys.values()} & tensors.keys()
    report_fit(path, sorted(tensors.keys() - used), len(tensors))
    return OtherLora(path, weight, factors)


def spell(config: Mapping, sizes: Mapping[str, torch.Size]) -> Spellings:
    """All spellings of the names of all linear layers. sizes: {layer of diffusers: shape}."""
    known = {name: [name] for name in sizes}
    for pattern, targets in FLUX_RULES:
        for i in range(max(config["num_layers"], config["num_single_layers"])):
            key = pattern.replace(r"(\d+)", str(i)).replace("(weight|bias)", "weight").replace("\\", "")
            if match := re.fullmatch(pattern, key):
                known[key.removesuffix(".weight")] = [match.expand(t).removesuffix(".weight") for t in targets]
    for pattern, fused in LORA_MODULES.items():  # XLabs
        module, _, last = fused.rpartition(".")
        for i in range(max(config["num_layers"], config["num_single_layers"])):
            targets = [f"{module}.{part}" for part in SEPARATE[last]] if last in SEPARATE else [fused]
            known[pattern.format(i).removesuffix("_lora")] = [target.format(i) for target in targets]
    known = {name: targets for name, targets in known.items() if sizes.keys() >= {*targets}}
    return known | {name.replace(".", "_"): targets for name, targets in known.items()}


def find_modules(
    tensors: Mapping[str, torch.Tensor], known: Spellings
) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(module, its layers, {down, up, alpha: key}) of every known module with both factors.

    Where a file holds a LoRA twice, under diffusers' names and others, it is taken once, as diffusers does.
    """
    twice = any(key.startswith("transformer.") for key in tensors)
    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _FACTOR.fullmatch(key)
        if match and key.startswith("transformer." if twice else ""):
            which = {"A": "down", "B": "up"}.get(match[2], match[2])
            modules.setdefault(match[1], {"alpha": f"{match[1]}.alpha"})[which] = key
    for module, keys in modules.items():
        targets = known.get(_PREFIX.sub("", module), [])
        if targets and keys.keys() == {"down", "up", "alpha"}:
            yield module, targets, keys


def read_alphas(path: Path, metadata: Mapping) -> Alphas:
    """Read the alphas of peft's configuration in the file's header or beside it; none if there is neither."""
    settings, beside = metadata.get(METADATA), lora_sources(path)[1:]
    if settings is None:
        settings = read_json(beside[0]) if beside else {}
    try:
        settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        patterns = settings.get("alpha_pattern") or {}
        layers = {re.compile(rf"(.*\.)?({key})"): float(alpha) for key, alpha in patterns.items()}
        others = float(settings["lora_alpha"]) if settings.get("lora_alpha") is not None else None
        if not all(math.isfinite(alpha) for alpha in (*layers.values(), others or 0)):
            raise ValueError("NaN or infinity")
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(f"--lora {path}: its header names no usable alpha ({error})") from error
    return Alphas(layers, others, bool(settings.get("use_rslora")))


def report_fit(path: Path, left: list[str], count: int) -> None:
    """Warn about tensors that do not fit. Raises InputError if these are all."""
    if len(left) == count:
        raise InputError(f"--lora {path}: none of its {count} tensors fits this FLUX transformer, such as {left[0]}")
    if left and is_first_process():
        print(
            f"warning: --lora {path}: {len(left)} of {count} tensors do not fit FLUX's transformer and are left out, "
            f"such as {left[0]}",
            file=sys.stderr,
        )


@torch.no_grad()
def merge_lora(transformer: FluxTransformer2DModel, lora: OtherLora) -> None:
    """Merge a LoRA into the weights, before these are fused or quantised. Sums are rounded once, from float32."""
    for name, (down, up) in lora.factors.items():
        layer = transformer.get_submodule(name)
        update = up.float() @ down.float()
        layer.weight.copy_(update.mul_(lora.weight).add_(layer.weight.float()))
