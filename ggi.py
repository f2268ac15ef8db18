"""Geometry-guided in-betweening: the frames between the anchors, as a video (stage 3).

    python ggi.py --target assets/sampleA/multiviews/RUN

RUN is a folder that sag_generate_anchor_view.py wrote. Writes RUN/d0.5_e1350_n30/{0000.png …, video.mp4}: 46 numbered
frames per arc; the video shows the frame that two arcs share once; index.html beside it shows them in a browser. The
same command continues an interrupted run.

    accelerate launch --num_processes 4 ggi.py --target RUN_A RUN_B … [--no-chain]

divides runs among processes, or single arcs with --no-chain; the files do not depend on the number of processes.
"""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from models.flags import add_attention_flag, add_compile_flag, add_memory_flags, add_overwrite_flag, resolve_device
from models.inbetween.backbones import BACKBONES, Paths, add_backbone_flag
from models.precision import automatic_precision, settle_precision
from models.settings import carries, check_carrying
from models.weights import Preset, add_weight_flags, caption_source, locate, require_same_weights
from utils.cli import (
    Arguments,
    InputError,
    Parser,
    heavy_imports,
    positive_int,
    prompt_text,
    run_script,
)
from utils.files import files_sha256
from utils.images import find_ffmpeg, picture_size, read_image, write_image
from utils.layout import (
    ARC_FRAMES,
    CONTACT_SHEET,
    VIDEO_FILE,
    Arc,
    Scene,
    chain_path,
    find_anchors,
    find_scene,
    latents_path,
    load_scene,
)
from utils.noise import load_or_make_noise
from utils.runs import Run, is_first_process, open_run, require_distinct, warn_of_another_scene
from utils.scene.carry import CarriedVideo, anchors_for_arc, carry_to_arc
from utils.scene.scene_geometry import load_scene_geometry, missing_geometry
from utils.videos.page import INDEX
from utils.videos.run import VideoJob, arcs_to_refill, finish_video, is_done, make_page, save_arc

if TYPE_CHECKING:
    from models.inbetween.stage import ArcInputs, InbetweenStage


def parse_args(argv: Sequence[str] | None = None) -> Arguments:
    parser = Parser(__doc__)
    add, where = parser.add_argument, partial(parser.add_argument, decides=False)
    backbone = add_backbone_flag(parser, argv)
    where(
        "--target",
        type=Path,
        nargs="+",
        required=True,
        metavar="RUN",
        help="run folders with the anchors image_00.png …; several are shared among the processes",
    )
    where(
        "--scene", type=Path, help="scene folder (default: the one that RUN lies in, else the one RUN was drawn for)"
    )
    add(
        "--prompt",
        type=prompt_text,
        help="what the video shows; may be empty (default: a caption of the first anchor by BLIP-2)",
    )
    add("--caption_model", metavar="REPO|PATH", help="BLIP-2 for the caption (default: Salesforce/blip2-opt-2.7b)")
    add("--width", type=positive_int, help="pixels (default: the weights' preset)")
    add("--height", type=positive_int, help="pixels (default: the weights' preset)")
    add(
        "--num_frames", type=positive_int, help="frames of the model per arc, padding included (default: the preset's)"
    )
    where("--fps", type=positive_int, default=12, help="frames per second of video.mp4")
    where("--output_dir", type=Path, help="folder to put the video's folder into (default: RUN)")
    backbone.add_flags(parser)
    add_overwrite_flag(parser)
    add_attention_flag(parser)
    add_compile_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, backbone.components)
    return parser.parse_args(argv)


