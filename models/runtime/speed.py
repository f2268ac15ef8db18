"""Faster denoising: compiled blocks, another attention kernel, and a cache for the in-betweening.

The cache changes the result slightly, the others only its rounding.

The cache does not suit FLUX with a ControlNet: diffusers adds the ControlNet's residuals after skipped blocks as
well, although the cached sum already contains them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.flags import ATTENTION_KERNELS
from models.runtime.memory import RESIDENT
from models.runtime.rotary import use_complex_rotary
from utils.cli import InputError

# torch's plain kernel is left out: it holds all attention scores at once, 30 GB for a video.
KERNELS = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ATTENTION_KERNELS}
HEAD_SIZE = 128  # FLUX's, the largest
VECTOR_BITS = {"DEFAULT": 1, "AVX2": 256, "AVX512": 512}  # of what torch computes with; 1: no vectors
PROGRAMS = 64  # per function; FLUX's single blocks need two per size and batch. Beyond the limit, code runs uncompiled


@contextmanager
def attention_kernel(name: str | None) -> Iterator[None]:
    """Compute all attention in the block by this kernel of torch; None leaves the choice to torch.

    It holds for all threads: other threads must not need attention that the kernel cannot compute. (diffusers'
    `set_attention_backend` would work for FLUX, but has no effect on CogVideoX.)
    """
    if name is None:
        yield
        return
    with sdpa_kernel(KERNELS[name]):
        yield


def require_attention(name: str | None, device: str, dtype: torch.dtype) -> None:
    """Raise InputError unless this device can compute attention with that kernel."""
    if name is None:
        return
    query = torch.zeros(1, 1, 8, HEAD_SIZE, device=device, dtype=dtype)
    try:
        with attention_kernel(name):
            F.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        if not str(error).startswith(("No available kernel", "No viable backend")):
            raise
        raise InputError(f"--attention {name}: {device} has no such kernel for {dtype}; leave the flag out") from error


@contextmanager
def first_block_cache(transformer: CacheMixin, threshold: float | None) -> Iterator[None]:
    """While the first block's residual hardly changes, skip the other blocks and reuse what they added last.

    threshold: the residual's mean change relative to its mean size; None disables the cache. It starts empty.
    """
    if threshold is None:
        yield
        return
    transformer.enable_cache(FirstBlockCacheConfig(threshold))
    try:
        yield
    finally:
        transformer.disable_cache()


def require_compilable(how: str, device: str) -> None:
    """Raise InputError unless a network is on its device as loaded; other placements use hooks between layers.

    how: its placement (`models/runtime/memory.py`).
    """
    if device == "cpu" and " " in torch.__file__:
        raise InputError(
            f"--compile: torch calls the compiler without quotes, and has spaces in its path {torch.__file__}"
        )
    if how != RESIDENT:
        raise InputError(f"--compile goes with --memory full: the transformer would be kept {how}")


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile a transformer block by block: all blocks share one program for each shape of their inputs."""
    torch._dynamo.config.recompile_limit = PROGRAMS
    # Only as a setting does the vector width keep cached programs apart: those for AVX-512 give NaN under AVX2.
    torch._inductor.config.cpp.simdlen = VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    use_complex_rotary(transformer, False)  # it cannot compile complex numbers, and fuses diffusers' formula
    for name in ("transformer_blocks", "single_transformer_blocks", "blocks", "vace_blocks"):
        for block in getattr(transformer, name, ()):
            block.compile(dynamic=False)  # true CFG uses batches of one and of two
