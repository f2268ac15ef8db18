"""A pretend accelerator, device "pretend", to check the devices of tensors on a CPU.

Its tensors are CPU tensors in a wrapper. An operation on tensors of both kinds is an error, as on a GPU. Importing
this changes torch's accelerator for the whole process: do it in a separate one (`test_devices.py`).

    with PretendGpu():
        torch.ones(3, device="pretend") + torch.ones(3)  # RuntimeError
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "pretend"
_setup_privateuseone_for_python_backend(DEVICE)
# Functions of an accelerator that gradient checkpointing calls.
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16]
torch.pretend.is_autocast_enabled = lambda: False
torch.pretend.get_autocast_dtype = lambda: torch.bfloat16
# A parameter cannot change its class: moving a module makes new ones.
torch.__future__.set_overwrite_module_params_on_conversion(True)

aten = torch.ops.aten
MIXES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor}  # indices may lie on the CPU


class DeviceTensor(torch.Tensor):
    """values: the CPU tensor inside."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "DeviceTensor":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.size(), device=torch.device(DEVICE, 0), **layout)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})


class PretendGpu(TorchDispatchMode):
    """Device "pretend" exists in the block."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if names_device(options) or any(isinstance(leaf, DeviceTensor) for leaf in tree_leaves((arguments, options))):
            return compute(function, arguments, options)
        return function(*arguments, **options)


def names_device(options: dict) -> bool:
    return options.get("device") is not None and torch.device(options["device"]).type == DEVICE


def compute(function, arguments: tuple, options: dict):
    """Run an operation on the tensors inside; its results lie on the device that it names, else on its inputs'."""
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    on_cpu = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]  # scalars may be
    if on_gpu and on_cpu and function not in MIXES:
        shapes = [[tuple(tensor.shape) for tensor in some] for some in (on_gpu, on_cpu)]
        raise RuntimeError(f"{function}: {shapes[0]} on the GPU, {shapes[1]} on the CPU")
    to_device = bool(on_gpu)
    if options.get("device") is not None:
        to_device = names_device(options)
        options = options | {"device": torch.device("cpu")}
    inside = lambda leaf: leaf.values if isinstance(leaf, DeviceTensor) else leaf  # noqa: E731
    result = function(*tree_map(inside, arguments), **tree_map(inside, options))
    if function._schema.is_mutable:
        return arguments[0]
    wrap = lambda leaf: DeviceTensor(leaf) if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
    return tree_map(wrap, result) if to_device else result
