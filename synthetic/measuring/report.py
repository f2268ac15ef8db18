"""Write the tables and pictures of the benchmark: results.json, results.csv, results.md, pictures/*.png.

Everything follows from {row: {unit: {metric: value or None}}}; the same values give the same bytes.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from synthetic.demo import apart
from synthetic.measuring.curves import draw_curves
from synthetic.measuring.intervals import RESAMPLES, Estimate, estimate, paired_difference
from synthetic.measuring.methods import CLAIMS, SWEEPS, Claim, made_as
from utils.evaluation.measure import Metric
from utils.files import atomic_path, write_json
from utils.images import contact_sheet, write_image
from utils.layout import resample_indices

COMPARED_WITH = "full"
ARROWS = {"higher": "↑", "lower": "↓", "near 1": "→1"}
METRIC_GROUPS = (  # prefixes of metric names; one table of the report per group
    ("structure", "style", "class"),
    ("anchors", "temporal", "flicker", "seams"),
    ("fidelity", "away", "end", "closure", "cpu"),
)
SHEET_COLUMNS, SHEET_CELL = 9, 180  # moments of a video, and pixels of each
CURVES = {  # sweep -> the metrics that its curves show
    "num_replacement": ("anchors_error", "style_colour", "structure_f1", "fidelity_psnr"),
    "degradation": ("temporal_1", "temporal_24", "flicker", "fidelity_psnr"),
    "lora_steps": ("style_colour", "class_colour", "structure_f1", "fidelity_psnr"),
    "num_inference_steps": ("structure_f1", "temporal_1", "flicker", "fidelity_psnr"),
}

Results = Mapping[str, Mapping[str, Mapping[str, float | None]]]


@dataclass(frozen=True)
class Difference:
    """A row, `full`, minus another on one metric, unit by unit. verdict: it is better, worse, or undecided."""

    method: str
    metric: str
    difference: Estimate
    verdict: str


def column(results: Results, method: str, metric: str) -> list[float | None]:
    """A metric of a row, one value per unit, in the order of the units."""
    return [values[metric] for values in results[method].values()]


def summarise(results: Results, metrics: Sequence[Metric]) -> dict[str, dict[str, Estimate]]:
    """{row: {metric: mean and interval over units}}."""
    return {name: {m.name: estimate(column(results, name, m.name)) for m in metrics} for name in results}


def compare(results: Results, metrics: Sequence[Metric]) -> list[Difference]:
    """`full` minus every other row on every metric; empty if `full` was not run."""
    if COMPARED_WITH not in results:
        return []
    others = [name for name in results if made_as(name) != COMPARED_WITH]
    return [_difference(results, name, metric) for name in others for metric in metrics]


def _difference(results: Results, name: str, metric: Metric, ours: str = COMPARED_WITH) -> Difference:
    columns = [column(results, row, metric.name) for row in (ours, name)]
    if metric.better == "near 1":  # compare the distances from 1
        columns = [[v if v is None else abs(v - 1) for v in values] for values in columns]
    found = paired_difference(*columns)
    if not found.excludes_zero:
        verdict = "undecided"
    else:
        verdict = "better" if (found.mean > 0) == (metric.better == "higher") else "worse"
    return Difference(name, metric.name, found, verdict)


# --- files ---


def write_report(
    folder: Path, results: Results, metrics: Sequence[Metric], about: Mapping, settings: Mapping[str, float]
) -> None:
    """All tables and curves. about: what was run, JSON values. settings: of `full`, to place it on the curves."""
    summary, differences = summarise(results, metrics), compare(results, metrics)
    claims = [row for claim in CLAIMS for row in claim_rows(claim, results, metrics)]
    curves = write_curves(folder / "pictures", summary, metrics, settings)
    tables = {
        "about": about,
        "metrics": [asdict(metric) for metric in metrics],
        "summary": {name: {m: _numbers(e) for m, e in row.items()} for name, row in summary.items()},
        "differences": [asdict(d) | {"difference": _numbers(d.difference)} for d in differences],
        "units": results,
    }
    write_json(folder / "results.json", tables)
    write_csv(folder / "results.csv", summary, metrics)
    with atomic_path(folder / "results.md") as temporary:
        temporary.write_text(markdown(summary, differences, claims, metrics, about, curves))


def _numbers(found: Estimate) -> dict[str, float | int | None]:
    return {name: None if math.isnan(value) else value for name, value in asdict(found).items()}


def write_csv(path: Path, summary: Mapping[str, Mapping[str, Estimate]], metrics: Sequence[Metric]) -> None:
    """One line per row and metric."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "metric", "unit", "better", "mean", "low", "high", "units"])
        for name, row in summary.items():
            for metric in metrics:
                e = row[metric.name]
                numbers = [f"{v:.6g}" if e.count else "" for v in (e.mean, e.low, e.high)]
                writer.writerow([name, metric.name, metric.unit, metric.better, *numbers, e.count])


