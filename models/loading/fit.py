"""Check, before loading, that a component's tensors fit its configuration, and its tokenizers their encoders.

Networks are built on the meta device and compared with the headers of their files: no weights are read.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
import transformers

from models.loading.files import MODEL_KINDS, Shards, blaming, build_empty, reference_layout
from models.loading.keymaps import ggi_transformer, merged_names, with_base
from models.loading.networks import load_strictly
from models.loading.whole import (
    CONVERTIBLE,
    ENCODER_CLASSES,
    ENCODERS,
    NETWORKS,
    component_folder,
    require_numbers,
    weight_files,
)
from utils.cli import InputError
from utils.files import read_json

SLACK = 0.1  # share by which a tokenizer and its encoder may differ: encoders are padded, tokens are added
LAYER = re.compile(r"(?:text_model\.)?encoder\.(?:block|layers)\.(\d+)\.")  # of a text encoder
STEPS = 3  # of a trial of the schedule
SCHEDULERS = {  # component -> class that the stages make of its scheduler_config.json; FLUX's is computed
    "cogvideox_text": diffusers.CogVideoXDDIMScheduler,
    "wan_text": diffusers.UniPCMultistepScheduler,
}
POSITIONS, SCALE = "position_ids", "scale"  # in names of tensors: whole numbers of old files; factors of 8-bit weights
OLD_NAMES = ".query."  # in attention layers of an old VAE, which diffusers renames while it loads


def require_fit(paths: Mapping[str, Path]) -> None:
    """Raise InputError, in one line, unless each component can be loaded.

    paths: as `locate` returns them, and `inbetween`: the 48-channel transformer's folder. Other names are left out.
    """
    for name, path in paths.items():
        folder = component_folder(name, path)
        if name in ENCODERS:
            _require_tokenizers(name, folder)
            _require_encoders(name, folder)
            _require_schedule(name, folder / "scheduler")
        elif name in NETWORKS:
            with blaming(f"{name}: {folder} is not a whole {NETWORKS[name]}"):
                _require_tensors(name, folder)


def _require_tensors(name: str, folder: Path) -> None:
    if folder.is_file():
        kind = CONVERTIBLE[name]
        config, tensors = reference_layout(kind, folder)
        require_numbers(folder, NETWORKS[name], config)
        _require_floats(folder, tensors)
        build_empty(MODEL_KINDS[kind][0], config, tensors)
        return
    config, shards = read_json(folder / "config.json"), Shards(folder)
    if config.get("quantization_config") or any(OLD_NAMES in key for key in shards):
        return  # diffusers converts the tensors
    if name == "inbetween":
        plan = {key: shards.empty_like(key if key in shards else with_base(key)) for key in merged_names(shards)}
        config, tensors = ggi_transformer(config, plan)
    else:
        tensors = {key: shards.empty_like(key) for key in shards}
    _require_floats(folder, tensors)
    network = getattr(diffusers, NETWORKS[name])
    _require_types(folder / "config.json", network, config)
    build_empty(network, config, tensors)


def _require_types(path: Path, network: type, config: Mapping) -> None:
    """Raise InputError unless each entry is a number or a switch where the network's own default is one."""
    for key, parameter in inspect.signature(network.__init__).parameters.items():
        value, switch = config.get(key, parameter.default), isinstance(parameter.default, bool)
        if isinstance(parameter.default, int | float) and not isinstance(value, bool if switch else int | float):
            needed = "true or false" if switch else "a number"
            raise InputError(f"{path} says {key} {value!r}, not {needed}: it is damaged, fetch it again")


def _require_floats(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError for integers, which would be taken for the numbers that they stand for."""
    if whole := next((key for key, tensor in tensors.items() if not tensor.is_floating_point()), None):
        raise InputError(
            f"{path}: {whole} holds {tensors[whole].dtype}, and no quantization_config says how to read it: fetch the "
            "weights in bfloat16"
        )


def _require_tokenizers(name: str, folder: Path) -> None:
    """Raise InputError unless each tokenizer has the vocabulary that its text encoder expects.

    transformers silently makes an empty tokenizer when the vocabulary file is missing.
    """
    classes = read_json(folder / "model_index.json")
    for tokenizer, encoder in ENCODERS[name].items():
        config, path = read_json(folder / encoder / "config.json"), folder / tokenizer
        expected, longest = config.get("vocab_size"), config.get("max_position_embeddings")
        if not isinstance(expected, int):
            raise InputError(f"{name}: {folder / encoder / 'config.json'} has no vocab_size: it is damaged")
        with blaming(f"{name}: the tokenizer in {path} cannot be loaded"):
            found = getattr(transformers, classes[tokenizer][1]).from_pretrained(path, local_files_only=True)
        if abs(len(found) - expected) > SLACK * expected:
            raise InputError(
                f"{name}: the tokenizer in {path} knows {len(found)} tokens, the text encoder {expected}: the file of "
                "its vocabulary is missing, damaged or of another model"
            )
        with blaming(f"{name}: {path / 'tokenizer_config.json'} does not fit the text encoder's config.json"):
            short = not longest or 0 < found.model_max_length <= longest
        if not short:
            raise InputError(f"{name}: {path / 'tokenizer_config.json'} has no model_max_length from 1 to {longest}")


def _require_encoders(name: str, folder: Path) -> None:
    """Raise InputError unless each text encoder's tensors are all there, fit its config, and are plain numbers."""
    for part, kind in ENCODER_CLASSES[name].items():
        path = folder / part
        if read_json(path / "config.json").get("quantization_config"):
            continue  # transformers converts the tensors
        model = load_strictly(name, getattr(transformers, kind), path, torch.bfloat16, device_map="meta")
        shards = Shards(path, weight_files(path, "model"))
        layers, held = model.config.num_hidden_layers, len({found[1] for key in shards if (found := LAYER.match(key))})
        if held != layers:
            raise InputError(f"{name}: {path} holds {held} layers, its config.json says {layers}: fetch both again")
        tensors = {key: shards.empty_like(key) for key in shards if not key.endswith(POSITIONS)}
        _require_floats(path, tensors)
        scales = [key for key in tensors if SCALE in key and "logit" not in key]
        if scales and any(tensor.element_size() == 1 for tensor in tensors.values()):
            raise InputError(
                f"{name}: {path}: {scales[0]} scales weights of 8 bits, which is not read: fetch them in bfloat16"
            )


def _require_schedule(name: str, folder: Path) -> None:
    """Raise InputError unless the noise schedule can be made and gives finite numbers, by a step of it on zeros."""
    classes = read_json(folder.parent / "model_index.json")
    what = f"{name}: {folder / 'scheduler_config.json'} cannot be used"
    with blaming(what):
        found = getattr(diffusers, classes["scheduler"][1])
        if not issubclass(found, diffusers.SchedulerMixin):
            raise InputError(f"{what}: {found.__name__} is no scheduler")
        if name not in SCHEDULERS:
            found.from_pretrained(folder, local_files_only=True)
            return
        schedule = SCHEDULERS[name].from_config(read_json(folder / "scheduler_config.json"))
        schedule.set_timesteps(STEPS)
        latents = torch.zeros(1, 1, 1, 1, 1)  # of a video
        for step in schedule.timesteps:
            latents = schedule.step(latents + 1, step, latents, return_dict=False)[0]
        if not latents.isfinite().all():
            raise InputError(f"{what}: its steps give NaN or infinity")
