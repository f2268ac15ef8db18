"""Put trained tiny networks together as a weight set: what `--weights tiny` loads.

    python -m synthetic.assemble --video_vae runs/video_vae/checkpoint-4000 --output runs/start
    python -m synthetic.assemble --base runs/start --image runs/image/checkpoint-20000 \\
        --inbetween runs/ggi/checkpoint-8000 --output checkpoints/tiny --overwrite

A part that is not given comes from --base, or is random without it. The text encoder of the video model is never
trained, so the base must be the weight set that the in-between transformer was trained on. All is stored in bfloat16.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils.cli import InputError, Parser, require_writable, run_script
from utils.files import atomic_path, write_json

PARTS = {
    "image": ("flux", "controlnet"),
    "video_vae": ("vae",),
    "inbetween": ("transformer",),
    "base": ("flux", "controlnet", "cogvideox"),
}
CHECKPOINT, GIVEN = "a checkpoint-<step> folder of its training", {"base": "a weight set"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.assemble")
    parser.add_argument("--image", type=Path, metavar="CHECKPOINT", help="of `synthetic.train image`")
    parser.add_argument("--video_vae", type=Path, metavar="CHECKPOINT", help="of `synthetic.train video-vae`")
    parser.add_argument("--inbetween", type=Path, metavar="CHECKPOINT", help="of train_ggi.py")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="weight set that has the other parts")
    parser.add_argument("--output", type=Path, default=Path("checkpoints/tiny"), help="weight set to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the weight set that is there, all of it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    for name, parts in PARTS.items():
        folder = getattr(args, name)
        if folder and (missing := [part for part in parts if not (folder / part).is_dir()]):
            raise InputError(f"--{name} {folder} holds no {missing[0]}: give {GIVEN.get(name, CHECKPOINT)}")
    if args.output.exists() and not args.overwrite:
        raise InputError(f"{args.output} exists already; pass --overwrite to replace it")
    require_writable(args.output)
    assemble(args.image, args.video_vae, args.inbetween, args.base, args.output)
    print(args.output)


def assemble(
    image: Path | None, video_vae: Path | None, inbetween: Path | None, base: Path | None, output: Path
) -> None:
    """Write the weight set, atomically; None takes the part of `base`, or random weights."""
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
    flux_from = image or base
    local = {"torch_dtype": torch.bfloat16, "local_files_only": True}
    flux = FluxPipeline.from_pretrained(flux_from / "flux", **local) if flux_from else tiny_models.flux_pipeline()
    control = (
        FluxControlNetModel.from_pretrained(flux_from / "controlnet", **local)
        if flux_from
        else tiny_models.controlnet()
    )
    torch.manual_seed(0)  # the same random parts, however many numbers were drawn before
    video = (
        CogVideoXImageToVideoPipeline.from_pretrained(base / "cogvideox", **local)
        if base
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
