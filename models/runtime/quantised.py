"""bitsandbytes' layers of 8 and 4 bits, frozen, to train a LoRA beside them.

They compute as torch.nn.Linear does under autocast: in one dtype, whatever the input's is. Both multiply by weights
that are restored for the moment.

bitsandbytes' own 8-bit layer is not for training with gradient checkpointing: it keeps its inputs where checkpointing
does not see them. It also rounds the inputs to 8 bits.
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
    """codes: int8 [out, in]. scales: float32 [out], of which a code is a 127th."""
    return codes.to(dtype).mul_((scales / 127)[:, None])
