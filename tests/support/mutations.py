"""Copies of weight, tokenizer and LoRA files with one thing damaged: each loads, or ends in one line.

    python -m tests.support.mutations --count 200 --seed 1

draws that many kinds of damage and prints the outcome of each. Anything but success, InputError (bad input) and
FloatingPointError (NaN) would be a traceback for a user.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import CogVideoXTransformer3DModel, FluxPipeline

from models.finite import require_finite_weights
from models.flux.lora import check_lora
from models.inbetween.frozen_lora import read_frozen_lora
from models.inbetween.pipeline import CogVideoXInbetweenPipeline
from models.loading.files import load_ggi_transformer
from models.loading.fit import require_fit
from models.loading.networks import load_encoders, load_model
from models.loading.whole import NETWORKS, component_folder, require_whole
from models.weights import WEIGHTS, weight_hashes
from tests.scripts.bad_input.common import write_lora
from tests.support.clips import write_lora as write_frozen_lora
from tests.support.helpers import GOLDEN
from utils.cli import InputError, Parser, non_negative_int, positive_int, run_script
from utils.files import read_json

Rng = np.random.Generator
WORDS = (b"null", b"[]", b"{}", b"[1, 2]", b'"x"', b'"I8"', b'"F16"', b"-1", b"0", b"7", b"1e400", b"true")


def flip_bytes(data: bytearray, rng: Rng) -> bytearray:
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        data[place] ^= int(rng.integers(1, 256))
    return data


def flip_early(data: bytearray, rng: Rng) -> bytearray:
    """Flip bytes in the header of a weight file."""
    return flip_bytes(data[:400], rng) + data[400:]


def cut_short(data: bytearray, rng: Rng) -> bytearray:
    return data[: rng.integers(len(data))]


def cut_out(data: bytearray, rng: Rng) -> bytearray:
    first, last = sorted(rng.integers(len(data), size=2))
    return data[:first] + data[last:]


def append(data: bytearray, rng: Rng) -> bytearray:
    return data + rng.bytes(int(rng.integers(1, 100)))


def put_not_a_number(data: bytearray, rng: Rng) -> bytearray:
    """Set all bits of a number: NaN as float32, bfloat16 and float16."""
    place = len(data) - 4 * int(rng.integers(1, min(60, len(data) // 4 + 1) + 1))
    return data[:place] + b"\xff" * 4 + data[place + 4 :]


def change_length(data: bytearray, rng: Rng) -> bytearray:
    """Change the length of the header, the first eight bytes of a weight file."""
    return bytearray(int(rng.choice([0, 1, 7, 2**20, 2**63 - 1])).to_bytes(8, "little")) + data[8:]


def exchange_value(data: bytearray, rng: Rng) -> bytearray:
    """Replace a value of JSON, or of a weight file's header, by one of another type."""
    colons = [i for i, byte in enumerate(data[:4000]) if byte == ord(":")]
    if not colons:
        return flip_bytes(data, rng)
    first = int(rng.choice(colons)) + 1
    last = next((i for i in range(first, len(data)) if data[i] in b",}\n"), len(data))
    return data[:first] + bytes(rng.choice(list(WORDS))) + data[last:]


def page(data: bytearray, rng: Rng) -> bytearray:
    return bytearray(b"<!DOCTYPE html>" + rng.bytes(20))


DAMAGES = (flip_bytes, flip_early, cut_short, cut_out, append, put_not_a_number, change_length, exchange_value, page)


def load_network(name: str, path: Path) -> None:
    """Check and load a component as the stages do, up to its first use."""
    require_whole(name, component_folder(name, path))
    require_fit({name: path})
    weight_hashes({name: path} if name != "inbetween" else {"transformer": path})
    if name == "flux_text":
        model = load_encoders(name, FluxPipeline, path, torch.float32)
    elif name == "cogvideox_text":
        model = load_encoders(name, CogVideoXInbetweenPipeline, path, torch.float32)
    elif name == "inbetween":
        model = load_ggi_transformer(path, torch.float32)
    else:
        model = load_model(name, getattr(diffusers, NETWORKS[name]), path, torch.float32)
    for network in model.components.values() if name.endswith("_text") else [model]:
        if isinstance(network, torch.nn.Module):
            require_finite_weights(network)


