"""Sparse anchor views: the first and last frame of every arc in the reference's style (stage 2).

    python sag_generate_anchor_view.py --epoch 400 --target assets/sampleA --pfix NAME --num_replacement 12

Writes image_00.png … into SCENE/multiviews/<run>/, with the warped previous anchor and its mask beside each. Anchors
depend on the one before, so they are drawn in order; the same command continues an interrupted run.

    accelerate launch --num_processes 4 sag_generate_anchor_view.py --target SCENE_A SCENE_B --pfix X Y --seed 1 2 …

draws every scene in every style from every seed. Processes share them; the files do not depend on how many there are.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.flags import add_attention_flag, add_compile_flag, add_memory_flags, resolve_device
from models.precision import automatic_precision, report_precision, settle_precision
from models.weights import (
    FLUX_STAGE,
    Preset,
    add_weight_flags,
    load_preset,
    locate,
    require_same_weights,
    weight_hashes,
)
from utils.cli import (
    InputError,
    Parser,
    finite_float,
    folder_name,
    heavy_imports,
    non_negative_int,
    positive_int,
    run_script,
    seed_or_draw,
)
from utils.correspondence import read_map
from utils.edges import resize_edges
from utils.files import files_sha256
from utils.images import contact_sheet, read_image, write_image
from utils.layout import (
    ANCHOR_FILES,
    CONTACT_SHEET,
    MULTIVIEWS,
    Scene,
    anchor_latents_path,
    anchor_path,
    anchor_run_name,
    find_lora,
    floor_to,
    load_scene,
    mask_path,
    pad_prompts,
    warped_path,
)
from utils.runs import MANIFEST, Run, draw_seed, find_unfinished, is_first_process, open_run, require_distinct


@dataclass
class Job:
    """The anchors of one scene in one style from one seed. pfix: name of the LoRA. size: width, height in pixels."""

    scene: Scene
    pfix: str
    size: tuple[int, int]
    seed: int
    prompts: list[str]
    run: Run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--target", type=Path, nargs="+", required=True, metavar="SCENE", help="scene folders with arc0, arc1, …")
    add("--pfix", type=folder_name, nargs="+", required=True, metavar="NAME", help="names of LoRAs, all of one rank")
    add("--epoch", type=positive_int, default=400, help="training step of the LoRA's checkpoint")
    add("--loras", type=Path, default=Path("loras"), help="folder of all LoRAs")
    add(
        "--lora_weight",
        type=finite_float,
        default=1.0,
        help="multiplies both LoRA factors: the strength is its square",
    )
    add(
        "--prompt",
        nargs="+",
        default=[""],
        help="prompt of each anchor; the last one serves the rest (default: empty)",
    )
    add("--neg_prompt", default="", help="negative prompt; equal prompts make true CFG a no-op, which is skipped")
    add("--num_steps", type=positive_int, default=25, help="denoising steps; the ControlNet acts on the first 25")
    add("--num_replacement", type=non_negative_int, default=12, help="steps guided by the warped previous anchor")
    add("--guidance", type=finite_float, default=4.0, help="distilled guidance scale of FLUX.1-dev")
    add("--true_gs", type=finite_float, default=3.5, help="scale of true classifier-free guidance; 1 switches it off")
    add("--timestep_to_start_cfg", type=non_negative_int, default=1, help="first step with true CFG")
    add("--control_weight", type=finite_float, default=0.8, help="strength of the edge ControlNet")
    add(
        "--seed",
        type=seed_or_draw,
        nargs="+",
        default=[-1],
        help="noise seeds; -1 continues the newest unfinished run, else draws one, for each scene and LoRA",
    )
    add("--use_else_noise", action="store_true", help="a different noise for every anchor: seed, seed + 1, …")
    add("--width", type=positive_int, help="pixels (default: the weights' preset, else the edge frames' width)")
    add("--height", type=positive_int, help="pixels (default: the weights' preset, else the edge frames' height)")
    add("--output_dir", type=Path, help="folder to put the run into (default: SCENE/multiviews)")
    add("--overwrite", action="store_true", help="replace a run of this name that was made with other arguments")
    add_attention_flag(parser)
    add_compile_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, FLUX_STAGE)
    return parser.parse_args()


def anchor_size(args: argparse.Namespace, preset: Preset, scene: Scene) -> tuple[int, int]:
    """(width, height) in pixels. The edge frames' own size is floored, as in the reference; a given one must fit."""
    multiple = preset.image_multiple
    for name in ("width", "height"):
        given = getattr(args, name)
        if given and given % multiple:
            raise InputError(f"--{name} {given}: these weights need a multiple of {multiple}")
    default = preset.image_size or tuple(floor_to(side, multiple) for side in scene.edge_size)
    size = (args.width or default[0], args.height or default[1])
    if min(size) < multiple:
        raise InputError(
            f"anchors of {size[0]}x{size[1]} are too small: these weights need {multiple} pixels at least"
        )
    return size


