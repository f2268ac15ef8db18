"""Count what each stage holds on a GPU, and write the table that the scripts look up: checkpoints/NAME/memory.json.

    python -m benchmarks.memory
    python -m benchmarks.memory --weights tiny

It counts from configurations alone and takes a minute or two on any machine, without weights and without a GPU.
"""

import argparse
from collections.abc import Sequence

from models.weights import WEIGHTS
from utils.cli import Parser, run_script
from utils.files import write_json

STAGES = ("alignment", "anchors", "ggi", "training")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m benchmarks.memory")
    parser.add_argument("--weights", choices=["full", "tiny", "wan_vace"], default="full", help="which networks")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    from benchmarks.memory.table import count_stage
    from benchmarks.memory.wan import count_wan
    from models.runtime.memory import PLAN_FILE

    path, wan = WEIGHTS / args.weights / PLAN_FILE, args.weights == "wan_vace"
    write_json(path, count_wan() if wan else {stage: count_stage(args.weights, stage) for stage in STAGES})
    print(path)


if __name__ == "__main__":
    run_script(main)
