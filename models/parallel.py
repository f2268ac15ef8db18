"""Processes that share independent work, as `accelerate launch --num_processes N` starts them; streams of a GPU."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from utils.cli import InputError

WAIT = timedelta(days=7)  # of processes for one another: encoding a large dataset takes hours


def open_processes(device: str) -> tuple[PartialState, str]:
    """accelerate's state of this process, and its own device. device: from `resolve_device`."""
    if ":" in device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--device {device}: choose GPUs by `accelerate launch --gpu_ids …` and pass --device cuda")
    process = PartialState(cpu=device == "cpu", timeout=WAIT)
    return process, str(process.device) if process.num_processes > 1 else device


def side_stream(device: str) -> torch.cuda.StreamContext:
    """A block whose work on a GPU does not wait for that of other threads. On a CPU it changes nothing."""
    return torch.cuda.stream(torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None)
