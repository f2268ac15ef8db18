"""What makes denoising faster: compiled blocks, and a cache for the in-betweening, which changes the result a little.

The cache is not for FLUX with a ControlNet: diffusers adds the ControlNet's residuals after skipped blocks, too, on
top of the cached sum that holds them already.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.cache_utils import CacheMixin

from models.memory import RESIDENT
from utils.cli import InputError


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

    how: it is kept (`models/memory.py`).
    """
    if how != RESIDENT:
        raise InputError(f"--compile goes with --memory full: the transformer would be kept {how}")


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile the blocks of a transformer, not the whole: they share one program."""
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, name, ()):
            block.compile()
