"""Check trained weights: the method's results on test scenes and styles, compared with ground truth.

    python -m synthetic.check
    python -m synthetic.check --scenes 2 --seeds 1 --only edge_correlation style_error --resume

Prints one line per figure, `name value bar ok|short`, and ends with exit code 1 if any falls short of its bar; figures
without a bar are for comparison. A unit is one scene in one style; no two units share a style.
OUTPUT_DIR/units/SCENE_STYLE/ holds pictures to look at: anchors.png, video.png, chain.png and chain.mp4, with
the truth on the right. --resume reuses figures measured with the same weights and settings.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from models.weights import WEIGHTS, Preset, load_preset, locate, require_hashes
from synthetic.measuring.jobs import finish, worker_pool
from synthetic.measuring.settings import MOST_LORA_STEPS, Settings
from synthetic.pictures import SPLITS
from utils.cli import InputError, Parser, add_settings, positive_int, require_writable, run_script, settings_of
from utils.files import write_json

FIRST_SEED = SPLITS["test"][0]
Means = Mapping[str, float]


@dataclass(frozen=True)
class Bar:
    """The condition that a figure must meet: `value sign limit(means)`. sign: >=, <=, < or >."""

    sign: str
    limit: Callable[[Means], float]

    def is_met(self, value: float, means: Means) -> bool:
        limit = self.limit(means)
        return {">=": value >= limit, "<=": value <= limit, "<": value < limit, ">": value > limit}[self.sign]


def at_least(limit: float) -> Bar:
    return Bar(">=", lambda means: limit)


def at_most(limit: float) -> Bar:
    return Bar("<=", lambda means: limit)


def below(name: str, factor: float = 1.0) -> Bar:
    """The bar: below `factor` times another figure."""
    return Bar("<", lambda means: factor * means[name])


CHAIN_WITHOUT = ("chain_no_align", "chain_no_replace", "chain_no_ggi", "chain_no_edges")
# figure -> (part that measures it, bar or None)
FIGURES: dict[str, tuple[str, Bar | None]] = {
    "image_vae_psnr": ("image_vae", at_least(30)),
    "video_vae_psnr": ("video_vae", at_least(31.5)),
    "edge_vae_psnr": ("video_vae", None),
    "edge_correlation": ("anchors", at_least(0.85)),
    "edge_correlation_shuffled": ("anchors", below("edge_correlation", 0.5)),
    "edge_correlation_base": ("anchors", None),
    "edge_correlation_vae": ("anchors", None),
    "style_error": ("anchors", at_most(12)),
    "style_error_base": ("anchors", None),
    "style_error_vae": ("anchors", None),
    "style_error_replacement": ("anchors", at_most(12)),
    "covisible_ratio": ("anchors", at_most(0.6)),
    "covisible_error_replacement": ("anchors", None),
    "covisible_error": ("anchors", None),
    "covisible_ratio_base": ("anchors", None),
    "covisible_error_base_replacement": ("anchors", None),
    "covisible_error_base": ("anchors", None),
    "covisible_error_vae": ("anchors", None),
    "inbetween_gain_db": ("inbetween", at_least(6)),
    "gain_no_edges": ("inbetween", below("inbetween_gain_db")),
    "gain_no_end": ("inbetween", below("inbetween_gain_db")),
    "gain_no_warp": ("inbetween", below("inbetween_gain_db")),
    "gain_vae": ("video_vae", None),
    "last_frame_psnr": ("inbetween", Bar(">=", lambda means: means["video_vae_psnr"] - 3)),
    "chain_fidelity": ("chain", Bar(">", lambda means: max(means[name] for name in CHAIN_WITHOUT))),
    **{name: ("chain", below("chain_fidelity")) for name in CHAIN_WITHOUT},
}
PART_ORDER = ("image_vae", "video_vae", "anchors", "inbetween", "chain")
ALSO_NEEDED = {"inbetween": ("video_vae",)}  # part -> other parts whose figures its bars depend on


def means_over_units(units: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each figure over the units that have it and where it is not NaN.

    A covisible ratio is the ratio of two means, so that a unit with little overlap cannot distort it.
    """
    columns: dict[str, list[float]] = {}
    for unit in units:
        for name, value in unit.items():
            columns.setdefault(name, []).append(value)
    means = {}
    for name, values in columns.items():
        known = [value for value in values if not math.isnan(value)]
        means[name] = float(np.mean(known)) if known else math.nan
    for kind in ("", "_base"):
        if f"covisible_error{kind}" in means:
            ratio = means[f"covisible_error{kind}_replacement"] / means[f"covisible_error{kind}"]
            means[f"covisible_ratio{kind}"] = ratio
    return means


def judge(means: Means, names: Iterable[str]) -> list[dict]:
    """One row per figure: name, value, bar as text (`-` for none), verdict (ok, short or info)."""
    rows = []
    for name in names:
        value, bar = means[name], FIGURES[name][1]
        text = f"{bar.sign}{bar.limit(means):.3f}" if bar else "-"
        verdict = ("ok" if bar.is_met(value, means) else "short") if bar else "info"
        rows.append({"name": name, "value": value, "bar": text, "verdict": verdict})
    return rows


# --- the command line ---


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.check")
    add_unit_flags(parser)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(FIGURES), metavar="NAME", help="figures to measure (default: all)")
    add("--resume", action="store_true", help="keep what was measured before with the same weights and settings")
    add("--json", type=Path, metavar="FILE", help="also write figures, bars and every unit's figures there")
    add("--output_dir", type=Path, default=Path("runs/check"), help="folder of results, pictures and cached scenes")
    add_settings(parser, Settings)
    return parser.parse_args(argv)


