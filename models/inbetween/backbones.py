"""The video models that stage 3 knows: their flags, their weights, and what is checked before anything is loaded.

`BACKBONES[args.backbone]` is all that a script needs; `open_stage` loads the networks. Nothing heavy is imported here.
"""

import argparse
import math
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from models.foreign import require_cogvideox, require_video_transformer, require_wan
from models.loading.whole import open_weights
from models.settings import InbetweenSettings, WanVaceSettings
from models.weights import EPOCH, GGI_STAGE, WAN_STAGE, WEIGHTS, Preset, find_inbetween, load_preset
from utils.cli import InputError, Parser, add_settings, positive_int, settings_of
from utils.files import files_sha256, read_json
from utils.images import read_image
from utils.layout import (
    ARC_FRAMES,
    LATENT_FRAMES,
    PADDING_FRAMES,
    Scene,
    same_aspect,
    video_run_name,
)
from utils.runs import is_first_process

if TYPE_CHECKING:
    from models.inbetween.stage import InbetweenStage
    from models.runtime.memory import Plan
    from models.runtime.runtime import Runtime

Paths = Mapping[str, Path]


class Backbone(ABC):
    """A video model of stage 3. components: its parts that `locate` finds. stage: its name among memory plans."""

    components: ClassVar[Sequence[str]]
    stage: ClassVar[str]
    settings: ClassVar[type[InbetweenSettings]]

    def add_flags(self, parser: Parser) -> None:
        """Add the settings, and flags that only this model has."""
        add_settings(parser, self.settings)

    @abstractmethod
    def preset(self, args: argparse.Namespace) -> Preset:
        """Where its weights come from, and at which sizes it works."""

    def size(self, preset: Preset, edge_size: tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels where the flags do not say. edge_size: of the scene's edges, if it has any."""
        return preset.video_size

    @abstractmethod
    def check(self, args: argparse.Namespace, preset: Preset) -> Paths:
        """Raise InputError for flags that it cannot follow. Returns files beside the components, for the manifest."""

    @abstractmethod
    def check_networks(self, paths: Paths) -> None:
        """Raise InputError unless the components, and what `check` returned, fit together."""

    def inputs(self, args: argparse.Namespace, scene: Scene) -> dict[str, object]:
        """Hashes of inputs that only this model has, for the manifest. Raises InputError if they are not there."""
        return {}

    def takes_noise(self, args: argparse.Namespace) -> bool:
        """Whether the warped noise has any weight."""
        return True

    @abstractmethod
    def run_name(self, args: argparse.Namespace) -> str:
        """Name of a video's folder."""

    @abstractmethod
    def plan(self, args: argparse.Namespace, preset: Preset, paths: Paths) -> "Plan":
        """Its memory plan at these sizes."""

    @abstractmethod
    def open_stage(
        self, runtime: "Runtime", paths: Paths, prompts: Sequence[str], args: argparse.Namespace
    ) -> "InbetweenStage":
        """Load its networks. paths: of the components, and what `check` returned."""


class CogVideoX(Backbone):
    """The paper's: CogVideoX-5B with a transformer of 48 input channels."""

    components, stage, settings = GGI_STAGE, "ggi", InbetweenSettings

    def add_flags(self, parser: Parser) -> None:
        add = parser.add_argument
        default = "(default: checkpoints for full)"
        add("--model_path", type=Path, help=f"folder with checkpoint-<epoch>/transformer {default}")
        add("--epoch", type=positive_int, default=EPOCH, help="training step of the in-between transformer")
        super().add_flags(parser)

    def preset(self, args: argparse.Namespace) -> Preset:
        return load_preset(args.weights)

    def check(self, args: argparse.Namespace, preset: Preset) -> Paths:
        transformer = find_inbetween(preset, args.model_path, args.epoch)
        require_video_transformer(transformer)
        check_size(args, read_json(transformer / "config.json"))
        return {"transformer": transformer}

    def check_networks(self, paths: Paths) -> None:
        from models.loading.fit import require_fit

        require_cogvideox(paths, paths["transformer"])
        require_fit({**paths, "inbetween": paths["transformer"]})

    def run_name(self, args: argparse.Namespace) -> str:
        return video_run_name(args.degradation, args.epoch, args.num_inference_steps)

    def plan(self, args: argparse.Namespace, preset: Preset, paths: Paths) -> "Plan":
        from models.runtime.memory import look_up_plan

        guided = args.guidance_scale != 1 and args.prompt != ""
        pixels = args.width * args.height
        return look_up_plan(preset.name, "ggi", pixels=pixels, frames=args.num_frames, batch=1 + guided)

    def open_stage(self, runtime, paths, prompts, args) -> "InbetweenStage":
        from models.inbetween.stages import CogVideoXStage

        settings, size = settings_of(self.settings, args), (args.width, args.height)
        return CogVideoXStage(runtime, paths, paths["transformer"], prompts, settings, size)


class WanVace(Backbone):
    """Wan2.1-VACE, 1.3B or 14B, as released for diffusers."""

    components, stage, settings = WAN_STAGE, "wan_vace", WanVaceSettings

    def add_flags(self, parser: Parser) -> None:
        super().add_flags(parser)
        add = parser.add_argument
        style_help = "picture of the style, for the model's reference images (default: none)"
        add("--style_reference", type=Path, metavar="PICTURE", help=style_help, decides=False)
        add(
            "--lora", type=Path, metavar="FILE", help="LoRA of the transformer, as train_ggi.py or diffusers writes it"
        )

    def preset(self, args: argparse.Namespace) -> Preset:
        if args.weights != "full":
            raise InputError(f"--weights {args.weights} has no Wan VACE: leave it out")
        return load_preset(args.weights, "wan_vace")

    def size(self, preset: Preset, edge_size: tuple[int, int] | None) -> tuple[int, int]:
        """The size of the preset whose aspect is nearest to that of the edges."""
        if edge_size is None:
            return preset.video_size
        aspect = math.log(operator.truediv(*edge_size))
        return min(preset.video_sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))

    def check(self, args: argparse.Namespace, preset: Preset) -> Paths:
        frames = ARC_FRAMES + PADDING_FRAMES
        if args.num_frames != frames:
            raise InputError(f"--num_frames {args.num_frames}: an arc and its padding are {frames} frames")
        require_multiples(args)
        if args.cache is not None:
            raise InputError("--cache does not go with Wan VACE: its control would be added to skipped blocks twice")
        for name in ("style_reference", "lora"):
            path = getattr(args, name)
            if path is not None and not path.is_file():
                raise InputError(f"--{name} {path} does not exist")
        if args.style_reference:
            read_image(args.style_reference)
        if args.lora:
            open_weights(args.lora, "np")
        return {"lora": args.lora} if args.lora else {}

    def check_networks(self, paths: Paths) -> None:
        from models.loading.fit import require_fit

        require_wan(paths)
        require_fit({name: paths[name] for name in self.components})

    def inputs(self, args: argparse.Namespace, scene: Scene) -> dict[str, object]:
        found, size = {}, (args.width, args.height)
        if not same_aspect(scene.edge_size, size) and is_first_process():
            stretched = "note: {}: edges of {}x{} are stretched to {}x{}".format(scene.folder, *scene.edge_size, *size)
            print(stretched, file=sys.stderr)
        if args.style_reference:
            found["style_reference_sha256"] = files_sha256([args.style_reference])
        if args.control == "depth":
            depths = [path for arc in scene.arcs for path in arc.control_paths("depth")]
            if missing := [path for path in depths if not path.is_file()]:
                raise InputError(f"{missing[0]} is missing: --control depth needs preprocess.py --passes depth")
            found["depth_sha256"] = files_sha256(depths)
        return found

    def takes_noise(self, args: argparse.Namespace) -> bool:
        return args.degradation < 1

    def run_name(self, args: argparse.Namespace) -> str:
        return f"wan_vace_{args.control}_d{args.degradation}_n{args.num_inference_steps}"

    def plan(self, args: argparse.Namespace, preset: Preset, paths: Paths) -> "Plan":
        from models.loading.networks import component_config
        from models.runtime.memory import PLAN_FILE, look_up_plan, scale_plan

        config = component_config("wan_transformer", paths["wan_transformer"])
        width = config["num_attention_heads"] * config["attention_head_dim"]
        known = {name: entry["width"] for name, entry in read_json(WEIGHTS / preset.name / PLAN_FILE).items()}
        nearest = min(known, key=lambda name: abs(known[name] - width))
        plan = look_up_plan(preset.name, nearest, pixels=args.width * args.height, frames=args.num_frames, batch=1)
        if known[nearest] == width:
            return plan
        print(f"note: memory is estimated from that of Wan2.1-VACE-{nearest}, by the width", file=sys.stderr)
        return scale_plan(plan, width / known[nearest])

    def open_stage(self, runtime, paths, prompts, args) -> "InbetweenStage":
        from models.inbetween.stages import WanVaceStage

        style = read_image(args.style_reference) if args.style_reference else None
        settings, size = settings_of(self.settings, args), (args.width, args.height)
        return WanVaceStage(runtime, paths, prompts, settings, size, style)


def check_size(args: argparse.Namespace, config: dict) -> None:
    """Raise InputError for a size that CogVideoX's transformer does not support. config: its config.json."""
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
            f"{args.width}x{args.height}: these weights have learned positions for {trained[0]}x{trained[1]}; use "
            "that size, and make the scene from edges of its aspect"
        )
    require_multiples(args)


def require_multiples(args: argparse.Namespace) -> None:
    if args.width % 16 or args.height % 16:
        raise InputError(f"{args.width}x{args.height}: width and height must be multiples of 16")


DEFAULT = "cogvideox"
BACKBONES: Mapping[str, Backbone] = {DEFAULT: CogVideoX(), "wan_vace": WanVace()}


def add_backbone_flag(parser: Parser, argv: Sequence[str] | None) -> Backbone:
    """Add --backbone. Returns the video model that it names, on which the other flags depend."""
    about = "video model; each has flags of its own: --backbone wan_vace --help"
    parser.add_argument("--backbone", choices=BACKBONES, default=DEFAULT, help=about)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--backbone", nargs="?", default=DEFAULT)
    return BACKBONES.get(first.parse_known_args(argv)[0].backbone, BACKBONES[DEFAULT])
