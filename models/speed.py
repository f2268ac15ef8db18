"""An optional shortcut of the in-betweening's denoising, which changes the result a little.

Not for FLUX with a ControlNet: diffusers adds the ControlNet's residuals after skipped blocks, too, on top of the
cached sum that holds them already.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import FirstBlockCacheConfig
from diffusers.models.cache_utils import CacheMixin


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
