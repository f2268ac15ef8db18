"""Where the networks of a stage are placed (`--memory`), and how much GPU memory that needs, known before loading.

`full` holds all networks of a phase on the GPU; `balanced` and `low` save memory by less precision or speed.
Plans are tables, checkpoints/NAME/memory.json, written by `python -m benchmarks.memory`.
"""

import errno
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import psutil
import torch

from models.finite import require_finite_weights
from models.flags import MEMORY_MODES
from models.weights import WEIGHTS
from utils.cli import InputError
from utils.files import read_json, show_bytes
from utils.runs import is_first_process

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SPARE = 0.06  # share of the free memory reserved for the CUDA context and fragmentation
BITSANDBYTES = "bitsandbytes==0.50.2"
RESIDENT = "resident"  # on the GPU, as loaded
FP8 = "fp8"  # on the GPU, stored in 8 bits, computed in the precision of the other networks; for inference
INT8, NF4 = "int8", "nf4"  # on the GPU, the blocks' matrices in 8 or 4 bits, frozen; gradients pass through
ON_DEMAND = "at work"  # in CPU memory, moved to the GPU while the network is used
OFFLOADED = "streamed"  # in CPU memory, layers are moved to the GPU one by one, each just before its use
EIGHT_BITS = "8 bits"  # an optimizer's moments in 8 bits, each block of values with one scale
PAGED = "8 bits, paged"  # the same in CPU memory; the driver pages in what an update needs
LOSSY = (FP8, INT8, NF4, EIGHT_BITS)
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")

# stage -> mode -> network or optimizer -> placement; text: the encoders, freed before the others are loaded
PLACEMENTS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "alignment": {
        "full": {"text": RESIDENT, "transformer": RESIDENT, "controlnet": RESIDENT, "vae": RESIDENT},
        "balanced": {"text": RESIDENT, "transformer": INT8, "controlnet": INT8, "vae": RESIDENT},
        "low": {"text": OFFLOADED, "transformer": NF4, "controlnet": NF4, "vae": RESIDENT},
    },
    "anchors": {
        "full": {"text": RESIDENT, "transformer": RESIDENT, "controlnet": RESIDENT, "vae": RESIDENT},
        "balanced": {"text": RESIDENT, "transformer": FP8, "controlnet": RESIDENT, "vae": RESIDENT},
        "low": {"text": OFFLOADED, "transformer": OFFLOADED, "controlnet": OFFLOADED, "vae": OFFLOADED},
    },
    "ggi": {
        "full": {"text": RESIDENT, "transformer": RESIDENT, "vae": RESIDENT},
        "balanced": {"text": RESIDENT, "transformer": ON_DEMAND, "vae": ON_DEMAND},
        "low": {"text": OFFLOADED, "transformer": OFFLOADED, "vae": RESIDENT},
    },
    "wan_vace": {  # umT5-XXL alone would fill a card of 12 GB
        "full": {"text": RESIDENT, "transformer": RESIDENT, "vae": RESIDENT},
        "balanced": {"text": OFFLOADED, "transformer": ON_DEMAND, "vae": ON_DEMAND},
        "low": {"text": OFFLOADED, "transformer": OFFLOADED, "vae": RESIDENT},
    },
    "training": {  # of all weights, which stay on the GPU in float32, as do their gradients
        "full": {"optimizer": RESIDENT},
        "balanced": {"optimizer": EIGHT_BITS},
        "low": {"optimizer": PAGED},
    },
}


@dataclass(frozen=True)
class Phase:
    """Peak GPU memory of one phase of a stage, in bytes. optimizer: gradients and moments."""

    name: str
    weights: int
    activations: int
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.optimizer


Plan = dict[str, list[Phase]]  # mode -> its phases, one after the other: the largest decides


# --- looking up ---

PLAN_FILE = "memory.json"  # beside the preset of a weight set
BATCHED = ("training", "denoising")  # phases whose activations grow with the batch
FIXED = ("text", "update")  # phases whose activations depend neither on the batch nor on pixels and frames
SHARDED = ("training", "update", "sheets")  # phases that hold tensors divided by FSDP


