"""Stop a run at NaN and infinity: in weights, LoRAs, losses, latents and pictures.

A tensor is checked on its own device by its smallest and largest value: one pass, no copy, and one answer for all
tensors of a network. NaN spreads through a network, so weights and results are checked, and nothing in between.
`utils.cli.run_script` turns the FloatingPointError into one line and exit code 3.
"""

from collections.abc import Iterable, Mapping

import torch

PRECISION = "too large for float16? then use bfloat16 or float32 (--dtype, --mixed_precision)"
DAMAGE = "or a weight file is damaged: python -m models.weights check --hashes"


def are_finite(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Whether each tensor holds neither NaN nor infinity. Integers, empty tensors and the meta device pass."""
    tensors = list(tensors)
    found = [True] * len(tensors)
    values = [
        (i, _extremes(t)) for i, t in enumerate(tensors) if t.is_floating_point() and t.numel() and not t.is_meta
    ]
    for device in {extremes.device for _, extremes in values}:  # one transfer each
        here = [(i, extremes) for i, extremes in values if extremes.device == device]
        finite = torch.stack([extremes for _, extremes in here]).isfinite().all(dim=1)
        for (i, _), value in zip(here, finite.cpu().tolist(), strict=True):
            found[i] = value
    return found


def _extremes(tensor: torch.Tensor) -> torch.Tensor:
    """Smallest and largest value, float32 [2]; both are NaN if any value is."""
    tensor = tensor.detach()
    if tensor.element_size() == 1:  # torch cannot compare 8-bit floats
        tensor = tensor.to(torch.bfloat16)
    return torch.stack(torch.aminmax(tensor)).float()


def require_finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return a result if all of it is finite. what: names it in the FloatingPointError."""
    if not are_finite([tensor])[0]:
        raise FloatingPointError(f"{what} hold NaN or infinity: {PRECISION}; {DAMAGE}")
    return tensor


def require_finite_tensors(tensors: Mapping[str, torch.Tensor], what: str, advice: str) -> None:
    """Raise FloatingPointError that names the first tensor that is not finite. what: where they are from."""
    for name, finite in zip(tensors, are_finite(tensors.values()), strict=True):
        if not finite:
            raise FloatingPointError(f"{what}: {name} holds NaN or infinity: {advice}")


def require_finite_weights(model: torch.nn.Module) -> None:
    """`require_finite_tensors` for the weights of a loaded network."""
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    what = f"weights of {type(model).__name__}" + (f" ({source})" if source else "")
    require_finite_tensors(
        dict(model.named_parameters()), what, f"the file is damaged, fetch it again; or {PRECISION}"
    )
