"""Loading of Wan VACE: its text encoder for the prompts, then transformer and VAE, with a LoRA merged."""

import html
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanVACEPipeline, WanVACETransformer3DModel

from models.finite import require_finite
from models.inbetween.stage import place_networks
from models.inbetween.wan_vace import WanVaceInbetweenPipeline
from models.loading.files import blaming, read_lora
from models.loading.networks import free_caches, load_encoders, load_model, load_pipeline
from models.prompts import warn_of_cuts
from models.runtime.memory import RESIDENT, place_pipeline
from utils.cli import InputError

TEXT_TOKENS = 512
TILE, TILE_STRIDE = (512, 512), (480, 416)  # height, width in pixels: two tiles of 832x480


def encode_wan_prompts(
    path: Path, prompts: Iterable[str], device: str, dtype: torch.dtype, how: str = RESIDENT
) -> dict[str, torch.Tensor]:
    """Encode prompts for Wan, then free the text encoder: {prompt: umT5 embedding [1, 512, D] on the CPU}.

    As the pipeline does, zeros follow a text's own tokens. (Its own function needs ftfy, for damaged Unicode.)
    """
    pipeline = load_encoders("wan_text", WanVACEPipeline, path, dtype)
    align(pipeline.text_encoder, device)
    place_pipeline(pipeline, how, device)
    texts = {prompt: " ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts}
    warn_of_cuts("umT5", pipeline.tokenizer, texts.values(), TEXT_TOKENS)
    embeds = {}
    for prompt, text in texts.items():
        tokens = pipeline.tokenizer(
            [text], padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            hidden = pipeline.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds[prompt] = (hidden * tokens.attention_mask[..., None]).to(dtype).cpu()
        require_finite(embeds[prompt], f"the umT5 embeddings of the prompt {prompt!r}")
    del pipeline
    free_caches()
    return embeds


def load_wan_vace(
    paths: Mapping[str, Path],
    device: str,
    dtype: torch.dtype,
    kept: Mapping[str, str],
    lora: Path | None = None,
    *,
    tiling: bool,
) -> WanVaceInbetweenPipeline:
    """Load the pipeline without its text encoder; the VAE in float32.

    kept: {network: placement}. lora: merged into the weights. tiling: decode in tiles.
    """
    networks = {
        "transformer": load_model("wan_transformer", WanVACETransformer3DModel, paths["wan_transformer"], dtype),
        "vae": load_model("wan_vae", AutoencoderKLWan, paths["wan_vae"], torch.float32),
    }
    no_text = {"text_encoder": None, "tokenizer": None}
    pipeline = load_pipeline("wan_text", WanVaceInbetweenPipeline, paths["wan_text"], dtype, **networks, **no_text)
    set_tiles(pipeline, tiling)
    if lora:
        merge_lora(pipeline, lora)
    for network in networks.values():
        align(network, device)
    place_networks(pipeline, kept, device)
    pipeline.set_progress_bar_config(leave=False, desc="steps")
    return pipeline


def align(network: torch.nn.Module, device: str) -> None:
    """Copy weights that a CPU computes with out of their memory-mapped file.

    There they may begin anywhere, and products round by where their factors begin; a launch of several processes
    loads them elsewhere.
    """
    if device == "cpu":
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.clone()


def set_tiles(pipeline: WanVaceInbetweenPipeline, tiling: bool) -> None:
    """Decode videos larger than a tile in tiles: less memory, and slightly other numbers where tiles overlap."""
    pipeline.vae.enable_tiling(*TILE, *TILE_STRIDE)
    pipeline.vae.disable_tiling()  # as soon as it has the sizes
    pipeline.tiled_decoding = tiling


def merge_lora(pipeline: WanVaceInbetweenPipeline, path: Path) -> None:
    """Add a LoRA file in diffusers' format to the transformer's weights. Raises InputError unless all of it fits."""
    tensors, _ = read_lora(path)
    with blaming(f"--lora {path} does not fit these weights"):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, local_files_only=True)
        pipeline.fuse_lora(components=["transformer"])
    given = sum("lora_" in key and key.endswith(".weight") for key in tensors)
    taken = sum(".lora_" in name for name, _ in pipeline.transformer.named_parameters())
    if taken != given:  # diffusers leaves out what it does not know
        raise InputError(f"--lora {path} does not fit these weights: {taken} of its {given} factors are known")
    pipeline.unload_lora_weights()
    pipeline.transformer.requires_grad_(False)