def look_up_plan(
    weights: str, stage: str, *, pixels: int, frames: int | None = None, batch: int | None = None
) -> Plan:
    """The plan of a stage from the table of a weight set, with its activations for pictures of this size.

    weights: full or tiny. pixels: per picture. frames: per video. batch: crops or clips per training step, or
    branches of guidance (1 or 2). None: as in the table. The plan does not account for other networks, another
    precision or another LoRA rank.
    """
    entry = read_json(WEIGHTS / weights / PLAN_FILE)[stage]
    area = pixels * (frames or entry["frames"])

    def scaled(phase: Phase) -> Phase:
        now, then = (1, 1) if phase.name in FIXED else (area, entry["pixels"] * entry["frames"])
        if phase.name in BATCHED:
            now, then = now * (batch or entry["batch"]), then * entry["batch"]
        return replace(phase, activations=-(-phase.activations * now // then))  # rounded up

    return {mode: [scaled(Phase(**phase)) for phase in phases] for mode, phases in entry["modes"].items()}


def scale_plan(plan: Plan, factor: float) -> Plan:
    """A plan for networks of another width: a rough estimate."""
    return {
        mode: [
            replace(phase, weights=round(phase.weights * factor), activations=round(phase.activations * factor))
            for phase in phases
        ]
        for mode, phases in plan.items()
    }


def shard_plan(plan: Plan, processes: int) -> Plan:
    """The plan of `full`, the only mode for FSDP, with weights and optimizer divided among processes.

    An approximation: it ignores the two blocks gathered at a time, and the weights outside the blocks.
    """

    def part(phase: Phase) -> Phase:
        if phase.name not in SHARDED:
            return phase
        activations = phase.activations // (processes if phase.name == "update" else 1)
        return Phase(phase.name, phase.weights // processes, activations, phase.optimizer // processes)

    return {"full": [part(phase) for phase in plan["full"]]}


def plan_on(device: str, stage: str, plan: Plan) -> Plan:
    """Adapt the plan of a GPU to `device`.

    A CPU offloads nothing: each phase needs as much as in the fastest mode with the same placement.
    """
    if is_gpu(device):
        return plan

    def placement(where: str, mode: str, phase: str) -> dict[str, str]:
        kept = placement_on(where, stage, mode)
        return {name: kept[name] for name in kept if (name == "text") == (phase == "text")}

    def find(mode: str, i: int, phase: str) -> Phase:
        alike = (other for other in plan if placement("cuda", other, phase) == placement(device, mode, phase))
        return plan[next(alike, mode)][i]

    return {mode: [find(mode, i, phase.name) for i, phase in enumerate(phases)] for mode, phases in plan.items()}


# --- choosing ---


def is_gpu(device: str) -> bool:
    return torch.device(device).type != "cpu"


def free_memory(device: str) -> int:
    """Free bytes on a torch device; on a CPU, the share of one process of the launch."""
    if not is_gpu(device):
        return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return torch.cuda.mem_get_info(torch.device(device))[0]


def find_room(device: str) -> int:
    """Bytes that a plan may use: of the fullest device of a launch, so that all processes choose the same mode."""
    room = int((1 - SPARE) * free_memory(device))
    if torch.distributed.is_initialized():
        least = torch.tensor([room], device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        room = int(least)
    return room


def choose_mode(wanted: str, plans: Mapping[str, Sequence[Phase]], room: int, device: str) -> str:
    """The mode to use. wanted: a mode of `plans`, or auto for the first (and so fastest) that fits into `room` bytes.

    Raises InputError if there is no such mode, or if it does not fit, naming the fastest mode that would.
    """
    peaks = {mode: max(phase.total for phase in plans[mode]) for mode in MEMORY_MODES if mode in plans}
    if wanted not in ("auto", *peaks):
        raise InputError(f"--memory {wanted}: there is only {', '.join(peaks)} here")
    fitting = [mode for mode in peaks if peaks[mode] <= room]
    if wanted == "auto" and fitting:
        return fitting[0]
    if wanted in fitting:
        return wanted
    needed = show_bytes(min(peaks.values()) if wanted == "auto" else peaks[wanted])
    advice = f"use --memory {fitting[0]}" if fitting else "no mode fits: free some, or use a larger one"
    raise InputError(f"--memory {wanted} needs {needed}, {device} has room for {show_bytes(room)}: {advice}")


def describe_plan(mode: str, phases: Sequence[Phase], room: int, device: str) -> str:
    """Describe the chosen mode to the user, in one line."""
    parts = ", ".join(f"{phase.name} {show_bytes(phase.total)}" for phase in phases)
    return f"memory {mode}: {parts}; {device} has room for {show_bytes(room)}"


# --- placing ---


def block_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """{name: linear layer} of all transformer blocks, nearly all of the weights; LoRA layers are left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name.startswith(BLOCKS) and ".lora_" not in name
    }


def place(model: torch.nn.Module, how: str, device: str) -> None:
    """Move a loaded network to `device`, or set up offloading; ON_DEMAND is left to the pipeline's own hooks.

    Raises FloatingPointError when its weights are not finite.
    """
    if how != RESIDENT:  # before they are quantised, or while they stay on the CPU
        require_finite_weights(model)
    if how == OFFLOADED:
        from diffusers import ModelMixin
        from diffusers.hooks import apply_group_offloading

        streams = torch.device(device).type == "cuda"
        offload = (
            model.enable_group_offload if isinstance(model, ModelMixin) else partial(apply_group_offloading, model)
        )
        # No record_stream: the CPU would run ahead and queue more layers than fit.
        offload(onload_device=torch.device(device), offload_type="leaf_level", use_stream=streams)
        return
    if how == FP8:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=model.dtype)
    elif how in (INT8, NF4):
        quantise(model, how)
    model.to(device)
    if how == RESIDENT:
        require_finite_weights(model)


def place_pipeline(pipeline: "DiffusionPipeline", how: str, device: str) -> None:
    """`place` all networks of a pipeline."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            place(part, how, device)


def quantise(model: torch.nn.Module, how: str) -> None:
    """Replace the blocks' linear layers by 8-bit or 4-bit ones, which quantise when they are moved."""
    from bitsandbytes.nn import Int8Params, Params4bit

    from models.runtime.quantised import Int8Linear, Nf4Linear

    layer_class, weight_class, options = {
        INT8: (Int8Linear, Int8Params, {"has_fp16_weights": False}),
        NF4: (Nf4Linear, Params4bit, {"quant_type": "nf4", "compress_statistics": False}),
    }[how]
    for name, layer in block_linears(model).items():
        weight = layer.weight.data
        with torch.device("meta"):  # no initial weights: they would be overwritten
            new = layer_class(layer.in_features, layer.out_features, layer.bias is not None, **options)
        new.weight = weight_class(weight, requires_grad=False, **options)
        new.bias, new.compute_dtype = layer.bias, weight.dtype
        model.set_submodule(name, new)


def choose_memory_mode(
    stage: str, plan: Mapping[str, Sequence[Phase]], wanted: str, device: str
) -> tuple[str, dict[str, str]]:
    """Choose a mode for this device, report it on stderr, and return it with {network: placement}."""
    room, plan = find_room(device), plan_on(device, stage, plan)
    mode = choose_mode(wanted, plan, room, device)
    if is_first_process():
        print(describe_plan(mode, plan[mode], room, device), file=sys.stderr)
    kept = placement_on(device, stage, mode)
    if {INT8, NF4, EIGHT_BITS, PAGED} & set(kept.values()) and find_spec("bitsandbytes") is None:
        raise InputError(f"--memory {mode} needs bitsandbytes: pip install {BITSANDBYTES}")
    return mode, kept


@contextmanager
def advise_on_oom(
    stage: str, mode: str, modes: Collection[str] = MEMORY_MODES, *, sharded: bool = False
) -> Iterator[None]:
    """Turn running out of memory in the block into an OSError that says which of `modes` needs less.

    Modes with the same results are suggested first, because they can continue the run. sharded: weights are divided
    among processes.
    """
    smaller = [other for other in MEMORY_MODES[MEMORY_MODES.index(mode) + 1 :] if other in modes]
    alike = [
        other
        for other in smaller
        if lossy_placements(PLACEMENTS[stage][other]) == lossy_placements(PLACEMENTS[stage][mode])
    ]
    if alike:
        advice = f"what is finished is kept: run the same command again with --memory {alike[0]}"
    elif smaller:
        advice = f"begin again with --memory {smaller[0]} --overwrite"
    else:
        advice = f"free some, or use a larger GPU{' or more of them' if sharded else ''}"
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OSError(errno.ENOMEM, f"out of memory with --memory {mode}; {advice}") from error


def placement_on(device: str, stage: str, mode: str) -> dict[str, str]:
    """{network: placement}. Without a GPU nothing is offloaded: networks stay in CPU memory."""
    kept = PLACEMENTS[stage][mode]
    if is_gpu(device):
        return dict(kept)
    here = {OFFLOADED: RESIDENT, ON_DEMAND: RESIDENT, PAGED: EIGHT_BITS}
    return {name: here.get(how, how) for name, how in kept.items()}


def lossy_placements(kept: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The placements that change results, for a manifest's `weights`; empty when none does."""
    values = {name: EIGHT_BITS if how == PAGED else how for name, how in kept.items()}  # paging changes no result
    found = {name: how for name, how in values.items() if how in LOSSY}
    return {"kept": found} if found else {}
