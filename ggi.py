"""Geometry-guided in-betweening: the frames between the anchors, as a video (stage 3).

    python ggi.py --target assets/sampleA/multiviews/RUN

RUN is a folder that sag_generate_anchor_view.py wrote. Writes RUN/d0.5_e1350_n30/{0000.png …, video.mp4}: 46 numbered
frames per arc; the video shows the frame that two arcs share once. The same command continues an interrupted run.

    accelerate launch --num_processes 4 ggi.py --target RUN_A RUN_B … [--no-chain]

shares runs among processes, and with --no-chain single arcs; the files do not depend on how many there are.
"""

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from models.flags import add_attention_flag, add_compile_flag, add_memory_flags, resolve_device
from models.precision import automatic_precision, report_precision, settle_precision
from models.weights import (
    EPOCH,
    GGI_STAGE,
    Preset,
    add_weight_flags,
    caption_source,
    find_inbetween,
    load_preset,
    locate,
    require_same_weights,
    weight_hashes,
)
from utils.background import Beside
from utils.cli import (
    InputError,
    Parser,
    guidance_float,
    heavy_imports,
    positive_float,
    positive_int,
    run_script,
    seed,
    unit_float,
)
from utils.edges import resize_edges
from utils.files import files_sha256, read_json
from utils.images import read_image, resize_image, write_image
from utils.layout import (
    CONTACT_SHEET,
    LATENT_FRAMES,
    VIDEO_FILE,
    Arc,
    Scene,
    chain_path,
    edge_frame_indices,
    find_anchors,
    find_scene,
    latents_path,
    load_scene,
    video_run_name,
)
from utils.noise import blend_noise, load_or_make_noise
from utils.runs import Run, derive_seed, is_first_process, open_run, require_distinct
from utils.video_run import Job, finish_video, is_done, save_arc


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--target",
        type=Path,
        nargs="+",
        required=True,
        metavar="RUN",
        help="run folders with the anchors image_00.png …; several are shared among the processes",
    )
    add("--scene", type=Path, help="scene folder (default: the one that RUN lies in, else the one RUN was drawn for)")
    add("--prompt", help="what the video shows; may be empty (default: a caption of the first anchor by BLIP-2)")
    add("--caption_model", metavar="REPO|PATH", help="BLIP-2 for the caption (default: Salesforce/blip2-opt-2.7b)")
    add("--model_path", type=Path, help="folder with checkpoint-<epoch>/transformer (default: checkpoints for full)")
    add("--epoch", type=positive_int, default=EPOCH, help="training step of the in-between transformer")
    add(
        "--degradation",
        type=unit_float,
        default=0.5,
        help="share of fresh noise: 0 keeps the warped noise, 1 drops it",
    )
    add("--num_inference_steps", type=positive_int, default=30, help="DDIM steps")
    add("--guidance_scale", type=guidance_float, default=6.0, help="classifier-free guidance scale; 1 switches it off")
    add("--width", type=positive_int, help="pixels (default: the weights' preset)")
    add("--height", type=positive_int, help="pixels (default: the weights' preset)")
    add(
        "--num_frames", type=positive_int, help="frames of the model per arc, padding included (default: the preset's)"
    )
    add("--fps", type=positive_int, default=12, help="frames per second of video.mp4")
    add("--seed", type=seed, default=43, help="seed of fresh noise and of the VAE's draws")
    add(
        "--chain",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start each arc from the last generated frame of the one before (default); --no-chain: from its anchor",
    )
    add("--output_dir", type=Path, help="folder to put the video's folder into (default: RUN)")
    add("--overwrite", action="store_true", help="replace a video of this name that was made with other arguments")
    add(
        "--cache",
        type=positive_float,
        metavar="THRESHOLD",
        help="skip most of a step that changes the first block's output by less than this share, such as 0.1: faster, "
        "a little different (default: off)",
    )
    add_attention_flag(parser)
    add_compile_flag(parser)
    add_memory_flags(parser)
    add_weight_flags(parser, GGI_STAGE)
    return parser.parse_args()


