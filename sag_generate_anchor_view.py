"""Sparse anchor views: the first and last frame of every arc, in the reference's style (stage 2).

    python sag_generate_anchor_view.py --epoch 400 --target assets/sampleA --pfix NAME --num_replacement 12

Writes image_00.png … into SCENE/multiviews/<run>/, with the warped previous anchor and its mask beside each. Anchors
depend on the one before, so they are drawn in order; the same command continues an interrupted run.

    accelerate launch --num_processes 4 sag_generate_anchor_view.py --target SCENE_A SCENE_B --pfix X Y --seed 1 2 …

draws every scene in every style from every seed. The files do not depend on the number of processes that share them.

    python sag_generate_anchor_view.py … --seed 7 --redo 2 --redo_seed 8      # or --use_picture 2=retouched.png

draws anchor 2 of a finished run anew, or puts a picture in its place, and leaves the others as they are.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from models.flags import (
    add_attention_flag,
    add_compile_flag,
    add_lora_flag,
    add_memory_flags,
    add_overwrite_flag,
    resolve_device,
)
from models.foreign import require_flux
from models.precision import automatic_precision, settle_precision
from models.settings import AnchorSettings
from models.weights import FLUX_STAGE, Preset, add_weight_flags, load_preset, locate, require_same_weights
from utils.cli import (
    Arguments,
    InputError,
    Parser,
    add_settings,
    folder_name,
    heavy_imports,
    non_negative_int,
    positive_int,
    prompt_text,
    run_script,
    seed,
    seed_or_draw,
    settings_of,
)
from utils.correspondence import read_map
from utils.edges import resize_edges
from utils.files import files_sha256
from utils.images import contact_sheet, read_image, resize_image, write_image
from utils.layout import (
    ANCHOR_FILES,
    CONTACT_SHEET,
    MULTIVIEWS,
    Scene,
    anchor_latents_path,
    anchor_path,
    anchor_run_name,
    find_lora,
    load_scene,
    lora_sources,
    mask_path,
    pad_prompts,
    warped_path,
)
from utils.runs import MANIFEST, Run, draw_seed, find_unfinished, is_first_process, open_run, require_distinct
from utils.scene.carry import carry_to_anchor
from utils.scene.scene_geometry import SceneGeometry, load_scene_geometry

if TYPE_CHECKING:
    import torch

    from models.flux.anchors import AnchorStage

MOST_STRETCH = 0.02  # of the aspect, before it is noted; sides are rounded down to multiples of 16 pixels


@dataclass
class AnchorJob:
    """The anchors of one scene in one style from one seed. pfix: name of the LoRA. size: width, height in pixels.

    geometry: of the scene, at that size, where all anchors guide one another. redo: anchors to draw anew.
    pictures: {anchor: what takes its place}, uint8 [H, W, 3] of any size.
    """

    scene: Scene
    pfix: str
    size: tuple[int, int]
    seed: int
    prompts: list[str]
    run: Run
    geometry: SceneGeometry | None = None
    redo: Sequence[int] = ()
    pictures: Mapping[int, np.ndarray] = field(default_factory=dict)


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    parser = Parser(__doc__)
    add, where = parser.add_argument, partial(parser.add_argument, decides=False)
    where("--target", type=Path, nargs="+", required=True, metavar="SCENE", help="scene folders with arc0, arc1, …")
    add("--pfix", type=folder_name, nargs="+", required=True, metavar="NAME", help="names of LoRAs, all of one rank")
    add("--epoch", type=positive_int, default=400, help="training step of the LoRA's checkpoint")
    add_lora_flag(parser)
    where("--loras", type=Path, default=Path("loras"), help="folder of all LoRAs")
    add(
        "--prompt",
        type=prompt_text,
        nargs="+",
        default=[""],
        help="prompt of each anchor; the last one serves the rest (default: empty)",
    )
    add(
        "--seed",
        type=seed_or_draw,
        nargs="+",
        default=[-1],
        help="noise seeds; -1 continues the newest unfinished run, else draws one, for each scene and LoRA",
    )
    add("--width", type=positive_int, help="pixels (default: the weights' preset, else the edge frames' width)")
    add("--height", type=positive_int, help="pixels (default: the weights' preset, else the edge frames' height)")
    where("--output_dir", type=Path, help="folder to put the run into (default: SCENE/multiviews)")
    where("--first", type=positive_int, metavar="N", help="draw the first N anchors only, for an early look")
    where(
        "--redo", type=non_negative_int, nargs="+", default=[], metavar="K", help="anchors of a finished run, from 0"
    )
    where("--redo_seed", type=seed, help="noise seed of these (default: the run's, plus 1)")
    where("--redo_prompt", type=prompt_text, help="prompt of these (default: their own)")
    where("--use_picture", type=picture_choice, nargs="+", default=[], metavar="K=FILE", help="a picture as anchor K")
    add_settings(parser, AnchorSettings)
    add_overwrite_flag(parser)
    add_attention_flag(parser)
    add_compile_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, FLUX_STAGE)
    return parser.parse_args(argv)


def picture_choice(text: str) -> tuple[int, Path]:
    """K=FILE"""
    number, equals, path = text.partition("=")
    if not (equals and path and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not K=FILE, such as 2=retouched.png")
    return int(number), Path(path)


def anchor_size(args: Arguments, preset: Preset, scene: Scene) -> tuple[int, int]:
    """(width, height) in pixels. The edge frames' size is rounded down, as in the reference; a given size must fit."""
    multiple = preset.image_multiple
    for name in ("width", "height"):
        given = getattr(args, name)
        if given and given % multiple:
            raise InputError(f"--{name} {given}: these weights need a multiple of {multiple}")
    default = preset.anchor_size(scene.edge_size)
    size = (args.width or default[0], args.height or default[1])
    if min(size) < multiple:
        raise InputError(
            f"anchors of {size[0]}x{size[1]} are too small: these weights need {multiple} pixels at least"
        )
    note_stretch(f"the edges of {scene.folder}", scene.edge_size, size)
    return size


