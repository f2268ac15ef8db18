"""Start values for small autoencoders that carry colours through the whole network from the first step.

A small autoencoder whose layers normalise their input collapses to grey and takes long to leave it. Here six channels
of every layer hold +R, +G, +B, -R, -G, -B and pass unchanged through convolutions, shortcuts, down- and upsampling;
what residual branches would add to them starts at zero. SiLU keeps them: silu(x) - silu(-x) = x.
"""

import torch
from torch import nn

COLOURS = 3
LANES = 2 * COLOURS  # each colour and its negative


@torch.no_grad()
def open_highway(vae: nn.Module) -> None:
    """Set the start values of an AutoencoderKL or AutoencoderKLCogVideoX in place."""
    for name, module in vae.named_modules():
        last = name.rpartition(".")[2]
        if last == "conv2":  # the residual branch of a block adds nothing to the lanes
            _clear(_conv(module), LANES)
        elif last == "conv_shortcut":
            _pass(_conv(module), torch.eye(LANES))
        elif type(module).__name__.startswith("Downsample") or type(module).__name__ == "CogVideoXDownsample3D":
            _pass(module.conv, torch.eye(LANES) / 4, taps=2)
        elif type(module).__name__.startswith("Upsample") or type(module).__name__ == "CogVideoXUpsample3D":
            _pass(module.conv, torch.eye(LANES))
        elif last in ("conv_y", "conv_b"):  # spatial norms of the video decoder start without modulation
            conv = _conv(module)
            nn.init.zeros_(conv.weight)
            nn.init.constant_(conv.bias, float(last == "conv_y"))
    split = torch.cat([torch.eye(COLOURS), -torch.eye(COLOURS)])  # [6, 3]
    for part in (vae.encoder, vae.decoder):
        _pass(_conv(part.conv_in), split)
        _pass(_conv(part.conv_out), split.T)


def _conv(module: nn.Module) -> nn.Module:
    """The convolution inside CogVideoX's causal wrapper."""
    return getattr(module, "conv", module)


def _clear(conv: nn.Module, outputs: int) -> None:
    conv.weight[:outputs] = 0
    conv.bias[:outputs] = 0


def _pass(conv: nn.Module, matrix: torch.Tensor, taps: int = 1) -> None:
    """The first outputs become `matrix` [out, in] times the first inputs, at the middle of the kernel.

    taps: 2 spreads it over the first 2x2 of the kernel, which is what a stride of 2 covers. In time the kernel's last
    tap is the present frame.
    """
    outputs, inputs = matrix.shape
    _clear(conv, outputs)
    middle = conv.weight.shape[-1] // 2 if taps == 1 else 0
    place = [slice(middle, middle + taps)] * 2
    kernel = conv.weight[:outputs, :inputs, -1] if conv.weight.dim() == 5 else conv.weight[:outputs, :inputs]
    kernel[:, :, place[0], place[1]] = matrix[:, :, None, None]
