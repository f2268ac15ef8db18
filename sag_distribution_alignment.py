"""Distribution alignment: a LoRA on FLUX and on its HED ControlNet, trained on the reference picture (stage 1).

    accelerate launch --num_processes 1 --main_process_port=4401 sag_distribution_alignment.py \\
        --path_image assets/references/X.png --pfix NAME

    accelerate launch … sag_distribution_alignment.py --path_image A.png B.png --prompt 'exterior' 'interior' --pfix
    school
    accelerate launch --config_file configs/ddp.yaml sag_distribution_alignment.py …    # or configs/fsdp.yaml

Writes loras/NAME/checkpoint-<step>/{lora,controlnet.lora}.safetensors every --checkpointing_steps steps, the loss
curve, and a copy of the references. The same command continues an interrupted run, to the same weights as an
uninterrupted one.
"""

import argparse
from pathlib import Path

from models.flags import add_attention_flag, add_memory_flags, resolve_device
from models.precision import MIXED, automatic_precision, report_precision, settle_precision
from models.runtime.training import end_training, forward_precision, open_accelerator, read_losses, write_checkpoint
from models.weights import (
    FLUX_STAGE,
    Preset,
    add_weight_flags,
    load_preset,
    locate,
    require_same_weights,
    weight_hashes,
)
from utils.cli import InputError, Parser, folder_name, heavy_imports, positive_float, positive_int, run_script, seed
from utils.data.references import Reference, load_references
from utils.edges import edge_detector
from utils.files import files_sha256
from utils.images import write_image
from utils.layout import STATE_FOLDER, checkpoint_lora_paths, find_checkpoints
from utils.runs import Run, open_run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--path_image", type=Path, nargs="+", required=True, metavar="PNG", help="reference picture(s)")
    add("--prompt", nargs="+", default=[], help="identifier prompt of each picture, in order (default: empty)")
    add("--pfix", type=folder_name, required=True, metavar="NAME", help="name of the LoRA: the folder in --output_dir")
    add("--path_edges", type=Path, nargs="+", default=[], metavar="PNG", help="ready edge picture of each reference")
    add("--edges", choices=["hed", "lines"], help="edge detector (default: hed for full, lines for tiny weights)")
    add("--max_train_steps", type=positive_int, default=600, help="optimizer steps; may be raised later to go on")
    add("--checkpointing_steps", type=positive_int, default=100, help="steps between checkpoints")
    add("--learning_rate", type=positive_float, default=1e-4, help="constant learning rate of AdamW")
    add("--rank", type=positive_int, default=16, help="LoRA rank")
    add("--resolution", type=positive_int, help="long side of training crops in pixels (default: the weights' preset)")
    add("--train_batch_size", type=positive_int, default=1, help="crops per process and step")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="batches per optimizer step")
    add(
        "--mixed_precision",
        choices=["auto", *MIXED],
        default="auto",
        help="precision of the networks, LoRA is float32; auto: bf16 for full weights, and for tiny ones where the "
        "device computes in it, else no",
    )
    add("--seed", type=seed, default=0, help="seed of LoRA's start values, crops, noise and timesteps")
    add("--report_to", choices=["tensorboard", "none"], default="tensorboard", help="where the loss is logged")
    add("--resume_from_checkpoint", default="latest", help="latest, a step such as 300, or none to start again")
    add("--output_dir", type=Path, default=Path("loras"), help="folder of all LoRAs")
    add("--overwrite", action="store_true", help="replace a LoRA of this name that was trained with other arguments")
    add_attention_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, FLUX_STAGE)
    return parser.parse_args()


def result_arguments(args: argparse.Namespace) -> dict:
    """What decides the weights: arguments, and pictures by their content. How far and where to train does not."""
    elsewhere = {
        "max_train_steps",
        "checkpointing_steps",
        "report_to",
        "resume_from_checkpoint",
        "output_dir",
        "path_image",
        "path_edges",
    }
    chosen = {
        key: value for key, value in vars(args).items() if key not in elsewhere | {"overwrite", "device", "memory"}
    }
    return chosen | {"pictures_sha256": files_sha256([*args.path_image, *args.path_edges])}


def resume_step(args: argparse.Namespace, run: Run) -> int:
    """The checkpoint to go on from; 0 to start."""
    wanted, found = args.resume_from_checkpoint.removeprefix("checkpoint-"), list(find_checkpoints(run.folder))
    if run.replaces or (not found and wanted in ("latest", "none")):
        return 0
    if wanted == "none":
        raise InputError(f"{run.folder} holds checkpoints {found}: pass --overwrite to start again")
    if wanted != "latest" and not (wanted.isdigit() and int(wanted) in found):
        raise InputError(f"--resume_from_checkpoint {wanted}: {run.folder} holds checkpoints {found or 'none'}")
    return found[-1] if wanted == "latest" else int(wanted)


def main() -> None:
    args = parse_args()
    preset = load_preset(args.weights)
    args.resolution = args.resolution or preset.resolution
    args.edges = args.edges or preset.edges
    args.prompt = args.prompt or [""] * len(args.path_image)
    if args.resolution % preset.training_multiple:
        raise InputError(
            f"--resolution {args.resolution}: these weights need a multiple of {preset.training_multiple}"
        )
    detect = None if args.path_edges else edge_detector(args.edges)
    references = load_references(args.path_image, args.prompt, args.path_edges, detect, args.resolution)
    device = resolve_device(args.device)
    if ":" in device:
        raise InputError(f"--device {device}: choose GPUs by `accelerate launch --gpu_ids …` and pass --device cuda")
    if args.dtype == "auto" and args.mixed_precision != "auto":
        args.dtype = MIXED[args.mixed_precision]
    automatic = automatic_precision(args, preset.dtype, device)
    folder = args.output_dir / args.pfix
    run = open_run(folder, result_arguments(args), overwrite=args.overwrite, automatic=automatic)
    settle_precision(args, [run])
    first_step = resume_step(args, run)
    if first_step >= args.max_train_steps:
        require_same_weights(run, args, preset, FLUX_STAGE)
        print(f"{run.folder} is finished at step {first_step}; raise --max_train_steps to train on")
        return
    paths = locate(args, preset, FLUX_STAGE)
    train(args, preset, references, run, first_step, device, paths)


