"""The small weight set, for tests that do not need the shipped weights: random two-layer networks at 48x32 pixels.

Classes, files and preset are those of `checkpoints/tiny`, which the set replaces in tests: `--weights tiny` loads it.
"""

import fcntl
import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.weights import WEIGHTS, Preset, load_preset
from utils.files import atomic_path, write_json

WIDTH, HEIGHT = 48, 32
SIZE, LATENT_SIZE = (WIDTH, HEIGHT), (WIDTH // 8, HEIGHT // 8)
OUTPUTS = {"decoder.conv_out.weight", "decoder.conv_out.conv.weight", "proj_out.weight"}  # pictures stay in range
SESSION = "TEST_SESSION_FOLDER"  # environment variable: the folder of this pytest session (conftest.py)


def session_folder() -> Path:
    return Path(os.environ[SESSION])


@functools.cache
def small_checkpoints() -> Path:
    """A folder like `checkpoints`, with the weight set as `tiny`; the first worker that asks for it makes it."""
    folder = session_folder() / "checkpoints"
    with (session_folder() / "checkpoints.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with atomic_path(folder) as temporary:
                write_small_weights(temporary / "tiny")
                for name in ("full", "wan_vace"):
                    shutil.copytree(WEIGHTS / name, temporary / name)
    return folder


def small_preset() -> Preset:
    with small_weights():
        return load_preset("tiny")


def write_small_weights(folder: Path, size: tuple[int, int] = SIZE) -> None:
    """Write random weights, larger than usual initial ones, so that every change of an input changes the pictures.

    size: width, height in pixels.
    """
    import torch

    from synthetic import tiny_models

    flux_layers = {"num_layers": 2, "num_attention_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux, control, video = tiny_models.flux_pipeline(), tiny_models.controlnet(), tiny_models.cogvideox_pipeline()
        flux.transformer = resized(flux.transformer, **flux_layers, num_single_layers=2)
        control = resized(control, **flux_layers)
        positions = {"sample_width": size[0] // 8, "sample_height": size[1] // 8}
        video.transformer = resized(video.transformer, num_layers=2, num_attention_heads=1, **positions)
        flux.vae, video.vae = (resized(vae, block_out_channels=(8, 8, 16, 16)) for vae in (flux.vae, video.vae))
        for network in (flux.transformer, flux.vae, control, video.transformer, video.vae):
            for name, parameter in network.named_parameters():
                if parameter.dim() > 1:
                    gain = 0.5 if name in OUTPUTS else 1.5
                    torch.nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
        for name, part in (("flux", flux), ("controlnet", control), ("cogvideox", video)):
            part.to(torch.bfloat16).save_pretrained(folder / name)
    sizes = {"image_size": size, "resolution": size[0], "video_size": size}
    write_json(folder / "preset.json", tiny_models.PRESET | sizes)


def resized(network, **sizes: int):
    """A new network of the same class and configuration except for some sizes."""
    return type(network).from_config({**network.config, **sizes})


def use_small_weights(patch: pytest.MonkeyPatch) -> None:
    """Make `--weights tiny` mean the small weight set from here on."""
    import tests.support.warm_imports  # noqa: F401 - once, not by each script

    patch.setattr("models.weights.WEIGHTS", small_checkpoints())


@contextmanager
def small_weights() -> Iterator[None]:
    """`use_small_weights` in the block."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_weights(patch)
        yield
