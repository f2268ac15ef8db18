"""What the benchmark compares: the method, the method with a part removed or another setting, and baselines."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.settings import AnchorSettings, InbetweenSettings
from utils.cli import InputError

GGI, PER_FRAME, CROSSFADE, REPROJECT, COPY, TRUTH = "ggi", "per_frame", "crossfade", "reproject", "copy", "truth"
AUTOENCODER = "autoencoder"
ALL = 1000  # guided steps: all there are


@dataclass(frozen=True)
class Method:
    """How a video of the whole path comes about. Defaults are the scripts'; rows with equal recipes are made once.

    kind: the in-between model (GGI), a baseline of synthetic/measuring/baselines.py, or the true frames.
    """

    kind: str = GGI
    aligned: bool = True  # LoRAs of distribution alignment in the image model
    num_replacement: int = (
        AnchorSettings.num_replacement
    )  # steps of an anchor that follow the warped one before; 0: every anchor for itself
    degradation: float = InbetweenSettings.degradation  # share of fresh noise in the video's noise; 1: no warped noise
    edges: bool = True  # edge frames for the in-between model; without: black ones
    end: bool = True  # the end anchor for the in-between model
    chain: bool = (
        InbetweenSettings.chain
    )  # an arc starts from the last generated frame of the one before; without: from its anchor
    lora_steps: int | None = None  # optimizer steps of the alignment; None: those of the settings
    num_inference_steps: int | None = None  # denoising steps of a video; None: those of the settings
    guided: int = 0  # steps of the video guided by the carried anchors, at most
    composite: str | None = None  # carried pixels put over the frames: None, seen or sure
    colour_match: bool = False
    sources: str = "previous"  # what is carried to anchors and frames; all: every anchor drawn so far
    true_anchors: bool = False  # the true pictures in place of drawn anchors

    @property
    def has_anchors(self) -> bool:
        return self.kind not in (PER_FRAME, TRUTH, AUTOENCODER) and not self.true_anchors

    @property
    def has_loras(self) -> bool:
        return self.aligned and self.kind not in (TRUTH, AUTOENCODER) and not self.true_anchors

    @property
    def is_carried(self) -> bool:
        """Whether anchors are carried along the geometry."""
        return bool(self.guided or self.composite or self.colour_match) or self.kind == REPROJECT


FULL = Method()
REPLACEMENTS, DEGRADATIONS = (4, 8, 12, 16, 20), (0, 0.25, 0.5, 0.75)
LORA_STEPS, STEPS = (25, 50, 400), (5, 10, 15, 20, 50)  # `full` has 200 and 30
REMOVALS = {
    "no_align": Method(aligned=False),
    "no_replace": Method(num_replacement=0),
    "no_warp": Method(degradation=1),
    "no_edges": Method(edges=False),
    "no_end": Method(end=False),
}
GUIDED = {
    "guided": Method(guided=ALL),
    "guided_composite": Method(guided=ALL, composite="seen"),
    "guided_sure": Method(guided=ALL, composite="sure"),
    "guided_match": Method(guided=ALL, colour_match=True),
    "composite": Method(composite="seen"),
    "guided_15": Method(guided=15),
    "guided_25": Method(guided=25),
    "guided_5_of_5": Method(guided=ALL, num_inference_steps=5),
    "guided_10_of_10": Method(guided=ALL, num_inference_steps=10),
    "guided_15_of_15": Method(guided=ALL, num_inference_steps=15),
    "guided_no_fresh": Method(guided=ALL, degradation=0),
    "sources_all": Method(guided=ALL, sources="all"),
    "sources_all_composite": Method(guided=ALL, composite="seen", sources="all"),
    "guided_10_composite": Method(guided=ALL, num_inference_steps=10, degradation=0, composite="seen"),
}
TRUE_ANCHORS = {  # what is left to gain by better anchors
    "true_full": Method(true_anchors=True),
    "true_guided": Method(guided=ALL, true_anchors=True),
    "true_guided_composite": Method(guided=ALL, composite="seen", true_anchors=True),
    "true_reproject": Method(REPROJECT, true_anchors=True),
}
BASELINES = {kind: Method(kind) for kind in (PER_FRAME, CROSSFADE, REPROJECT, COPY)}
METHODS = {
    "full": FULL,
    **REMOVALS,
    **BASELINES,
    AUTOENCODER: Method(AUTOENCODER),  # the true frames through the video VAE: the ceiling of every video
    "truth": Method(TRUTH),  # no video of a method: what a perfect one would measure
    **GUIDED,
    **TRUE_ANCHORS,
    "no_chain": Method(chain=False),
    **{f"replace_{n}": Method(num_replacement=n) for n in REPLACEMENTS},
    **{f"degr_{share}": Method(degradation=share) for share in DEGRADATIONS},
    **{f"lora_{n}": Method(lora_steps=n) for n in LORA_STEPS},
    **{f"steps_{n}": Method(num_inference_steps=n) for n in STEPS},
}
MAIN = ("full", *REMOVALS, *BASELINES, AUTOENCODER, "truth")
GROUPS = {"main": MAIN, "carried": ("full", *GUIDED), "true_anchors": tuple(TRUE_ANCHORS), "all": tuple(METHODS)}

# Curves: name -> (label of its axis, the rows on it with their places). None: where the settings put `full`.
SWEEPS: dict[str, tuple[str, dict[str, float | None]]] = {
    "num_replacement": ("--num_replacement", {"no_replace": 0, **{f"replace_{n}": n for n in REPLACEMENTS}}),
    "degradation": ("--degradation", {**{f"degr_{share}": share for share in DEGRADATIONS}, "no_warp": 1}),
    "lora_steps": ("--max_train_steps", {"no_align": 0, **{f"lora_{n}": n for n in LORA_STEPS}, "full": None}),
    "num_inference_steps": ("--num_inference_steps", {**{f"steps_{n}": n for n in STEPS}, "full": None}),
}


@dataclass(frozen=True)
class Claim:
    """A row that is better than another in some metrics, and no worse in others (the interval is not on that side)."""

    part: str
    row: str
    than: str
    better: tuple[str, ...]
    no_worse: tuple[str, ...] = ()


TEMPORAL = ("temporal_1", "temporal_8", "temporal_24", "flicker")
FIDELITY = ("fidelity_psnr", "fidelity_ssim")
CLAIMS = (
    Claim("alignment → style", "full", "no_align", ("style_colour", "style_texture", "class_colour")),
    Claim("replacement → cross-view consistency", "full", "no_replace", ("anchors_error", "temporal_24")),
    Claim("warped noise → temporal consistency or fidelity", "full", "no_warp", (*TEMPORAL, *FIDELITY)),
    Claim("edges → structural fidelity", "full", "no_edges",
          ("structure_precision", "structure_recall", "structure_f1")),
    Claim("end anchor → fidelity near the arc's end", "full", "no_end", ("end_psnr",)),
    Claim("guidance → all", "guided", "full", (*FIDELITY, *TEMPORAL, "structure_f1")),
    Claim("the whole against carrying alone", "guided_composite", "reproject", (*FIDELITY, "class_colour"),
          ("structure_f1",)),
    Claim("the whole against the image model alone", "guided_composite", "per_frame", TEMPORAL, ("fidelity_psnr",)),
    Claim("the same between true anchors", "true_guided_composite", "true_reproject", (*FIDELITY, "class_colour"),
          ("structure_f1",)),
    Claim("all anchors as sources → loops close", "sources_all", "guided", ("closure",)),
    Claim("the same with composites", "sources_all_composite", "guided_composite", ("closure",)),
)  # fmt: skip


def choose_methods(words: Sequence[str]) -> list[str]:
    """Names of rows in the table's order, each once. words: names, or groups of them. Raises InputError for others."""
    wanted = {name for word in words for name in GROUPS.get(word, (word,))}
    if unknown := sorted(wanted - set(METHODS)):
        raise InputError(f"--methods {unknown[0]}: choose from {', '.join((*GROUPS, *METHODS))}")
    return [name for name in METHODS if name in wanted]


def made_as(name: str) -> str:
    """The first row with the same recipe, under which a video is kept: `replace_12` is `full`."""
    return next(other for other, method in METHODS.items() if method == METHODS[name])
