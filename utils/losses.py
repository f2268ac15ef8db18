"""The loss curve of a training: loss.csv with a row per step, and its picture."""

import csv
from pathlib import Path

from utils.arcs import LOSS_CURVE, LOSS_FILE
from utils.images import plot_curve, write_image
from utils.runs import atomic_path


def read_losses(folder: Path, steps: int) -> list[float]:
    """The losses of the first `steps` steps of an interrupted run."""
    path = folder / LOSS_FILE
    if not steps or not path.exists():
        return []
    with path.open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)][:steps]


def write_losses(folder: Path, losses: list[float]) -> None:
    with atomic_path(folder / LOSS_FILE) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    write_image(folder / LOSS_CURVE, plot_curve(losses, "loss"))