def make_inputs(folder: Path, weights: Path) -> Mapping[Path, Callable[[Path], object]]:
    """{file or folder: function that loads it}. weights: a weight set such as `checkpoints/tiny`."""
    flux, cogvideox = (shutil.copytree(weights / name, folder / name) for name in ("flux", "cogvideox"))
    control = shutil.copytree(weights / "controlnet", folder / "controlnet")
    text = shutil.ignore_patterns("transformer", "vae")
    texts = [shutil.copytree(weights / name, folder / f"{name}_text", ignore=text) for name in ("flux", "cogvideox")]
    for name in ("flux_tiny", "ae_tiny", "controlnet_tiny"):
        shutil.copy(GOLDEN / "3_flux" / f"{name}.safetensors", folder)
    write_lora(folder / "loras")
    config = read_json(cogvideox / "transformer" / "config.json")
    with torch.random.fork_rng():
        transformer = CogVideoXTransformer3DModel.from_config(config)
    frozen = write_frozen_lora(folder / "frozen.safetensors", transformer)
    shapes = [read_json(WEIGHTS / "tiny" / part / "config.json") for part in ("flux/transformer", "controlnet")]
    return {
        flux / "transformer": partial(load_network, "flux_transformer"),
        flux / "vae": partial(load_network, "flux_vae"),
        control: partial(load_network, "controlnet"),
        cogvideox / "vae": partial(load_network, "cogvideox_vae"),
        cogvideox / "transformer": partial(load_network, "inbetween"),
        texts[0]: partial(load_network, "flux_text"),
        texts[1]: partial(load_network, "cogvideox_text"),
        folder / "flux_tiny.safetensors": partial(load_network, "flux_transformer"),
        folder / "ae_tiny.safetensors": partial(load_network, "flux_vae"),
        folder / "controlnet_tiny.safetensors": partial(load_network, "controlnet"),
        folder / "loras" / "lora.safetensors": lambda path: check_lora(path, shapes[0]),
        folder / "loras" / "controlnet.lora.safetensors": lambda path: check_lora(path, shapes[1]),
        frozen: lambda path: read_frozen_lora(path, config),
    }


def damage_one(inputs: Mapping[Path, Callable], rng: Rng) -> tuple[str, str]:
    """Damage one file of one input, load it, and restore it: (damage, outcome).

    Raises exceptions that a user would see as a traceback.
    """
    path, load = list(inputs.items())[rng.integers(len(inputs))]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    file, damage = files[rng.integers(len(files))], DAMAGES[rng.integers(len(DAMAGES))]
    whole = file.read_bytes()
    file.write_bytes(damage(bytearray(whole), rng))
    what = f"{damage.__name__} of {file.relative_to(path.parent)}"
    try:
        load(path)
        return what, "loaded"
    except (InputError, FloatingPointError) as error:
        return what, f"{type(error).__name__}: {error}"
    finally:
        file.write_bytes(whole)


def damage_many(weights: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`damage_one` with copies of the weights of a set; an exception says which damage it was."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder), weights)
        for path, load in inputs.items():
            load(path)  # undamaged, it loads
        for number in range(count):
            try:
                yield damage_one(inputs, np.random.default_rng([seed, number]))
            except BaseException as error:
                error.add_note(f"damage {number} of seed {seed}")
                raise


def main() -> None:
    parser = Parser(__doc__, "python -m tests.support.mutations")
    parser.add_argument("--count", type=positive_int, default=200, help="damages")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the damages")
    args = parser.parse_args()
    for what, outcome in damage_many(WEIGHTS / "tiny", args.count, args.seed):
        print(f"{what}: {' '.join(outcome.split())[:200]}", flush=True)


if __name__ == "__main__":
    run_script(main)
