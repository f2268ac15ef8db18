"""Full-size networks with random weights: seconds per step, peak memory, and how far each is from the card's limit.

    python benchmarks/full_size.py
    python benchmarks/full_size.py --phases ggi --steps 5 --memory low --json full_size.json
    python benchmarks/full_size.py --attention cudnn --compile --no_reference

Speed and memory do not depend on the values of weights, so nothing is downloaded: the networks are built from
configs/full. Beside our recipe runs the reference's (benchmarks/recipes.py), whose networks are loaded anew for every
arc. Without a CUDA device, operations and memory are counted, those of a card, and the rest is `not measured`;
--weights tiny measures the tiny networks anywhere.
"""

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # started as a file: its imports begin at the repository's root, as with `python -m`
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.full_size", *sys.argv[1:]], environment)

from benchmarks.recipes import LORA_RANK, Setup, build, setup_of
from models.weights import MEMORY_MODES, add_attention_flag, add_compile_flag
from utils.cli import InputError, Parser, positive_float, positive_int, require_writable, run_script
from utils.runs import show_bytes, write_json

PHASES = ("alignment", "anchors", "ggi")
RECIPES = ("text", "ours", "reference")  # of each phase, one after the other in memory
ARCS, ARC_PASSES = 10, 30  # arcs of a scene; denoising steps of each, both branches of guidance in one batch
FASTER = ("ours", "both branches")  # steps that --attention and --compile are for
WARM_UP = 2  # steps that are not timed
DEVIATION = 0.02  # of random weights
CEILING_SIZE = {"cuda": 8192, "cpu": 512}  # sides of the matrices whose product gives the ceiling


