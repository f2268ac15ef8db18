"""Training of the in-between transformer: CogVideoX between two images, along edges and warped noise.

    python train_ggi.py --weights full --dataset DL3DV-10K --captions captions.json --lora go_with_the_flow.safetensors
    accelerate launch --config_file configs/fsdp.yaml --num_processes 8 train_ggi.py …    # or configs/ddp.yaml
    python train_ggi.py --weights tiny --dataset synthetic --from_scratch
    python -m torch.distributed.run --nproc_per_node 2 train_ggi.py --weights tiny …      # two processes on a CPU

Clips are encoded once, into --cache_dir. Writes RUN/checkpoint-<step>/transformer/, which `ggi.py --model_path RUN
--epoch STEP` loads, loss curves, and sample sheets in RUN/samples. The same command continues an interrupted run, to
the same weights as an uninterrupted one. Layout of a dataset folder: utils/data/clips.py.
"""

import argparse
import hashlib
from pathlib import Path

from models.flags import add_attention_flag, add_memory_flags, resolve_device
from models.precision import automatic_precision, report_precision, settle_precision
from models.runtime.training import FREE_SETTINGS, add_training_flags, fit, is_trained, training_settings
from models.weights import (
    GGI_STAGE,
    Preset,
    add_weight_flags,
    component_folder,
    load_preset,
    locate,
    require_same_weights,
    weight_hashes,
)
from utils.cli import InputError, Parser, heavy_imports, positive_int, require_writable, run_script, unit_float
from utils.data.clips import ClipSource, FolderClips
from utils.data.flow import FLOWS
from utils.edges import DETECTORS
from utils.files import read_json
from utils.layout import find_checkpoints
from utils.runs import Run, open_run

SYNTHETIC = "synthetic"
START = "cogvideox_transformer"
FOLDER_FLAGS = ("captions", "edges", "flow", "stride", "windows")  # of --dataset FOLDER alone
SHEET_CLIPS = 2


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, metavar="FOLDER|synthetic", help="folder of clips, or towns drawn on the fly")
    add("--clips", type=positive_int, help="clips of the synthetic dataset (default: 1000)")
    add("--captions", type=Path, metavar="FILE", help="JSON or CSV: id, caption of every clip (default: no captions)")
    add("--edges", choices=DETECTORS, help="edge detector (default: hed for full, lines for tiny weights)")
    add("--flow", choices=FLOWS, help="optical flow that carries the noise (default: dis)")
    add("--stride", type=positive_int, help="frames of the source per frame of a clip (default: 1)")
    add("--windows", type=positive_int, help="clips of 46 frames from each longer one, evenly spread (default: 1)")
    add("--init_from", type=Path, metavar="FOLDER", help="transformer to start from (default: the weights')")
    add("--from_scratch", action="store_true", help="start from random weights of that transformer's architecture")
    add("--lora", type=Path, metavar="FILE", help="LoRA that stays frozen inside and is merged into what is saved")
    add("--caption_dropout", type=unit_float, default=0.1, help="share of examples with an empty prompt")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="less memory, more time (full: on)")
    add("--cache_dir", type=Path, default=Path("cache/ggi"), help="folder of encoded clips")
    add("--output_dir", type=Path, default=Path("runs/ggi"), metavar="RUN", help="run folder")
    add("--overwrite", action="store_true", help="replace a run that was trained with other arguments")
    add_training_flags(
        parser,
        max_train_steps=1350,
        checkpointing_steps=450,
        sheet_steps=450,
        learning_rate=5e-5,
        gradient_accumulation_steps=4,
        ema_decay=0.0,
        beta2=0.95,
        weight_decay=1e-4,
    )
    add_attention_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, GGI_STAGE)
    return parser.parse_args()


def open_dataset(args: argparse.Namespace, preset: Preset) -> ClipSource:
    """The clips. Raises InputError when they are not usable, or a flag belongs to the other kind of dataset."""
    wrong = FOLDER_FLAGS if args.dataset == SYNTHETIC else ("clips",)
    if given := [name for name in wrong if getattr(args, name) is not None]:
        raise InputError(f"--{given[0]} does not go with --dataset {args.dataset}")
    if args.dataset == SYNTHETIC:
        from synthetic.clips import SIZE, SyntheticClips

        if preset.video_size != SIZE:
            raise InputError(
                f"--dataset synthetic has clips of {SIZE}, --weights {args.weights} needs {preset.video_size}"
            )
        return SyntheticClips(args.clips or 1000)
    return FolderClips(
        Path(args.dataset),
        preset.video_size,
        captions=args.captions,
        edges=args.edges or preset.edges,
        flow=args.flow or "dis",
        stride=args.stride or 1,
        windows=args.windows or 1,
    )