def result_arguments(
    args: argparse.Namespace, scene: Scene, pfix: str, prompts: list[str], size: tuple[int, int], loras: Sequence[Path]
) -> dict:
    """What decides the pictures, but the seed: arguments, and files by their content. Where they are put does not."""
    elsewhere = {"output_dir", "overwrite", "device", "memory", "loras", "target"}
    chosen = {key: value for key, value in vars(args).items() if key not in elsewhere}
    inputs = [*scene.anchor_edge_paths, *(arc.corres_end_path for arc in scene.arcs)]
    hashes = {"scene_sha256": files_sha256(inputs), "loras_sha256": files_sha256(loras)}
    return chosen | {"pfix": pfix, "prompt": prompts, "width": size[0], "height": size[1]} | hashes


def open_job(
    args: argparse.Namespace, preset: Preset, scene: Scene, pfix: str, loras: Sequence[Path], seed: int
) -> Job:
    """The run to continue or begin, for one scene, LoRA and seed. Raises InputError for what cannot be used."""
    prompts, size = pad_prompts(args.prompt, len(scene.arcs) + 1), anchor_size(args, preset, scene)
    arguments = result_arguments(args, scene, pfix, prompts, size, loras)
    automatic = automatic_precision(args, preset.dtype, resolve_device(args.device))
    parent = args.output_dir or scene.folder / MULTIVIEWS
    if seed < 0:
        unfinished = find_unfinished(parent, arguments, "seed", automatic)
        seed = draw_seed() if unfinished is None else unfinished
        print(f"seed {seed}" + ("" if unfinished is None else ", continuing an unfinished run"))
    name = anchor_run_name(pfix, prompts, args.epoch, seed, args.num_replacement)
    # Videos of these anchors are folders of their own, which stay when the anchors are drawn anew.
    run = open_run(
        parent / name,
        arguments | {"seed": seed},
        overwrite=args.overwrite,
        automatic=automatic,
        owned=(*ANCHOR_FILES, MANIFEST),
    )
    return Job(scene, pfix, size, seed, prompts, run)


def main() -> None:
    args = parse_args()
    scenes = [load_scene(target) for target in args.target]
    preset = load_preset(args.weights)
    if len(args.target) > 1 and args.output_dir:
        raise InputError("--output_dir goes with a single --target")
    if -1 in args.seed and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--seed -1: several processes need a seed to agree on")
    loras = {pfix: find_lora(args.loras, pfix, args.epoch) for pfix in args.pfix}
    jobs = [
        open_job(args, preset, scene, pfix, loras[pfix], seed)
        for pfix in args.pfix
        for scene in scenes
        for seed in args.seed
    ]
    require_distinct([job.run for job in jobs])
    for job in jobs:
        if job.run.finished and is_first_process():
            require_same_weights(job.run, args, preset, FLUX_STAGE)
            print(f"{job.run.folder} is finished")
    unfinished = [job for job in jobs if not job.run.finished]
    if unfinished:
        settle_precision(args, [job.run for job in unfinished])
        draw_anchors(args, preset, unfinished, loras)
    for job in unfinished if is_first_process() else ():
        print(job.run.folder)


def draw_anchors(
    args: argparse.Namespace, preset: Preset, jobs: list[Job], loras: Mapping[str, tuple[Path, Path]]
) -> None:
    """Draw all anchors that are not there yet, shared among all processes. loras: files of each --pfix."""
    with heavy_imports():
        from benchmarks.memory.plans import plan_anchors
        from models.flux.lora import add_lora, common_ranks, read_loras
        from models.flux.network import encode_flux_prompts, load_flux, place_flux
        from models.loading.networks import DTYPES, component_config
        from models.runtime.memory import lossy, settle_memory
        from models.runtime.parallel import open_processes
        from models.runtime.rotary import use_complex_rotary
        from models.runtime.speed import compile_blocks, require_attention, require_compilable

    process, device = open_processes(resolve_device(args.device))
    dtype, length = DTYPES[args.dtype], preset.max_sequence_length
    require_attention(args.attention, device, dtype)
    with process.local_main_process_first():  # it downloads what is missing
        paths = locate(args, preset, FLUX_STAGE)
    configs = [component_config(name, paths[name]) for name in ("flux_transformer", "controlnet")]
    states = read_loras({job.pfix: loras[job.pfix] for job in jobs}, configs)
    ranks = common_ranks(states)
    prompts = [prompt for job in jobs for prompt in job.prompts]
    guided = args.true_gs != 1 and {*prompts} != {args.neg_prompt}
    largest = max((job.size for job in jobs), key=lambda size: size[0] * size[1])
    plan = plan_anchors(paths, largest, max(ranks), length, dtype, device, guided=guided)
    mode, kept = settle_memory("anchors", plan, args.memory, device)
    report_precision(args)
    if args.compile:
        require_compilable(kept["transformer"])
    weights = weight_hashes(paths) | lossy(kept)
    for job in jobs:
        job.run.require_begun_with(weights)
    prompts.append(args.neg_prompt)
    texts = encode_flux_prompts(paths["flux_text"], prompts, device, dtype, length, kept["text"])
    models = load_flux(paths, device, dtype)
    for model, rank in zip((models.transformer, models.controlnet), ranks, strict=True):
        add_lora(model, rank)
        use_complex_rotary(model)
    place_flux(models, kept)
    if args.compile:
        compile_blocks(models.transformer)
    draw_jobs(args, preset, jobs[process.process_index :: process.num_processes], models, states, texts, weights, mode)
    process.wait_for_everyone()


