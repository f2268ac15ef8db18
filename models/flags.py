"""Flags that say how a stage runs, shared by the scripts. Nothing heavy is imported here."""

import argparse
from pathlib import Path

from utils.cli import InputError, Parser, finite_float

MEMORY_MODES = ("full", "balanced", "low")  # from fastest and largest to slowest and smallest
ATTENTION_KERNELS = ("cudnn", "flash", "efficient")  # torch's kernels (`models/runtime/speed.py`)


def add_memory_flags(parser: Parser) -> None:
    """--memory, and --offload as another name for its smallest mode."""
    parser.add_argument(
        "--memory",
        choices=["auto", *MEMORY_MODES],
        default="auto",
        decides=False,  # placements that change results are in the manifest's `weights`
        help="how networks are kept: full is fastest, low needs least; auto takes the fastest mode that fits",
    )
    parser.add_argument(
        "--offload",
        dest="memory",
        action="store_const",
        const="low",
        default="auto",
        decides=False,
        help="the same as --memory low",
    )


def add_overwrite_flag(parser: Parser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        decides=False,
        help="replace a result of this name that was made with other arguments",
    )


def add_compile_flag(parser: Parser) -> None:
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks: minutes at the start; other rounding; goes with --memory full",
    )


def add_attention_flag(parser: Parser) -> None:
    parser.add_argument(
        "--attention",
        choices=ATTENTION_KERNELS,
        help="torch's attention kernel for the transformers: other speed and rounding (default: torch chooses)",
    )


def add_lora_flag(parser: Parser) -> None:
    parser.add_argument(
        "--lora",
        type=weighted_file,
        action="extend",
        nargs="+",
        default=[],
        decides=False,  # its content decides the result, not its path
        metavar="FILE[:WEIGHT]",
        help="LoRAs of other programs (kohya, ai-toolkit, XLabs, BFL …) to add to FLUX; weight 1 if not given",
    )


def weighted_file(text: str) -> tuple[Path, float]:
    """argparse type: an existing file, and the weight after a colon, or 1."""
    path, _, weight = text.rpartition(":")
    found = (Path(text), 1.0) if Path(text).exists() or not path else (Path(path), finite_float(weight))
    if not found[0].is_file():
        kind = "is a folder: name the file in it" if found[0].is_dir() else "does not exist"
        raise argparse.ArgumentTypeError(f"{found[0]} {kind}")
    return found


def resolve_device(name: str) -> str:
    """Turn --device into a torch device string. Raises InputError when there is no such device."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return "cpu"
    if not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine has no such CUDA device; use --device cpu")
    return name


def resolve_launched_device(name: str) -> str:
    """`resolve_device` for a training, whose GPUs the launcher chooses."""
    device = resolve_device(name)
    if ":" in device:
        raise InputError(
            f"--device {device}: pass cuda, and choose GPUs by CUDA_VISIBLE_DEVICES or `accelerate --gpu_ids`"
        )
    return device
