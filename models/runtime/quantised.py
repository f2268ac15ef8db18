"""Frozen 8-bit and 4-bit layers of bitsandbytes, to train a LoRA beside them.

Like torch.nn.Linear under autocast, they compute in one dtype, whatever the input's. Both restore their weights to
that dtype for each product.

bitsandbytes' own 8-bit layer does not suit gradient checkpointing: it stores its inputs where checkpointing does not
see them. It also rounds the inputs to 8 bits.
"""

import bitsandbytes as bnb
import torch
import torch.nn.functional as F


class Int8Linear(bnb.nn.Linear8bitLt):
    """compute_dtype: set it before use."""

    compute_dtype: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in features], any floating-point dtype. Returns [..., out features] in `compute_dtype`."""
        return _Int8Product.apply(x.to(self.compute_dtype), self.weight.data, self.weight.SCB, self.bias)


class Nf4Linear(bnb.nn.Linear4bit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in features], any floating-point dtype. Returns [..., out features] in `compute_dtype`."""
        return super().forward(x.to(self.compute_dtype))


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None):
        ctx.save_for_backward(codes, scales)
        return F.linear(x, _restore(codes, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ _restore(*ctx.saved_tensors, gradient.dtype), None, None, None


def _restore(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights in `dtype`: codes * scales / 127. codes: int8 [out, in]. scales: float32 [out]."""
    return codes.to(dtype).mul_((scales / 127)[:, None])
