"""Sparse anchor views: the first and last frame of every arc in the reference's style (stage 2).

    python sag_generate_anchor_view.py --epoch 400 --target assets/sampleA --pfix NAME --num_replacement 12

Writes image_00.png … into SCENE/multiviews/<run>/, with the warped previous anchor and its mask beside each. Anchors
depend on the one before, so they are drawn in order; the same command continues an interrupted run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.weights import (
    FLUX_STAGE,
    Preset,
    add_memory_flags,
    add_weight_flags,
    load_preset,
    locate,
    require_same_weights,
    resolve_device,
    weight_hashes,
)
from utils.arcs import (
    ANCHOR_FILES,
    CONTACT_SHEET,
    MULTIVIEWS,
    Scene,
    anchor_path,
    anchor_run_name,
    find_lora,
    floor_to,
    load_scene,
    mask_path,
    pad_prompts,
    warped_path,
)
from utils.cli import (
    InputError,
    Parser,
    finite_float,
    folder_name,
    non_negative_int,
    positive_int,
    run_script,
    seed_or_draw,
)
from utils.correspondence import read_map
from utils.edges import resize_edges
from utils.images import contact_sheet, read_image, write_image
from utils.runs import MANIFEST, Run, draw_seed, files_sha256, find_unfinished, open_run


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--target", type=Path, required=True, metavar="SCENE", help="scene folder with arc0, arc1, …")
    add("--pfix", type=folder_name, required=True, metavar="NAME", help="name of the LoRA")
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
        default=-1,
        help="noise seed; -1 continues the newest unfinished run, else draws one",
    )
    add("--use_else_noise", action="store_true", help="a different noise for every anchor: seed, seed + 1, …")
    add("--width", type=positive_int, help="pixels (default: the weights' preset, else the edge frames' width)")
    add("--height", type=positive_int, help="pixels (default: the weights' preset, else the edge frames' height)")
    add("--output_dir", type=Path, help="folder to put the run into (default: SCENE/multiviews)")
    add("--overwrite", action="store_true", help="replace a run of this name that was made with other arguments")
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


def result_arguments(args: argparse.Namespace, scene: Scene, size: tuple[int, int], loras: Sequence[Path]) -> dict:
    """What decides the pictures: arguments, and files by their content. Where they are drawn and put does not."""
    elsewhere = {"output_dir", "overwrite", "device", "memory", "loras", "target"}
    chosen = {key: value for key, value in vars(args).items() if key not in elsewhere}
    inputs = [*scene.anchor_edge_paths, *(arc.corres_end_path for arc in scene.arcs)]
    hashes = {"scene_sha256": files_sha256(inputs), "loras_sha256": files_sha256(loras)}
    return chosen | {"width": size[0], "height": size[1]} | hashes


def open_anchor_run(args: argparse.Namespace, arguments: dict) -> Run:
    """The run to continue or begin; fixes `args.seed` when it is -1."""
    parent = args.output_dir or args.target / MULTIVIEWS
    if args.seed < 0:
        unfinished = find_unfinished(parent, arguments, "seed")
        args.seed = draw_seed() if unfinished is None else unfinished
        print(f"seed {args.seed}" + ("" if unfinished is None else ", continuing an unfinished run"))
    name = anchor_run_name(args.pfix, args.prompt, args.epoch, args.seed, args.num_replacement)
    # Videos of these anchors are folders of their own, which stay when the anchors are drawn anew.
    return open_run(
        parent / name, arguments | {"seed": args.seed}, overwrite=args.overwrite, owned=(*ANCHOR_FILES, MANIFEST)
    )


def main() -> None:
    args = parse_args()
    scene = load_scene(args.target)
    preset = load_preset(args.weights)
    args.prompt = pad_prompts(args.prompt, len(scene.arcs) + 1)
    args.dtype = args.dtype or preset.dtype
    size = anchor_size(args, preset, scene)
    lora_files = find_lora(args.loras, args.pfix, args.epoch)
    device = resolve_device(args.device)
    run = open_anchor_run(args, result_arguments(args, scene, size, lora_files))
    if run.finished:
        require_same_weights(run, args, preset, FLUX_STAGE)
        print(f"{run.folder} is finished")
        return
    paths = locate(args, preset, FLUX_STAGE)
    draw_anchors(args, preset, scene, size, run, device, paths, lora_files)
    print(run.folder)


def draw_anchors(
    args: argparse.Namespace,
    preset: Preset,
    scene: Scene,
    size: tuple[int, int],
    run: Run,
    device: str,
    paths: dict[str, Path],
    lora_files: tuple[Path, Path],
) -> None:
    from tqdm import tqdm

    from models.anchors import AnchorSettings, decode_anchor, encode_warped, sample_anchor, warp_anchor
    from models.latents import draw_noise, to_signed
    from models.loading import DTYPES, component_config, encode_flux_prompts, load_flux, place_flux
    from models.lora import check_lora, load_lora, lora_rank
    from models.memory import lossy, settle_memory
    from models.plans import plan_anchors

    names = ("flux_transformer", "controlnet")
    states = [check_lora(f, component_config(n, paths[n])) for f, n in zip(lora_files, names, strict=True)]
    dtype, length = DTYPES[args.dtype], preset.max_sequence_length
    plan = plan_anchors(paths, size, lora_rank(states[0]), length, dtype, device)
    kept = settle_memory("anchors", plan, args.memory, device)
    texts = encode_flux_prompts(paths["flux_text"], [*args.prompt, args.neg_prompt], device, dtype, length)
    models = load_flux(paths, device, dtype)
    for model, state in zip((models.transformer, models.controlnet), states, strict=True):
        load_lora(model, state, args.lora_weight)
    place_flux(models, kept)

    settings = AnchorSettings(
        args.num_steps,
        args.guidance,
        args.true_gs,
        args.timestep_to_start_cfg,
        args.control_weight,
        args.num_replacement,
    )
    run.begin(weights=weight_hashes(paths) | lossy(kept), scene=str(args.target.resolve()))
    width, height = size
    noise_of = lambda k: draw_noise((1, 16, height // 8, width // 8), args.seed + k * args.use_else_noise)  # noqa: E731
    with tqdm(total=(len(scene.arcs) + 1) * args.num_steps, desc="anchors", unit="step") as progress:
        for k, edge_path in enumerate(scene.anchor_edge_paths):
            if anchor_path(run.folder, k).exists():
                progress.update(args.num_steps)
                continue
            control = to_signed(resize_edges(read_image(edge_path), width, height))[None]
            replacement = None
            if k:
                previous = read_image(anchor_path(run.folder, k - 1))
                code = read_map(scene.arcs[k - 1].corres_end_path)
                warped, mask = warp_anchor(previous, code, preset.mask_dilations)
                # The reference's posterior draw is the first after seeding the previous anchor: its noise, bit for
                # bit.
                replacement = encode_warped(models, warped, mask, noise_of(k - 1))
                write_image(warped_path(run.folder, k), warped)
                write_image(mask_path(run.folder, k), 255 * mask)
            latents = sample_anchor(
                models,
                noise_of(k),
                control,
                texts[args.prompt[k]],
                texts[args.neg_prompt],
                settings,
                replacement,
                on_step=lambda step: progress.update(),
            )
            write_image(anchor_path(run.folder, k), decode_anchor(models, latents))
            run.save()
    write_image(run.folder / CONTACT_SHEET, anchor_sheet(scene, run.folder))
    run.finish()


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
