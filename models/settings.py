"""Settings of each stage: one frozen dataclass per stage; the scripts' flags are made from its fields.

Defaults are the paper's, and are defined only here. Nothing heavy is imported here.
"""

import argparse
from dataclasses import Field, dataclass, fields

from models.precision import MIXED
from utils.cli import (
    InputError,
    decay,
    finite_float,
    flag,
    guidance_float,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    prompt_text,
    seed,
    unit_float,
)

LOGS = ["tensorboard", "none"]
CONTROLS = ["edges", "depth"]
AUTO = "auto: bf16 for full weights, and for tiny ones where the device computes in it, else no"


CONTROL_MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")  # in InstantX' and Shakker's order


def control_mode(text: str) -> int:
    """argparse type: the number of a mode, or its name."""
    if text in CONTROL_MODES:
        return CONTROL_MODES.index(text)
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor one of {', '.join(CONTROL_MODES)}")
    return int(text)


def control_mode_flag() -> Field:
    """A field: which kind of picture a ControlNet for several kinds is given."""
    about = f"mode of a ControlNet that has several (Union): a number, or {', '.join(CONTROL_MODES)}"
    return flag(None, about, type=control_mode, metavar="MODE")


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained."""

    max_train_steps: int = flag(
        1000, "optimizer steps; may be raised later to go on", type=positive_int, decides=False
    )
    checkpointing_steps: int = flag(500, "steps between checkpoints", type=positive_int, decides=False)
    sheet_steps: int = flag(500, "steps between sample sheets", type=positive_int, decides=False)
    learning_rate: float = flag(1e-4, "peak learning rate of AdamW", type=positive_float)
    warmup_steps: int = flag(100, "first steps, over which the learning rate rises", type=non_negative_int)
    decay_steps: int = flag(
        0, "last steps, over which the learning rate falls to zero", type=non_negative_int, decides=False
    )
    train_batch_size: int = flag(1, "items per process and step", type=positive_int)
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step", type=positive_int)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", type=positive_float)
    ema_decay: float = flag(0.999, "decay of the averaged weights that are saved; 0 saves the raw ones", type=decay)
    beta2: float = flag(0.999, "second beta of AdamW; the first is 0.9", type=decay)
    weight_decay: float = flag(0.01, "weight decay of AdamW", type=non_negative_float)
    mixed_precision: str = flag(
        "auto", f"precision of the computation, weights are float32; {AUTO}", choices=["auto", "bf16", "no"]
    )
    seed: int = flag(0, "seed of start values, data order, noise and timesteps", type=seed)
    report_to: str = flag("tensorboard", "where curves are logged", choices=LOGS, decides=False)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant, then linear to zero over the last `decay_steps` steps. step: from 0."""
        rise = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        fall = min(1.0, (self.max_train_steps - step) / max(self.decay_steps, 1))
        return self.learning_rate * min(rise, fall)


@dataclass(frozen=True)
class AlignmentSettings:
    """Stage 1: LoRAs on FLUX and its ControlNet, trained on the reference."""

    max_train_steps: int = flag(600, "optimizer steps; may be raised later to go on", type=positive_int, decides=False)
    checkpointing_steps: int = flag(100, "steps between checkpoints", type=positive_int, decides=False)
    learning_rate: float = flag(1e-4, "constant learning rate of AdamW", type=positive_float)
    rank: int = flag(16, "LoRA rank", type=positive_int)
    control_mode: int | None = control_mode_flag()
    train_batch_size: int = flag(1, "crops per process and step", type=positive_int)
    gradient_accumulation_steps: int = flag(1, "batches per optimizer step", type=positive_int)
    mixed_precision: str = flag(
        "auto", f"precision of the networks, LoRA is float32; {AUTO}", choices=["auto", *MIXED]
    )
    seed: int = flag(0, "seed of LoRA's start values, crops, noise and timesteps", type=seed)
    report_to: str = flag("tensorboard", "where the loss is logged", choices=LOGS, decides=False)

    def training(self) -> TrainSettings:
        """As TrainSettings: AdamW with the reference's settings, a constant learning rate, no averaging."""
        shared = {field.name: getattr(self, field.name) for field in fields(self)}
        del shared["rank"], shared["control_mode"]
        return TrainSettings(**shared, warmup_steps=0, ema_decay=0.0)


@dataclass(frozen=True)
class AnchorSettings:
    """Stage 2: one anchor view, kept consistent with the one before."""

    lora_weight: float = flag(1.0, "multiplies both LoRA factors: the strength is its square", type=finite_float)
    neg_prompt: str = flag(
        "", "negative prompt; equal prompts make true CFG a no-op, which is skipped", type=prompt_text
    )
    num_steps: int = flag(25, "denoising steps; the ControlNet acts on the first 25", type=positive_int)
    num_replacement: int = flag(12, "steps guided by the warped previous anchor", type=non_negative_int)
    guidance: float = flag(4.0, "distilled guidance scale of FLUX.1-dev", type=finite_float)
    true_gs: float = flag(3.5, "scale of true classifier-free guidance; 1 switches it off", type=finite_float)
    timestep_to_start_cfg: int = flag(1, "first step with true CFG", type=non_negative_int)
    control_weight: float = flag(0.8, "strength of the edge ControlNet", type=finite_float)
    control_mode: int | None = control_mode_flag()
    sources: str = flag(
        "previous",
        "anchors that each is kept consistent with: the previous one, as in the paper, or all that see a point",
        choices=["previous", "all"],
    )
    use_else_noise: bool = flag(False, "a different noise for every anchor: seed, seed + 1, …", action="store_true")


