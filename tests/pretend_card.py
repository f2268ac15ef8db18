"""A pretend accelerator, device "card", to check on a CPU what lies where.

Its tensors are CPU tensors in a wrapper. An operation on tensors of both kinds is an error, as on a GPU. Importing
this changes what torch takes for the machine's accelerator: do it in a process of its own (`tests/test_devices.py`).

    with PretendCard():
        torch.ones(3, device="card") + torch.ones(3)  # RuntimeError
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CARD = "card"
_setup_privateuseone_for_python_backend(CARD)
# What gradient checkpointing asks of an accelerator.
torch.card.get_amp_supported_dtype = lambda: [torch.bfloat16]
torch.card.is_autocast_enabled = lambda: False
torch.card.get_autocast_dtype = lambda: torch.bfloat16
# A parameter cannot change its kind: moving a module makes new ones.
torch.__future__.set_overwrite_module_params_on_conversion(True)

aten = torch.ops.aten
MIXES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor}  # indices may lie on the CPU


class CardTensor(torch.Tensor):
    """values: the CPU tensor inside."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "CardTensor":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.size(), device=torch.device(CARD, 0), **layout)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})


class PretendCard(TorchDispatchMode):
    """In the block, device "card" is there."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if names_card(options) or any(isinstance(leaf, CardTensor) for leaf in tree_leaves((arguments, options))):
            return compute(function, arguments, options)
        return function(*arguments, **options)


def names_card(options: dict) -> bool:
    return options.get("device") is not None and torch.device(options["device"]).type == CARD


def compute(function, arguments: tuple, options: dict):
    """Run an operation on the tensors inside; its results lie on the device that it names, else on its inputs'."""
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    on_card = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, CardTensor) and tensor.dim()]  # scalars may be
    if on_card and on_cpu and function not in MIXES:
        shapes = [[tuple(tensor.shape) for tensor in some] for some in (on_card, on_cpu)]
        raise RuntimeError(f"{function}: {shapes[0]} on the card, {shapes[1]} on the CPU")
    to_card = bool(on_card)
    if options.get("device") is not None:
        to_card = names_card(options)
        options = options | {"device": torch.device("cpu")}
    inside = lambda leaf: leaf.values if isinstance(leaf, CardTensor) else leaf  # noqa: E731
    result = function(*tree_map(inside, arguments), **tree_map(inside, options))
    if function._schema.is_mutable:
        return arguments[0]
    wrap = lambda leaf: CardTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
    return tree_map(wrap, result) if to_card else result