def draw_jobs(
    args, preset: Preset, jobs: list[Job], models, states: dict, texts: dict, weights: dict, mode: str
) -> None:
    """Draw this process's part. states: from `read_loras`. texts: {prompt: Text}. weights: for the manifests."""
    from tqdm import tqdm

    from models.flux.lora import set_lora
    from models.runtime.memory import naming_smaller_mode

    steps, styles = sum(len(job.prompts) for job in jobs) * args.num_steps, [job.pfix for job in jobs]
    with tqdm(total=steps, desc="anchors", unit="step", disable=not is_first_process()) as progress:
        for job, before in zip(jobs, [None, *styles], strict=False):
            if job.pfix != before:
                for model, state in zip((models.transformer, models.controlnet), states[job.pfix], strict=True):
                    set_lora(model, state, args.lora_weight)
            job.run.begin(weights=weights, scene=str(job.scene.folder.resolve()))
            with naming_smaller_mode("anchors", mode):
                draw_job(args, preset, job, models, texts, progress)
            write_image(job.run.folder / CONTACT_SHEET, anchor_sheet(job.scene, job.run.folder))
            job.run.finish()


def draw_job(args: argparse.Namespace, preset: Preset, job: Job, models, texts: dict, progress) -> None:
    """All anchors of one scene, in order. texts: {prompt: Text}."""
    from models.flux.anchors import decode_anchor
    from models.latents import find_or_make

    for k in range(len(job.prompts)):
        end = progress.n + args.num_steps
        path, kept = anchor_path(job.run.folder, k), anchor_latents_path(job.run.folder, k)
        if not path.exists():
            latents = find_or_make(kept, partial(denoise_anchor, args, preset, job, k, models, texts, progress))
            write_image(path, decode_anchor(models, latents))
            job.run.save()
        kept.unlink(missing_ok=True)
        progress.update(end - progress.n)


def denoise_anchor(args: argparse.Namespace, preset: Preset, job: Job, k: int, models, texts: dict, progress):
    """Latents [1, 16, h, w] of anchor k. Writes the warped anchor before it and its mask."""
    from models.flux.anchors import AnchorSettings, encode_warped, sample_anchor, warp_anchor
    from models.latents import draw_noise, to_signed
    from models.runtime.speed import attention_kernel

    settings = AnchorSettings(
        args.num_steps,
        args.guidance,
        args.true_gs,
        args.timestep_to_start_cfg,
        args.control_weight,
        args.num_replacement,
    )
    (width, height), folder = job.size, job.run.folder
    noise_of = lambda k: draw_noise((1, 16, height // 8, width // 8), job.seed + k * args.use_else_noise)  # noqa: E731
    control = to_signed(resize_edges(read_image(job.scene.anchor_edge_paths[k]), width, height))[None]
    replacement = None
    if k:
        previous = read_image(anchor_path(folder, k - 1))
        code = read_map(job.scene.arcs[k - 1].corres_end_path)
        warped, mask = warp_anchor(previous, code, preset.mask_dilations)
        # The reference's posterior draw is the first after seeding the previous anchor: its noise, bit for bit.
        replacement = encode_warped(models, warped, mask, noise_of(k - 1))
        write_image(warped_path(folder, k), warped)
        write_image(mask_path(folder, k), 255 * mask)
    with attention_kernel(args.attention):
        return sample_anchor(
            models,
            noise_of(k),
            control,
            texts[job.prompts[k]],
            texts[args.neg_prompt],
            settings,
            replacement,
            on_step=lambda step: progress.update(),
        )


def anchor_sheet(scene: Scene, folder: Path):
    """Edges, warped previous anchor, mask and anchor, one column per anchor."""
    ks = range(len(scene.arcs) + 1)
    edges = [read_image(path) for path in scene.anchor_edge_paths]
    blank = 0 * read_image(anchor_path(folder, 0))
    warped = [read_image(warped_path(folder, k)) if k else blank for k in ks]
    masks = [read_image(mask_path(folder, k)) if k else blank + 255 for k in ks]
    anchors = [read_image(anchor_path(folder, k)) for k in ks]
    return contact_sheet(
        [("edges", edges), ("previous anchor, warped", warped), ("mask: white is free", masks), ("anchors", anchors)]
    )


if __name__ == "__main__":
    run_script(main)