def find_start(args: argparse.Namespace, preset: Preset) -> Path:
    """Folder of the start weights."""
    folder = args.init_from or component_folder(START, locate(args, preset, [START])[START])
    if not (folder / "config.json").is_file() or not (args.from_scratch or any(folder.glob("*.safetensors"))):
        raise InputError(f"{folder} holds no transformer: expected config.json and *.safetensors")
    return folder


def result_arguments(args: argparse.Namespace, source: ClipSource) -> dict:
    """What decides the weights. How far and where to train does not, nor where data and results lie.

    Weights to start from count by their flags here and by their hashes in the manifest.
    """
    elsewhere = {"output_dir", "cache_dir", "overwrite", "device", "memory", "dataset", "clips"}
    elsewhere |= {"gradient_checkpointing"} | FREE_SETTINGS | set(FOLDER_FLAGS)
    chosen = {key: value for key, value in vars(args).items() if key not in elsewhere}
    names = "\n".join(source.name(i) for i in range(len(source)))
    return chosen | {
        "clips": source.identity() | {"count": len(source), "sha256": hashlib.sha256(names.encode()).hexdigest()}
    }


def main() -> None:
    args = parse_args()
    preset = load_preset(args.weights)
    args.dtype = preset.dtype if args.dtype == "auto" else args.dtype  # of what is saved: alike on every machine
    source = open_dataset(args, preset)
    if args.lora and not args.lora.is_file():
        raise InputError(f"--lora {args.lora} does not exist")
    require_writable(args.cache_dir)
    device = resolve_device(args.device)
    if ":" in device:
        raise InputError(f"--device {device}: choose GPUs by `accelerate launch --gpu_ids …` and pass --device cuda")
    automatic = automatic_precision(args, preset.dtype, device)
    run = open_run(args.output_dir, result_arguments(args, source), overwrite=args.overwrite, automatic=automatic)
    if args.cache_dir.resolve().is_relative_to(args.output_dir.resolve()):
        raise InputError(f"--cache_dir {args.cache_dir} lies in --output_dir: a cache outlives runs")
    settle_precision(args, [run])
    if is_trained(run, training_settings(args)):
        require_same_weights(run, args, preset, GGI_STAGE)
        if not run.finished:  # it was stopped after its last checkpoint
            run.finish(steps=args.max_train_steps)
        print(f"{run.folder} is finished; raise --max_train_steps to train on")
        return
    paths = locate(args, preset, GGI_STAGE) | {"start": find_start(args, preset)}
    train(args, preset, source, run, paths, device)


def train(
    args: argparse.Namespace, preset: Preset, source: ClipSource, run: Run, paths: dict[str, Path], device: str
) -> None:
    with heavy_imports():
        from diffusers import CogVideoXDDIMScheduler

        from models.inbetween import training as training
        from models.loading.networks import DTYPES
        from models.runtime.memory import lossy, naming_smaller_mode
        from models.runtime.parallel import open_processes
        from models.runtime.sharding import require_shardable, sharding_wanted
        from models.runtime.speed import attention_kernel, require_attention

    autocast, dtype = autocast_dtype(args), DTYPES[args.dtype]
    require_shardable(args.memory, args.mixed_precision)
    config = read_json(paths["start"] / "config.json")
    training.check_start(config, preset.video_size, preset.num_frames)
    lora = training.read_frozen_lora(args.lora, config) if args.lora else None
    process, _ = open_processes(device)
    require_attention(args.attention, str(process.device), autocast or DTYPES["float32"])
    weights = weight_hashes(paths | ({"lora": args.lora} if lora else {}))
    cache = open_cache(args, preset, source, paths, weights, config["max_text_seq_length"])
    missing = cache.missing_clips(process.process_index, process.num_processes)
    mode, kept = settle_training(args, preset, paths, config, lora, missing, process)
    report_precision(args)
    weights |= lossy(kept)
    run.require_begun_with(weights)
    fill_cache(args, preset, source, paths, cache, missing, config["max_text_seq_length"], process)

    if args.from_scratch:
        transformer = training.new_transformer(config, args.seed)
    else:
        transformer = training.load_start(paths["start"])
    if lora:
        training.add_frozen_lora(transformer, lora, dtype if autocast else DTYPES["float32"])
    if checkpoints_gradients(args):
        transformer.enable_gradient_checkpointing()
    scheduler = CogVideoXDDIMScheduler.from_pretrained(
        paths["cogvideox_text"], subfolder="scheduler", local_files_only=True
    )

    def draw(step_seed, items):
        return training.draw_batch(cache, step_seed, items, args.caption_dropout, len(scheduler.alphas_cumprod))

    def sheet():
        vae = load_video_vae(args, preset, paths, process.device)  # for the moment: it needs memory
        numbers = range(min(SHEET_CLIPS, len(cache)))
        return training.paint_sheet(transformer, vae, scheduler, cache, numbers, autocast)

    with attention_kernel(args.attention), naming_smaller_mode("training", mode, sharded=sharding_wanted()):
        fit(
            run,
            training.InbetweenObjective(transformer, scheduler),
            training_settings(args),
            draw,
            lambda folder: training.save_transformer(transformer, folder / "transformer", dtype),
            sheet,
            device=device,
            weights=weights,
            moments=kept["optimizer"],
        )
    if process.is_main_process:
        print(find_checkpoints(run.folder)[args.max_train_steps])


