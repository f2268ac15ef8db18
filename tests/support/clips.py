"""Training clips for tests, and arguments of a training on them (fixture `dataset`: conftest.py)."""

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from utils.images import write_image, write_video

TRAIN = "train_ggi"
CAPTIONS = {"town/a": "a wall in motion", "b": "a second wall"}
QUICK = ("--gradient_accumulation_steps", 1, "--warmup_steps", 0, "--learning_rate", 1e-3, "--sheet_steps", 1000)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def moving(count: int, width: int, height: int, seed: int, pan: float = 1.6) -> list[np.ndarray]:
    """Frames uint8 [height, width, 3] of a textured wall that a camera passes, `pan` pixels per frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6, (width + 200) // 6, 3), dtype=np.uint8)
    wall = cv2.resize(coarse, (width + 200, height), interpolation=cv2.INTER_CUBIC)
    shifts = (np.float32([[1, 0, -pan * i], [0, 1, 0]]) for i in range(count))
    return [cv2.warpAffine(wall, shift, (width, height), flags=cv2.INTER_CUBIC) for shift in shifts]


def make_dataset(folder: Path) -> Path:
    """One clip of 50 pictures in DL3DV's layout, and a video of 47 frames; captions of both beside the folder."""
    for i, frame in enumerate(moving(50, 160, 100, seed=0)):
        write_image(folder / "town" / "a" / "images_2" / f"frame_{i + 1}.png", frame)
    write_video(folder / "b.mp4", moving(47, 144, 112, seed=1), fps=12)
    folder.with_suffix(".json").write_text(json.dumps(CAPTIONS))
    return folder


def arguments(dataset: Path, folder: Path, steps: int, *more: object) -> tuple:
    """Arguments that train into folder/run, with a checkpoint every two steps; the cache lies beside the dataset."""
    captions, cache = dataset.with_suffix(".json"), dataset.with_name("cache")
    places = ("--output_dir", folder / "run", "--cache_dir", cache, "--dataset", dataset, "--captions", captions)
    return (*places, *QUICK, "--max_train_steps", steps, "--checkpointing_steps", 2, *more)


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / f"checkpoint-{step}" / "transformer" / WEIGHTS)


def write_lora(path: Path, transformer: CogVideoXTransformer3DModel, rank: int = 3, **more: torch.Tensor) -> Path:
    """A random LoRA on the first block's queries and output, as diffusers' trainers name it."""
    torch.manual_seed(1)
    width, state = transformer.transformer_blocks[0].attn1.to_q.in_features, {}
    for name in ("to_q", "to_out.0"):
        state[f"transformer.transformer_blocks.0.attn1.{name}.lora_A.weight"] = torch.randn(rank, width)
        state[f"transformer.transformer_blocks.0.attn1.{name}.lora_B.weight"] = torch.randn(width, rank)
    save_file(state | more, path)
    return path
