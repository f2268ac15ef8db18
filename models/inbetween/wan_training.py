"""Training of a LoRA on Wan VACE: clips as it sees them, the objective, and what is saved.

The network is frozen; the LoRA lies on all attention and feed-forward layers of both stacks of blocks. Loss: flow
matching, ||v - (noise - latents)||² at (1 - σ) latents + σ noise, with the noise warped to a random degree.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from models.finite import require_finite_tensors
from models.inbetween.clip_cache import STORED, ClipCache, Tensors
from models.inbetween.training import mix_channels, uncached_casts
from models.inbetween.wan_loading import TEXT_TOKENS, align, encode_wan_prompts
from models.inbetween.wan_vace import NUM_FRAMES, WanVaceInbetweenPipeline
from models.latents import draw_noise, to_signed
from models.loading.networks import component_config, load_model
from models.runtime.memory import RESIDENT, place
from models.runtime.runtime import Runtime
from models.runtime.training import Training
from models.settings import TrainSettings, WanTrainSettings
from utils.cli import InputError
from utils.data.clips import Clip, ClipSource
from utils.edges import scribble
from utils.files import atomic_path
from utils.layout import edge_frame_indices
from utils.noise import blend_noise
from utils.runs import derive_seed

TARGETS = r"(vace_)?blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
LORA_FILE = "lora.safetensors"
SHIFT = 3.0  # of the noise levels that are drawn, as of those that are sampled
LEVELS = 1000  # the network is told σ times this


# --- clips ---


class _EncodingPipeline(WanVaceInbetweenPipeline):
    """Its transformer gives the configuration only."""

    @property
    def _execution_device(self) -> torch.device:
        return self.vae.device


class WanClipEncoder:
    """Encodes clips: `video` [16, 13, h, w] and `conditions` [96, 13, h, w], as ggi.py makes them from edges."""

    def __init__(self, vae: AutoencoderKLWan, config: Mapping, size: tuple[int, int]):
        """vae: on its device. config: of the transformer, which is not needed. size: (width, height) in pixels."""
        with torch.device("meta"):
            transformer = WanVACETransformer3DModel.from_config(config)
        self._pipe = _EncodingPipeline(None, None, vae, UniPCMultistepScheduler(), transformer)
        self._size = size

    @torch.no_grad()
    def encode(self, clip: Clip, seed: int) -> Tensors:
        """All tensors of one clip, on the CPU. Raises InputError for a wrong size. seed: nothing is drawn."""
        found = clip.frames.shape[2:0:-1]
        if found != self._size:
            raise InputError(f"the dataset's clips are {found[0]}x{found[1]}, not {self._size[0]}x{self._size[1]}")
        frames = to_signed(clip.frames[edge_frame_indices(NUM_FRAMES)])[None]
        inner = [scribble(edges) for edges in clip.edges[1:-1]]
        tensors = {
            "video": self._pipe.encode_video(frames)[0],
            "conditions": self._pipe.encode_arc(clip.frames[0], clip.frames[-1], inner)[0],
            "noise": torch.from_numpy(clip.noise).movedim(-1, 1),
        }
        return {name: tensor.to("cpu", STORED) for name, tensor in tensors.items()}


def open_wan_cache(folder: Path, source: ClipSource, weights: Mapping, size: tuple[int, int], dtype: str) -> ClipCache:
    """weights: hashes of the networks."""
    text = {"text": weights["wan_text"], "tokens": TEXT_TOKENS, "dtype": dtype}
    return ClipCache(folder, source, {"vae": weights["wan_vae"], "size": size, "model": "wan_vace"}, text)


def fill_wan_cache(
    runtime: Runtime, source: ClipSource, paths: Mapping[str, Path], cache: ClipCache, size: tuple[int, int]
) -> None:
    """Encode what the cache lacks: clips in all processes, captions in the first. Frees the networks afterwards."""
    process = runtime.process
    missing = cache.missing_clips(process.process_index, process.num_processes)
    if missing and process.is_local_main_process:
        source.prepare()
    runtime.wait()
    if missing:
        vae = load_model("wan_vae", AutoencoderKLWan, paths["wan_vae"], torch.float32)
        align(vae, runtime.device)
        place(vae, RESIDENT, runtime.device)
        config = component_config("wan_transformer", paths["wan_transformer"])
        cache.add_clips(missing, WanClipEncoder(vae, config, size).encode, quiet=not runtime.is_main)
        del vae
    runtime.wait()
    if runtime.is_main and (texts := cache.missing_texts()):
        cache.add_texts(encode_wan_prompts(paths["wan_text"], texts, runtime.device, runtime.dtype))
    runtime.wait()


# --- the objective ---


class WanObjective(torch.nn.Module):
    """The network with its LoRA: the loss of a batch."""

    def __init__(self, transformer: WanVACETransformer3DModel):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        conditions: torch.Tensor,
        text: torch.Tensor,
        sigma: torch.Tensor,
    ) -> Tensors:
        """The scalar `loss`. latents, noise: [B, 16, F, h, w]. conditions: [B, 96, F, h, w]. text: [B, T, D]."""
        level = sigma[:, None, None, None, None]
        dtype = self.transformer.dtype
        with uncached_casts():
            velocity = self.transformer(
                hidden_states=((1 - level) * latents + level * noise).to(dtype),
                timestep=LEVELS * sigma,
                encoder_hidden_states=text.to(dtype),
                control_hidden_states=conditions.to(dtype),
                return_dict=False,
            )[0]
        return {"loss": (velocity.float() - (noise - latents)).square().mean()}


def draw_item(cache: ClipCache, item_seed: Sequence[int], caption_dropout: float) -> Tensors:
    """One training example: the arguments of `WanObjective`, without the batch dimension. The seed decides all."""
    rng = np.random.default_rng(item_seed)
    number, u, alpha = int(rng.integers(len(cache))), rng.random(), float(rng.random())
    dropped = rng.random() < caption_dropout
    clip = cache.clip(number)
    warped = mix_channels(clip["noise"], rng)
    noise = blend_noise(warped, draw_noise(warped.shape, derive_seed(*item_seed, 1)), alpha)
    return {
        "latents": clip["video"],
        "noise": noise.movedim(1, 0),
        "conditions": clip["conditions"],
        "text": cache.text("" if dropped else cache.caption(number)),
        "sigma": torch.tensor(SHIFT * u / (1 + (SHIFT - 1) * u), dtype=torch.float32),
    }


# --- the LoRA ---


def add_lora(transformer: WanVACETransformer3DModel, rank: int, seed: int) -> None:
    """Add a LoRA in float32, which alone is trained; it changes nothing yet."""
    torch.manual_seed(seed)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian"))
    for parameter in lora_parameters(transformer).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def lora_parameters(transformer: WanVACETransformer3DModel) -> dict[str, torch.nn.Parameter]:
    """{name in diffusers' files: parameter}."""
    named = transformer.named_parameters()
    return {name.replace(".default.", "."): parameter for name, parameter in named if ".lora_" in name}


class WanTraining(Training):
    """Wan VACE with a new LoRA, ready to be trained by `fit` on a cache of clips. paths: components of WAN_STAGE."""

    def __init__(
        self,
        runtime: Runtime,
        paths: Mapping[str, Path],
        cache: ClipCache,
        settings: TrainSettings,
        own: WanTrainSettings,
    ):
        self.cache, self.caption_dropout, self.dtype = cache, own.caption_dropout, runtime.dtype
        cls = WanVACETransformer3DModel
        self.transformer = load_model("wan_transformer", cls, paths["wan_transformer"], runtime.dtype).train()
        align(self.transformer, runtime.device)
        add_lora(self.transformer, own.lora_rank, settings.seed)
        if own.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        super().__init__(WanObjective(self.transformer), self.draw_batch, self.save_weights, None, runtime.attention)

    def draw_batch(self, step_seed: Sequence[int], items: Iterable[int]) -> Tensors:
        drawn = [draw_item(self.cache, (*step_seed, item), self.caption_dropout) for item in items]
        return {name: torch.stack([item[name] for item in drawn]) for name in drawn[0]}

    def save_weights(self, folder: Path) -> None:
        state = {name: p.detach().to("cpu", self.dtype) for name, p in lora_parameters(self.transformer).items()}
        require_finite_tensors(state, "trained LoRA", f"too large for {self.dtype}")
        WanVACEPipeline.save_lora_weights(folder, transformer_lora_layers=state, weight_name=LORA_FILE)

    def prepare(self, accelerator) -> None:
        """Store only the LoRA in a state, in float32."""

        def save(_: list, weights: list, folder: str) -> None:
            weights.clear()
            if accelerator.is_main_process:
                with atomic_path(Path(folder) / LORA_FILE) as temporary:
                    state = lora_parameters(self.transformer)
                    save_file({name: p.detach().cpu().contiguous() for name, p in state.items()}, temporary)

        def load(modules: list, folder: str) -> None:
            modules.clear()
            state = load_file(Path(folder) / LORA_FILE)
            for name, parameter in lora_parameters(self.transformer).items():
                parameter.data.copy_(state[name])

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)
