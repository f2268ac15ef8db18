"""Measures a video: structure, style, consistency along the scene's geometry, and fidelity to true frames.

    python evaluate.py --video assets/sampleA/multiviews/RUN/d0.5_e1350_n30 --reference assets/references/boxtown.png

The video is a run folder of ggi.py, a folder of numbered frames, or a video file, of 46 N or 45 N + 1 frames for a
path of N arcs. A metric that lacks an input names it: `n/a: needs scene.glb`. docs/metrics.md explains all metrics.
Those of a run folder, and the true frames, are shown on its page too.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from utils.cli import InputError, Parser, run_script
from utils.images import read_image
from utils.layout import find_scene, load_scene
from utils.runs import warn_of_another_scene
from utils.videos.page import add_to_page, has_page
from utils.videos.read import read_frames

DIGITS = 6  # decimal places in JSON


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--video", type=Path, required=True, metavar="RUN", help="run folder, folder of frames, or video file")
    add("--scene", type=Path, help="scene folder (default: the one that RUN lies in, else the one RUN was made for)")
    add("--reference", type=Path, metavar="IMAGE", help="picture whose style the video should have")
    add("--ground_truth", type=Path, metavar="VIDEO", help="true frames, in any of the forms of --video, same size")
    add("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return parser.parse_args()


def read_truth(path: Path, frames: np.ndarray, num_arcs: int) -> np.ndarray:
    """Read the true frames. Raises InputError unless they have the size of the video."""
    truth = read_frames(path, num_arcs)
    if truth.shape != frames.shape:
        (height, width), (wanted_height, wanted_width) = truth.shape[1:3], frames.shape[1:3]
        raise InputError(f"{path} is {width}x{height}, the video {wanted_width}x{wanted_height}: they must be equal")
    return truth


def show_progress(items: Iterable, what: str) -> Iterable:
    from tqdm import tqdm

    return tqdm(items, desc=what, leave=False)


def describe(args: argparse.Namespace, frames: np.ndarray, num_arcs: int, values: dict) -> dict:
    """The results as JSON values."""
    numbers = {name: round(v, DIGITS) if isinstance(v, float) else None for name, v in values.items()}
    missing = {name: v.reason for name, v in values.items() if not isinstance(v, float)}
    height, width = frames.shape[1:3]
    about = {"video": str(args.video), "frames": len(frames), "arcs": num_arcs, "size": [width, height]}
    return about | {"metrics": numbers, "missing": missing}


def print_table(values: dict) -> None:
    from utils.evaluation.measure import METRICS

    rows = [("metric", "value", "unit", "range", "better")]
    for metric in METRICS:
        value = values[metric.name]
        measured = isinstance(value, float)
        shown = f"{value:.3f}" if measured else f"n/a: {value.reason}"
        rows.append(
            (metric.name, shown, metric.unit, metric.range, metric.better) if measured else (metric.name, shown)
        )
    widths = [max(len(row[k]) for row in rows if len(row) == 5) for k in range(5)]
    widths[0] = max(len(row[0]) for row in rows)
    for name, value, *rest in rows:
        cells = [value.rjust(widths[1]), *map(str.ljust, rest, widths[2:])] if rest else [value]
        print("  ".join([name.ljust(widths[0]), *cells]).rstrip())


def main() -> None:
    args = parse_args()
    if not args.video.exists():
        raise InputError(f"video {args.video} does not exist")
    scene = load_scene(args.scene or find_scene(args.video))
    warn_of_another_scene(args.video, scene)
    num_arcs = len(scene.arcs)
    reference = None if args.reference is None else read_image(args.reference)
    frames = read_frames(args.video, num_arcs)
    truth = None if args.ground_truth is None else read_truth(args.ground_truth, frames, num_arcs)

    from utils.evaluation.measure import load_targets, measure

    targets = load_targets(scene, (frames.shape[2], frames.shape[1]), show_progress)
    values = measure(frames, targets, reference=reference, truth=truth, progress=show_progress)
    results = describe(args, frames, num_arcs, values)
    if args.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    else:
        print_table(values)
    if has_page(args.video):
        add_to_page(args.video, results=results, truth=truth)


if __name__ == "__main__":
    run_script(main)
