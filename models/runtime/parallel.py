"""Processes that share independent work, as `accelerate launch --num_processes N` starts them."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from utils.cli import InputError

WAIT = timedelta(days=7)  # how long processes wait for each other: encoding a large dataset takes hours


def open_processes(device: str) -> tuple[PartialState, str]:
    """accelerate's state of this process, and the process's device. device: from `resolve_device`."""
    if ":" in device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--device {device}: choose GPUs by `accelerate launch --gpu_ids …` and pass --device cuda")
    process = PartialState(cpu=device == "cpu", timeout=WAIT)
    device = str(process.device) if process.num_processes > 1 else device
    gpu = torch.device(device)
    if gpu.type == "cuda" and gpu.index is not None:
        torch.cuda.set_device(gpu)  # new CUDA streams use the current device
    return process, device