def add_unit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose test scenes, styles and weights."""
    add = parser.add_argument
    add("--scenes", type=positive_int, default=8, help="test scenes")
    add("--seeds", type=positive_int, default=2, help="styles for each scene")
    add("--first_scene", type=positive_int, default=FIRST_SEED, help="seed of the first scene; the next ones follow")
    add("--first_style", type=positive_int, default=FIRST_SEED, help="seed of the first style; the next ones follow")
    add("--weights_dir", type=Path, default=WEIGHTS / "tiny", help="folder of a weight set, with its preset.json")
    add("--processes", type=positive_int, default=2, help="processes that work on units, one thread each")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for arguments with which the bars do not apply."""
    check_unit_flags(args)
    if args.lora_steps > MOST_LORA_STEPS:
        raise InputError(f"--lora_steps {args.lora_steps}: the bars hold for {MOST_LORA_STEPS} at most")
    require_writable(args.output_dir)
    if args.json:
        if args.json.is_dir():
            raise InputError(f"--json {args.json} is a folder: name a file")
        require_writable(args.json.parent)


def check_unit_flags(args: argparse.Namespace) -> None:
    """Raise InputError for scenes or styles seen in training, and for a folder without weights."""
    for name in ("first_scene", "first_style"):
        if getattr(args, name) < FIRST_SEED:
            raise InputError(
                f"--{name} {getattr(args, name)}: tests start at {FIRST_SEED}; seeds below are trained on"
            )
    if not (args.weights_dir / "preset.json").is_file() and args.weights_dir != WEIGHTS / "tiny":
        raise InputError(f"--weights_dir {args.weights_dir} holds no preset.json")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_arguments(args)
    names = [name for name in FIGURES if name in (args.only or FIGURES)]
    wanted = {FIGURES[name][0] for name in names}
    wanted |= {needed for part in wanted for needed in ALSO_NEEDED.get(part, ())}
    parts = [part for part in PART_ORDER if part in wanted]
    results = measure(args, parts)
    means = means_over_units(results.values())
    rows = judge(means, names)
    for row in rows:
        print("{name} {value:.3f} {bar} {verdict}".format(**row))
    if args.json:
        write_json(
            args.json, {"figures": rows, "units": results, "settings": dataclasses.asdict(settings_of(Settings, args))}
        )
    if any(row["verdict"] == "short" for row in rows):
        sys.exit(1)


def measure(args: argparse.Namespace, parts: list[str]) -> dict[str, dict[str, float]]:
    """Measure the units that are not measured yet; returns {unit: figures} of all."""
    from synthetic.measuring.scene_bench import choose_units
    from synthetic.measuring.units import PARTS, finished_parts, used_weights

    preset = load_unit_preset(args)
    components = dict.fromkeys(component for part in parts for component in PARTS[part].components)
    paths = locate(argparse.Namespace(), preset, components)
    settings, hashes = settings_of(Settings, args), require_hashes(used_weights(parts, paths, preset))
    units = choose_units(args.scenes, args.seeds, args.first_scene, args.first_style)

    jobs, results = [], {}
    for unit in units:
        done = finished_parts(unit, parts, settings, hashes, args.output_dir) if args.resume else {}
        results[unit.name] = {name: value for figures in done.values() for name, value in figures.items()}
        if missing := [part for part in parts if part not in done]:
            jobs.append((unit, missing, preset, paths, settings, hashes, args.output_dir))
    for name, figures in run_jobs(jobs, args.processes).items():
        results[name] |= figures
    return results


def load_unit_preset(args: argparse.Namespace) -> Preset:
    """The preset of --weights_dir. Raises InputError unless its anchors and videos have one size."""
    preset = load_preset("tiny" if args.weights_dir == WEIGHTS / "tiny" else str(args.weights_dir.resolve()))
    if preset.image_size is None or preset.image_size != preset.video_size:
        raise InputError(f"{args.weights_dir}: anchors and videos must have one size, named in preset.json")
    return preset


def run_jobs(jobs: list[tuple], processes: int) -> dict[str, dict[str, float]]:
    """Draw the scenes of all jobs, then measure, each in parallel; returns {unit: figures}. Raises a job's exception
    once the running jobs are done."""
    scenes = list({job[0].scene_seed: job for job in jobs}.values())  # units of one scene share its cache
    total = len(scenes) + len(jobs)
    with worker_pool(processes) as pool, tqdm(total=total, desc="check", unit="unit", disable=not jobs) as bar:
        finish([pool.submit(_draw_scene, job) for job in scenes], bar)
        measured = finish([pool.submit(_measure, job) for job in jobs], bar)
    return {job[0].name: figures for job, figures in zip(jobs, measured, strict=True)}


def _draw_scene(job: tuple) -> None:
    from synthetic.measuring.scene_bench import SceneBench
    from synthetic.measuring.units import PARTS

    unit, parts, *rest, _hashes, folder = job
    scene = SceneBench(unit, *rest, folder).scene
    for kind in {kind for part in parts for kind in PARTS[part].scene_data}:
        getattr(scene, kind)  # reading it draws it into the cache


def _measure(job: tuple) -> dict[str, float]:
    from synthetic.measuring.units import measure_unit

    return measure_unit(*job)


if __name__ == "__main__":
    run_script(main)
