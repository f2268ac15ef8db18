"""What the full-size benchmark builds and runs: our recipe of each stage, and the reference's.

The reference's: in-betweening with its LoRA of rank 2048 unmerged, a second pass for equal prompts, text and edges
encoded in every training step.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from models.weights import FLUX_STAGE, GGI_STAGE, ROOT, load_preset, locate

RELEASED_RANK = 2048  # of the LoRA in the released in-between transformer
HED_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width and convolutions of each


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is built. paths: folders with config.json. sizes: width, height in pixels."""

    paths: dict[str, Path]
    inbetween: Path
    anchor_size: tuple[int, int]
    crop: int
    video_size: tuple[int, int]
    num_frames: int
    text_length: int


def setup_of(weights: str) -> Setup:
    """Configurations of a weight set; those of the full one are in configs/full."""
    preset = load_preset(weights)
    if weights == "tiny":
        paths = locate(argparse.Namespace(), preset, (*FLUX_STAGE, *GGI_STAGE))
        inbetween, anchors = Path(preset.ggi_transformer), preset.image_size
    else:
        folder = ROOT / "configs" / "full"
        paths = {name: folder / name.split("_")[0] for name in (*FLUX_STAGE, *GGI_STAGE)}
        inbetween, anchors = folder / "inbetween", (1072, 720)
    return Setup(
        paths,
        inbetween,
        anchors,
        preset.resolution,
        preset.video_size,
        preset.num_frames,
        preset.max_sequence_length,
    )


def build(setup: Setup, phase: str, recipe: str, make: Callable) -> tuple[list, Callable[[], object]]:
    """(networks, one step) of a phase: of `ours`, of the `reference`, or `decoding`, which is done once.

    Of anchors `ours` is the default, equal prompts, whose one branch is enough; `both branches` go in one batch.
    make: turns a function that builds a network into a network to use.
    """
    if phase == "ggi":
        return build_ggi(setup, recipe, make)
    if recipe == "decoding":
        return anchor_decoder(setup, make)
    return build_flux(setup, phase, recipe, make)


def build_ggi(setup: Setup, recipe: str, make: Callable) -> tuple[list, Callable[[], object]]:
    from models.plans import video_builders
    from models.steps import ggi_step, latent_shape, video_decoding

    builders = video_builders(setup.paths["cogvideox_vae"], setup.inbetween)
    if recipe == "decoding":
        vae = make(builders["vae"])
        vae.enable_slicing()
        vae.enable_tiling()
        return [vae], video_decoding(vae, latent_shape(vae, setup.video_size, setup.num_frames))
    builder = builders["transformer"]
    network = make(with_released_lora(builder) if recipe == "reference" else builder)
    return [network], ggi_step(network, setup.video_size, setup.num_frames, 2)


def anchor_decoder(setup: Setup, make: Callable) -> tuple[list, Callable[[], object]]:
    from models.flux import FluxModels
    from models.plans import flux_builders
    from models.steps import anchor_decoding

    vae = make(flux_builders(setup.paths)["vae"])
    return [vae], anchor_decoding(FluxModels(None, None, vae, str(vae.device)), setup.anchor_size)


def build_flux(setup: Setup, phase: str, recipe: str, make: Callable) -> tuple[list, Callable[[], object]]:
    from models.flux import FluxModels
    from models.plans import flux_builders, with_lora
    from models.steps import alignment_step, anchor_step

    builders = flux_builders(setup.paths)
    networks = [make(with_lora(builders[name], 16)) for name in ("transformer", "controlnet")]
    models = FluxModels(*networks, None, str(networks[0].device))
    if phase == "anchors":
        step = anchor_step(models, setup.anchor_size, setup.text_length, 2 if recipe == "both branches" else 1)
        return networks, twice(step) if recipe == "reference" else step
    for network in networks:
        network.enable_gradient_checkpointing()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    step = alignment_step(models, setup.crop, 1, setup.text_length)
    if recipe == "ours":
        return networks, step
    encoders, encode = text_step(setup, make)
    detector, detect = edge_step(setup.crop, make)
    return [*networks, *encoders, detector], lambda: (encode(), detect(), step())


def twice(step: Callable[[], object]) -> Callable[[], object]:
    return lambda: (step(), step())


def with_released_lora(builder: Callable) -> Callable:
    """The LoRA of the released transformer beside the weights, as the reference runs it."""

    def build_with_lora():
        from peft import LoraConfig

        network = builder()
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        network.add_adapter(
            LoraConfig(r=RELEASED_RANK, lora_alpha=RELEASED_RANK, target_modules=names, init_lora_weights=False)
        )
        return network

    return build_with_lora


def text_step(setup: Setup, make: Callable) -> tuple[list, Callable[[], object]]:
    """FLUX's text encoders on one prompt."""
    import torch

    from models.plans import FLUX_ENCODERS, encoder_builder

    encoders = {n: make(encoder_builder(setup.paths["flux_text"], n, c)) for n, c in FLUX_ENCODERS.items()}
    prompts = {
        name: torch.zeros(
            1,
            getattr(encoder.config, "max_position_embeddings", setup.text_length),  # T5 has no such limit
            dtype=torch.long,
            device=encoder.device,
        )
        for name, encoder in encoders.items()
    }

    def encode() -> None:
        with torch.no_grad():
            for name, encoder in encoders.items():
                encoder(prompts[name])

    return list(encoders.values()), encode


def edge_step(side: int, make: Callable) -> tuple[object, Callable[[], object]]:
    """The HED edge detector on one square crop: VGG-16's convolutions, and an output beside each of its stages."""
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

    network = make(detector)
    image = torch.randn(1, 3, side, side, device=next(network.parameters()).device)

    def detect() -> None:
        with torch.no_grad():
            features = image
            for stage, output in network:
                features = stage(features)
                output(features)

    return network, detect
