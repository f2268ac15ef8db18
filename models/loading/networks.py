"""Load the networks of a stage from the local paths that `models.weights.locate` found.

Text encoders are loaded, used and freed before the others: they are the largest networks and are needed only briefly.
All loading is strict: a missing, extra or misshapen key is an error.
"""

import gc
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers

from models.loading.files import blaming, load_reference_file, reference_config
from models.loading.whole import CONVERTIBLE, ENCODERS, component_folder
from utils.cli import InputError
from utils.files import read_json

LACKING = ("missing_keys", "mismatched_keys", "error_msgs")  # how libraries report incomplete files

# The scripts show their own progress bar.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def component_config(name: str, path: Path) -> dict:
    """Read a model's config without loading it; for a reference-format file, from the tensors' shapes."""
    folder = component_folder(name, path)
    if folder.is_dir():
        return read_json(folder / "config.json")
    return reference_config(CONVERTIBLE[name], folder)


def load_model(name: str, cls: type, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load one diffusers model, frozen. path: from `locate`. Raises InputError when keys are missing or extra."""
    folder = component_folder(name, path)
    if folder.is_file():
        model = load_reference_file(CONVERTIBLE[name], folder).to(dtype).requires_grad_(False)
        model.register_to_config(_name_or_path=str(folder))
        return model
    return load_strictly(name, cls, folder, dtype, (*LACKING, "unexpected_keys"))


def load_strictly(
    name: str, cls: type, folder: Path, dtype: torch.dtype, kinds: Sequence[str] = LACKING, **options: object
) -> torch.nn.Module:
    """Load a folder with a library's `from_pretrained`, frozen. kinds: entries of its report that are errors."""
    options |= {"dtype": dtype, "output_loading_info": True, "local_files_only": True, "use_safetensors": True}
    with blaming(f"{name}: {folder} cannot be loaded"):
        model, info = cls.from_pretrained(folder, **options)
    wrong = {kind: sorted(map(str, info[kind]))[:3] for kind in kinds if info.get(kind)}
    if wrong:
        raise InputError(f"{name}: {folder} does not hold a whole {cls.__name__}: {wrong}")
    return model.eval().requires_grad_(False)


def load_pipeline(name: str, cls: type, path: Path, dtype: torch.dtype, **parts) -> diffusers.DiffusionPipeline:
    """Load the pipeline in the folder `path`, without transformer and VAE unless they are among `parts`."""
    parts = {"transformer": None, "vae": None} | parts
    with blaming(f"{name}: {path} cannot be loaded"):
        return cls.from_pretrained(path, dtype=dtype, local_files_only=True, **parts)


def load_encoders(name: str, cls: type, path: Path, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    """Load a pipeline with only its tokenizers and text encoders, on the CPU.

    Raises InputError when an encoder lacks weights, which transformers would draw at random.
    """
    classes = read_json(path / "model_index.json")
    encoders = {
        part: load_strictly(name, getattr(transformers, classes[part][1]), path / part, dtype, LACKING)
        for part in ENCODERS[name].values()
    }
    return load_pipeline(name, cls, path, dtype, **encoders)


def free_caches() -> None:
    """Return cached memory to the GPU and the system, after the last reference to a network was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # since torch 2.12
            torch.accelerator.empty_host_cache()  # memory pinned for offloading
