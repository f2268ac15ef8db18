"""Train the tiny networks on the synthetic world: their autoencoders, and FLUX with its ControlNet and text encoders.

    python -m synthetic.train vae --output_dir runs/vae
    python -m synthetic.train video-vae --image_vae runs/vae/checkpoint-6000/vae --output_dir runs/video_vae
    python -m synthetic.train image --vae runs/vae/checkpoint-6000/vae --output_dir runs/image
    accelerate launch --num_processes 2 -m synthetic.train image …

Every run writes checkpoint-<step>/ folders with averaged weights in diffusers' format, loss.csv, TensorBoard curves
and sample sheets; the same command continues an interrupted run. `--init_from` starts from earlier weights instead.
The in-between transformer has its own trainer, train_ggi.py. `make tiny-weights` runs all of it.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from models.flags import resolve_launched_device
from models.precision import automatic_precision, report_precision, settle_precision
from models.settings import TrainSettings
from synthetic.pictures import load_towns
from utils.cli import (
    Arguments,
    InputError,
    Parser,
    add_settings,
    non_negative_float,
    positive_int,
    run_script,
    settings_of,
    unit_float,
)
from utils.files import file_sha256, read_json
from utils.runs import open_run

STAGES = ("vae", "image", "video-vae")
START = {  # (stage, flag) -> {part of the folder that the flag names: its class}
    ("vae", "init_from"): {"vae": "AutoencoderKL"},
    ("video-vae", "init_from"): {"vae": "AutoencoderKLCogVideoX"},
    ("video-vae", "image_vae"): {"": "AutoencoderKL"},
    ("image", "init_from"): {"flux": "FluxPipeline", "controlnet": "FluxControlNetModel"},
    ("image", "vae"): {"": "AutoencoderKL"},
}
DEFAULTS = {
    "vae": {"learning_rate": 1.5e-3, "train_batch_size": 8, "warmup_steps": 200, "decay_steps": 2000},
    "video-vae": {"learning_rate": 6e-4, "warmup_steps": 50, "decay_steps": 600, "ema_decay": 0.995},
    "image": {"learning_rate": 1e-3, "train_batch_size": 16, "warmup_steps": 300, "decay_steps": 2500},
}
SEGMENT = 9  # frames of a training sample of the video autoencoder
HELD_OUT, HELD_OUT_CLIPS = ("validation", 8), ("validation", 3)  # towns and clips on a sample sheet


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    parser = Parser(__doc__, "python -m synthetic.train")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="vae|image|video-vae")
    for stage in STAGES:
        sub = stages.add_parser(stage, help=f"train {stage}", doc=f"Train {stage}.")
        add, where = sub.add_argument, functools.partial(sub.add_argument, decides=False)
        where("--output_dir", type=Path, required=True, help="run folder")
        add("--init_from", type=Path, metavar="FOLDER", help="folder of weights to start from, as a checkpoint has it")
        if stage == "video-vae":
            add("--clips", type=positive_int, default=400, help="clips of the training split, drawn once and cached")
        else:
            add("--towns", type=positive_int, default=1250, help="towns of the training split, drawn once and cached")
        cache = Path("cache") / ("clips" if stage == "video-vae" else "pictures")
        where("--cache_dir", type=Path, default=cache, help="folder of the cache")
        where("--device", default="auto", help="auto, cpu or cuda; auto takes a GPU if there is one")
        where("--overwrite", action="store_true", help="replace a run that was trained with other arguments")
        if stage != "image":
            add("--decoder_only", action="store_true", help="keep the latents as they are, for networks built on them")
        if stage == "video-vae":
            add("--image_vae", type=Path, metavar="FOLDER", help="trained image autoencoder to start from")
            add("--edge_share", type=unit_float, default=0.3, help="share of samples that are edges; GGI encodes both")
            add("--sharpness", type=non_negative_float, default=0.0, help="added weight of errors in outlines")
            add("--motion", type=non_negative_float, default=0.0, help="added weight of errors in changes over time")
        if stage == "image":
            add("--vae", type=Path, required=True, metavar="FOLDER", help="trained image autoencoder")
            add("--caption_dropout", type=unit_float, default=0.4, help="share of pictures with an empty prompt")
        regularisation = {"beta2": 0.99, "weight_decay": 0.01 if stage == "image" else 0.0}
        add_settings(sub, TrainSettings, **regularisation, **DEFAULTS[stage])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    weights = start_weights(args)
    if getattr(args, "decoder_only", False) and not args.init_from:
        raise InputError("--decoder_only goes on from weights that exist: pass --init_from")
    if getattr(args, "image_vae", None) and args.init_from:
        raise InputError("--image_vae and --init_from both say what to start from: pass one of them")
    args.device = resolve_launched_device(args.device)
    run = open_run(
        args.output_dir,
        args.identity(),
        overwrite=args.overwrite,
        automatic=automatic_precision(args, "float32", args.device),
        defaults=args.defaults(),
    )
    settle_precision(args, [run])
    if run.trained_steps >= args.max_train_steps:
        if not run.finished:  # it was stopped after its last checkpoint
            run.finish(steps=args.max_train_steps)
        print(f"{run.folder} is finished; raise --max_train_steps to train on")
        return
    run.require_begun_with(weights)

    from accelerate import PartialState

    from models.runtime.training import fit

    process = PartialState(cpu=args.device == "cpu")
    train = {"vae": train_vae, "video-vae": train_video_vae, "image": train_image}[args.stage]

    def fit_run(training, settings: TrainSettings) -> None:
        report_precision(args)
        fit(run, training, settings, device=args.device, weights=weights)

    train(args, process, fit_run)
    if process.is_main_process:
        print(run.folder / f"checkpoint-{args.max_train_steps}")


def start_weights(args: Arguments) -> dict[str, dict[str, str]]:
    """{flag: {file: sha256}} of what the training starts from. Raises InputError unless all of it is there."""
    hashes = {}
    for (stage, flag), parts in START.items():
        if stage == args.stage and (folder := getattr(args, flag)):
            files = [file for name, kind in parts.items() for file in weight_files(flag, folder / name, kind)]
            hashes[flag] = {str(file.relative_to(folder)): file_sha256(file) for file in files}
    return hashes


def weight_files(flag: str, folder: Path, kind: str) -> list[Path]:
    """The weights of a model or pipeline of class `kind`. Raises InputError when the folder holds something else."""
    config = folder / ("model_index.json" if kind.endswith("Pipeline") else "config.json")
    files = sorted(folder.rglob("*.safetensors"))
    if not config.is_file() or read_json(config).get("_class_name") != kind or not files:
        raise InputError(f"--{flag}: {folder} is not a folder of weights, or not of {kind}")
    return files


def train_vae(args: Arguments, process, fit_run: Callable) -> None:
    import torch
    from diffusers import AutoencoderKL

    from models.latents import to_signed
    from models.runtime.training import Training
    from synthetic.tiny_models import image_vae
    from synthetic.training import vae as training

    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.init_from / "vae") if args.init_from else image_vae()
    vae.encoder.requires_grad_(not args.decoder_only)
    vae.to(memory_format=torch.channels_last)  # a third faster
    with process.local_main_process_first():  # it draws what is missing
        towns, held_out = (load_towns(split, n, args.cache_dir) for split, n in (("train", args.towns), HELD_OUT))
    draw = training.draw_pictures(towns)
    shown = np.array([town.images[i % len(town.images), 0] for i, town in enumerate(held_out)])

    def save(folder: Path) -> None:
        if not args.decoder_only:
            batches = (draw((1, k), range(16))["pixels"] for k in range(training.STATISTICS // 16))
            mean, std = training.latent_statistics(vae, batches)
            vae.register_to_config(scaling_factor=1 / std, shift_factor=mean)
        copy.deepcopy(vae).to(torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(folder / "vae")

    def sheet() -> np.ndarray:
        return training.reconstruction_sheet(shown, training.reconstruct(vae, to_signed(shown)))

    fit_run(Training(training.ReconstructionObjective(vae), draw, save, sheet), settings_of(TrainSettings, args))


def train_video_vae(args: Arguments, process, fit_run: Callable) -> None:
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLCogVideoX

    from models.latents import to_signed
    from models.runtime.training import Training
    from synthetic.tiny_models import video_vae
    from synthetic.training import vae as training
    from synthetic.training.inflate import inflate

    torch.manual_seed(args.seed)
    vae = AutoencoderKLCogVideoX.from_pretrained(args.init_from / "vae") if args.init_from else video_vae()
    if args.image_vae:
        try:
            inflate(AutoencoderKL.from_pretrained(args.image_vae), vae)
        except ValueError as error:
            raise InputError(f"--image_vae {args.image_vae} has another architecture: {error}") from error
    vae.encoder.requires_grad_(not args.decoder_only)
    for part in vae.modules():  # a quarter faster
        if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d):
            is_2d = isinstance(part, torch.nn.Conv2d)
            part.to(memory_format=torch.channels_last if is_2d else torch.channels_last_3d)
    with process.local_main_process_first():  # it draws what is missing
        videos, held_out = (
            load_videos(split, n, args.cache_dir) for split, n in (("train", args.clips), HELD_OUT_CLIPS)
        )
    draw = training.draw_segments(videos, SEGMENT, args.edge_share)
    objective = training.ReconstructionObjective(vae, args.sharpness, args.motion)
    shown = np.array([video[:SEGMENT] for pair in held_out for video in training.video_and_edges(pair)])

    def save(folder: Path) -> None:
        if not args.decoder_only:
            _, std = training.latent_statistics(vae, (draw((1, k), range(4))["pixels"] for k in range(16)))
            vae.register_to_config(scaling_factor=1 / std)
        copy.deepcopy(vae).to(torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(folder / "vae")

    def sheet() -> np.ndarray:
        output = training.reconstruct(vae, to_signed(shown).movedim(2, 1))
        return training.reconstruction_sheet(shown[:, -1], output[:, :, -1])

    fit_run(Training(objective, draw, save, sheet), settings_of(TrainSettings, args))


def load_videos(split: str, count: int, folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(frames, edges) of the first `count` drawn clips of a split, every style a video of its own."""
    from synthetic.clips import cached_clip, draw_clips

    draw_clips(split, count, folder)
    clips = (cached_clip(split, n, folder) for n in range(count))
    return [(frames, clip["edges"]) for clip in clips if clip for frames in clip["images"]]


