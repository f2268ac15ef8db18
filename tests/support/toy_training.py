"""Fit a straight line to noisy points with the training loop `fit`: for its tests, also as a process.

    python -m tests.support.toy_training --output_dir runs/line --max_train_steps 6

The weights of a checkpoint are in line.safetensors. All processes and accumulation steps share one
batch: the points of a step depend on --points, their total number, and not on how they are divided.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from models.runtime.training import Draw, Training, fit
from models.settings import TrainSettings
from utils.cli import Arguments, Parser, add_settings, run_script, settings_of, unit_float
from utils.runs import open_run

INPUTS = 4
SLOPE = torch.tensor([0.5, -1.0, 2.0, 0.25])
WEIGHTS = "line.safetensors"
QUICK = {"mixed_precision": "no", "report_to": "none", "warmup_steps": 0, "learning_rate": 0.05, "sheet_steps": 2,
         "checkpointing_steps": 3, "max_train_steps": 6, "train_batch_size": 4}  # fmt: skip


class Line(nn.Module):
    """dropout: share of the inputs that are dropped, by the global random generator."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(5)
        self.line = nn.Linear(INPUTS, 1)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        error = self.line(self.drop(x))[:, 0] - y
        return {"loss": error.square().mean(), "bias": error.mean()}


def draw_points(part: int) -> Draw:
    """The points of one process; `part` is how many all processes draw together in one accumulated part."""

    def draw(step_seed: tuple[int, ...], items: Iterable[int]) -> dict:
        seed, step, micro = step_seed
        rngs = [np.random.default_rng([seed, step, micro * part + item]) for item in items]
        x = torch.tensor(np.array([rng.standard_normal(INPUTS) for rng in rngs]), dtype=torch.float32)
        fuzz = torch.tensor([rng.normal(0, 0.01) for rng in rngs], dtype=torch.float32)
        return {"x": x, "y": x @ SLOPE + 1 + fuzz}

    return draw


def parse_args(argv: Sequence[str] | None) -> Arguments:
    parser = Parser(__doc__, "python -m tests.support.toy_training")
    parser.add_argument("--output_dir", type=Path, required=True, decides=False, help="run folder")
    parser.add_argument("--points", type=int, help="points of one part, in all processes (default: the batch's)")
    parser.add_argument("--dropout", type=unit_float, default=0.0, help="share of inputs left out")
    add_settings(parser, TrainSettings, **QUICK)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, save: Callable[[Line, Path], None] | None = None) -> Line:
    args = parse_args(argv)
    run = open_run(args.output_dir, args.identity())
    objective = Line(args.dropout)
    draw = draw_points(args.points or args.train_batch_size)

    def write(folder: Path) -> None:
        weights = {name: tensor.detach().clone() for name, tensor in objective.line.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        if save:
            save(objective, folder)

    def sheet() -> np.ndarray:
        """Grey as bright as the first weight, which shows the weights that the sheet was drawn with."""
        level = int(objective.line.weight[0, 0].detach().clamp(-1, 1) * 127 + 128)
        return np.full((4, 4, 3), level, np.uint8)

    fit(run, Training(objective, draw, write, sheet), settings_of(TrainSettings, args))
    return objective


if __name__ == "__main__":
    run_script(main)
