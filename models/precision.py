"""The precision of the networks: what `auto` means on a device, and for a run that is continued."""

import argparse
import platform
import sys
from collections.abc import Sequence

from utils.cli import InputError
from utils.runs import Run, is_first_process

MIXED = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}  # --mixed_precision: dtype of the computation


def computes_in_bfloat16(device: str) -> bool:
    """Whether a torch device has bfloat16 instructions; without them it is emulated, slower than float32."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN honours ONEDNN_MAX_CPU_ISA but says yes on every CPU with AVX-512; the CPU's flags ignore the variable.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    is_arm = platform.machine() in ("aarch64", "arm64")  # on Arm oneDNN asks the CPU itself
    return is_arm or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def automatic_precision(args: argparse.Namespace, published: str, device: str) -> dict[str, str]:
    """{flag: its value on this device} for those of --dtype and --mixed_precision that are auto.

    published: dtype of the weights. bfloat16 weights stay bfloat16 on every device. Raises InputError for mixed
    precision in float16 on a CPU.
    """
    if getattr(args, "mixed_precision", None) == "fp16" and device == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU, where gradients are scaled: use bf16 or no")
    low = published == "bfloat16" or computes_in_bfloat16(device)
    values = {"dtype": "bfloat16" if low else published, "mixed_precision": "bf16" if low else "no"}
    return {name: values[name] for name in _automatic(args)}


def settle_precision(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Replace auto by the precision that these runs were begun in.

    Raises InputError when they differ, because networks are loaded only once.
    """
    for name in _automatic(args):
        found = {run.manifest["arguments"][name]: run.folder for run in runs}
        if len(found) > 1:
            begun = ", ".join(f"{folder} in {value}" for value, folder in found.items())
            raise InputError(f"runs of several precisions ({begun}): give those of one --{name} at a time")
        setattr(args, name, *found)


def _automatic(args: argparse.Namespace) -> list[str]:
    return [name for name in ("dtype", "mixed_precision") if getattr(args, name, None) == "auto"]


def report_precision(args: argparse.Namespace) -> None:
    """Print the precision of the computation on stderr."""
    if is_first_process():
        computed = MIXED[args.mixed_precision] if "mixed_precision" in args else args.dtype
        print(f"precision: {computed}", file=sys.stderr)
