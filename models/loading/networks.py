"""Load the networks of a stage from the local paths that `models.weights.locate` found.

Text encoders are loaded, used and freed before the others: they are the largest networks and are needed only briefly.
All loading is strict: a missing, extra or misshapen key is an error.
"""

import gc
from pathlib import Path

import diffusers
import torch
import transformers

from models.loading.files import load_reference_file, reference_config
from models.runtime.memory import place
from models.weights import CONVERTIBLE, component_folder
from utils.cli import InputError
from utils.files import read_json

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
        return load_reference_file(CONVERTIBLE[name], folder).to(dtype).requires_grad_(False)
    try:
        model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: {folder} cannot be loaded: {error}") from error
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        raise InputError(f"{name}: {folder} does not hold a whole {cls.__name__}: {wrong}")
    return model.eval().requires_grad_(False)


def load_pipeline(name: str, cls: type, path: Path, dtype: torch.dtype, **parts) -> diffusers.DiffusionPipeline:
    """Load the pipeline in the folder `path`, without transformer and VAE unless they are among `parts`."""
    parts = {"transformer": None, "vae": None} | parts
    try:
        return cls.from_pretrained(path, dtype=dtype, local_files_only=True, **parts)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {path} cannot be loaded: {error}") from error


def load_encoders(
    name: str, cls: type, path: Path, device: str, dtype: torch.dtype, how: str
) -> diffusers.DiffusionPipeline:
    """Load a pipeline with only its text encoders. how: their placement (`models/runtime/memory.py`)."""
    pipeline = load_pipeline(name, cls, path, dtype)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            place(part, how, device)
    return pipeline


def free_caches() -> None:
    """Return cached memory to the GPU and the system, after the last reference to a network was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # since torch 2.12
            torch.accelerator.empty_host_cache()  # memory pinned for offloading
