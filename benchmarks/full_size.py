"""Full-size networks with random weights: seconds per step against the GPU's limit, peak memory against the plan.

    python -m benchmarks.full_size
    python -m benchmarks.full_size --phases ggi --steps 5 --memory low --json full_size.json
    python -m benchmarks.full_size --attention cudnn --compile --no_reference

Speed and memory do not depend on the values of weights, so nothing is downloaded: the networks are built from
configs/full. The reference's recipe (benchmarks/recipes.py), which reloads the transformer for every arc, is measured
for comparison. Without a CUDA device, operations are counted, memory is taken from the plan, and the rest is
`not measured`; --weights tiny measures the tiny networks anywhere.
"""

import argparse
import dataclasses
import functools
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarks.recipes import build
from benchmarks.report import Row, heading, line_of, ratios
from benchmarks.setup import Setup, setup_of
from models.flags import MEMORY_MODES, add_attention_flag, add_compile_flag
from utils.cli import InputError, Parser, positive_float, positive_int, require_writable, run_script
from utils.files import write_json

PHASES = ("alignment", "anchors", "ggi")
RECIPES = ("text", "ours", "reference")  # per phase; only one is in memory at a time
FASTER = ("ours", "both branches")  # steps that use --attention
WARM_UP = 2  # steps that are not timed
DEVIATION = 0.02  # standard deviation of random weights
CEILING_PRODUCTS = {"cuda": (8192, 1000), "cpu": (512, 20)}  # side of the matrices, and number of timed products
LOADED_BYTES = 2e9  # loading is timed on this many bytes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m benchmarks.full_size")
    add = parser.add_argument
    add("--phases", type=phases, default=",".join(PHASES), help="some of them")
    add("--steps", type=positive_int, default=5, help="timed steps of each recipe")
    add("--memory", choices=MEMORY_MODES, default="full", help="how our networks are kept; the reference's: full")
    add("--limit_gb", type=positive_float, metavar="GB", help="let the process use no more of the GPU (default: all)")
    add("--no_reference", action="store_true", help="leave the reference's recipe out")
    add("--diffusers_rotary", action="store_true", help="rotary positions by diffusers' formula, to compare with ours")
    add("--weights", choices=["full", "tiny"], default="full", help="sizes of the networks")
    add("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    add_attention_flag(parser)
    add_compile_flag(parser)
    return parser.parse_args(argv)


def phases(text: str) -> list[str]:
    """argparse type: a comma-separated list of PHASES."""
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

    from models.runtime.memory import placement_on
    from models.runtime.speed import require_attention, require_compilable

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.limit_gb:
        limit_memory(args.limit_gb)
    if args.compile:
        for phase in args.phases:
            require_compilable(placement_on("cuda", phase, args.memory)["transformer"], "cuda")
    setup, measured = setup_of(args.weights), device == "cuda" or args.weights == "tiny"
    if measured:
        require_attention(args.attention, device, torch.bfloat16)
    ceiling = matrix_ceiling(device) if measured else None
    record = {
        "GPU": torch.cuda.get_device_name() if device == "cuda" else "no CUDA device",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "options": {key: value for key, value in vars(args).items() if key != "json"},
        "matrix_ceiling_flops": ceiling,
    }
    print("\n".join(heading(record)), flush=True)
    rows, failed = [], False
    for phase in args.phases:
        planned = planned_peaks(args.weights, phase, args.memory)
        for recipe in RECIPES[:-1] if args.no_reference else RECIPES:
            new = count(setup, phase, recipe)
            for row in new:
                row.planned = planned.get(row.step)
            if measured and not try_to_measure(new, setup, recipe, args, device):
                failed = True
            print("\n".join(line_of(row, ceiling) for row in new), flush=True)
            rows += new
            if args.json:
                write_json(args.json, record | {"rows": [dataclasses.asdict(row) for row in rows]})
    print("\n".join(["", *ratios(rows, recipe_of(args))]))
    if failed:
        raise OSError("not all recipes could be measured; the reasons are above")


def recipe_of(args: argparse.Namespace) -> str:
    """Describe our recipe in words."""
    flags = [f"--memory {args.memory}"] if args.memory != "full" else []
    flags += [f"--attention {args.attention}"] if args.attention else []
    flags += [f"--{name}" for name in ("compile", "diffusers_rotary") if getattr(args, name)]
    return "ours with " + " ".join(flags) if flags else "ours"


def try_to_measure(rows: Sequence[Row], setup: Setup, recipe: str, args: argparse.Namespace, device: str) -> bool:
    """Measure a recipe. Prints any error instead of raising it, so that the other recipes are still measured."""
    import torch

    from models.loading.networks import free_caches

    try:
        measure(rows, setup, recipe, args, device)
    except torch.OutOfMemoryError as error:
        print(f"{rows[0].phase}, {recipe}: out of memory ({error})", file=sys.stderr)
        return False
    except Exception:
        traceback.print_exc()
        return False
    finally:
        free_caches()
    return True


# --- counting and measuring ---


def count(setup: Setup, phase: str, recipe: str, steps: Collection[str] | None = None) -> list[Row]:
    """Count the operations of each step by running the real code on tensors without data. steps: some of them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.memory.counting import empty_model, materialize, without_data

    dtype, rows = torch.bfloat16, []

    def make(_: str, builder: Callable):
        return materialize(outside(empty_model, builder, dtype))

    with without_data(dtype), torch.set_grad_enabled(phase == "alignment"):
        for name, (_, step) in build(setup, phase, recipe, make, "cpu").steps.items():
            if steps is not None and name not in steps:
                continue
            with FlopCounterMode(display=False, custom_mapping=cpu_attention()) as counter:
                step()
            rows.append(Row(phase, name, counter.get_total_flops()))
    return rows


def planned_peaks(weights: str, phase: str, memory: str) -> dict[str, int]:
    """{step: planned peak bytes on a GPU} of our recipe; each step is a phase of the memory plan."""
    from models.runtime.memory import BATCHED, look_up_plan

    setup = setup_of(weights)
    sizes = {"alignment": (setup.crop, setup.crop), "anchors": setup.anchor_size, "ggi": setup.video_size}

    def peaks(batch: int | None) -> dict[str, int]:
        plan = look_up_plan(weights, phase, pixels=math.prod(sizes[phase]), batch=batch)[memory]
        return {"ours" if p.name in BATCHED else p.name: p.total for p in plan}

    if phase == "anchors":
        return peaks(1) | {"both branches": peaks(2)["ours"]}
    return peaks(None)


def cpu_attention() -> dict:
    """FLOP counts of the CPU attention that tensors without data use; torch's table has only the GPU kernels."""
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


def measure(rows: Sequence[Row], setup: Setup, recipe: str, args: argparse.Namespace, device: str) -> None:
    """Fill in seconds, peak and loading time. rows: from `count`."""
    import torch

    from benchmarks.memory.counting import default_dtype, empty_model, materialize
    from models.runtime.memory import ON_DEMAND, RESIDENT, place, placement_on
    from models.runtime.rotary import use_complex_rotary
    from models.runtime.speed import attention_kernel, compile_blocks

    phase, dtype = rows[0].phase, torch.bfloat16
    memory = "full" if recipe == "reference" else args.memory
    kept = placement_on(device, phase, memory) | {"detector": RESIDENT}

    def make(name: str, builder: Callable):
        whole = kept[name] in (RESIDENT, ON_DEMAND)  # others may not fit until they are quantised or offloaded
        network = materialize(
            empty_model(builder, dtype), functools.partial(random_values, device, device if whole else "cpu")
        )
        if not whole:
            place(network, kept[name], device)
        return network

    with default_dtype(dtype), torch.set_grad_enabled(phase == "alignment"):
        built = build(setup, phase, recipe, make, device)
        transformer = built.networks.get("transformer")
        if args.compile and recipe == "ours" and phase != "alignment":  # alignment's script has no --compile
            compile_blocks(transformer)
        if args.diffusers_rotary:
            for network in built.networks.values():
                use_complex_rotary(network, False)
        for row in rows:
            at_work, step = built.steps[row.step]
            for name, network in built.networks.items():
                if kept.get(name) == ON_DEMAND:
                    network.to(device if name in at_work else "cpu")
            with attention_kernel(args.attention if row.step in FASTER else None):
                row.seconds, row.peak = time_step(step, args.steps, device)
        if phase == "ggi" and transformer is not None and memory == "full":
            row = next(row for row in rows if row.step == recipe)
            row.loading = loading_seconds(transformer, device)
            if recipe == "reference":
                row.merged_distance = merged_distance(transformer, built.steps[recipe][1])


def random_values(device: str, place: str, name: str, tensor):
    """Random values for an empty tensor, drawn on `device` and moved to `place`.

    Norm weights are 1 and biases 0, so that the signal neither vanishes nor explodes.
    """
    import torch

    if tensor.is_floating_point() and tensor.dim() > 1:
        values = torch.randn(tensor.shape, dtype=tensor.dtype, device=device).mul_(DEVIATION)
    else:
        values = torch.full(tensor.shape, name == "weight", dtype=tensor.dtype, device=device)
    return values.to(place)


def time_step(step: Callable, steps: int, device: str) -> tuple[float, int | None]:
    """(seconds per step, peak bytes on the GPU including the first steps)."""
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
    """Relative distance between the outputs with the LoRA unmerged and merged."""
    import torch

    with torch.no_grad():
        before = step()[0].float()
        network.fuse_lora()
        return ((step()[0].float() - before).norm() / before.norm()).item()


def limit_memory(gigabytes: float) -> None:
    """Limit the process's GPU memory. Raises InputError without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"--limit_gb {gigabytes:g} needs a CUDA device; leave it out")
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / torch.cuda.mem_get_info()[1]))


def loading_seconds(network, device: str) -> float:
    """Seconds to load the network's tensors from the local disk (warm cache) to the device.

    Measured on some tensors and scaled to the bytes of all.
    """
    import torch
    from safetensors.torch import load_file, save_file

    some, total, taken = {}, 0, 0
    for name, tensor in network.state_dict().items():
        total += tensor.nbytes
        if taken < LOADED_BYTES:
            some[name], taken = tensor.contiguous(), taken + tensor.nbytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(some, path)
        began = time.perf_counter()
        load_file(path, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * total / taken


def matrix_ceiling(device: str) -> float:
    """Operations per second of a large bfloat16 matrix product, run until a GPU is as warm as under a model."""
    import torch

    n, repeats = CEILING_PRODUCTS[device]
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(2):  # the first round warms up
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
    return 2 * n**3 * repeats / (time.perf_counter() - began)


if __name__ == "__main__":
    run_script(main)
