"""Write random weights in the layout of the real ones, so that the scripts themselves run at full size.

    python -m benchmarks.random_weights --output random
    python ggi.py --weights full --cogvideox random/cogvideox --model_path random …

Speed and memory do not depend on values. Networks are built from configs/full; tokenizers and schedulers, which weigh
nothing, are the tiny weights'. 50 GB in bfloat16: FLUX, its ControlNet, T5 twice, CogVideoX and its autoencoder.
"""

import argparse
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.full_size import random_values
from benchmarks.setup import setup_of
from models.weights import EPOCH, WEIGHTS
from utils.cli import Parser, heavy_imports, require_writable, run_script
from utils.files import atomic_path
from utils.layout import ggi_transformer_folder

PIPELINES = ("flux", "cogvideox")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m benchmarks.random_weights")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--weights", choices=["full", "tiny"], default="full", help="sizes of the networks")
    return parser.parse_args(argv)


def network_builders(weights: str) -> dict[Path, Callable]:
    """{folder in the output: function that builds its network}."""
    from benchmarks.memory.plans import FLUX_ENCODERS, VIDEO_ENCODERS, encoder_builder, flux_builders, video_builders

    setup = setup_of(weights)
    flux, video = flux_builders(setup.paths), video_builders(setup.paths["cogvideox_vae"], setup.inbetween)
    builders = {Path("controlnet"): flux.pop("controlnet"), Path("cogvideox/vae"): video["vae"]}
    builders |= {Path("flux") / name: build for name, build in flux.items()}
    builders[ggi_transformer_folder(Path(), EPOCH)] = video["transformer"]
    for pipeline, encoders in zip(PIPELINES, (FLUX_ENCODERS, VIDEO_ENCODERS), strict=True):
        folder = setup.paths[f"{pipeline}_text"]
        builders |= {Path(pipeline) / name: encoder_builder(folder, name, cls) for name, cls in encoders.items()}
    return builders


def copy_small_parts(folder: Path) -> None:
    """Copy tokenizers, schedulers and the pipelines' indices of the tiny weights."""
    for pipeline in PIPELINES:
        source = WEIGHTS / "tiny" / pipeline
        for part in ("scheduler", "tokenizer", "tokenizer_2"):
            if (source / part).exists():
                shutil.copytree(source / part, folder / pipeline / part)
        shutil.copy(source / "model_index.json", folder / pipeline)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output.exists():
        print(f"{args.output} is there already")
        return
    require_writable(args.output)
    with heavy_imports():
        import torch

        from benchmarks.memory.counting import empty_model, materialize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = functools.partial(random_values, device, "cpu")
    with atomic_path(args.output) as folder:
        folder.mkdir()
        copy_small_parts(folder)
        for part, build in network_builders(args.weights).items():
            materialize(empty_model(build, torch.bfloat16), new).save_pretrained(folder / part)
            print(part, flush=True)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