def check_anchors(anchors: Sequence[Path]) -> None:
    """Raise InputError unless all anchors are readable and of one size."""
    shapes = [read_image(path).shape for path in anchors]
    for path, shape in zip(anchors, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(
                f"{path} is {shape[1]}x{shape[0]}, {anchors[0]} {shapes[0][1]}x{shapes[0][0]}: draw them again"
            )


def check_size(args: argparse.Namespace, config: dict) -> None:
    """Refuse sizes that the transformer cannot do. config: its config.json."""
    if config.get("in_channels") != 48:
        raise InputError(f"the transformer has {config.get('in_channels')} input channels; in-betweening needs 48")
    frames = (LATENT_FRAMES - 1) * config["temporal_compression_ratio"] + 1
    if args.num_frames != frames:
        raise InputError(
            f"--num_frames {args.num_frames}: an arc has {LATENT_FRAMES} latent frames, which are {frames}"
        )
    trained = (8 * config["sample_width"], 8 * config["sample_height"])
    if config["use_learned_positional_embeddings"] and (args.width, args.height) != trained:
        raise InputError(
            f"{args.width}x{args.height}: these weights have learned positions for {trained[0]}x{trained[1]}"
        )
    if args.width % 16 or args.height % 16:
        raise InputError(f"{args.width}x{args.height}: width and height must be multiples of 16")


def result_arguments(
    args: argparse.Namespace, scene: Scene, anchors: Sequence[Path], noises: Sequence[np.ndarray]
) -> dict:
    """What decides the video: arguments, and inputs by their content. Where it is made and put does not."""
    elsewhere = {"output_dir", "overwrite", "device", "memory", "scene", "target", "fps"}
    chosen = {key: value for key, value in vars(args).items() if key not in elsewhere}
    edges = [path for arc in scene.arcs for path in arc.edge_paths]
    return chosen | {
        "anchors_sha256": files_sha256(anchors),
        "edges_sha256": files_sha256(edges),
        "noise_sha256": hashlib.sha256(np.stack(noises)).hexdigest(),
    }


def open_job(args: argparse.Namespace, preset: Preset, target: Path) -> Job:
    """Read what `target` holds and open its video's run. Raises InputError for what cannot be used."""
    if not target.is_dir():
        raise InputError(f"run folder {target} does not exist: give one that sag_generate_anchor_view.py wrote")
    scene = load_scene(args.scene or find_scene(target))
    anchors = find_anchors(target, len(scene.arcs) + 1)
    check_anchors(anchors)
    folder = (args.output_dir or target) / video_run_name(args.degradation, args.epoch, args.num_inference_steps)
    noises = [load_or_make_noise(arc, (args.width // 8, args.height // 8)) for arc in scene.arcs]
    automatic = automatic_precision(args, preset.dtype, resolve_device(args.device))
    arguments = result_arguments(args, scene, anchors, noises)
    run = open_run(folder, arguments, overwrite=args.overwrite, automatic=automatic)
    prompt = args.prompt if args.prompt is not None else run.manifest.get("prompt")
    return Job(scene, anchors, noises, run, prompt)


def main() -> None:
    args = parse_args()
    preset = load_preset(args.weights)
    args.width, args.height = args.width or preset.video_size[0], args.height or preset.video_size[1]
    args.num_frames = args.num_frames or preset.num_frames
    if len(args.target) > 1 and (args.output_dir or args.scene):
        raise InputError("--output_dir and --scene go with a single --target")
    transformer = find_inbetween(preset, args.model_path, args.epoch)
    check_size(args, read_json(transformer / "config.json"))
    jobs = [open_job(args, preset, target) for target in args.target]
    require_distinct([job.run for job in jobs])
    for job in jobs:
        if job.run.finished and is_first_process():
            require_same_weights(job.run, args, preset, GGI_STAGE, transformer=transformer)
    unfinished = [job for job in jobs if not job.run.finished]
    if unfinished:
        settle_precision(args, [job.run for job in unfinished])
        fill_arcs(args, preset, unfinished, transformer)
    for job in jobs if is_first_process() else ():
        if job.run.finished and job.run.manifest.get("fps") == args.fps:
            print(f"{job.run.folder} is finished")
        else:
            finish_video(job, args.fps)
        print_results(job.run)


def fill_arcs(args: argparse.Namespace, preset: Preset, jobs: list[Job], transformer: Path) -> None:
    """Generate every arc that is not there yet, shared among all processes."""
    with heavy_imports():
        from benchmarks.memory.plans import plan_ggi
        from models.inbetween.pipeline import caption_image, encode_video_prompts, load_inbetween
        from models.loading.networks import DTYPES
        from models.runtime.memory import lossy, settle_memory, settle_overlap
        from models.runtime.parallel import open_processes
        from models.runtime.speed import compile_blocks, require_attention, require_compilable

    process, device = open_processes(resolve_device(args.device))
    require_attention(args.attention, device, DTYPES[args.dtype])
    uncaptioned = [job for job in jobs if job.prompt is None]
    with process.local_main_process_first():  # it downloads what is missing
        caption_model = caption_source(args.caption_model) if uncaptioned else None
        paths = locate(args, preset, GGI_STAGE)
    dtype, size, tiling = DTYPES[args.dtype], (args.width, args.height), preset.vae_tiling
    guided = args.guidance_scale != 1 and args.prompt != ""
    plan = plan_ggi(paths, transformer, size, args.num_frames, dtype, device, guided=guided, tiling=tiling)
    mode, kept = settle_memory("ggi", plan, args.memory, device)
    report_precision(args)
    shares, early = share_arcs(jobs, args.chain), ("encoding", "denoising")
    overlap = len(shares) > process.num_processes and settle_overlap(plan[mode], "decoding", early, kept, device)
    if args.compile:
        require_compilable(kept["transformer"])
    for job in uncaptioned:  # alike in every process: its draws are seeded
        job.prompt = caption_image(read_image(job.anchors[0]), caption_model, device, dtype, args.seed)
    length = read_json(transformer / "config.json")["max_text_seq_length"]
    prompts = [*(job.prompt for job in jobs), ""]
    embeds = encode_video_prompts(paths["cogvideox_text"], prompts, device, dtype, length, kept["text"])
    pipe = load_inbetween(paths, transformer, device, dtype, kept, tiling=tiling)
    if args.compile:
        compile_blocks(pipe.transformer)
    hashes = weight_hashes(paths | {"transformer": transformer}) | lossy(kept)
    if process.is_main_process:
        for job in jobs:
            job.run.begin(weights=hashes, prompt=job.prompt, scene=str(job.scene.folder.resolve()))
    process.wait_for_everyone()
    mine = shares[process.process_index :: process.num_processes]
    fill_shares(args, pipe, mine, embeds, device, mode, overlap)
    process.wait_for_everyone()


def fill_shares(
    args: argparse.Namespace,
    pipe,
    mine: list[tuple[Job, list[Arc]]],
    embeds: dict,
    device: str,
    mode: str,
    overlap: bool,
) -> None:
    """Generate what is this process's to do. Files are written while the next arc is denoised.

    embeds: {prompt: [1, T, D]}. mode: of memory. overlap: an arc whose last frame no other waits for is decoded beside
    the next one, too, until that turns out to need more memory than was planned.
    """
    from torch import OutOfMemoryError
    from tqdm import tqdm

    from models.latents import find_or_make
    from models.runtime.memory import naming_smaller_mode
    from models.runtime.parallel import use_own_stream

    first = is_first_process()
    progress = tqdm(total=sum(len(arcs) for _, arcs in mine), desc="arcs", unit="arc", disable=not first)
    undecoded: list[tuple[Job, Arc, object]] = []

    def save(job: Job, arc: Arc, frames: np.ndarray) -> None:
        save_arc(job.run, arc, frames)
        if first:
            job.run.save()
        progress.update()

    def decode_beside(job: Job, arc: Arc, latents) -> None:
        try:
            frames = decode_arc(pipe, job.run, arc, latents)
        except OutOfMemoryError:
            undecoded.append((job, arc, latents))
        else:
            save(job, arc, frames)

    with progress, Beside(use_own_stream(device)) as beside, naming_smaller_mode("ggi", mode):
        for job, arcs in mine:
            for arc in arcs:
                if is_done(job.run, arc):
                    progress.update()
                    continue
                make = partial(denoise_arc, args, pipe, job, arc, embeds[job.prompt], embeds[""])
                path, latents = latents_path(job.run.folder, arc.index), None
                try:
                    latents = find_or_make(path, make)
                except OutOfMemoryError:
                    if not overlap:
                        raise
                if latents is None:  # out here the tensors of the attempt are gone; once more, alone
                    beside.wait()
                    overlap, latents = False, find_or_make(path, make)
                if overlap and not undecoded and arc is arcs[-1]:
                    beside.begin(decode_beside, job, arc, latents)
                else:
                    beside.begin(save, job, arc, decode_arc(pipe, job.run, arc, latents))
        beside.wait()
        for job, arc, latents in undecoded:
            save(job, arc, decode_arc(pipe, job.run, arc, latents))


def share_arcs(jobs: Sequence[Job], chain: bool) -> list[tuple[Job, list[Arc]]]:
    """What one process does in one go. Chained arcs follow each other; others are free."""
    if chain:
        return [(job, list(job.scene.arcs)) for job in jobs]
    return [(job, [arc]) for job in jobs for arc in job.scene.arcs]


def denoise_arc(args: argparse.Namespace, pipe, job: Job, arc: Arc, positive, negative):
    """Latents of one arc between its two end pictures, [1, 13, 16, h, w]. positive, negative: embeddings [1, T, D]."""
    import torch

    from models.inbetween.pipeline import ConditionEps
    from models.latents import draw_noise, to_signed
    from models.runtime.speed import attention_kernel, first_block_cache

    start = chain_path(job.run.folder, arc.index) if args.chain and arc.index else job.anchors[arc.index]
    pictures = (read_image(path) for path in (start, job.anchors[arc.index + 1]))
    ends = (to_signed(resize_image(picture, args.width, args.height))[None] for picture in pictures)
    edges = to_signed(edge_video(arc, args.width, args.height, args.num_frames))[None]
    warped = job.noises[arc.index]  # float32 [13, h, w, 16]
    eps = ConditionEps.draw(*warped.shape[:3], seed=args.seed, arc=arc.index)
    conditions = pipe.encode_conditions(*ends, edges, eps)
    background = torch.from_numpy(warped).movedim(-1, 1)[None]
    fresh = draw_noise(background.shape, derive_seed(args.seed, arc.index, 1))
    with attention_kernel(args.attention), first_block_cache(pipe.transformer, args.cache):
        return pipe(
            conditions,
            blend_noise(background, fresh, args.degradation).to(pipe.transformer.dtype),
            positive,
            negative,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
        )


def edge_video(arc: Arc, width: int, height: int, num_frames: int) -> np.ndarray:
    """Edge frames of an arc at the model's size, its last one repeated: uint8 [num_frames, height, width, 3]."""
    frames = [resize_edges(read_image(path), width, height) for path in arc.edge_paths]
    return np.stack([frames[i] for i in edge_frame_indices(num_frames)])


def decode_arc(pipe, run: Run, arc: Arc, latents) -> np.ndarray:
    """Frames of one arc, uint8 [num_frames, height, width, 3]. The one that the next arc starts from is written."""
    frames = pipe.decode_video(latents)
    write_image(chain_path(run.folder, arc.index + 1), frames[-1])
    return frames


def print_results(run: Run) -> None:
    print(run.folder / VIDEO_FILE)
    print(run.folder / CONTACT_SHEET)


if __name__ == "__main__":
    run_script(main)
