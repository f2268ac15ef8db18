"""AdamW with its moments in 32 or in 8 bits, and what its parts hold on the card.

An 8-bit moment is a code for one of 256 values; 256 neighbours share a float32 scale. Tensors below 4096 elements
keep 32-bit moments, as bitsandbytes has it. Weights and gradients are float32 in every mode.
"""

from collections.abc import Sequence

import torch

from models.counting import count_activations, without_data
from models.memory import EIGHT_BITS, PAGED, RESIDENT, is_card

Parameters = Sequence[torch.nn.Parameter]
SMALLEST = 4096  # elements of a tensor whose moments are kept in 8 bits
SMALLEST_PAGED = 100_000  # elements of a tensor whose moments are paged
SCALED = 256  # elements that share a scale
TABLES = 2 * 256 * 4  # bytes: what the codes of both moments mean, once for all tensors


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
    """Page what `load_state_dict` of a paged optimizer left on the card; for all others nothing happens."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = state[name]
            buffer = optimizer.get_state_buffer(parameter, loaded.dtype)
            if getattr(buffer, "is_paged", False):
                torch.cuda.synchronize()  # its zeros are written by the card, what follows by the CPU
                buffer.copy_(loaded)
                state[name] = buffer


# --- counting; what counts are sizes alone, so parameters may be empty ---


def gradient_bytes(parameters: Parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def moment_bytes(parameters: Parameters, moments: str) -> int:
    """Bytes on the card of both moments. Of paged ones: the scales, and the largest tensor's, which is at work."""
    if moments == RESIDENT:
        return 2 * gradient_bytes(parameters)
    sizes = [parameter.numel() for parameter in parameters]
    small = sum(2 * 4 * size for size in sizes if size < SMALLEST)
    large = [size for size in sizes if size >= SMALLEST]
    codes = [2 * size for size in large]
    if moments == PAGED:
        paged = [2 * size for size in large if size >= SMALLEST_PAGED]
        codes = [sum(codes) - sum(paged), max(paged, default=0)]
    return small + sum(codes) + sum(2 * 4 * -(-size // SCALED) for size in large) + (TABLES if large else 0)


def update_bytes(parameters: Parameters, moments: str, device: str) -> int:
    """Peak bytes of what one update makes besides gradients and moments, counted by running one without data.

    On a card, PyTorch's AdamW works on all tensors at once; bitsandbytes' kernels work in place.
    """
    on_card = is_card(device)
    if moments != RESIDENT:
        largest = max((parameter.numel() for parameter in parameters if parameter.numel() >= SMALLEST), default=0)
        return 0 if on_card else 5 * 4 * largest  # both moments, gradient and weight in float32, a denominator
    with without_data(torch.float32):
        copies = [torch.nn.Parameter(torch.empty(parameter.shape)) for parameter in parameters]
        for copy in copies:
            copy.grad = torch.empty_like(copy)
        optimizer = torch.optim.AdamW(copies, foreach=on_card)
        optimizer.step()  # makes the moments
        states = [value for state in optimizer.state.values() for value in state.values()]
        return count_activations(optimizer.step, holder([*copies, *(copy.grad for copy in copies), *states]))


def holder(tensors: Sequence[torch.Tensor]) -> torch.nn.Module:
    """A module that holds these tensors, for `count_activations`."""
    module = torch.nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_buffer(str(i), tensor.detach())
    return module
