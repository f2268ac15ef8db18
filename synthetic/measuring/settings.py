"""Flags that decide the benchmarks' figures, besides weights and seeds. Imports nothing heavy."""

from dataclasses import dataclass

from models.settings import AlignmentSettings, AnchorSettings, InbetweenSettings
from utils.cli import finite_float, flag, guidance_float, positive_float, positive_int, unit_float

MOST_LORA_STEPS = 400  # beyond which the check's bars do not apply


@dataclass(frozen=True)
class Settings:
    """Defaults that differ from the scripts' suit the tiny weights (docs/tiny_weights.md)."""

    lora_steps: int = flag(
        200, f"steps of the alignment; the bars hold for {MOST_LORA_STEPS} at most", type=positive_int
    )
    learning_rate: float = flag(1e-3, "of the alignment", type=positive_float)
    train_batch_size: int = flag(8, "crops in each of its steps", type=positive_int)
    rank: int = flag(AlignmentSettings.rank, "rank of the LoRAs", type=positive_int)
    precision: str = flag("bf16", "of the networks in the alignment", choices=["bf16", "float32"])
    prompt: str = flag("empty", "prompt of all stages: none, or the style's caption", choices=["empty", "caption"])
    num_steps: int = flag(AnchorSettings.num_steps, "denoising steps of an anchor", type=positive_int)
    true_gs: float = flag(
        2.0, "classifier-free guidance of an anchor; 1 switches it off; without a prompt no change", type=finite_float
    )
    num_inference_steps: int = flag(
        InbetweenSettings.num_inference_steps, "denoising steps of a video", type=positive_int
    )
    guidance_scale: float = flag(1.0, "classifier-free guidance of a video; 1 switches it off", type=guidance_float)

    coarse: float = flag(
        0.0,
        "share of its size by which each object of the method's mesh is off; half of the small ones lack then",
        type=unit_float,
    )

    loop: bool = flag(False, "paths go out and back, so that each frame has a revisit", action="store_true")

    def prompt_of(self, caption: str) -> str:
        return caption if self.prompt == "caption" else ""

    def alignment(self, seed: int) -> AlignmentSettings:
        return AlignmentSettings(
            max_train_steps=self.lora_steps,
            checkpointing_steps=self.lora_steps,
            learning_rate=self.learning_rate,
            rank=self.rank,
            train_batch_size=self.train_batch_size,
            mixed_precision="bf16" if self.precision == "bf16" else "no",
            seed=seed,
            report_to="none",
        )

    def anchors(self, num_replacement: int = AnchorSettings.num_replacement) -> AnchorSettings:
        return AnchorSettings(num_steps=self.num_steps, true_gs=self.true_gs, num_replacement=num_replacement)

    def inbetween(self, **changes: object) -> InbetweenSettings:
        steps, scale = self.num_inference_steps, self.guidance_scale
        return InbetweenSettings(num_inference_steps=steps, guidance_scale=scale, **changes)