@dataclass(frozen=True)
class InbetweenSettings:
    """Stage 3: the frames between two anchors. `num_replacement` and what follows it go beyond the paper."""

    degradation: float = flag(0.5, "share of fresh noise: 0 keeps the warped noise, 1 drops it", type=unit_float)
    num_inference_steps: int = flag(30, "DDIM steps", type=positive_int)
    guidance_scale: float = flag(6.0, "classifier-free guidance scale; 1 switches it off", type=guidance_float)
    seed: int = flag(43, "seed of fresh noise and of the VAE's draws", type=seed)
    chain: bool = flag(
        True,
        "start each arc from the last generated frame of the one before (default); --no-chain: from its anchor",
        action=argparse.BooleanOptionalAction,
    )
    num_replacement: int = flag(
        0, "steps guided by the anchors, carried to every frame along the geometry", type=non_negative_int
    )
    replacement_coverage: float = flag(
        0.6, "share of a latent cell, in each frame, that an anchor must see for it to be guided", type=unit_float
    )
    sources: str = flag(
        "ends", "anchors that are carried: the two of the arc, or all that see a point", choices=["ends", "all"]
    )
    composite: str | None = flag(
        None,
        "put carried pixels over the frames, all that are seen, or only sure ones: not at borders of surfaces, seen "
        "squarely, and magnified by 2 at most; the rest gets their colours (default: off)",
        choices=["seen", "sure"],
        nargs="?",
        const="seen",
    )
    colour_match: bool = flag(
        False, "give the frames the low frequencies of the carried anchors, against drift", action="store_true"
    )
    cache: float | None = flag(
        None,
        "skip most of a step that changes the first block's output by less than this share, such as 0.1: faster, "
        "a little different (default: off)",
        type=positive_float,
        metavar="THRESHOLD",
    )


def carries(settings: InbetweenSettings | argparse.Namespace) -> bool:
    """Whether anchors are carried along the scene's geometry."""
    return bool(settings.num_replacement or settings.composite or settings.colour_match)


def check_carrying(settings: InbetweenSettings | argparse.Namespace) -> None:
    """Raise InputError for settings about carried anchors that do not go together."""
    if settings.num_replacement > settings.num_inference_steps:
        raise InputError(
            f"--num_replacement {settings.num_replacement}: there are {settings.num_inference_steps} steps in all"
        )
    if settings.replacement_coverage != InbetweenSettings.replacement_coverage and not settings.num_replacement:
        raise InputError("--replacement_coverage goes with --num_replacement")
    if settings.composite and settings.colour_match:
        raise InputError("--composite matches colours itself: leave --colour_match out")
    if settings.sources != "ends" and not carries(settings):
        raise InputError(f"--sources {settings.sources} goes with --num_replacement, --composite or --colour_match")


WAN_NEGATIVE = (  # in the model's own examples; mind that it asks for no paintings and no style
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)


@dataclass(frozen=True)
class WanVaceSettings(InbetweenSettings):
    """Stage 3 by Wan VACE: its usual sampling, and how it is controlled. It was not trained on warped noise."""

    degradation: float = flag(1.0, "share of fresh noise: 0 keeps the warped noise, 1 drops it", type=unit_float)
    num_inference_steps: int = flag(30, "UniPC steps", type=positive_int)
    guidance_scale: float = flag(5.0, "classifier-free guidance scale; 1 switches it off", type=guidance_float)
    chain: bool = flag(
        False,
        "start each arc from its anchor (default); --chain: from the last generated frame of the one before; its "
        "colours drift",
        action=argparse.BooleanOptionalAction,
    )
    flow_shift: float = flag(3.0, "shift of the noise schedule: 3 at 480 lines, 5 at 720", type=positive_float)
    neg_prompt: str = flag(WAN_NEGATIVE, "negative prompt", type=prompt_text)
    control: str = flag(
        "edges",
        "what the frames between are controlled by; depth needs preprocess.py --passes depth",
        choices=CONTROLS,
    )
    control_weight: float = flag(1.0, "strength of the control branch", type=non_negative_float)
    latent_mask: str = flag(
        "nearest",
        "which frame tells a latent frame whether it is given: nearest, as in diffusers and the original, where the "
        "start anchor counts as free; groups: all frames of its causal group must be given",
        choices=["nearest", "groups"],
    )


INBETWEEN_TRAINING = {  # TrainSettings of the released in-between transformer
    "max_train_steps": 1350,
    "checkpointing_steps": 450,
    "sheet_steps": 450,
    "learning_rate": 5e-5,
    "gradient_accumulation_steps": 4,
    "ema_decay": 0.0,
    "beta2": 0.95,
    "weight_decay": 1e-4,
}


WAN_TRAINING = {"checkpointing_steps": 250, "gradient_accumulation_steps": 4, "ema_decay": 0.0}  # of TrainSettings


@dataclass(frozen=True)
class WanTrainSettings:
    """Settings of the training of a LoRA on Wan VACE beyond TrainSettings."""

    lora_rank: int = flag(32, "LoRA rank", type=positive_int)
    caption_dropout: float = flag(0.1, "share of examples with an empty prompt", type=unit_float)
    gradient_checkpointing: bool = flag(
        True, "less memory, more time (default)", action=argparse.BooleanOptionalAction, decides=False
    )


@dataclass(frozen=True)
class InbetweenTrainSettings:
    """Settings of stage 3's training beyond TrainSettings."""

    from_scratch: bool = flag(
        False, "start from random weights of that transformer's architecture", action="store_true"
    )
    caption_dropout: float = flag(0.1, "share of examples with an empty prompt", type=unit_float)
    gradient_checkpointing: bool | None = flag(
        None, "less memory, more time (full: on)", action=argparse.BooleanOptionalAction, decides=False
    )
