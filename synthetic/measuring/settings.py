"""What decides the benchmarks' figures besides weights and seeds, as flags. Nothing heavy is imported here."""

import argparse
from dataclasses import dataclass, fields

from utils.cli import finite_float, guidance_float, positive_float, positive_int

MOST_LORA_STEPS = 400  # for which the check's bars hold


@dataclass(frozen=True)
class Settings:
    """Defaults are what suits the tiny weights (docs/tiny_weights.md), not the scripts'."""

    lora_steps: int = 200  # optimizer steps of the alignment
    learning_rate: float = 1e-3  # of the alignment
    train_batch_size: int = 8  # crops in each of its steps
    rank: int = 16  # of the LoRAs
    precision: str = "bf16"  # of the networks while the LoRAs are trained: bf16 or float32
    prompt: str = "empty"  # of all stages: empty, or the style's caption
    num_steps: int = 25  # denoising steps of an anchor
    true_gs: float = 2.0  # classifier-free guidance of an anchor; without a prompt it changes nothing
    num_inference_steps: int = 30  # denoising steps of a video
    guidance_scale: float = 1.0  # classifier-free guidance of a video

    def prompt_of(self, caption: str) -> str:
        return caption if self.prompt == "caption" else ""


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting."""
    group = parser.add_argument_group("settings")
    default = {field.name: field.default for field in fields(Settings)}

    def add(name: str, about: str, **options: object) -> None:
        group.add_argument(f"--{name}", default=default[name], help=about, **options)

    add("lora_steps", f"steps of the alignment; the bars hold for {MOST_LORA_STEPS} at most", type=positive_int)
    add("learning_rate", "of the alignment", type=positive_float)
    add("train_batch_size", "crops in each of its steps", type=positive_int)
    add("rank", "rank of the LoRAs", type=positive_int)
    add("precision", "of the networks in the alignment", choices=["bf16", "float32"])
    add("prompt", "prompt of all stages: none, or the style's caption", choices=["empty", "caption"])
    add("num_steps", "denoising steps of an anchor", type=positive_int)
    add("true_gs", "classifier-free guidance of an anchor; 1 switches it off", type=finite_float)
    add("num_inference_steps", "denoising steps of a video", type=positive_int)
    add("guidance_scale", "classifier-free guidance of a video; 1 switches it off", type=guidance_float)


def settings_of(args: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
