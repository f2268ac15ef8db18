"""Bad input: exit code 2 and one line that says what is wrong, before any model is loaded or anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.lora import lora_targets
from models.weights import WEIGHTS, load_preset
from tests.helpers import ALIGN, ANCHORS, DATA, GGI, call, run, write_picture
from tests.scenes import make_scene
from utils.runs import read_json

Refuse = Callable[..., None]
FORBIDDEN = ("load_flux", "load_inbetween", "encode_flux_prompts", "encode_video_prompts", "caption_image")


def write_lora(folder: Path, rank: int = 4, hidden: int | None = None) -> None:
    """A LoRA of random values for the tiny weights, or for a model of another width, as a training run leaves it."""
    load_preset("tiny")
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name, part in (("lora", "flux/transformer"), ("controlnet.lora", "controlnet")):
        config = read_json(WEIGHTS / "tiny" / part / "config.json")
        if hidden:
            config["attention_head_dim"] = hidden // config["num_attention_heads"]
        factors = {}
        for target, (features, out) in lora_targets(config).items():
            key = reference_key(target)
            factors[f"{key}.down.weight"] = torch.randn(rank, features, generator=generator)
            factors[f"{key}.up.weight"] = torch.randn(out, rank, generator=generator)
        save_file({key: value.bfloat16() for key, value in factors.items()}, folder / f"{name}.safetensors")


def reference_key(target: str) -> str:
    """transformer_blocks.0.attn.to_qkv -> double_blocks.0.processor.qkv_lora1, and so on."""
    block, number, *rest = target.split(".")
    names = {"attn.to_qkv": "qkv_lora", "proj_out": "proj_lora"}
    if block == "transformer_blocks":
        block = "double_blocks"
        names = {
            "attn.to_qkv": "qkv_lora1",
            "attn.to_out.0": "proj_lora1",
            "attn.to_added_qkv": "qkv_lora2",
            "attn.to_add_out": "proj_lora2",
        }
    return f"{block.removesuffix('_blocks').removeprefix('single_transformer') or 'single'}_blocks.{number}".replace(
        "double_blocks_blocks", "double_blocks"
    ) + f".processor.{names['.'.join(rest)]}"