def write_curves(
    folder: Path,
    summary: Mapping[str, Mapping[str, Estimate]],
    metrics: Sequence[Metric],
    settings: Mapping[str, float],
) -> list[str]:
    """Draw every sweep that has at least three rows; returns the names of the sweeps drawn."""
    written = []
    for sweep, (label, places) in SWEEPS.items():
        there = {name: settings[sweep] if p is None else p for name, p in places.items() if name in summary}
        if len(there) < 3:
            continue
        chosen = [metric for metric in metrics if metric.name in CURVES[sweep]]
        panels = [(f"{m.name} {ARROWS[m.better]}", [summary[name][m.name] for name in there]) for m in chosen]
        write_image(folder / f"curve_{sweep}.png", draw_curves(label, list(there.values()), panels))
        written.append(sweep)
    return written


# --- Markdown ---


def markdown(
    summary: Mapping[str, Mapping[str, Estimate]],
    differences: Sequence[Difference],
    claims: Sequence[Sequence[str]],
    metrics: Sequence[Metric],
    about: Mapping,
    curves: Iterable[str] = (),
) -> str:
    """The report as Markdown. Intervals are 95 % bootstrap intervals over units."""
    lines = ["# Benchmark", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [f"Mean [95 % interval], bootstrap over units, {RESAMPLES} resamples, seeded.", ""]
    shown = {name: {m: show(e) for m, e in row.items()} for name, row in summary.items()}
    lines += grouped_tables(shown, metrics)
    if claims:
        lines += ["## Claims", "", "A row minus another, unit by unit.", ""]
        lines += [*table(["claim", "row", "than", "metric", "difference", "claimed", "found"], claims), ""]
    if differences:
        lines += ["## All paired differences", "", "`full` minus row; of `seams`: distance from 1. "
                  "**bold**: `full` is better; *italic*: worse; plain: the interval holds zero.", ""]  # fmt: skip
        marked: dict[str, dict[str, str]] = {}
        for d in differences:
            marked.setdefault(d.method, {})[d.metric] = _marked(d)
        lines += grouped_tables(marked, metrics)
    lines += [line for sweep in curves for line in (f"![{sweep}](pictures/curve_{sweep}.png)", "")]
    return "\n".join([*lines, "![all rows](pictures/methods.png)"]) + "\n"


def grouped_tables(cells: Mapping[str, Mapping[str, str]], metrics: Sequence[Metric]) -> list[str]:
    """{row: {metric: text}} as one table per group of METRIC_GROUPS, so that none is too wide to read."""
    lines = []
    for prefixes in METRIC_GROUPS:
        group = [m for m in metrics if m.name.startswith(prefixes)]
        if group:
            head = ["method", *(f"{m.name} {ARROWS[m.better]}" for m in group)]
            lines += [*table(head, [[name, *(row[m.name] for m in group)] for name, row in cells.items()]), ""]
    return lines


def claim_rows(claim: Claim, results: Results, metrics: Sequence[Metric]) -> list[list[str]]:
    """What was found of a claim, a row of text per metric; empty if its rows were not run."""
    if not {claim.row, claim.than} <= results.keys():
        return []
    claimed = {name: "better" for name in claim.better} | {name: "no worse" for name in claim.no_worse}
    chosen = [metric for metric in metrics if metric.name in claimed]
    found = [_difference(results, claim.than, metric, claim.row) for metric in chosen]
    shown = [[d.metric, show(d.difference, signed=True), claimed[d.metric], d.verdict] for d in found]
    return [[claim.part, claim.row, claim.than, *words] for words in shown]


def _marked(d: Difference) -> str:
    mark = {"better": "**", "worse": "*", "undecided": ""}[d.verdict]
    return f"{mark}{show(d.difference, signed=True)}{mark}"


def show(found: Estimate, *, signed: bool = False) -> str:
    """`mean [low, high]` with three decimals below 10 and one above 100; a single unit has no interval."""
    if not found.count:
        return "n/a"
    size = max(abs(value) for value in (found.mean, found.low, found.high))
    spec = f"{'+' if signed else ''}.{1 if size >= 100 else 2 if size >= 10 else 3}f"
    if found.count == 1:
        return f"{found.mean:{spec}}"
    return f"{found.mean:{spec}} [{found.low:{spec}}, {found.high:{spec}}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


# --- pictures ---


def write_sheets(folder: Path, videos: Mapping[str, np.ndarray], truth: np.ndarray) -> None:
    """NAME.png for every row, above the truth, and methods.png with all of them. Videos: uint8 [F, H, W, 3]."""
    columns = resample_indices(len(truth), SHEET_COLUMNS)

    def row(name: str, frames: np.ndarray) -> tuple[str, list[np.ndarray]]:
        return name, [apart(frames[i]) for i in columns]

    last = row("truth", truth)
    shown = {name: frames for name, frames in videos.items() if name != "truth"}
    for name, frames in shown.items():
        write_image(folder / f"{name}.png", contact_sheet([row(name, frames), last], SHEET_CELL))
    write_image(folder / "methods.png", contact_sheet([*(row(*item) for item in shown.items()), last], SHEET_CELL))
