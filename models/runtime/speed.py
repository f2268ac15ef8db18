"""What makes denoising faster: compiled blocks, another attention kernel, and a cache for the in-betweening.

The cache changes the result a little, the others its rounding.

The cache is not for FLUX with a ControlNet: diffusers adds the ControlNet's residuals after skipped blocks, too, on
top of the cached sum that holds them already.
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

# torch's plain kernel is left out: it needs all scores at once, 30 GB for a video.
KERNELS = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ATTENTION_KERNELS}
HEAD_SIZE = 128  # FLUX's, the largest
PROGRAMS = 64  # of one function; FLUX's single blocks need two for each size and batch. Others run as they are


@contextmanager
def attention_kernel(name: str | None) -> Iterator[None]:
    """Attention in the block is computed by this kernel of torch alone; None leaves the choice to torch.

    In all threads: what runs beside the block must have no attention that the kernel cannot do. (diffusers'
    `set_attention_backend` would do for FLUX, but has no effect on CogVideoX.)
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
    """Skip all blocks but the first, and add what they added last, while the first one's residual hardly changes.

    threshold: its mean change, relative to its mean size; None switches the cache off. It is empty on entering.
    """
    if threshold is None:
        yield
        return
    transformer.enable_cache(FirstBlockCacheConfig(threshold))
    try:
        yield
    finally:
        transformer.disable_cache()


def require_compilable(how: str) -> None:
    """Raise InputError unless a network lies on its device as it was loaded; other ways work by hooks between layers.

    how: it is kept (`models/runtime/memory.py`).
    """
    if how != RESIDENT:
        raise InputError(f"--compile goes with --memory full: the transformer would be kept {how}")


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile the blocks of a transformer, not the whole: they share one program for each shape of their inputs."""
    torch._dynamo.config.recompile_limit = PROGRAMS
    use_complex_rotary(transformer, False)  # the compiler knows no complex numbers, and fuses diffusers' formula
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, name, ()):
            block.compile(dynamic=False)  # with true CFG batches of one and of two
