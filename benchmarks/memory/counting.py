"""Count the bytes of weights and activations, on models and tensors without data.

Weights are counted on empty models of the real configurations; activations by running the real code on tensors that
have shapes and dtypes but no memory.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.runtime.memory import FP8, INT8, NF4, block_linears, place

NF4_BLOCK = 64  # weights that share a scale


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make this the dtype of new floating-point tensors in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def without_data(dtype: torch.dtype) -> Iterator[None]:
    """Tensors made in the block have shapes and dtypes, but no values and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(dtype):
        yield


def empty_model(build: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """A model of this dtype on the meta device, frozen."""
    with torch.device("meta"), default_dtype(dtype):
        model = build().eval().requires_grad_(False)
    for module in model.modules():  # loading casts buffers as well
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model


def materialize(
    model: torch.nn.Module, new: Callable[[str, torch.Tensor], torch.Tensor] | None = None
) -> torch.nn.Module:
    """Replace the meta tensors of an empty model; tensors that two modules share stay shared.

    new(name in its module, meta tensor) returns a tensor of the same shape and dtype; torch.empty by default. Inside
    `without_data` those count as tensors in memory, unlike meta tensors.
    """
    new = new or (lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    is_parameter, value = isinstance(tensor, torch.nn.Parameter), new(name, tensor)
                    made[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad) if is_parameter else value
                tensors[name] = None if tensor is None else made[id(tensor)]
    return model


def autocast_as_on_gpu(model: torch.nn.Module) -> None:
    """Make norms and upsampling return float32 under autocast, as on a GPU; a CPU's autocast keeps their dtype.

    This changes the dtype of the norms' weights, so count weights first.
    """
    norms = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm)
    for module in model.modules():
        if isinstance(module, norms):
            module.float()
        if isinstance(module, (*norms, CogVideoXUpsample3D)):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; shared tensors count once."""
    tensors = [*model.parameters(), *model.buffers(), *(t for module in model.modules() for t in _scales(module))]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _scales(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that a quantised layer (`models/runtime/quantised.py`) holds besides its codes."""
    weight = getattr(module, "weight", None)
    if (four_bits := getattr(weight, "quant_state", None)) is not None:
        return [four_bits.absmax, four_bits.code]
    scales = getattr(weight, "SCB", None)
    return [] if scales is None else [scales]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors made while this is active, and their peak.

    on_gpu: include cuDNN's workspace for 16-bit convolutions: copies of input, weights and output with channels last.
    """

    def __init__(self, *, on_gpu: bool = False):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.on_gpu = on_gpu

    def ignore(self, model: torch.nn.Module) -> None:
        self.known |= {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    weakref.finalize(storage, self._forget, key, size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        if self.on_gpu and function is torch.ops.aten.convolution.default and result.element_size() == 2:
            copies = sum(tensor.nbytes for tensor in (*arguments[:2], result))
            self.peak = max(self.peak, self.now + copies)
        return result


def count_activations(step: Callable[[], object], *models: torch.nn.Module, on_gpu: bool = False) -> int:
    """Peak bytes of the tensors that `step` makes, without the weights of `models`. Call it inside `without_data`.

    on_gpu: include the workspace of convolutions.
    """
    with LiveBytes(on_gpu=on_gpu) as live:
        for model in models:
            live.ignore(model)
        step()
    return live.peak


def count_offloaded(step: Callable[[], object], *models: torch.nn.Module) -> int:
    """Peak bytes of the tensors that `step` makes and of the offloaded layers that are on the GPU at the same time.

    Those are the layer that computes and the next one, which is being prefetched. A first run records the order, as in
    diffusers' leaf-level group offloading: if a layer runs twice in a row, the next one is prefetched twice.
    """
    sizes = {layer: size for model in models for layer in model.modules() if (size := _own_bytes(layer))}
    order: list[torch.nn.Module] = []
    with _watched(sizes, order.append):
        step()
    following, on_gpu = dict(pairwise(order)), {}

    def bring(layer: torch.nn.Module) -> None:
        on_gpu[layer] = torch.empty(sizes[layer], dtype=torch.uint8)

    def begin(layer: torch.nn.Module) -> None:
        if layer not in on_gpu:
            bring(layer)
        if layer in following:
            bring(following[layer])

    def end(layer: torch.nn.Module) -> None:
        on_gpu.pop(layer, None)

    with _watched(sizes, begin, end):
        return count_activations(step, *models, on_gpu=True)


def _own_bytes(layer: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))


@contextmanager
def _watched(
    layers: Iterable[torch.nn.Module],
    begin: Callable[[torch.nn.Module], None],
    end: Callable[[torch.nn.Module], None] | None = None,
) -> Iterator[None]:
    """In the block, call begin(layer) before and end(layer) after each call of a layer."""
    hooks = [layer.register_forward_pre_hook(lambda layer, _: begin(layer)) for layer in layers]
    if end:
        hooks += [layer.register_forward_hook(lambda layer, *_: end(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def kept_bytes(model: torch.nn.Module, how: str) -> int:
    """Bytes of the weights on the GPU while an empty model (`empty_model`) is in use. FP8 changes the model.

    how: any placement but OFFLOADED, which keeps only a few layers on the GPU (`count_offloaded`).
    """
    if how in (INT8, NF4):
        matrices = [layer.weight for layer in block_linears(model).values()]
        before = sum(weight.nbytes for weight in matrices)
        return held_bytes(model) - before + sum(_quantised_bytes(*weight.shape, how) for weight in matrices)
    if how == FP8:
        place(model, FP8, "meta")
    return held_bytes(model)


def restored_bytes(model: torch.nn.Module, how: str) -> int:
    """Bytes of the largest matrix that a quantised layer restores while it computes. model: empty."""
    if how not in (FP8, INT8, NF4):
        return 0
    return max(layer.weight.nbytes for layer in block_linears(model).values())


def _quantised_bytes(out: int, features: int, how: str) -> int:
    if how == INT8:
        return out * features + 4 * out  # a float32 scale per row
    return (out * features + 1) // 2 + 4 * -(-out * features // NF4_BLOCK) + 4 * 16  # scales, table of 16 values
