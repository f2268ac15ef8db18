"""Results of the full-size benchmark, and their printing."""

import dataclasses
from collections.abc import Sequence

from utils.files import show_bytes

ARCS, ARC_PASSES = 10, 30  # arcs of a scene; denoising steps of each, both branches of guidance in one batch


@dataclasses.dataclass
class Row:
    """One step of one phase. flops: of a step. seconds: per step. None: not measured.

    planned, peak: bytes. loading: seconds. merged_distance: relative change of the output when the LoRA is merged.
    """

    phase: str
    step: str
    flops: int
    planned: int | None = None
    seconds: float | None = None
    peak: int | None = None
    loading: float | None = None
    merged_distance: float | None = None


def heading(record: dict) -> list[str]:
    """The lines before the table, and the table's header, in Markdown."""
    ceiling = record["matrix_ceiling_flops"]
    lines = [f"GPU: {record['GPU']}; torch {record['torch']}, cuDNN {record['cudnn'] or 'none'}"]
    lines += [f"matrix product: {ceiling / 1e12:.3g} TFLOP/s" if ceiling else "matrix product: not measured", ""]
    head = ("phase", "step", "PFLOP per step", "planned peak", "peak", "seconds per step", "TFLOP/s", "of ceiling")
    return [*lines, f"| {' | '.join(head)} |", "|" + "---|" * len(head)]


def line_of(row: Row, ceiling: float | None) -> str:
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
    return f"| {' | '.join(cells)} |"


def show_peak(row: Row) -> str:
    return show_bytes(row.peak) + (f", {row.peak / row.planned:.2f} of the plan" if row.planned else "")


def ratios(rows: Sequence[Row], ours_is: str) -> list[str]:
    """The reference's time over ours: per step and, for GGI, for a whole scene of ten arcs."""
    lines = []
    for phase in dict.fromkeys(row.phase for row in rows):
        found = {row.step: row for row in rows if row.phase == phase}
        ours, theirs = found["ours"], found.get("reference")
        if theirs is None:
            continue
        text = f"{phase}: the reference computes {theirs.flops / ours.flops:.2f} times as much per step"
        if ours.seconds and theirs.seconds:
            text += f" and takes {theirs.seconds / ours.seconds:.2f} times as long as {ours_is}"
        if ours.loading and theirs.loading and found["encoding"].seconds and found["decoding"].seconds:
            alike = ARCS * (found["encoding"].seconds + found["decoding"].seconds)
            mine = alike + ours.loading + ARCS * ARC_PASSES * ours.seconds
            other = alike + ARCS * (theirs.loading + ARC_PASSES * theirs.seconds)
            text += f"; {other / mine:.2f} times for {ARCS} arcs with loading the transformer, encoding and decoding"
        if theirs.merged_distance is not None:
            text += f"; merging the LoRA moves one pass by {theirs.merged_distance:.1e}"
        lines.append(text)
    return lines
