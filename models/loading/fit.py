"""Check, before loading, that a component's tensors fit its configuration, and its tokenizers their encoders.

Networks are built on the meta device and compared with the headers of their files: no weights are read.
"""

from collections.abc import Mapping
from pathlib import Path

import diffusers
import torch
import transformers

from models.loading.files import MODEL_KINDS, Shards, blaming, build_empty, reference_layout
from models.loading.keymaps import ggi_transformer, merged_names, with_base
from models.loading.whole import CONVERTIBLE, ENCODERS, NETWORKS, component_folder
from utils.cli import InputError
from utils.files import read_json

SLACK = 0.1  # share by which a tokenizer and its encoder may differ: encoders are padded, tokens are added
OLD_NAMES = ".query."  # in attention layers of an old VAE, which diffusers renames while it loads


def require_fit(paths: Mapping[str, Path]) -> None:
    """Raise InputError, in one line, unless each component can be loaded.

    paths: as `locate` returns them, and `inbetween`: the 48-channel transformer's folder. Other names are left out.
    """
    for name, path in paths.items():
        folder = component_folder(name, path)
        if name in ENCODERS:
            _require_tokenizers(name, folder)
        elif name in NETWORKS:
            with blaming(f"{name}: {folder} is not a whole {NETWORKS[name]}"):
                _require_tensors(name, folder)


def _require_tensors(name: str, folder: Path) -> None:
    if folder.is_file():
        kind = CONVERTIBLE[name]
        config, tensors = reference_layout(kind, folder)
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
    build_empty(getattr(diffusers, NETWORKS[name]), config, tensors)


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
        if longest and found.model_max_length > longest:
            raise InputError(f"{name}: {path / 'tokenizer_config.json'} has no model_max_length up to {longest}")
