"""The table of memory plans of a weight set: each stage with the script's default settings, on a GPU.

Where the memory depends on an argument, the table has the larger plan (docs/performance.md).
"""

from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.memory.plans import plan_alignment, plan_anchors, plan_ggi
from benchmarks.memory.training_plan import TrainingSetup, plan_training, trained_builder
from benchmarks.setup import RELEASED_LAYERS, RELEASED_RANK, setup_of
from models.runtime.memory import Plan
from models.runtime.runtime import DTYPES
from models.settings import AlignmentSettings
from models.weights import load_preset
from utils.files import read_json

DEVICE = "cuda"  # need not exist: nothing is computed
BRANCHES = 2  # branches of guidance in one batch
BF16 = torch.bfloat16  # --mixed_precision of both trainings


def count_stage(weights: str, stage: str) -> dict:
    """A stage's entry in the table. stage: alignment, anchors, ggi or training."""
    setup, preset = setup_of(weights), load_preset(weights)
    paths, length, dtype = setup.paths, setup.text_length, DTYPES[preset.dtype]
    size, frames = setup.video_size, setup.num_frames
    if stage == "alignment":
        plan = plan_alignment(paths, setup.crop, 1, AlignmentSettings.rank, length, BF16, DEVICE, autocast=BF16)
        return entry_of(plan, pixels=setup.crop**2, frames=1, batch=1)
    if stage == "anchors":
        size = setup.anchor_size
        plan = plan_anchors(paths, size, AlignmentSettings.rank, length, dtype, DEVICE, guided=True)
        return entry_of(plan, pixels=size[0] * size[1], frames=1, batch=BRANCHES)
    if stage == "ggi":
        tiling = preset.vae_tiling
        plan = plan_ggi(paths, setup.inbetween, size, frames, dtype, DEVICE, guided=True, tiling=tiling)
        return entry_of(plan, pixels=size[0] * size[1], frames=frames, batch=BRANCHES)
    plan = count_training(weights, paths, setup.inbetween)
    return entry_of(plan, pixels=size[0] * size[1], frames=frames, batch=1)


def entry_of(plan: Plan, *, pixels: int, frames: int, batch: int) -> dict:
    """A stage's entry in the table, as `look_up_plan` reads it."""
    modes = {mode: [asdict(phase) for phase in phases] for mode, phases in plan.items()}
    return {"pixels": pixels, "frames": frames, "batch": batch, "modes": modes}


def count_training(weights: str, paths: dict[str, Path], transformer: Path) -> Plan:
    """Plan the training. transformer: folder with its config.json. The full one has the released LoRA inside."""
    preset, config = load_preset(weights), read_json(transformer / "config.json")
    full = weights == "full"
    layers = [f"transformer_blocks.{i}.attn1.{name}" for i in range(config["num_layers"]) for name in RELEASED_LAYERS]
    setup = TrainingSetup(
        size=preset.video_size,
        num_frames=preset.num_frames,
        batch=1,
        accumulation=4,
        checkpointing=full,
        autocast=BF16,
        ema_decay=0.0,
        dtype=DTYPES[preset.dtype],
        tiling=preset.vae_tiling,
        encoding=True,
    )
    build = trained_builder(config, dict.fromkeys(layers if full else (), RELEASED_RANK), setup.dtype)
    return plan_training(paths, build, setup, DEVICE)