@dataclasses.dataclass
class Row:
    """One step of one phase. flops: of a step. seconds: per step. None: not measured.

    planned, peak: bytes. loading: seconds. merged_distance: of a pass with the LoRA merged into the weights, relative.
    """

    phase: str
    step: str
    flops: int
    planned: int | None = None
    seconds: float | None = None
    peak: int | None = None
    loading: float | None = None
    merged_distance: float | None = None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "benchmarks/full_size.py")
    add = parser.add_argument
    add("--phases", type=phases, default=",".join(PHASES), help="some of them")
    add("--steps", type=positive_int, default=5, help="timed steps of each recipe")
    add("--memory", choices=MEMORY_MODES, default="full", help="how our networks are kept; the reference's: full")
    add("--limit_gb", type=positive_float, metavar="GB", help="let the process use no more of the card (default: all)")
    add("--no_reference", action="store_true", help="leave the reference's recipe out")
    add("--weights", choices=["full", "tiny"], default="full", help="sizes of the networks")
    add("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    add_attention_flag(parser)
    add_compile_flag(parser)
    return parser.parse_args(argv)


def phases(text: str) -> list[str]:
    """argparse type: some of PHASES, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in PHASES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PHASES)}")
    return [name for name in PHASES if name in names]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.json:
        require_writable(args.json.parent)
    import torch

    from models.loading import free_caches
    from models.speed import require_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.limit_gb:
        limit_memory(args.limit_gb)
    if args.compile and args.memory != "full":
        raise InputError("--compile goes with --memory full")
    setup, measured = setup_of(args.weights), device == "cuda" or args.weights == "tiny"
    if measured:
        require_attention(args.attention, device, torch.bfloat16)
    ceiling = matrix_ceiling(device) if measured else None
    rows = []
    for phase in args.phases:
        planned = planned_peaks(setup, phase, args.memory, device if measured else "cuda")
        for recipe in RECIPES[:-1] if args.no_reference else RECIPES:
            new = count(setup, phase, recipe)
            for row in new:
                row.planned = planned.get(row.step)
            rows += new
            if not measured:
                continue
            try:
                measure(new, setup, recipe, args, device)
            except torch.OutOfMemoryError as error:  # the other rows are still worth having
                print(f"{phase}, {recipe}: out of memory ({error})", file=sys.stderr)
            free_caches()
    card = torch.cuda.get_device_name() if device == "cuda" else "no CUDA device"
    print("\n".join(report(rows, card, ceiling)))
    if args.json:
        numbers = [dataclasses.asdict(row) for row in rows]
        options = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(args.json, {"card": card, "options": options, "matrix_ceiling_flops": ceiling, "rows": numbers})


# --- counting and measuring ---


def count(setup: Setup, phase: str, recipe: str) -> list[Row]:
    """Operations of each step, counted on the real code without data."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from models.counting import bring_in, empty_model, without_data

    dtype, rows = torch.bfloat16, []

    def make(_: str, builder: Callable):
        return bring_in(outside(empty_model, builder, dtype))

    with without_data(dtype), torch.set_grad_enabled(phase == "alignment"):
        for name, (_, step) in build(setup, phase, recipe, make, "cpu").steps.items():
            with FlopCounterMode(display=False, custom_mapping=cpu_attention()) as counter:
                step()
            rows.append(Row(phase, name, counter.get_total_flops()))
    return rows


def planned_peaks(setup: Setup, phase: str, memory: str, device: str) -> dict[str, int]:
    """{step: bytes} of our recipe: each is a phase of the memory plan."""
    import torch

    def peaks(guided: bool) -> dict[str, int]:
        plan = plan_of(setup, phase, torch.bfloat16, device, guided=guided)[memory]
        return {"ours" if p.name in ("training", "denoising") else p.name: p.total for p in plan}

    found = peaks(guided=phase == "ggi")
    return found | ({"both branches": peaks(guided=True)["ours"]} if phase == "anchors" else {})


def cpu_attention() -> dict:
    """Counts of the attention that tensors without data go through: torch's table has those of GPUs only."""
    import torch
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def forward(query, key, value, *arguments, out_shape=None, **options) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *arguments, out_shape=None, **options) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def outside(function: Callable, *arguments: object) -> object:
    """Call a function as if outside of `without_data`."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return function(*arguments)


def plan_of(setup: Setup, phase: str, dtype, device: str, *, guided: bool) -> dict:
    from models.plans import plan_alignment, plan_anchors, plan_ggi

    if phase == "ggi":
        size, frames = setup.video_size, setup.num_frames
        return plan_ggi(setup.paths, setup.inbetween, size, frames, dtype, device, guided=guided, tiling=True)
    if phase == "anchors":
        return plan_anchors(setup.paths, setup.anchor_size, LORA_RANK, setup.text_length, dtype, device, guided=guided)
    return plan_alignment(setup.paths, setup.crop, 1, LORA_RANK, setup.text_length, dtype, device)


def measure(rows: Sequence[Row], setup: Setup, recipe: str, args: argparse.Namespace, device: str) -> None:
    """Fill in seconds, peak and loading time. rows: from `count`."""
    import torch

    from models.counting import bring_in, default_dtype, empty_model
    from models.memory import AT_WORK, RESIDENT, keep, kept_on
    from models.speed import attention_kernel, compile_blocks

    phase, dtype = rows[0].phase, torch.bfloat16
    memory = "full" if recipe == "reference" else args.memory
    kept = kept_on(device, phase, memory) | {"detector": RESIDENT}

    def make(name: str, builder: Callable):
        whole = kept[name] in (RESIDENT, AT_WORK)  # others may not fit before they are quantised or streamed
        network = bring_in(
            empty_model(builder, dtype), functools.partial(random_values, device, device if whole else "cpu")
        )
        if not whole:
            keep(network, kept[name], device)
        return network

    with default_dtype(dtype), torch.set_grad_enabled(phase == "alignment"):
        built = build(setup, phase, recipe, make, device)
        transformer = built.networks.get("transformer")
        if args.compile and recipe == "ours":
            compile_blocks(transformer)
        for row in rows:
            at_work, step = built.steps[row.step]
            for name, network in built.networks.items():
                if kept.get(name) == AT_WORK:
                    network.to(device if name in at_work else "cpu")
            with attention_kernel(args.attention if row.step in FASTER else None):
                row.seconds, row.peak = time_step(step, args.steps, device)
        if phase == "ggi" and transformer is not None and memory == "full":
            row = next(row for row in rows if row.step == recipe)
            row.loading = loading_seconds(transformer, device)
            if recipe == "reference":
                row.merged_distance = merged_distance(transformer, step)


def random_values(device: str, place: str, name: str, tensor):
    """Values in the place of an empty tensor: random matrices, drawn on `device` and brought to `place`.

    Norms scale by 1, nothing is shifted: the signal neither dies nor grows.
    """
    import torch

    if tensor.is_floating_point() and tensor.dim() > 1:
        values = torch.randn(tensor.shape, dtype=tensor.dtype, device=device).mul_(DEVIATION)
    else:
        values = torch.full(tensor.shape, name == "weight", dtype=tensor.dtype, device=device)
    return values.to(place)


def time_step(step: Callable, steps: int, device: str) -> tuple[float, int | None]:
    """(seconds per step, peak bytes on the card, those of the first steps included)."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None


