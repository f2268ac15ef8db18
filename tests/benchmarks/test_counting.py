"""Counting bytes on meta tensors: every rule on a network small enough to count by hand."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.upsampling import CogVideoXUpsample3D

from benchmarks.memory.counting import (
    autocast_as_on_gpu,
    count_activations,
    count_offloaded,
    empty_model,
    materialize,
    without_data,
)


def test_live_bytes_of_known_steps():
    def step(keep_first: bool) -> None:
        first = torch.zeros(1000)
        second = first + 1
        if not keep_first:
            del first
        third = second.view(10, 100) * 2
        del second, third

    with without_data(torch.float32):
        assert count_activations(lambda: step(True)) == 12_000
        assert count_activations(lambda: step(False)) == 8_000


def test_weights_do_not_count_as_activations():
    linear = empty_model(lambda: torch.nn.Linear(100, 300), torch.float32)
    with without_data(torch.float32), torch.no_grad():
        materialize(linear)
        x = torch.empty(7, 100)
        assert count_activations(lambda: linear(x), linear) == 4 * 7 * 300


def test_convolutions_on_a_gpu_take_copies_with_channels_last():
    layer = empty_model(lambda: torch.nn.Conv2d(3, 8, 3, padding=1), torch.bfloat16)
    with without_data(torch.bfloat16), torch.no_grad():
        materialize(layer)
        x = torch.empty(1, 3, 10, 20)
        plain, on_gpu = (count_activations(lambda: layer(x), layer, on_gpu=on_gpu) for on_gpu in (False, True))
    assert plain == 2 * 8 * 200 and on_gpu == plain + 2 * (3 * 200 + 8 * 3 * 9 + 8 * 200)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: torch.nn.LayerNorm(8), (4, 8)),
        (lambda: torch.nn.RMSNorm(8), (4, 8)),
        (lambda: torch.nn.GroupNorm(2, 8), (4, 8, 5)),
        (lambda: CogVideoXUpsample3D(8, 8), (1, 8, 1, 4, 4)),
    ],
)
def test_what_a_gpus_autocast_computes_in_float32(build: Callable[[], torch.nn.Module], shape: tuple[int, ...]):
    layer, seen = build().bfloat16(), []
    autocast_as_on_gpu(layer)
    watched = getattr(layer, "conv", layer)
    watched.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(shape, dtype=torch.bfloat16))
    assert seen == [torch.float32]


def test_gradients_and_saved_tensors_count():
    linear = empty_model(lambda: torch.nn.Linear(100, 300), torch.float32).requires_grad_()
    with without_data(torch.float32):
        materialize(linear)
        x = torch.empty(7, 100)
        peak = count_activations(lambda: linear(x).sum().backward(), linear)
    assert 4 * (100 * 300 + 300) < peak < 2 * 4 * (100 * 300 + 300)


class Chain(torch.nn.Module):
    """Layers of 100, 300 and 200 inputs, 10 outputs and no bias, called in this order."""

    def __init__(self, order: str):
        super().__init__()
        self.order = order
        self.layers = torch.nn.ModuleDict(
            {name: torch.nn.Linear(size, 10, bias=False) for name, size in {"a": 100, "b": 300, "c": 200}.items()}
        )

    def forward(self) -> None:
        for name in self.order:
            layer = self.layers[name]
            layer(torch.empty(1, layer.in_features))  # its input and output are freed


@pytest.mark.parametrize(
    ("order", "values"),
    [
        ("abc", 10 * (300 + 200) + 300 + 10),  # while b runs: its weights and those of c, its input and output
        ("acb", 10 * (200 + 300) + 200 + 10),  # while c runs
        ("a", 10 * 100 + 100 + 10),
        ("aab", 10 * (100 + 300 + 300) + 100),  # b is loaded again, beside its old copy, before a runs again
    ],
)
def test_streamed_layers_at_work_and_on_their_way(order: str, values: int):
    chain = empty_model(lambda: Chain(order), torch.float32)
    with without_data(torch.float32), torch.no_grad():
        materialize(chain)
        assert count_offloaded(chain, chain) == 4 * values
