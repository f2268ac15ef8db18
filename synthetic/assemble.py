"""Put trained tiny networks together as a weight set: what `--weights tiny` loads.

    python -m synthetic.assemble --image runs/image/checkpoint-20000 --video_vae runs/video_vae/checkpoint-4000 \\
        --inbetween runs/ggi/checkpoint-8000 --output checkpoints/tiny --overwrite

A part that is not given stays as it is in --output, or is random when there is none yet: so does the text encoder of
the video model, which is never trained. Everything is stored in bfloat16.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.cli import InputError, Parser, require_writable, run_script
from utils.runs import atomic_path, write_json


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.assemble")
    parser.add_argument("--image", type=Path, metavar="CHECKPOINT", help="of `synthetic.train image`")
    parser.add_argument("--video_vae", type=Path, metavar="CHECKPOINT", help="of `synthetic.train video-vae`")
    parser.add_argument("--inbetween", type=Path, metavar="CHECKPOINT", help="of train_ggi.py")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/tiny"), help="weight set to write")
    parser.add_argument("--overwrite", action="store_true", help="replace parts of a weight set that exists")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    for name, part in (("image", "flux"), ("video_vae", "vae"), ("inbetween", "transformer")):
        folder = getattr(args, name)
        if folder and not (folder / part).is_dir():
            raise InputError(f"--{name} {folder} holds no {part}: give a checkpoint-<step> folder of its training")
    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output} exists already; pass --overwrite to replace parts of it")
    require_writable(args.output)
    assemble(args.image, args.video_vae, args.inbetween, args.output)
    print(args.output)


def assemble(image: Path | None, video_vae: Path | None, inbetween: Path | None, output: Path) -> None:
    """Write the weight set, whole or not at all; None takes what is in `output`, or random weights."""
    import torch
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
        FluxControlNetModel,
        FluxPipeline,
    )

    from synthetic import tiny_models

    torch.manual_seed(0)
    before = output if output.exists() else None
    flux_from = image or before
    local = {"torch_dtype": torch.bfloat16, "local_files_only": True}
    flux = FluxPipeline.from_pretrained(flux_from / "flux", **local) if flux_from else tiny_models.flux_pipeline()
    control = (
        FluxControlNetModel.from_pretrained(flux_from / "controlnet", **local)
        if flux_from
        else tiny_models.controlnet()
    )
    video = (
        CogVideoXImageToVideoPipeline.from_pretrained(before / "cogvideox", **local)
        if before
        else tiny_models.cogvideox_pipeline()
    )
    if video_vae:
        video.vae = AutoencoderKLCogVideoX.from_pretrained(video_vae / "vae", **local)
    if inbetween:
        video.transformer = CogVideoXTransformer3DModel.from_pretrained(inbetween / "transformer", **local)
    with atomic_path(output) as folder:
        for name, part in (("flux", flux), ("controlnet", control), ("cogvideox", video)):
            part.to(torch.bfloat16).save_pretrained(folder / name)
        write_json(folder / "preset.json", tiny_models.PRESET)


if __name__ == "__main__":
    run_script(main)