def merged_distance(network, step: Callable) -> float:
    """Relative distance between one pass with the LoRA beside the weights and one with it merged."""
    import torch

    with torch.no_grad():
        before = step()[0].float()
        network.fuse_lora()
        return ((step()[0].float() - before).norm() / before.norm()).item()


def limit_memory(gigabytes: float) -> None:
    """Raise InputError without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"--limit_gb {gigabytes:g} needs a CUDA device; leave it out")
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / torch.cuda.mem_get_info()[1]))


def loading_seconds(network, device: str) -> float:
    """Time that the network's tensors take from the local disk, whose cache is warm, to the device."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
        began = time.perf_counter()
        load_file(path, device=device)
        return time.perf_counter() - began


def matrix_ceiling(device: str) -> float:
    """Operations per second of a large bfloat16 matrix product."""
    import torch

    n = CEILING_SIZE[device]
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for repeats in (3, 20):  # the first round warms up
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * n**3 * 20 / (time.perf_counter() - began)


# --- what is printed ---


def report(rows: Sequence[Row], card: str, ceiling: float | None) -> list[str]:
    """Markdown."""
    lines = [f"card: {card}"]
    lines += [f"matrix product: {ceiling / 1e12:.3g} TFLOP/s" if ceiling else "matrix product: not measured", ""]
    head = ("phase", "step", "PFLOP per step", "planned peak", "peak", "seconds per step", "TFLOP/s", "of ceiling")
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        rate = row.flops / row.seconds if row.seconds else None
        cells = (
            row.phase,
            row.step,
            f"{row.flops / 1e15:.4g}",
            "" if row.planned is None else show_bytes(row.planned),
            "not measured" if row.peak is None else show_peak(row),
            "not measured" if row.seconds is None else f"{row.seconds:.3f}",
            "not measured" if rate is None else f"{rate / 1e12:.3g}",
            "not measured" if rate is None or ceiling is None else f"{100 * rate / ceiling:.0f} %",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *ratios(rows)]


def show_peak(row: Row) -> str:
    return show_bytes(row.peak) + (f", {row.peak / row.planned:.2f} of the plan" if row.planned else "")


def ratios(rows: Sequence[Row]) -> list[str]:
    """The reference's time over ours, per step and, for GGI, for a scene of ten arcs with all that goes with them."""
    lines = []
    for phase in dict.fromkeys(row.phase for row in rows):
        found = {row.step: row for row in rows if row.phase == phase}
        ours, theirs = found["ours"], found.get("reference")
        if theirs is None:
            continue
        text = f"{phase}: the reference computes {theirs.flops / ours.flops:.2f} times as much per step"
        if ours.seconds and theirs.seconds:
            text += f" and takes {theirs.seconds / ours.seconds:.2f} times as long"
        if ours.loading and theirs.loading and found["encoding"].seconds and found["decoding"].seconds:
            alike = ARCS * (found["encoding"].seconds + found["decoding"].seconds)
            mine = alike + ours.loading + ARCS * ARC_PASSES * ours.seconds
            other = alike + ARCS * (theirs.loading + ARC_PASSES * theirs.seconds)
            text += f"; {other / mine:.2f} times for {ARCS} arcs with loading, encoding and decoding"
        if theirs.merged_distance is not None:
            text += f"; merging the LoRA moves one pass by {theirs.merged_distance:.1e}"
        lines.append(text)
    return lines


if __name__ == "__main__":
    run_script(main)
