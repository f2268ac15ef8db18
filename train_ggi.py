"""Training of the in-between transformer: CogVideoX between two images, guided by edges and warped noise.

    python train_ggi.py --weights full --dataset DL3DV-10K --captions captions.json --lora go_with_the_flow.safetensors
    accelerate launch --config_file configs/fsdp.yaml --num_processes 8 train_ggi.py …    # or configs/ddp.yaml
    python train_ggi.py --weights tiny --dataset synthetic --from_scratch
    python -m torch.distributed.run --nproc_per_node 2 train_ggi.py --weights tiny …      # two processes on a CPU
    python train_ggi.py --backbone wan_vace --lora_rank 32 --dataset DL3DV-10K            # a LoRA on Wan VACE

Clips are encoded once, into --cache_dir. Writes RUN/checkpoint-<step>/transformer/, which `ggi.py --model_path RUN
--epoch STEP` loads, loss curves, and sample sheets in RUN/samples. The same command continues an interrupted run, to
the same weights as an uninterrupted one. For Wan VACE it writes RUN/checkpoint-<step>/lora.safetensors, for `ggi.py
--backbone wan_vace --lora FILE`. Layout of a dataset folder: utils/data/clips.py.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from models.flags import add_attention_flag, add_memory_flags, add_overwrite_flag, resolve_launched_device
from models.foreign import require_cogvideox
from models.inbetween.backbones import BACKBONES, DEFAULT, add_backbone_flag
from models.loading.whole import component_folder, require_kind, require_whole
from models.precision import automatic_precision, settle_precision
from models.settings import (
    INBETWEEN_TRAINING,
    WAN_TRAINING,
    InbetweenTrainSettings,
    TrainSettings,
    WanTrainSettings,
)
from models.weights import GGI_STAGE, Preset, add_weight_flags, locate, require_same_weights
from utils.cli import (
    Arguments,
    InputError,
    Parser,
    add_settings,
    heavy_imports,
    positive_int,
    require_writable,
    run_script,
    settings_of,
)
from utils.data.clips import ClipSource, FolderClips
from utils.data.flow import FLOWS
from utils.edges import DETECTORS
from utils.files import read_json
from utils.layout import find_checkpoints
from utils.runs import Run, open_run

if TYPE_CHECKING:
    from models.runtime.runtime import Runtime

SYNTHETIC = "synthetic"
START = "cogvideox_transformer"
FOLDER_FLAGS = ("captions", "edges", "flow", "stride", "windows")  # flags that apply only to --dataset FOLDER


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    parser = Parser(__doc__)
    add, where = parser.add_argument, partial(parser.add_argument, decides=False)
    backbone = add_backbone_flag(parser, argv)
    # Clip names and the dataset's identity decide the result, not these flags.
    where("--dataset", required=True, metavar="FOLDER|synthetic", help="folder of clips, or towns drawn on the fly")
    where("--clips", type=positive_int, help="clips of the synthetic dataset (default: 1000)")
    where(
        "--captions", type=Path, metavar="FILE", help="JSON or CSV: id, caption of every clip (default: no captions)"
    )
    where("--edges", choices=DETECTORS, help="edge detector (default: hed for full, lines for tiny weights)")
    where("--flow", choices=FLOWS, help="optical flow that carries the noise (default: dis)")
    where("--stride", type=positive_int, help="frames of the source per frame of a clip (default: 1)")
    where("--windows", type=positive_int, help="clips of 46 frames from each longer one, evenly spread (default: 1)")
    if backbone is BACKBONES[DEFAULT]:
        add("--init_from", type=Path, metavar="FOLDER", help="transformer to start from (default: the weights')")
        add("--lora", type=Path, metavar="FILE", help="LoRA that stays frozen inside and is merged into what is saved")
        add_settings(parser, InbetweenTrainSettings)
        add_settings(parser, TrainSettings, **INBETWEEN_TRAINING)
    else:
        add("--width", type=positive_int, help="pixels (default: the weights' preset)")
        add("--height", type=positive_int, help="pixels (default: the weights' preset)")
        add_settings(parser, WanTrainSettings)
        add_settings(parser, TrainSettings, **WAN_TRAINING)
    where("--cache_dir", type=Path, default=Path("cache/ggi"), help="folder of encoded clips")
    where("--output_dir", type=Path, default=Path("runs/ggi"), metavar="RUN", help="run folder")
    add_overwrite_flag(parser)
    add_attention_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, backbone.components)
    return parser.parse_args(argv)


def open_dataset(args: Arguments, preset: Preset) -> ClipSource:
    """Open the clips. Raises InputError when they are unusable, or a flag belongs to the other kind of dataset."""
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


def find_start(args: Arguments, preset: Preset) -> Path:
    """Find the folder of the start weights."""
    folder = args.init_from or component_folder(START, locate(args, preset, [START])[START])
    if args.from_scratch:
        require_kind(START, folder)
    else:
        require_whole("inbetween", folder)
    return folder


def result_arguments(args: Arguments, source: ClipSource) -> dict:
    """What decides the trained weights. Start weights are named by flags here and by hashes in the manifest."""
    names = "\n".join(source.name(i) for i in range(len(source)))
    return args.identity() | {
        "clips": source.identity() | {"count": len(source), "sha256": hashlib.sha256(names.encode()).hexdigest()}
    }


def sized_preset(args: Arguments) -> Preset:
    """The preset; for Wan VACE at the size that the flags ask for."""
    preset = BACKBONES[args.backbone].preset(args)
    if args.backbone == DEFAULT:
        return preset
    width, height = args.width or preset.video_size[0], args.height or preset.video_size[1]
    if width % 16 or height % 16:
        raise InputError(f"{width}x{height}: width and height must be multiples of 16")
    return dataclasses.replace(preset, video_size=(width, height))


def main() -> None:
    args = parse_args()
    preset, components = sized_preset(args), BACKBONES[args.backbone].components
    args.dtype = preset.dtype if args.dtype == "auto" else args.dtype  # of saved weights: the same on every machine
    source = open_dataset(args, preset)
    if args.backbone == DEFAULT and args.lora and not args.lora.is_file():
        raise InputError(f"--lora {args.lora} does not exist")
    require_writable(args.cache_dir)
    run = open_run(
        args.output_dir,
        result_arguments(args, source),
        overwrite=args.overwrite,
        automatic=automatic_precision(args, preset.dtype, resolve_launched_device(args.device)),
        defaults=args.defaults(),
    )
    if args.cache_dir.resolve().is_relative_to(args.output_dir.resolve()):
        raise InputError(f"--cache_dir {args.cache_dir} lies in --output_dir: a cache outlives runs")
    settle_precision(args, [run])
    if run.trained_steps >= args.max_train_steps:
        require_same_weights(run, args, preset, components)
        if not run.finished:  # interrupted after its last checkpoint
            run.finish(steps=args.max_train_steps)
        print(f"{run.folder} is finished; raise --max_train_steps to train on")
        return
    paths = locate(args, preset, components)
    if args.backbone == DEFAULT:
        train(args, preset, source, run, paths | {"start": find_start(args, preset)})
    else:
        train_lora(args, preset, source, run, paths)


def train(args: Arguments, preset: Preset, source: ClipSource, run: Run, paths: dict[str, Path]) -> None:
    with heavy_imports():
        from models.inbetween.frozen_lora import read_frozen_lora
        from models.inbetween.pipeline import CHANNELS
        from models.inbetween.training import InbetweenTraining, check_start
        from models.loading.fit import require_fit
        from models.runtime.memory import look_up_plan
        from models.runtime.runtime import open_training_runtime
        from models.runtime.training import fit

    config = read_json(paths["start"] / "config.json")
    check_start(config, preset.video_size, preset.num_frames)
    require_cogvideox(paths, paths["start"])
    kind = "inbetween" if config["in_channels"] == CHANNELS else START
    start = {} if args.from_scratch else {kind: paths["start"]}
    require_fit({name: paths[name] for name in GGI_STAGE} | start)
    lora = read_frozen_lora(args.lora, config) if args.lora else {}
    (width, height), frames = preset.video_size, preset.num_frames
    plan = look_up_plan(preset.name, "training", pixels=width * height, frames=frames, batch=args.train_batch_size)
    runtime = open_training_runtime(args, preset, "training", plan)
    weights = runtime.weight_identity(paths | ({"lora": args.lora} if lora else {}))
    run.require_begun_with(weights)
    with runtime.advise_on_oom():
        cache = open_cache(args, preset, source, paths, weights, config["max_text_seq_length"])
        fill_cache(runtime, source, paths, cache, config["max_text_seq_length"])
        settings = settings_of(TrainSettings, args), settings_of(InbetweenTrainSettings, args)
        training = InbetweenTraining(runtime, paths, cache, lora, *settings)
        moments = runtime.placement["optimizer"]
        fit(run, training, settings[0], device=runtime.device, weights=weights, moments=moments)
    if runtime.is_main:
        print(find_checkpoints(run.folder)[args.max_train_steps])


def train_lora(args: Arguments, preset: Preset, source: ClipSource, run: Run, paths: dict[str, Path]) -> None:
    """Train a LoRA on Wan VACE. Its memory is not counted: the plan has the weights alone."""
    with heavy_imports():
        from models.inbetween.wan_training import LORA_FILE, WanTraining, fill_wan_cache, open_wan_cache
        from models.runtime.memory import Phase
        from models.runtime.runtime import open_training_runtime
        from models.runtime.training import fit

    BACKBONES[args.backbone].check_networks(paths)
    folder = component_folder("wan_transformer", paths["wan_transformer"])
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    runtime = open_training_runtime(args, preset, "training", {"full": [Phase("weights alone", held, 0)]})
    if runtime.sharded:
        raise InputError("a LoRA cannot be sharded (configs/fsdp.yaml): launch it with configs/ddp.yaml")
    weights = runtime.weight_identity(paths)
    run.require_begun_with(weights)
    with runtime.advise_on_oom():
        cache = open_wan_cache(args.cache_dir, source, weights, preset.video_size, args.dtype)
        fill_wan_cache(runtime, source, paths, cache, preset.video_size)
        settings = settings_of(TrainSettings, args)
        training = WanTraining(runtime, paths, cache, settings, settings_of(WanTrainSettings, args))
        fit(run, training, settings, device=runtime.device, weights=weights)
    if runtime.is_main:
        print(find_checkpoints(run.folder)[args.max_train_steps] / LORA_FILE)


def open_cache(args, preset: Preset, source: ClipSource, paths: dict[str, Path], weights: dict, length: int):
    """Open the ClipCache of these clips and networks. weights: the networks' hashes. length: tokens per caption."""
    from models.inbetween.clip_cache import ClipCache

    precision = {"dtype": args.dtype, "mixed_precision": args.mixed_precision}
    vae_config = read_json(component_folder("cogvideox_vae", paths["cogvideox_vae"]) / "config.json")
    identity = {"vae": weights["cogvideox_vae"], "scale": vae_config["scaling_factor"], "size": preset.video_size}
    text_identity = {"text": weights["cogvideox_text"], "tokens": length, "dtype": args.dtype}
    return ClipCache(args.cache_dir, source, identity | precision, text_identity)


def fill_cache(runtime: "Runtime", source: ClipSource, paths: dict[str, Path], cache, length: int) -> None:
    """Encode what the cache lacks: clips in all processes, captions in the first. Frees the networks afterwards.

    length: tokens per caption.
    """
    from models.inbetween.clip_cache import ClipEncoder
    from models.inbetween.pipeline import encode_video_prompts, load_video_vae

    process, preset = runtime.process, runtime.preset
    missing = cache.missing_clips(process.process_index, process.num_processes)
    if missing and process.is_local_main_process:
        source.prepare()
    runtime.wait()
    if missing:
        vae = load_video_vae(runtime, paths)
        encoder = ClipEncoder(vae, preset.video_size, preset.num_frames, runtime.autocast)
        cache.add_clips(missing, encoder.encode, quiet=not runtime.is_main)
        del vae, encoder
    runtime.wait()
    if runtime.is_main and (texts := cache.missing_texts()):
        cache.add_texts(encode_video_prompts(paths["cogvideox_text"], texts, runtime.device, runtime.dtype, length))
    runtime.wait()


if __name__ == "__main__":
    run_script(main)
