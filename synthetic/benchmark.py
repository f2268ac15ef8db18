"""The benchmark: the method, the method without each of its parts, and simple baselines, against ground truth.

    python -m synthetic.benchmark --scenes 8 --seeds 1
    python -m synthetic.benchmark --methods full no_warp degr_0 degr_0.25 degr_0.75 --output runs/noise

A unit is a test scene (a path of two arcs) in a test style; no two units share a style. Every method makes a video of
91 frames of every unit, measured with evaluate.py's metrics and against the true frames. OUTPUT holds results.md,
results.csv, results.json, pictures/ and all intermediate files. The same command continues an interrupted run; other
methods, scenes and styles add to the same folder. docs/metrics.md explains the columns.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from models.weights import FLUX_STAGE, GGI_STAGE, locate, require_hashes
from synthetic.check import add_unit_flags, check_unit_flags, load_unit_preset
from synthetic.measuring.jobs import finish, worker_pool
from synthetic.measuring.methods import GROUPS, METHODS, TRUTH, choose_methods, made_as
from synthetic.measuring.settings import Settings
from utils.cli import InputError, Parser, add_settings, require_writable, run_script, settings_of

if TYPE_CHECKING:  # they import torch
    from synthetic.measuring.rows import RowBench
    from synthetic.measuring.scene_bench import Unit

PASS_STYLES = 1000  # style seeds reserved for each pass over the scenes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.benchmark")
    add_unit_flags(parser)
    known = ", ".join((*GROUPS, *METHODS))
    add = parser.add_argument
    add("--methods", nargs="+", default=["main"], metavar="NAME", help=f"rows of the table: {known}")
    add("--output", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="folder of results and caches")
    add_settings(parser, Settings)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    names = choose_methods(args.methods)
    check_unit_flags(args)
    if args.scenes > PASS_STYLES:
        raise InputError(f"--scenes {args.scenes}: {PASS_STYLES} at most, or two units would share a style")
    require_writable(args.output)
    preset = load_unit_preset(args)
    paths = locate(argparse.Namespace(), preset, (*FLUX_STAGE, *GGI_STAGE))
    used = paths | {"transformer": Path(preset.ggi_transformer)}
    hashes = require_hashes(used)

    units = choose_passes(args.scenes, args.seeds, args.first_scene, args.first_style)
    settings = settings_of(Settings, args)
    setups = [((unit, preset, paths, settings, args.output), hashes) for unit in units]
    make_all(setups, names, args.processes)
    if require_hashes(used) != hashes:
        raise InputError(f"{args.weights_dir} was changed while the benchmark ran: run the same command again")
    report(setups, names, args)
    print(args.output / "results.md")


def choose_passes(scenes: int, seeds: int, first_scene: int, first_style: int) -> list["Unit"]:
    """Units of `seeds` passes over the scenes, each pass in new styles; more scenes or seeds only add units."""
    from synthetic.measuring.scene_bench import choose_units

    starts = range(first_style, first_style + seeds * PASS_STYLES, PASS_STYLES)
    return [unit for start in starts for unit in choose_units(scenes, 1, first_scene, start)]


# --- jobs of the worker processes ---

Setup = tuple[tuple, dict]  # arguments of RowBench: (unit, preset, paths, settings, folder), hashes


def open_bench(setup: Setup) -> "RowBench":
    from synthetic.measuring.rows import RowBench

    arguments, hashes = setup
    return RowBench(*arguments, hashes=hashes)


def draw_scene(setup: Setup) -> None:
    """Cache the edges, noise and correspondences of a unit's scene."""
    scene = open_bench(setup).scene
    for kind in ("anchors", "path", "covisibility"):
        getattr(scene, kind)


def make_shared(setup: Setup, names: Sequence[str]) -> None:
    """Make what all rows of a unit share: true frames, reference, LoRAs and anchors."""
    bench = open_bench(setup)
    _ = bench.truth, bench.reference_picture
    for method in dict.fromkeys(METHODS[name] for name in names):
        if method.has_loras:
            bench.loras(method)
        if method.has_anchors:
            bench.anchors(method)


def measure_row(setup: Setup, name: str) -> None:
    open_bench(setup).measure(name)


def make_all(setups: Sequence[Setup], names: Sequence[str], processes: int) -> None:
    """Make and measure what is missing, in parallel: scenes, then what rows share, then rows."""
    recipes = list(dict.fromkeys(made_as(name) for name in names))
    missing = [[name for name in recipes if open_bench(setup).measured(name) is None] for setup in setups]
    open_setups = [(setup, rows) for setup, rows in zip(setups, missing, strict=True) if rows]
    scenes = list({setup[0][0].scene_seed: setup for setup, _ in open_setups}.values())
    rows = [(setup, name) for setup, wanted in open_setups for name in wanted]
    if not rows:
        return
    total = len(scenes) + len(open_setups) + len(rows)
    with worker_pool(processes) as pool, tqdm(total=total, desc="benchmark", unit="job") as bar:
        finish([pool.submit(draw_scene, setup) for setup in scenes], bar)
        finish([pool.submit(make_shared, *job) for job in open_setups], bar)
        finish([pool.submit(measure_row, *job) for job in rows], bar)


# --- report ---


def report(setups: Sequence[Setup], names: Sequence[str], args: argparse.Namespace) -> None:
    """Write tables over all units, and pictures of the first one."""
    from synthetic.measuring.report import write_report, write_sheets
    from synthetic.measuring.rows import BENCH_METRICS

    benches = [open_bench(setup) for setup in setups]
    results = {name: {bench.unit.name: bench.measure(name) for bench in benches} for name in names}
    units, settings = [bench.unit for bench in benches], dataclasses.asdict(settings_of(Settings, args))
    write_report(args.output, results, BENCH_METRICS, about(args, units), settings)
    first = benches[0]
    videos = {name: first.video(name)[0] for name in names if METHODS[name].kind != TRUTH}
    write_sheets(args.output / "pictures", videos, first.truth.frames)


def about(args: argparse.Namespace, units: Sequence["Unit"]) -> dict:
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(settings_of(Settings, args)).items())
    styles = [unit.style_seed for unit in units[:: args.scenes]]  # the first of every pass
    return {
        "units": f"{len(units)}: {args.scenes} scenes x {args.seeds} styles each",
        "scene seeds": f"{args.first_scene} … {units[-1].scene_seed}",
        "style seeds": ", ".join(f"{first} … {first + args.scenes - 1}" for first in styles),
        "weights": args.weights_dir.name,
        "settings": settings,
    }


if __name__ == "__main__":
    run_script(main)
