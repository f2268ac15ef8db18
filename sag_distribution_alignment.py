"""Distribution alignment: a LoRA on FLUX and on its HED ControlNet, trained on the reference picture (stage 1).

    accelerate launch --num_processes 1 --main_process_port=4401 sag_distribution_alignment.py \\
        --path_image assets/references/X.png --pfix NAME

    accelerate launch … sag_distribution_alignment.py --path_image A.png B.png --prompt 'exterior' 'interior' --pfix
    school
    accelerate launch --config_file configs/ddp.yaml sag_distribution_alignment.py …

Writes loras/NAME/checkpoint-<step>/{lora,controlnet.lora}.safetensors every --checkpointing_steps steps, the loss
curve, and a copy of the references. The same command continues an interrupted run, to the same weights as an
uninterrupted one.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from models.flags import add_attention_flag, add_memory_flags, add_overwrite_flag, resolve_launched_device
from models.foreign import require_flux
from models.precision import MIXED, automatic_precision, settle_precision
from models.settings import AlignmentSettings
from models.weights import FLUX_STAGE, Preset, add_weight_flags, load_preset, locate, require_same_weights
from utils.cli import (
    Arguments,
    InputError,
    Parser,
    add_settings,
    folder_name,
    heavy_imports,
    positive_int,
    prompt_text,
    run_script,
    settings_of,
)
from utils.data.references import Reference, load_references
from utils.edges import edge_detector
from utils.files import files_sha256
from utils.layout import find_checkpoints
from utils.runs import Run, is_first_process, open_run


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    parser = Parser(__doc__)
    add, where = parser.add_argument, partial(parser.add_argument, decides=False)
    where("--path_image", type=Path, nargs="+", required=True, metavar="PNG", help="reference picture(s)")
    about = "identifier prompt of each picture, in order (default: empty)"
    add("--prompt", type=prompt_text, nargs="+", default=[], help=about)
    add("--pfix", type=folder_name, required=True, metavar="NAME", help="name of the LoRA: the folder in --output_dir")
    where("--path_edges", type=Path, nargs="+", default=[], metavar="PNG", help="ready edge picture of each reference")
    add("--edges", choices=["hed", "lines"], help="edge detector (default: hed for full, lines for tiny weights)")
    add("--resolution", type=positive_int, help="long side of training crops in pixels (default: the weights' preset)")
    add_settings(parser, AlignmentSettings)
    where("--resume_from_checkpoint", default="latest", help="latest, a step such as 300, or none to start again")
    where("--output_dir", type=Path, default=Path("loras"), help="folder of all LoRAs")
    add_overwrite_flag(parser)
    add_attention_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, FLUX_STAGE)
    return parser.parse_args(argv)


def resume_step(args: Arguments, run: Run) -> int | None:
    """Step of the checkpoint to resume from; None for the newest one that is whole, 0 to start."""
    wanted, found = args.resume_from_checkpoint.removeprefix("checkpoint-"), list(find_checkpoints(run.folder))
    if run.replaces or (not found and wanted in ("latest", "none")):
        return 0
    if wanted == "none":
        raise InputError(f"{run.folder} holds checkpoints {found}: pass --overwrite to start again")
    if wanted != "latest" and not (wanted.isdecimal() and int(wanted) in found):
        raise InputError(f"--resume_from_checkpoint {wanted}: {run.folder} holds checkpoints {found or 'none'}")
    return None if wanted == "latest" else int(wanted)


def prepare(args: Arguments) -> tuple[Preset, list[Reference], Run]:
    """Read and check everything that needs no network. Fills in what the weights decide."""
    preset = load_preset(args.weights)
    args.resolution = args.resolution or preset.resolution
    args.edges = args.edges or preset.edges
    if args.dtype == "auto" and args.mixed_precision != "auto":
        args.dtype = MIXED[args.mixed_precision]
    args.prompt = args.prompt or [""] * len(args.path_image)
    if args.resolution % preset.training_multiple:
        raise InputError(
            f"--resolution {args.resolution}: these weights need a multiple of {preset.training_multiple}"
        )
    detect = None if args.path_edges else edge_detector(args.edges)
    references = load_references(args.path_image, args.prompt, args.path_edges, detect, args.resolution)
    pictures = {"pictures_sha256": files_sha256([*args.path_image, *args.path_edges])}
    run = open_run(
        args.output_dir / args.pfix,
        args.identity() | pictures,
        overwrite=args.overwrite,
        automatic=automatic_precision(args, preset.dtype, resolve_launched_device(args.device)),
        defaults=args.defaults(),
    )
    settle_precision(args, [run])
    return preset, references, run


def main() -> None:
    args = parse_args()
    preset, references, run = prepare(args)
    first_step = resume_step(args, run)
    trained = run.trained_steps if first_step is None else first_step
    if trained >= args.max_train_steps:
        require_same_weights(run, args, preset, FLUX_STAGE)
        if not run.finished and is_first_process():  # it was stopped after its last checkpoint
            run.finish(steps=args.max_train_steps)
        print(f"{run.folder} is finished at step {trained}; raise --max_train_steps to train on")
        return
    train(args, preset, references, run, first_step)


def train(args: Arguments, preset: Preset, references: list[Reference], run: Run, first_step: int | None) -> None:
    with heavy_imports():
        from models.flux.alignment import Alignment
        from models.loading.fit import require_fit
        from models.runtime.memory import look_up_plan
        from models.runtime.runtime import first_here, open_training_runtime
        from models.runtime.training import fit

    plan = look_up_plan(preset.name, "alignment", pixels=args.resolution**2, batch=args.train_batch_size)
    paths = first_here(args, partial(locate, args, preset, FLUX_STAGE))
    require_flux(paths, args.control_mode)
    require_fit(paths)
    runtime, settings = open_training_runtime(args, preset, "alignment", plan), settings_of(AlignmentSettings, args)
    weights = runtime.weight_identity(paths)
    run.require_begun_with(weights)
    with runtime.advise_on_oom():
        alignment = Alignment(runtime, paths, references, settings, args.resolution)
        fit(run, alignment, settings.training(), device=runtime.device, weights=weights, resume=first_step)
    if runtime.is_main:
        print(find_checkpoints(run.folder)[args.max_train_steps])


if __name__ == "__main__":
    run_script(main)