def check_anchors(anchors: Sequence[Path]) -> None:
    """Raise InputError unless all anchors are readable and have one size."""
    shapes = [read_image(path).shape for path in anchors]
    for path, shape in zip(anchors, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(
                f"{path} is {shape[1]}x{shape[0]}, {anchors[0]} {shapes[0][1]}x{shapes[0][0]}: draw them again"
            )


def result_arguments(args: Arguments, scene: Scene, noises: Sequence[np.ndarray | None]) -> dict:
    """The arguments, and hashes of the inputs, that decide the video."""
    own = BACKBONES[args.backbone].inputs(args, scene)
    if noises[0] is not None:
        own["noise_sha256"] = hashlib.sha256(np.stack(noises)).hexdigest()
    geometry = {"geometry_sha256": files_sha256(scene.geometry_paths)} if carries(args) else {}
    return args.identity() | {"edges_sha256": files_sha256(scene.edge_paths), **own, **geometry}


def open_job(args: Arguments, preset: Preset, target: Path) -> VideoJob:
    """Read the anchors' folder `target` and open its video's run. Raises InputError for unusable input."""
    if not target.is_dir():
        raise InputError(f"run folder {target} does not exist: give one that sag_generate_anchor_view.py wrote")
    scene = load_scene(args.scene or find_scene(target))
    warn_of_another_scene(target, scene)
    anchors = find_anchors(target, len(scene.arcs) + 1)
    check_anchors(anchors)
    if carries(args) and (missing := missing_geometry(scene)):
        raise InputError(
            f"{scene.folder} has no {missing}, which --num_replacement, --composite and --colour_match need"
        )
    backbone, latent_size = BACKBONES[args.backbone], (args.width // 8, args.height // 8)
    folder = (args.output_dir or target) / backbone.run_name(args)
    takes_noise = backbone.takes_noise(args)
    noises = [load_or_make_noise(arc, latent_size) if takes_noise else None for arc in scene.arcs]
    arguments = result_arguments(args, scene, noises)
    automatic = automatic_precision(args, preset.dtype, resolve_device(args.device))
    anchors_hash = {"anchors_sha256": files_sha256(anchors)}  # compared one by one below
    run = open_run(
        folder, arguments, overwrite=args.overwrite, automatic=automatic | anchors_hash, defaults=args.defaults()
    )
    if refill := arcs_to_refill(run, anchors):
        print(f"note: anchors were replaced: arcs {', '.join(map(str, refill))} of {folder} are filled again")
        run.manifest["finished"] = False
    prompt = args.prompt if args.prompt is not None else run.manifest.get("prompt")
    geometry = None
    if carries(args) and not run.finished:
        geometry = load_scene_geometry(scene, (args.width, args.height), "carrying the anchors")
    return VideoJob(scene, anchors, noises, run, prompt, geometry, refill)


def first_edge_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """(width, height) in pixels of the first scene's edges; None if it has none."""
    first = Arc(0, (args.scene or find_scene(args.target[0])) / "arc0").edge_paths[0]
    return picture_size(first) if first.is_file() else None


def prepare(args: Arguments, edge_size: tuple[int, int] | None = None) -> tuple[Preset, Paths]:
    """Check all that the anchors do not decide; fills in sizes. Returns the preset and files beside the components.

    edge_size: (width, height) in pixels of the edges, where there are none yet.
    """
    find_ffmpeg()  # needed at the end: told at the start
    backbone = BACKBONES[args.backbone]
    preset = backbone.preset(args)
    width, height = backbone.size(preset, edge_size or first_edge_size(args))
    args.width, args.height = args.width or width, args.height or height
    args.num_frames = args.num_frames or preset.num_frames
    if len(args.target) > 1 and (args.output_dir or args.scene):
        raise InputError("--output_dir and --scene go with a single --target")
    beside = backbone.check(args, preset)
    check_carrying(args)
    return preset, beside


def main() -> None:
    args = parse_args()
    preset, beside = prepare(args)
    jobs = [open_job(args, preset, target) for target in args.target]
    require_distinct([job.run for job in jobs])
    for job in jobs:
        if job.run.finished and is_first_process():
            require_same_weights(job.run, args, preset, BACKBONES[args.backbone].components, **beside)
    unfinished = [job for job in jobs if not job.run.finished]
    if unfinished:
        settle_precision(args, [job.run for job in unfinished])
        fill_arcs(args, preset, unfinished, beside)
    for job in jobs if is_first_process() else ():
        if job.run.finished and job.run.manifest.get("fps") == args.fps:
            print(f"{job.run.folder} is finished")
            if not (job.run.folder / INDEX).exists():
                make_page(job, args.fps)
        else:
            finish_video(job, args.fps, carried_frames(job, args.sources) if job.geometry else None)
        print_results(job.run)


def fill_arcs(args: Arguments, preset: Preset, jobs: list[VideoJob], beside: Paths) -> None:
    """Generate all missing arcs, divided among the processes. beside: from `prepare`."""
    with heavy_imports():
        from models.inbetween.stage import caption_image
        from models.runtime.runtime import first_here, open_runtime

    backbone = BACKBONES[args.backbone]
    uncaptioned = [job for job in jobs if job.prompt is None]
    caption_model = first_here(args, partial(caption_source, args.caption_model)) if uncaptioned else None
    paths = first_here(args, partial(locate, args, preset, backbone.components)) | beside
    backbone.check_networks(paths)
    runtime = open_runtime(args, preset, backbone.stage, backbone.plan(args, preset, paths))
    with runtime.advise_on_oom():
        for job in uncaptioned:  # the same in every process, because sampling is seeded
            anchor = read_image(job.anchors[0])
            job.prompt = caption_image(anchor, caption_model, runtime.device, runtime.dtype, args.seed)
        prompts = [job.prompt for job in jobs]
        stage = backbone.open_stage(runtime, paths, prompts, args)
        weights = runtime.weight_identity(paths)
        if runtime.is_main:
            for job in jobs:
                job.begin(weights=weights, prompt=job.prompt, scene=str(job.scene.folder.resolve()))
        runtime.wait()
        fill_shares(stage, runtime.share(share_arcs(jobs, args.chain)))
    runtime.wait()


def fill_shares(stage: "InbetweenStage", shares: Sequence[tuple[VideoJob, list[Arc]]]) -> None:
    """Generate this process's share of the arcs. Files are written while the next arc is denoised."""
    from models.latents import find_or_make

    todo = [(job, arc) for job, arcs in shares for arc in arcs if not is_done(job.run, arc)]
    main = stage.runtime.is_main
    with ThreadPoolExecutor(1) as disk:
        writing: Future | None = None
        for job, arc in tqdm(todo, desc="arcs", unit="arc", disable=not main):
            path = latents_path(job.run.folder, arc.index)
            inputs = arc_inputs(stage, job, arc)
            frames = stage.decode(find_or_make(path, lambda inputs=inputs: stage.denoise(inputs)))
            write_image(chain_path(job.run.folder, arc.index + 1), frames[-1])
            frames = stage.finish(frames[:ARC_FRAMES], inputs)
            if writing:
                writing.result()  # at most one arc's frames wait for the disk
            writing = disk.submit(save, job, arc, frames, main)
        if writing:
            writing.result()


def save(job: VideoJob, arc: Arc, frames: np.ndarray, main: bool) -> None:
    save_arc(job.run, arc, frames)
    if main:
        job.run.save()


def share_arcs(jobs: Sequence[VideoJob], chain: bool) -> list[tuple[VideoJob, list[Arc]]]:
    """Units of work for one process each: all arcs of a run if they are chained, otherwise single arcs."""
    if chain:
        return [(job, list(job.scene.arcs)) for job in jobs]
    return [(job, [arc]) for job in jobs for arc in job.scene.arcs]


def arc_inputs(stage: "InbetweenStage", job: VideoJob, arc: Arc) -> "ArcInputs":
    """An arc's two end pictures, edges (or another control) and noise."""
    from models.inbetween.stage import ArcInputs

    chained = stage.settings.chain and arc.index
    start = chain_path(job.run.folder, arc.index) if chained else job.anchors[arc.index]
    carried = carry_to(arc, job, stage.settings.sources) if job.geometry else None
    return ArcInputs(
        arc.index,
        read_image(start),
        read_image(job.anchors[arc.index + 1]),
        stage.read_control(arc),
        job.noises[arc.index],
        job.prompt,
        carried,
    )


def carry_to(arc: Arc, job: VideoJob, sources: str) -> CarriedVideo:
    """The arc's two anchors, or all, carried to its frames."""
    numbers = anchors_for_arc(arc.index, sources, len(job.anchors))
    anchors = {k: read_image(job.anchors[k]) for k in numbers}
    return carry_to_arc(job.geometry.caster, job.geometry.views, anchors, arc.index)


def carried_frames(job: VideoJob, sources: str) -> Iterator[np.ndarray]:
    """The anchors carried to every frame of the video, those that two arcs share once."""
    for arc in job.scene.arcs:
        yield from carry_to(arc, job, sources).frames[bool(arc.index) :]


def print_results(run: Run) -> None:
    print(run.folder / VIDEO_FILE)
    print(run.folder / CONTACT_SHEET)


if __name__ == "__main__":
    run_script(main)
