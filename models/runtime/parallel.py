"""Processes that share independent work, as `accelerate launch --num_processes N` starts them."""

import os
import sys
from datetime import timedelta

import torch
from accelerate import PartialState

from utils.cli import InputError
from utils.runs import is_first_process

WAIT = timedelta(days=7)  # how long processes wait for each other: encoding a large dataset takes hours


def require_plain_launch() -> None:
    """Keep settings of the user's accelerate configuration out that these scripts do not support.

    Raises InputError for those that would change the training; prints that dynamo is ignored.
    """
    asked = lambda name: os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"  # noqa: E731
    if foreign := [name for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG") if asked(name)]:
        raise InputError(
            f"accelerate's configuration asks for {foreign[0]}, which these scripts do not support: pass "
            "--config_file configs/ddp.yaml or configs/fsdp.yaml to accelerate launch"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and is_first_process():
        print(f"note: accelerate's configuration asks for dynamo ({backend}); it is left out", file=sys.stderr)


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
