"""What makes denoising faster: compiled blocks, attention with fewer trips to memory, another kernel, and a cache.

The cache changes the result a little, the others its rounding.

The cache is not for FLUX with a ControlNet: diffusers adds the ControlNet's residuals after skipped blocks, too, on
top of the cached sum that holds them already.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel, FirstBlockCacheConfig
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.cache_utils import CacheMixin
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.memory import RESIDENT
from models.weights import ATTENTION_KERNELS
from utils.cli import InputError

# torch's plain kernel is left out: it needs all scores at once, 30 GB for a video.
KERNELS = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ATTENTION_KERNELS}
HEAD_SIZE = 128  # FLUX's, the largest
PROGRAMS = 64  # FLUX's blocks need three for each size and batch; beyond the limit torch goes on without, silently


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

    how: it is kept (`models/memory.py`).
    """
    if how != RESIDENT:
        raise InputError(f"--compile goes with --memory full: the transformer would be kept {how}")


def compile_blocks(transformer: torch.nn.Module) -> None:
    """Compile the blocks of a transformer, not the whole: they share one program for each shape of their inputs."""
    torch._dynamo.config.recompile_limit = PROGRAMS
    if isinstance(transformer, CogVideoXTransformer3DModel):
        # The compiler knows no complex numbers, and makes few trips of diffusers' real ones.
        transformer.set_attn_processor(CogVideoXAttnProcessor2_0())
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for block in getattr(transformer, name, ()):
            block.compile(dynamic=False)  # with true CFG batches of one and of two


class ComplexRotaryAttention:
    """CogVideoX's attention processor, whose rotary positions are complex numbers of modulus 1.

    One product turns queries and keys, with a third of the memory traffic of diffusers' formula and the same results.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states: video tokens [B, S, D]; encoder_hidden_states: text [B, T, D]. Returns both, in this order.

        image_rotary_emb: float32 cosines and sines [S, head size], each for two neighbours.
        """
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projected = (layer(tokens) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in projected)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            cosines, sines = (part[:, ::2].contiguous() for part in image_rotary_emb)
            rotation = torch.complex(cosines, sines)
            for part in (query, key):
                turn(part[:, :, text:], rotation)
        tokens = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = attn.to_out[0](tokens)
        return tokens[:, text:], tokens[:, :text]


def turn(x: torch.Tensor, rotation: torch.Tensor) -> None:
    """Multiply pairs of neighbours, as complex numbers, in place. x: [..., S, D]; rotation: complex64 [S, D/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    x.copy_(torch.view_as_real(pairs.mul_(rotation)).flatten(-2))
