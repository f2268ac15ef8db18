"""How a stage runs on this machine: device, precision, processes, memory mode, attention kernel, compilation."""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.flags import MEMORY_MODES, resolve_device, resolve_launched_device
from models.precision import MIXED, report_precision
from models.runtime.memory import PLACEMENTS, Phase, advise_on_oom, choose_memory_mode, lossy_placements, shard_plan
from models.runtime.parallel import open_processes
from models.runtime.sharding import require_shardable, sharding_wanted
from models.runtime.speed import attention_kernel, compile_blocks, require_attention, require_compilable
from models.weights import Preset, weight_hashes
from utils.cli import InputError

T = TypeVar("T")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Runtime:
    """placement: {network: where it is placed and in how many bits}, from the memory mode (`PLACEMENTS`).

    stage: alignment, anchors, ggi or training. process: None for a single process. autocast: precision of a
    training's computation, None for the weights' own. sharded: each process holds a part of the weights (FSDP).
    modes: the memory modes that the stage has.
    """

    stage: str
    preset: Preset
    device: str
    dtype: torch.dtype
    mode: str
    placement: Mapping[str, str]
    kernel: str | None = None
    compiled: bool = False
    process: PartialState | None = None
    autocast: torch.dtype | None = None
    sharded: bool = False
    modes: Collection[str] = MEMORY_MODES

    @property
    def is_main(self) -> bool:
        return self.process is None or self.process.is_main_process

    def share(self, items: Sequence) -> Sequence:
        """This process's share of the items."""
        return items[self.process.process_index :: self.process.num_processes] if self.process else items

    def wait(self) -> None:
        """Wait for all processes of the launch."""
        if self.process:
            self.process.wait_for_everyone()

    def attention(self) -> AbstractContextManager:
        """Use the requested attention kernel in the block.

        torch's own choice is slow for alignment in bfloat16 on a CPU, whose few tokens leave room for all scores.
        """
        if self.kernel is None and (self.stage, self.device, self.autocast) == ("alignment", "cpu", torch.bfloat16):
            return sdpa_kernel(SDPBackend.MATH)
        return attention_kernel(self.kernel)

    def compile(self, transformer: torch.nn.Module) -> None:
        """Compile the blocks of a transformer, if requested."""
        if self.compiled:
            compile_blocks(transformer)

    def advise_on_oom(self) -> AbstractContextManager:
        """Turn running out of memory in the block into an OSError that names a mode that needs less."""
        return advise_on_oom(self.stage, self.mode, self.modes, sharded=self.sharded)

    def weight_identity(self, paths: Mapping[str, Path]) -> dict:
        """Hashes of the weights, and placements that change results, for a manifest."""
        return weight_hashes(paths) | lossy_placements(self.placement)


def first_here(args: argparse.Namespace, find: Callable[[], T]) -> T:
    """Call a function in the first process of each machine before the others: it downloads what is missing."""
    process, _ = open_processes(resolve_device(args.device))
    with process.local_main_process_first():
        return find()


def open_runtime(args: argparse.Namespace, preset: Preset, stage: str, plan: Mapping[str, Sequence[Phase]]) -> Runtime:
    """Choose how this stage runs. plan: {mode: its phases}. Raises InputError for what this machine cannot do."""
    process, device = open_processes(resolve_device(args.device))
    dtype = DTYPES[args.dtype]
    require_attention(args.attention, device, dtype)
    mode, placement = choose_memory_mode(stage, plan, args.memory, device)
    report_precision(args)
    compiled = getattr(args, "compile", False)
    if compiled:
        require_compilable(placement["transformer"], device)
    return Runtime(stage, preset, device, dtype, mode, placement, args.attention, compiled, process, modes=[*plan])


def open_training_runtime(
    args: argparse.Namespace, preset: Preset, stage: str, plan: Mapping[str, Sequence[Phase]]
) -> Runtime:
    """`open_runtime` for a training: processes divide a batch, or also the weights. The launcher chooses GPUs."""
    device, sharded = resolve_launched_device(args.device), sharding_wanted()
    if sharded and stage == "alignment":
        raise InputError("alignment cannot be sharded (configs/fsdp.yaml): launch it with configs/ddp.yaml")
    require_shardable(args.memory, args.mixed_precision)
    process, _ = open_processes(device)
    dtype = DTYPES[args.dtype]
    autocast = None if args.mixed_precision == "no" else DTYPES[MIXED[args.mixed_precision]]
    require_attention(args.attention, str(process.device), autocast or dtype)
    plan = shard_plan(plan, process.num_processes) if sharded else plan
    mode, placement = choose_memory_mode(stage, plan, args.memory, str(process.device))
    report_precision(args)
    return Runtime(
        stage,
        preset,
        str(process.device),
        dtype,
        mode,
        placement,
        args.attention,
        process=process,
        autocast=autocast,
        sharded=sharded,
        modes=[*plan],
    )


def plain_runtime(preset: Preset, stage: str, dtype: str, device: str = "cpu") -> Runtime:
    """A runtime for measurements: one process, all networks on the device as loaded."""
    return Runtime(stage, preset, device, DTYPES[dtype], "full", PLACEMENTS[stage]["full"])