def train(
    args: argparse.Namespace,
    preset: Preset,
    references: list[Reference],
    run: Run,
    first_step: int,
    device: str,
    paths: dict[str, Path],
) -> None:
    with heavy_imports():
        from tqdm import tqdm

        from benchmarks.memory.plans import plan_alignment
        from models.flux.alignment import FlowObjective, load_trainable, lora_optimizer, optimizer_step
        from models.flux.lora import lora_parameters, save_lora, save_loras_only
        from models.flux.network import encode_flux_prompts
        from models.loading.networks import DTYPES
        from models.runtime.memory import lossy, naming_smaller_mode, settle_memory
        from models.runtime.sharding import load_state, require_shardable, save_state
        from models.runtime.speed import require_attention

    require_shardable(args.memory, args.mixed_precision)
    accelerator = open_accelerator(run, args, device)
    dtype, device, length = DTYPES[args.dtype], accelerator.device, preset.max_sequence_length
    autocast = None if args.mixed_precision == "no" else DTYPES[MIXED[args.mixed_precision]]
    require_attention(args.attention, str(device), autocast or dtype)
    size = (args.resolution, args.train_batch_size, args.rank, length)
    plan = plan_alignment(paths, *size, dtype, str(device), autocast=autocast)
    if accelerator.is_fsdp2:  # before it is divided, each process holds all of it
        plan = {"full": plan["full"]}
    mode, kept = settle_memory("alignment", plan, args.memory, str(device))
    report_precision(args)
    prompts = [reference.prompt for reference in references]
    texts = encode_flux_prompts(paths["flux_text"], prompts, device, dtype, length, kept["text"])
    models, loras = load_trainable(paths, device, dtype, args.rank, args.seed, kept)
    networks = (models.transformer, models.controlnet)
    optimizer = lora_optimizer([p for group in loras for p in group], args.learning_rate)
    objective, optimizer = accelerator.prepare(FlowObjective(models), optimizer)
    loras = [lora_parameters(network) for network in networks]  # sharding makes new ones
    save_loras_only(accelerator, networks)
    if first_step:
        load_state(accelerator, find_checkpoints(run.folder)[first_step] / STATE_FOLDER, objective, optimizer)
    if accelerator.is_main_process:
        begin(run, references, weight_hashes(paths) | lossy(kept))
    accelerator.wait_for_everyone()
    accelerator.init_trackers("alignment")

    def save(folder: Path) -> None:
        save_state(accelerator, folder / STATE_FOLDER, objective, optimizer)
        for network, path in zip(networks, checkpoint_lora_paths(folder), strict=True):
            save_lora(network, path)

    losses, total = read_losses(run.folder, first_step), args.max_train_steps
    is_first = accelerator.is_main_process
    for step in tqdm(range(first_step, total), "align", total, initial=first_step, disable=not is_first):
        with naming_smaller_mode("alignment", mode, sharded=accelerator.is_fsdp2):
            losses.append(backward(args, preset, references, step, accelerator, objective, models, texts))
            accelerator.unscale_gradients()  # float16 scales them
            norms = optimizer_step(optimizer, loras)
        accelerator.log({"loss": losses[-1], "grad_norm/flux": norms[0], "grad_norm/controlnet": norms[1]}, step + 1)
        if (step + 1) % args.checkpointing_steps == 0 or step + 1 == total:
            write_checkpoint(accelerator, run, step + 1, losses, save)
    objective = optimizer = None
    end_training(accelerator)
    if accelerator.is_main_process:
        run.finish(steps=args.max_train_steps)
        print(find_checkpoints(run.folder)[args.max_train_steps])


def begin(run: Run, references: list[Reference], weights: dict) -> None:
    """Open the run's folder and put a copy of what it is trained on there. weights: what it starts from."""
    run.begin(weights=weights)
    for i, reference in enumerate(references):
        copy = run.folder / "references" / f"{i:02d}_{reference.path.stem}"
        write_image(copy.with_name(f"{copy.name}.png"), reference.image)
        write_image(copy.with_name(f"{copy.name}.edges.png"), reference.edges)


def backward(args, preset: Preset, references, step: int, accelerator, objective, models, texts) -> float:
    """Gradients of one optimizer step, accumulated over its batches; returns their mean loss over all processes."""
    from models.flux.alignment import batch_flow_sample, draw_batch
    from models.flux.network import stack_texts
    from models.runtime.speed import attention_kernel

    rank, size = accelerator.process_index, args.train_batch_size
    losses = []
    for micro in range(args.gradient_accumulation_steps):
        items = range(rank * size, (rank + 1) * size)
        batch = draw_batch(references, (args.seed, step, micro), items, args.resolution, preset.training_multiple)
        sample, text = batch_flow_sample(models, batch), stack_texts([texts[batch.prompt]] * len(batch.t))
        with accelerator.accumulate(objective), attention_kernel(args.attention):
            with forward_precision(accelerator):
                loss = objective(sample, text, batch.control)
            accelerator.backward(loss)
        losses.append(accelerator.gather(loss.detach()).mean().item())
    return sum(losses) / len(losses)


if __name__ == "__main__":
    run_script(main)
