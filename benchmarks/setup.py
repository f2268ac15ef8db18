"""Configurations and sizes of a weight set, for the benchmarks."""

import argparse
import dataclasses
from pathlib import Path

from models.weights import FLUX_STAGE, GGI_STAGE, ROOT, load_preset, locate

RELEASED_RANK = 2048  # rank of the LoRA in the released in-between transformer
RELEASED_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # layers of every attention that the LoRA changes


@dataclasses.dataclass(frozen=True)
class Setup:
    """The networks to build. paths: folders with config.json. sizes: width, height in pixels."""

    paths: dict[str, Path]
    inbetween: Path
    anchor_size: tuple[int, int]
    crop: int
    video_size: tuple[int, int]
    num_frames: int
    text_length: int
    tiling: bool  # of the video VAE


def setup_of(weights: str) -> Setup:
    """Configurations of a weight set; those of the full one are in configs/full."""
    preset = load_preset(weights)
    if weights == "tiny":
        paths = locate(argparse.Namespace(), preset, (*FLUX_STAGE, *GGI_STAGE))
        inbetween, anchors = Path(preset.ggi_transformer), preset.image_size
    else:
        folder = ROOT / "configs" / "full"
        paths = {name: folder / name.split("_")[0] for name in (*FLUX_STAGE, *GGI_STAGE)}
        inbetween, anchors = folder / "inbetween", (1072, 720)
    return Setup(
        paths,
        inbetween,
        anchors,
        preset.resolution,
        preset.video_size,
        preset.num_frames,
        preset.max_sequence_length,
        preset.vae_tiling,
    )