def note_stretch(what: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Say that a picture will be stretched, if it will."""
    if abs(wanted[0] * size[1] / (wanted[1] * size[0]) - 1) > MOST_STRETCH:
        print("note: {}: {}x{} is stretched to {}x{}".format(what, *size, *wanted), file=sys.stderr)


def result_arguments(
    args: Arguments, scene: Scene, pfix: str, prompts: list[str], size: tuple[int, int], loras: Sequence[Path]
) -> dict:
    """The arguments, and hashes of the files, that decide the pictures, except the seed."""
    hashes = {"scene_sha256": files_sha256(scene.anchor_inputs), "loras_sha256": files_sha256(loras)}
    hashes["lora"] = [{"sha256": files_sha256(lora_sources(path)), "weight": weight} for path, weight in args.lora]
    if args.sources == "all":
        hashes["geometry_sha256"] = files_sha256(scene.geometry_paths)
    return args.identity() | {"pfix": pfix, "prompt": prompts, "width": size[0], "height": size[1]} | hashes


def open_job(args: Arguments, preset: Preset, scene: Scene, pfix: str, loras: Sequence[Path], seed: int) -> AnchorJob:
    """Continue or begin the run of one scene, LoRA and seed. Raises InputError for unusable input."""
    prompts, size = pad_prompts(args.prompt, len(scene.arcs) + 1), anchor_size(args, preset, scene)
    geometry = load_scene_geometry(scene, size, "--sources all") if args.sources == "all" else None
    arguments = result_arguments(args, scene, pfix, prompts, size, loras)
    automatic = automatic_precision(args, preset.dtype, resolve_device(args.device))
    parent = args.output_dir or scene.folder / MULTIVIEWS
    if seed < 0:
        unfinished = find_unfinished(parent, arguments, "seed", automatic, args.defaults())
        seed = draw_seed() if unfinished is None else unfinished
        print(f"seed {seed}" + ("" if unfinished is None else ", continuing an unfinished run"))
    name = anchor_run_name(pfix, prompts, args.epoch, seed, args.num_replacement)
    # Videos of these anchors have their own folders, which stay when the anchors are drawn again.
    run = open_run(
        parent / name,
        arguments | {"seed": seed},
        overwrite=args.overwrite,
        automatic=automatic,
        owned=(*ANCHOR_FILES, MANIFEST),
        defaults=args.defaults(),
    )
    return AnchorJob(scene, pfix, size, seed, prompts, run, geometry)


def choose_anew(args: Arguments, job: AnchorJob) -> None:
    """Set up a finished run for --redo and --use_picture. Raises InputError for anchors that it does not have."""
    count = len(job.prompts)
    chosen = [*args.redo, *(k for k, _ in args.use_picture)]
    if len({*chosen}) < len(chosen) or max(chosen) >= count:
        raise InputError(f"--redo, --use_picture {chosen}: each anchor once, of 0 to {count - 1}")
    if not all(anchor_path(job.run.folder, k).exists() for k in range(count)):
        raise InputError(f"{job.run.folder} is not finished: give the command without --redo and --use_picture first")
    job.redo = sorted(args.redo)
    for k, path in args.use_picture:
        job.pictures[k] = read_image(path)
        note_stretch(f"anchor {k}: {path}", job.pictures[k].shape[1::-1], job.size)
    job.seed = job.seed + 1 if args.redo_seed is None else args.redo_seed
    for k in args.redo if args.redo_prompt is not None else ():
        job.prompts[k] = args.redo_prompt


def use_pictures(job: AnchorJob) -> None:
    for k, picture in job.pictures.items():
        write_image(anchor_path(job.run.folder, k), resize_image(picture, *job.size))
    redone = {k: how for k, how in job.run.manifest.get("redone", {}).items() if int(k) not in job.pictures}
    job.run.save(pictures=sorted({*job.run.manifest.get("pictures", []), *job.pictures}), redone=redone)
    write_image(job.run.folder / CONTACT_SHEET, anchor_sheet(job.scene, job.run.folder))


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
    if not args.redo and (args.redo_seed, args.redo_prompt) != (None, None):
        raise InputError("--redo_seed and --redo_prompt go with --redo")
    if args.redo or args.use_picture:
        if len(jobs) > 1 or args.seed == [-1] or args.overwrite:
            raise InputError("--redo and --use_picture go with one scene, LoRA and --seed, and without --overwrite")
        choose_anew(args, jobs[0])
        if not args.redo and is_first_process():
            use_pictures(jobs[0])
    for job in jobs:
        if job.redo:
            continue
        if job.run.finished and is_first_process():
            require_same_weights(job.run, args, preset, FLUX_STAGE)
            print(f"{job.run.folder} is finished")
    unfinished = [job for job in jobs if job.redo or not job.run.finished]
    if unfinished:
        settle_precision(args, [job.run for job in unfinished])
        draw_anchors(args, preset, unfinished, loras)
    for job in unfinished if is_first_process() else ():
        print(job.run.folder)


def draw_anchors(
    args: Arguments, preset: Preset, jobs: list[AnchorJob], loras: Mapping[str, tuple[Path, Path]]
) -> None:
    """Draw all missing anchors, divided among the processes. loras: {pfix: its two LoRA files}."""
    with heavy_imports():
        from models.flux.anchors import AnchorStage
        from models.flux.lora import read_loras
        from models.flux.other_loras import read_other_lora
        from models.loading.fit import require_fit
        from models.loading.networks import component_config
        from models.runtime.memory import look_up_plan
        from models.runtime.runtime import first_here, open_runtime

    paths = first_here(args, partial(locate, args, preset, FLUX_STAGE))
    require_flux(paths, args.control_mode)
    require_fit(paths)
    configs = [component_config(name, paths[name]) for name in ("flux_transformer", "controlnet")]
    added = {"lora": [str(path) for path, _ in args.lora]} if args.lora else {}
    others = [read_other_lora(*lora, configs[0]) for lora in args.lora]
    states = read_loras({job.pfix: loras[job.pfix] for job in jobs}, configs)
    prompts = [prompt for job in jobs for prompt in job.prompts]
    guided = args.true_gs != 1 and {*prompts} != {args.neg_prompt}
    pixels = max(width * height for width, height in (job.size for job in jobs))
    plan = look_up_plan(preset.name, "anchors", pixels=pixels, batch=1 + guided)
    runtime = open_runtime(args, preset, "anchors", plan)
    weights = runtime.weight_identity(paths)
    for job in jobs:
        job.run.require_begun_with(weights)
    with runtime.advise_on_oom():
        stage = AnchorStage(runtime, paths, states, prompts, settings_of(AnchorSettings, args), others)
        mine = runtime.share(jobs)
        steps = sum(len(job.redo or job.prompts[: args.first]) for job in mine) * args.num_steps
        with tqdm(total=steps, desc="anchors", unit="step", disable=not runtime.is_main) as progress:
            for job in mine:
                stage.put_on(job.pfix)
                noted = {"lora_folder": str(loras[job.pfix][0].parents[1].resolve())}
                job.run.begin(weights=weights, scene=str(job.scene.folder.resolve()), **noted, **added)
                if job.pictures:
                    use_pictures(job)
                draw_job(stage, job, progress, args.first)
    runtime.wait()


def draw_job(stage: "AnchorStage", job: AnchorJob, progress: tqdm, first: int | None = None) -> None:
    """Draw all anchors of one scene, in order, and their contact sheet; the `first` only, if given, without one."""
    from models.latents import find_or_make

    for k in job.redo or range(len(job.prompts[:first])):
        end = progress.n + stage.settings.num_steps
        path, kept = anchor_path(job.run.folder, k), anchor_latents_path(job.run.folder, k)
        if job.redo:
            kept.unlink(missing_ok=True)  # of another seed
        if job.redo or not path.exists():
            latents = find_or_make(kept, partial(denoise_anchor, stage, job, k, progress))
            write_image(path, stage.decode(latents))
            job.run.save(**(redone(job, k) if job.redo else {}))
        kept.unlink(missing_ok=True)
        progress.update(end - progress.n)
    if not job.redo and first and first < len(job.prompts):
        return
    write_image(job.run.folder / CONTACT_SHEET, anchor_sheet(job.scene, job.run.folder))
    job.run.finish()


def redone(job: AnchorJob, k: int) -> dict:
    """What the manifest says after anchor k was drawn anew: how, and that no picture is in its place any more."""
    noted = job.run.manifest
    how = {str(k): {"seed": job.seed, "prompt": job.prompts[k]}}
    return {"redone": noted.get("redone", {}) | how, "pictures": [p for p in noted.get("pictures", []) if p != k]}


def denoise_anchor(stage: "AnchorStage", job: AnchorJob, k: int, progress: tqdm) -> "torch.Tensor":
    """Denoise anchor k; returns latents [1, 16, h, w]. Writes the warped previous anchor and its mask."""
    from models.flux.anchors import Anchor

    folder = job.run.folder
    edges = resize_edges(read_image(job.scene.anchor_edge_paths[k]), *job.size)
    before, carried = (), None
    if job.geometry:
        carried = carry_others(job, k)
    elif k:
        before = read_image(anchor_path(folder, k - 1)), read_map(job.scene.arcs[k - 1].corres_end_path)
    anchor = Anchor(k, edges, job.prompts[k], job.seed, *before, carried=carried)
    drawn = stage.draw(anchor, on_step=lambda step: progress.update())
    if drawn.warped is not None:
        write_image(warped_path(folder, k), drawn.warped)
        write_image(mask_path(folder, k), 255 * drawn.mask)
    return drawn.latents


def carry_others(job: AnchorJob, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """All anchors that are there, carried to anchor k: the picture and where they are seen; None if there are none."""
    paths = {j: anchor_path(job.run.folder, j) for j in range(len(job.prompts)) if j != k}
    there = {j: read_image(path) for j, path in paths.items() if path.exists()}
    return carry_to_anchor(job.geometry.caster, job.geometry.views, there, k)


def anchor_sheet(scene: Scene, folder: Path):
    """Edges, warped previous anchor, mask and anchor, one column per anchor."""
    ks = range(len(scene.arcs) + 1)
    edges = [read_image(path) for path in scene.anchor_edge_paths]
    blank = 0 * read_image(anchor_path(folder, 0))
    warped = [read_image(path) if (path := warped_path(folder, k)).exists() else blank for k in ks]
    masks = [read_image(path) if (path := mask_path(folder, k)).exists() else blank + 255 for k in ks]
    anchors = [read_image(anchor_path(folder, k)) for k in ks]
    return contact_sheet(
        [("edges", edges), ("previous anchor, warped", warped), ("mask: white is free", masks), ("anchors", anchors)]
    )


if __name__ == "__main__":
    run_script(main)
