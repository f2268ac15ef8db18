"""The recipes of the full-size benchmark: ours for each stage, and the reference's.

The reference keeps the in-between LoRA of rank 2048 unmerged, runs a second pass even for equal prompts, and encodes
text and edges in every training step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.setup import RELEASED_LAYERS, RELEASED_RANK, Setup
from models.settings import AlignmentSettings
from utils.files import read_json

HED_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, number of convolutions) per stage

Make = Callable[[str, Callable], object]  # (name in a memory plan, or `detector`; function that builds a network)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """networks: all networks in memory. steps: {name: (names of the networks it uses, function)}."""

    networks: dict[str, object]
    steps: dict[str, tuple[Sequence[str], Callable[[], object]]]


def build(setup: Setup, phase: str, recipe: str, make: Make, device: str) -> Recipe:
    """Build a recipe of a phase: `text` (the encoders that run before it), `ours` or `reference`.

    device: where networks compute. Enable gradients for alignment and its steps, disable them for the others.
    """
    if recipe == "text":
        component = "cogvideox_text" if phase == "ggi" else "flux_text"
        encoders, encode = text_step(setup, component, make, device)
        return Recipe(encoders, {"text": (tuple(encoders), encode)})
    builders = {"ggi": build_ggi, "anchors": build_anchors, "alignment": build_alignment}
    return builders[phase](setup, recipe, make, device)


def build_ggi(setup: Setup, recipe: str, make: Make, device: str) -> Recipe:
    from benchmarks.memory.plans import video_builders
    from benchmarks.memory.steps import ggi_step, latent_shape, video_decoding, video_encoding
    from models.inbetween.pipeline import prepare_networks

    builders = video_builders(setup.paths["cogvideox_vae"], setup.inbetween)
    size, frames = setup.video_size, setup.num_frames
    if recipe == "reference":
        network = make("transformer", with_released_lora(builders["transformer"]))
        return Recipe({"transformer": network}, {"reference": (("transformer",), ggi_step(network, size, frames, 2))})
    networks = {name: make(name, builder) for name, builder in builders.items()}
    network, vae = networks.values()
    prepare_networks(network, vae, tiling=setup.tiling)
    steps = {
        "encoding": (("vae",), video_encoding(vae, size, frames)),
        "ours": (("transformer",), ggi_step(network, size, frames, 2)),
        "decoding": (("vae",), video_decoding(vae, latent_shape(vae, size, frames))),
    }
    return Recipe(networks, steps)


def make_flux(setup: Setup, make: Make, device: str):
    """({name: network}, the same as FluxModels), with LoRAs of the default rank."""
    from benchmarks.memory.plans import flux_builders, with_lora
    from models.flux.network import FluxModels

    builders = flux_builders(setup.paths)
    builders |= {name: with_lora(builders[name], AlignmentSettings.rank) for name in ("transformer", "controlnet")}
    networks = {name: make(name, builder) for name, builder in builders.items()}
    return networks, FluxModels(*networks.values(), device)


def build_anchors(setup: Setup, recipe: str, make: Make, device: str) -> Recipe:
    """`ours` has the default, equal prompts, which need only one branch; `both branches` go in one batch."""
    from benchmarks.memory.steps import anchor_decoding, anchor_step
    from models.runtime.rotary import use_complex_rotary

    networks, models = make_flux(setup, make, device)
    one, both = (anchor_step(models, setup.anchor_size, setup.text_length, branches) for branches in (1, 2))
    at_work = ("transformer", "controlnet")
    if recipe == "reference":
        return Recipe(networks, {"reference": (at_work, lambda: (one(), one()))})
    for name in at_work:
        use_complex_rotary(networks[name])
    steps = {
        "ours": (at_work, one),
        "both branches": (at_work, both),
        "decoding": (("vae",), anchor_decoding(models, setup.anchor_size)),
    }
    return Recipe(networks, steps)


def build_alignment(setup: Setup, recipe: str, make: Make, device: str) -> Recipe:
    import torch

    from benchmarks.memory.steps import alignment_step
    from models.flux.lora import train_loras

    networks, models = make_flux(setup, make, device)
    loras = train_loras([models.transformer, models.controlnet])
    autocast = partial(torch.autocast, torch.device(device).type, torch.get_default_dtype())
    step = alignment_step(models, setup.crop, 1, setup.text_length, autocast)
    optimizer = torch.optim.AdamW([p for group in loras for p in group], lr=AlignmentSettings.learning_rate)

    def train() -> None:
        step()
        optimizer.step()
        optimizer.zero_grad()

    if recipe == "ours":
        return Recipe(networks, {"ours": (tuple(networks), train)})
    encoders, encode = text_step(setup, "flux_text", make, device)
    detector, detect = edge_step(setup.crop, make, device)
    networks |= encoders | {"detector": detector}
    return Recipe(networks, {"reference": (tuple(networks), lambda: (encode(), detect(), train()))})


def with_released_lora(builder: Callable) -> Callable:
    """Wrap `builder` so that it adds the released transformer's LoRA unmerged, as the reference runs it."""

    def build_with_lora():
        from peft import LoraConfig

        network = builder()
        layers = list(RELEASED_LAYERS)
        network.add_adapter(
            LoraConfig(r=RELEASED_RANK, lora_alpha=RELEASED_RANK, target_modules=layers, init_lora_weights=False)
        )
        return network

    return build_with_lora


def text_step(setup: Setup, component: str, make: Make, device: str) -> tuple[dict[str, object], Callable[[], object]]:
    """Text encoders, and a step that encodes one prompt. component: flux_text or cogvideox_text."""
    import torch

    from benchmarks.memory.plans import FLUX_ENCODERS, VIDEO_ENCODERS, encoder_builder

    if component == "flux_text":
        classes, length = FLUX_ENCODERS, setup.text_length
    else:
        classes, length = VIDEO_ENCODERS, read_json(setup.inbetween / "config.json")["max_text_seq_length"]
    encoders = {n: make("text", encoder_builder(setup.paths[component], n, cls)) for n, cls in classes.items()}
    prompts = {}
    for name, encoder in encoders.items():
        tokens = getattr(encoder.config, "max_position_embeddings", length)  # T5 has no such limit
        prompts[name] = torch.zeros(1, tokens, dtype=torch.long, device=device)

    @torch.no_grad()
    def encode() -> None:
        for name, encoder in encoders.items():
            encoder(prompts[name])

    return encoders, encode


def edge_step(side: int, make: Make, device: str) -> tuple[object, Callable[[], object]]:
    """The HED edge detector on one square crop: VGG-16's convolutions, and a side output for each stage."""
    import torch

    def detector() -> torch.nn.Module:
        stages, channels = [], 3
        for width, count in HED_STAGES:
            layers = [torch.nn.MaxPool2d(2)] if stages else []
            for _ in range(count):
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
                channels = width
            stages.append(torch.nn.ModuleList([torch.nn.Sequential(*layers), torch.nn.Conv2d(width, 1, 1)]))
        return torch.nn.ModuleList(stages)

    network = make("detector", detector)
    image = torch.randn(1, 3, side, side, device=device)

    @torch.no_grad()
    def detect() -> None:
        features = image
        for stage, output in network:
            features = stage(features)
            output(features)

    return network, detect
