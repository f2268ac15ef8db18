"""Loading the networks of a stage from the local paths that `models.weights.locate` found.

Text encoders are loaded, used and freed before the big networks are touched: they are the largest part that is needed
the shortest. All loading is strict: a missing, extra or misshapen key is an error.
"""

import gc
from collections.abc import Iterable, Mapping
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image

from models.convert import load_ggi_transformer, load_reference_file, reference_config
from models.flux import FluxModels, Text
from models.inbetween import CogVideoXInbetweenPipeline, prepare_networks
from models.memory import AT_WORK, KEPT, RESIDENT, keep
from models.weights import CONVERTIBLE, component_folder
from utils.cli import InputError
from utils.runs import read_json

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The scripts show a progress bar of their own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def component_config(name: str, path: Path) -> dict:
    """Config of a model without loading it; for a reference-format file it is read from the tensors' shapes."""
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


def load_flux(paths: dict[str, Path], device: str, dtype: torch.dtype) -> FluxModels:
    """Transformer, ControlNet and VAE of FLUX, in CPU memory; `place_flux` brings them to `device`."""
    return FluxModels(
        load_model("flux_transformer", FluxTransformer2DModel, paths["flux_transformer"], dtype),
        load_model("controlnet", FluxControlNetModel, paths["controlnet"], dtype),
        load_model("flux_vae", AutoencoderKL, paths["flux_vae"], dtype),
        device,
    )


def place_flux(models: FluxModels, kept: Mapping[str, str]) -> None:
    """Bring the networks to their device as `kept` says; call it after LoRA layers were added."""
    for name in kept.keys() & {"transformer", "controlnet", "vae"}:
        keep(getattr(models, name), kept[name], models.device)


def load_pipeline(name: str, cls: type, path: Path, dtype: torch.dtype, **parts) -> diffusers.DiffusionPipeline:
    """A pipeline from the folder `path`, without transformer and VAE unless they are among `parts`."""
    parts = {"transformer": None, "vae": None} | parts
    try:
        return cls.from_pretrained(path, dtype=dtype, local_files_only=True, **parts)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {path} cannot be loaded: {error}") from error


def load_encoders(
    name: str, cls: type, path: Path, device: str, dtype: torch.dtype, how: str
) -> diffusers.DiffusionPipeline:
    """A pipeline with its text encoders alone. how: they are kept on the device (`models/memory.py`)."""
    pipeline = load_pipeline(name, cls, path, dtype)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            keep(part, how, device)
    return pipeline


def encode_flux_prompts(
    path: Path, prompts: Iterable[str], device: str, dtype: torch.dtype, max_length: int, how: str = RESIDENT
) -> dict[str, Text]:
    """{prompt: Text} from the text encoders of the pipeline folder `path`, which are freed again. On the CPU."""
    pipeline = load_encoders("flux_text", FluxPipeline, path, device, dtype, how)
    texts = {}
    with torch.no_grad():
        for prompt in dict.fromkeys(prompts):
            tokens, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=max_length)
            texts[prompt] = Text(tokens.cpu(), pooled.cpu())
    del pipeline
    free_caches()
    return texts


def encode_video_prompts(
    path: Path, prompts: Iterable[str], device: str, dtype: torch.dtype, max_length: int, how: str = RESIDENT
) -> dict[str, torch.Tensor]:
    """{prompt: T5 embedding [1, T, D]} for CogVideoX; the text encoder is freed again. Tensors on the CPU."""
    pipeline = load_encoders("cogvideox_text", CogVideoXInbetweenPipeline, path, device, dtype, how)
    with torch.no_grad():
        embeds = {
            prompt: pipeline.encode_prompt(prompt, None, False, max_sequence_length=max_length)[0].cpu()
            for prompt in dict.fromkeys(prompts)
        }
    del pipeline
    free_caches()
    return embeds


@torch.no_grad()
def caption_image(image: np.ndarray, path: Path, device: str, dtype: torch.dtype, seed: int) -> str:
    """Describe uint8 [H, W, 3] with the BLIP-2 model in `path`, which is freed again."""
    from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

    # The processor is put together here because its own loader wants torchvision.
    model = Blip2ForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True).to(device)
    processor = Blip2Processor(
        BlipImageProcessorPil.from_pretrained(path, local_files_only=True),
        AutoTokenizer.from_pretrained(path, local_files_only=True),
        num_query_tokens=model.config.num_query_tokens,
    )
    torch.manual_seed(seed)
    inputs = processor(images=Image.fromarray(image), return_tensors="pt").to(device, dtype)
    tokens = model.generate(**inputs, max_new_tokens=40)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def load_inbetween(
    paths: dict[str, Path],
    transformer: Path,
    device: str,
    dtype: torch.dtype,
    kept: Mapping[str, str] = KEPT["ggi"]["full"],
    *,
    tiling: bool,
) -> CogVideoXInbetweenPipeline:
    """The in-between pipeline without its text encoder.

    transformer: folder in either layout, merged while loading. kept: {network: how it is kept} (`models/memory.py`).
    """
    networks = {
        "transformer": load_ggi_transformer(transformer, dtype).requires_grad_(False),
        "vae": load_model("cogvideox_vae", AutoencoderKLCogVideoX, paths["cogvideox_vae"], dtype),
    }
    no_text = {"text_encoder": None, "tokenizer": None}
    pipeline = load_pipeline(
        "cogvideox_text", CogVideoXInbetweenPipeline, paths["cogvideox_text"], dtype, **networks, **no_text
    )
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)  # whatever the repository names
    prepare_networks(**networks, tiling=tiling)
    if AT_WORK in kept.values():
        pipeline.enable_model_cpu_offload(device=device)
    else:
        for name in networks:
            keep(getattr(pipeline, name), kept[name], device)
    pipeline.set_progress_bar_config(leave=False, desc="steps")
    return pipeline


def free_caches() -> None:
    """Give memory back to the card and to the system, after the last reference to a network was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # since torch 2.12
            torch.accelerator.empty_host_cache()  # pinned, by what was streamed
