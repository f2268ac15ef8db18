"""The whole chain in one command: a scene, a camera path and a reference picture become a video.

    python generate.py --scene town.glb --cameras path.json --reference style.png --output out/town
    python generate.py --scene town.glb --path orbit --reference style.png --output out/town --preview

Checks what the stages need, then runs preprocess.py, sag_distribution_alignment.py, sag_generate_anchor_view.py and
ggi.py, each in its own process. The same command continues where it was interrupted. Results: OUTPUT/scene,
OUTPUT/loras, OUTPUT/<anchors>/<video>. Flags of a stage follow `--`, with its name in front:

    python generate.py … -- --alignment.max_train_steps 400 --anchors.true_gs 2 --ggi.num_inference_steps 20
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import ggi
import preprocess
import sag_distribution_alignment as alignment
import sag_generate_anchor_view as anchors
from models.flags import add_memory_flags, add_overwrite_flag
from models.foreign import require_flux
from models.inbetween.backbones import BACKBONES, DEFAULT
from models.runtime.chain import Stage, describe, make_stage, quietly, require_room, run_stage, split_flags
from models.settings import carries
from models.weights import FLUX_STAGE, load_preset, locate
from utils import layout
from utils.cli import InputError, Parser, positive_int, prompt_text, run_script, seed
from utils.particles import elements_per_cell
from utils.scene.scene_geometry import load_scene_geometry
from utils.videos.page import INDEX

SCRIPTS = {"preprocess": preprocess, "alignment": alignment, "anchors": anchors, "ggi": ggi}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = [*(sys.argv[1:] if argv is None else argv)]
    end = words.index("--") if "--" in words else len(words)
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--scene", type=Path, required=True, help="mesh, or a scene folder that preprocess.py wrote")
    add("--cameras", type=Path, help="camera path of a mesh, as for preprocess.py")
    add("--path", choices=["orbit", "dolly", "flythrough"], help="a built-in path in its place")
    add("--reference", type=Path, nargs="+", required=True, metavar="PNG", help="picture(s) whose style the video has")
    add("--output", type=Path, required=True, help="folder of all results")
    add("--name", help="name of the LoRA (default: that of the first reference)")
    add("--prompt", type=prompt_text, default="", help="what the video shows, for every stage")
    add("--seed", type=seed, default=42, help="noise seed of the anchors")
    add("--preview", action="store_true", help="stop after half of the alignment and one anchor of half the steps")
    add("--weights", choices=["full", "tiny"], default="full", help="weight set")
    add("--backbone", choices=BACKBONES, default=DEFAULT, help="video model of the last stage")
    add(
        "--device",
        default="auto",
        help="auto, cpu or cuda; auto takes a GPU if any (CUDA_VISIBLE_DEVICES chooses)",
    )
    add("--threads", type=positive_int, help="OpenMP threads of the alignment (default: as many as torch takes)")
    add_memory_flags(parser)
    add_overwrite_flag(parser)
    args = parser.parse_args(words[:end])
    args.stage_flags = split_flags(words[end + 1 :], SCRIPTS)
    return args


def plan_scene(args: argparse.Namespace) -> tuple[list[Stage], layout.Scene]:
    """Preprocessing, if there is any, and the scene as it will be."""
    if args.scene.is_dir():
        if args.cameras or args.path:
            raise InputError(f"{args.scene} is a folder: --cameras and --path go with a mesh")
        return [], layout.load_scene(args.scene)
    path = [word for name in ("cameras", "path") if (value := getattr(args, name)) for word in (f"--{name}", value)]
    flags = ("--scene", args.scene, *path, "--output", args.output / "scene", "--preview")
    stage = make_stage(args, SCRIPTS, "preprocess", *flags)
    _, cameras, run = quietly(preprocess.prepare, stage.args)
    edge_size, map_size = stage.args.edge_size, stage.args.map_size
    arcs = tuple(layout.Arc(i, run.folder / f"arc{i}") for i in range(layout.count_arcs(len(cameras.c2w))))
    stage.costs(preprocess.FILES * len(arcs), edge_size[0] * edge_size[1], run.folder)
    return [stage], layout.Scene(run.folder, arcs, edge_size, map_size)


def plan_alignment(args: argparse.Namespace) -> Stage:
    name, prompts = args.name or args.reference[0].stem, [args.prompt] * len(args.reference)
    flags = ("--path_image", *args.reference, "--prompt", *prompts, "--pfix", name)
    stage = make_stage(args, SCRIPTS, "alignment", *flags, "--output_dir", args.output / "loras")
    if args.preview:  # up to a checkpoint that the whole training leaves too
        steps, saved = stage.args.max_train_steps, stage.args.checkpointing_steps
        stage = stage.but("--max_train_steps", min(steps, -(-steps // 2 // saved) * saved))
    stage.threads, given = args.threads, stage.args
    _, _, run = quietly(alignment.prepare, given)
    stage.costs(given.max_train_steps, given.resolution**2, run.folder, batch=given.train_batch_size)
    return stage


def plan_anchors(args: argparse.Namespace, scene: layout.Scene, lora: Path, epoch: int) -> Stage:
    parent = args.output / layout.PREVIEW_FOLDER if args.preview else args.output
    flags = ("--target", scene.folder, "--loras", lora.parent, "--pfix", lora.name, "--epoch", epoch)
    flags += ("--prompt", args.prompt, "--seed", args.seed, "--output_dir", parent)
    stage = make_stage(args, SCRIPTS, "anchors", *flags)
    if args.preview:
        stage = stage.but("--first", 1, "--num_steps", -(-stage.args.num_steps // 2))
    given = stage.args
    if max(len(given.target), len(given.pfix), len(given.seed)) > 1 or given.seed[0] < 0:
        raise InputError("--anchors.seed, pfix and target: a video needs one of each")
    prompts = layout.pad_prompts(given.prompt, len(scene.arcs) + 1)
    width, height = quietly(anchors.anchor_size, given, load_preset(args.weights), scene)
    name = layout.anchor_run_name(*given.pfix, prompts, given.epoch, *given.seed, given.num_replacement)
    guided = given.true_gs != 1 and {*prompts} != {given.neg_prompt}
    steps = len(prompts[: given.first]) * given.num_steps
    stage.costs(steps, width * height, given.output_dir / name, batch=1 + guided)
    return stage


def plan_video(args: argparse.Namespace, scene: layout.Scene, draw: Stage, passes: Sequence[str]) -> Stage:
    """The last stage, and a look at the weights of all. passes: that preprocessing will draw."""
    flags = ["--target", draw.result, "--scene", scene.folder, "--prompt", args.prompt]
    flags += ["--backbone", args.backbone] if args.backbone != DEFAULT else []
    stage = make_stage(args, SCRIPTS, "ggi", *flags)
    if len((given := stage.args).target) > 1:
        raise InputError("--ggi.target: one video at a time")
    backbone = BACKBONES[given.backbone]
    preset, beside = quietly(ggi.prepare, given, scene.edge_size)
    if args.scene.is_dir() and (carries(given) or draw.args.sources == "all"):  # else it will be written
        load_scene_geometry(scene, (given.width, given.height), "carrying the anchors")
    has_depth = all(arc.has_control("depth") for arc in scene.arcs)
    if getattr(given, "control", None) == "depth" and not ("depth" in passes or has_depth):
        raise InputError("--ggi.control depth needs the depth of the scene: --preprocess.passes depth")
    if backbone.takes_noise(given):
        elements_per_cell(scene.map_size, (given.width // 8, given.height // 8))
    require_flux(locate(draw.args, load_preset(draw.args.weights), FLUX_STAGE), draw.args.control_mode)
    paths = locate(given, preset, backbone.components) | beside
    backbone.check_networks(paths)
    folder = (given.output_dir or draw.result) / backbone.run_name(given)
    stage.costs(len(scene.arcs) * given.num_inference_steps, given.width * given.height, folder)
    stage.plan = quietly(backbone.plan, given, preset, paths)
    return stage


def main() -> None:
    args = parse_args()
    require_room(args.output, args.weights)
    stages, scene = plan_scene(args)
    align = plan_alignment(args)
    draw = plan_anchors(args, scene, align.result, align.args.max_train_steps)
    fill = plan_video(args, scene, draw, stages[0].args.passes if stages else ())
    stages += [align, draw] if args.preview else [align, draw, fill]
    for stage in stages:
        print(describe(stage), flush=True)
    for stage in stages:
        run_stage(stage)
    if args.preview:
        print(layout.anchor_path(draw.result, 0))
    else:
        print(fill.result / layout.VIDEO_FILE, fill.result / INDEX, sep="\n")


if __name__ == "__main__":
    run_script(main)
