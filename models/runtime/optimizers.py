"""AdamW with 32-bit or 8-bit moments.

An 8-bit moment is a code for one of 256 values; 256 neighbours share a float32 scale. Tensors below 4096 elements
keep 32-bit moments, as in bitsandbytes. Weights and gradients are float32 in every mode.
"""

from collections.abc import Sequence

import torch

from models.runtime.memory import EIGHT_BITS, PAGED, RESIDENT

Parameters = Sequence[torch.nn.Parameter]


def make_optimizer(
    parameters: Parameters,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    moments: str = RESIDENT,
) -> torch.optim.Optimizer:
    """AdamW. moments: RESIDENT for 32 bits, EIGHT_BITS, or PAGED, which needs a CUDA device."""
    options = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
    if moments == RESIDENT:
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes as bnb

    return {EIGHT_BITS: bnb.optim.AdamW8bit, PAGED: bnb.optim.PagedAdamW8bit}[moments](parameters, **options)


def page_moments(optimizer: torch.optim.Optimizer) -> None:
    """Move the moments that `load_state_dict` left on the GPU back to paged memory; only for a paged optimizer."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = state[name]
            buffer = optimizer.get_state_buffer(parameter, loaded.dtype)
            if getattr(buffer, "is_paged", False):
                torch.cuda.synchronize()  # the GPU zeroes the buffer, the CPU then fills it
                buffer.copy_(loaded)
                state[name] = buffer