def checkpoints_gradients(args: argparse.Namespace) -> bool:
    return args.weights == "full" if args.gradient_checkpointing is None else args.gradient_checkpointing


def settle_training(
    args, preset: Preset, paths: dict[str, Path], config: dict, lora: dict | None, missing: list[int], process
) -> tuple[str, dict[str, str]]:
    """The memory mode, and {"optimizer": how its moments are kept}. missing: clips that this process will encode."""
    from benchmarks.memory.training_plan import TrainingSetup, plan_training, trained_builder
    from models.inbetween.training import lora_ranks
    from models.loading.networks import DTYPES
    from models.runtime.memory import settle_memory
    from models.runtime.parallel import in_any_process
    from models.runtime.sharding import sharding_wanted

    device, autocast = str(process.device), autocast_dtype(args)
    setup = TrainingSetup(
        size=preset.video_size,
        num_frames=preset.num_frames,
        batch=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        checkpointing=checkpoints_gradients(args),
        autocast=autocast,
        ema_decay=args.ema_decay,
        dtype=DTYPES[args.dtype],
        tiling=preset.vae_tiling,
        encoding=in_any_process(bool(missing), process.device),
        processes=process.num_processes,
        sharded=sharding_wanted(),
    )
    build = trained_builder(config, lora_ranks(lora or {}), DTYPES[args.dtype if autocast else "float32"])
    plan = plan_training(paths, build, setup, device)
    if setup.sharded:
        plan = {"full": plan["full"]}
    return settle_memory("training", plan, args.memory, device)


def open_cache(args, preset: Preset, source: ClipSource, paths: dict[str, Path], weights: dict, length: int):
    """The ClipCache of these clips and networks. weights: hashes of the networks. length: tokens of a caption."""
    from models.inbetween.clip_cache import ClipCache

    precision = {"dtype": args.dtype, "mixed_precision": args.mixed_precision}
    vae_config = read_json(component_folder("cogvideox_vae", paths["cogvideox_vae"]) / "config.json")
    identity = {"vae": weights["cogvideox_vae"], "scale": vae_config["scaling_factor"], "size": preset.video_size}
    text_identity = {"text": weights["cogvideox_text"], "tokens": length, "dtype": args.dtype}
    return ClipCache(args.cache_dir, source, identity | precision, text_identity)


def fill_cache(
    args, preset: Preset, source: ClipSource, paths: dict[str, Path], cache, missing: list[int], length: int, process
) -> None:
    """Encode what is not encoded yet: clips by all processes, captions by the first. Networks are freed again.

    missing: clips that this process encodes. length: tokens of a caption.
    """
    from models.inbetween.clip_cache import ClipEncoder
    from models.inbetween.pipeline import encode_video_prompts
    from models.loading.networks import DTYPES

    if missing and process.is_local_main_process:
        source.prepare()
    process.wait_for_everyone()
    if missing:
        vae = load_video_vae(args, preset, paths, process.device)
        encoder = ClipEncoder(vae, preset.video_size, preset.num_frames, autocast_dtype(args))
        cache.add_clips(missing, encoder.encode, quiet=not process.is_main_process)
        del vae, encoder
    process.wait_for_everyone()
    if process.is_main_process and (texts := cache.missing_texts()):
        device, dtype = process.device, DTYPES[args.dtype]
        cache.add_texts(encode_video_prompts(paths["cogvideox_text"], texts, device, dtype, length))
    process.wait_for_everyone()


def load_video_vae(args: argparse.Namespace, preset: Preset, paths: dict[str, Path], device):
    from diffusers import AutoencoderKLCogVideoX

    from models.loading.networks import DTYPES, load_model

    vae = load_model("cogvideox_vae", AutoencoderKLCogVideoX, paths["cogvideox_vae"], DTYPES[args.dtype]).to(device)
    if preset.vae_tiling:
        vae.enable_tiling()
    return vae


def autocast_dtype(args: argparse.Namespace):
    """torch.bfloat16 for --mixed_precision bf16, else None."""
    import torch

    return torch.bfloat16 if args.mixed_precision == "bf16" else None


if __name__ == "__main__":
    run_script(main)