def train_image(args: Arguments, process, fit_run: Callable) -> None:
    import torch
    from diffusers import AutoencoderKL, FluxControlNetModel, FluxPipeline
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from models.runtime.training import Training
    from synthetic.tiny_models import controlnet, flux_pipeline
    from synthetic.training import image as training

    torch.manual_seed(args.seed)
    if args.init_from:
        pipeline = FluxPipeline.from_pretrained(args.init_from / "flux", local_files_only=True)
        control = FluxControlNetModel.from_pretrained(args.init_from / "controlnet")
    else:
        pipeline, control = flux_pipeline(), controlnet()
    pipeline.vae = AutoencoderKL.from_pretrained(args.vae)
    objective = training.ImageObjective(pipeline, control, pipeline.vae.to(process.device))
    with process.local_main_process_first():  # it draws what is missing
        towns, held_out = (load_towns(split, n, args.cache_dir) for split, n in (("train", args.towns), HELD_OUT))
    edges = np.array([town.edges[i % len(town.edges)] for i, town in enumerate(held_out)])
    truth = np.array([town.images[i % len(town.images), 0] for i, town in enumerate(held_out)])
    captions = [town.captions[0] for town in held_out]

    def save(folder: Path) -> None:
        copy.deepcopy(pipeline).to(torch.bfloat16).save_pretrained(folder / "flux")
        copy.deepcopy(control).to(torch.bfloat16).save_pretrained(folder / "controlnet")

    def sheet() -> np.ndarray:
        """Rows: edges, true pictures, drawn with the caption, drawn with the empty prompt."""
        drawn = [training.sample_pictures(objective, edges, texts, 0) for texts in (captions, [""] * len(captions))]
        rows = [np.repeat(edges[..., None], 3, axis=-1), truth, *drawn]
        return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])

    draw = training.draw_captioned(towns, args.caption_dropout)
    plain = functools.partial(sdpa_kernel, SDPBackend.MATH)  # flash takes twice as long over 86 tokens on a CPU
    fit_run(Training(objective, draw, save, sheet, plain), settings_of(TrainSettings, args))


if __name__ == "__main__":
    run_script(main)
