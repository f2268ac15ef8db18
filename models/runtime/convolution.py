"""Convolutions of CogVideoX's VAE in float32 on a CPU: three to six times faster, the same but for rounding.

torch hands a convolution of one video to oneDNN only if channels x frames x rows pass 20,480, and else computes it by
a slow loop of its own; small videos, a few frames at a time, stay below. (In bfloat16 it asks oneDNN always.)
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d


class OneDnnConv3d(CogVideoXSafeConv3d):
    """diffusers' layer, computed by oneDNN where it can be."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Not a tensor without data, of which memory is only counted. Not under autocast, which casts only torch's own.
        plain = type(input) is torch.Tensor and input.device.type == "cpu" and input.dtype == torch.float32
        if not plain or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
            return super()._conv_forward(input, weight, bias)
        return torch.mkldnn_convolution(input, weight, bias, self.padding, self.stride, self.dilation, self.groups)


def use_onednn(vae: torch.nn.Module) -> None:
    for layer in vae.modules():
        if type(layer) is CogVideoXSafeConv3d:
            layer.__class__ = OneDnnConv3d  # it holds the same parameters, hooks and settings
