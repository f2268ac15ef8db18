"""Processes that share independent work, as `accelerate launch --num_processes N` starts them; streams of a GPU."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState

from utils.cli import InputError

WAIT = timedelta(days=7)  # of processes for one another: encoding a large dataset takes hours


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in one process of the launch, or more. Call it in all of them."""
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags)


def open_processes(device: str) -> tuple[PartialState, str]:
    """accelerate's state of this process, and its own device. device: from `resolve_device`."""
    if ":" in device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--device {device}: choose GPUs by `accelerate launch --gpu_ids …` and pass --device cuda")
    process = PartialState(cpu=device == "cpu", timeout=WAIT)
    device = str(process.device) if process.num_processes > 1 else device
    card = torch.device(device)
    if card.type == "cuda" and card.index is not None:
        torch.cuda.set_device(card)  # where streams are made, too
    return process, device


def use_own_stream(device: str) -> Callable[[], None]:
    """What a thread calls first, so that its work on this GPU does not wait for other threads'; nothing on a CPU.

    One stream for all that the thread does: torch keeps free memory by stream.
    """
    if torch.device(device).type == "cpu":
        return lambda: None
    stream = torch.cuda.Stream(device)

    def prepare() -> None:
        torch.cuda.set_device(stream.device)  # a new thread begins on the first GPU
        torch.cuda.set_stream(stream)

    return prepare
