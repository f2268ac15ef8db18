"""Helpers that the tests of bad_input share."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.flux.lora import lora_targets
from models.loading.keymaps import lora_from_peft
from models.weights import WEIGHTS
from tests.support.helpers import ALIGN, ANCHORS, GGI
from utils.files import read_json

Refuse = Callable[..., None]


def write_lora(folder: Path, rank: int = 4, **other: int) -> None:
    """Write a LoRA of zeros for the tiny weights, or for models with `other` values in their config."""
    folder.mkdir(parents=True)
    for name, part in (("lora", "flux/transformer"), ("controlnet.lora", "controlnet")):
        config = read_json(WEIGHTS / "tiny" / part / "config.json") | other
        state = {}
        for target, (features, out) in lora_targets(config).items():
            state[f"{target}.lora_A.weight"] = torch.zeros(rank, features)
            state[f"{target}.lora_B.weight"] = torch.zeros(out, rank)
        save_file(lora_from_peft(state), folder / f"{name}.safetensors")


def names(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def anchors(scene: Path, loras: Path, *arguments: object) -> tuple:
    return (ANCHORS, "--target", scene, "--pfix", "town", "--loras", loras, "--seed", 1, *arguments)


def video(scene: Path, views: Path, *arguments: object) -> tuple:
    return (GGI, "--target", views, "--scene", scene, "--prompt", "a town", *arguments)


def align(picture: Path, *arguments: object) -> tuple:
    return (ALIGN, "--path_image", picture, "--pfix", "new", "--output_dir", picture.parent / "out", *arguments)
