"""Latents on disk, from the end of their denoising until what is decoded from them is written."""

import errno
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.runs import atomic_path


def find_or_make(path: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Latents from the file `path`; without one they are made and written there first. On the CPU.

    A decode that fails costs no second denoising. Raises OSError when they cannot be written.
    """
    if path.exists():
        return load_file(path)["latents"]
    latents = make().cpu().contiguous()
    try:
        with atomic_path(path) as temporary:
            save_file({"latents": latents}, temporary)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, f"cannot write latents ({error})", str(path)) from error
    return latents
