"""Clips as the in-between transformer sees them, encoded once and kept on disk.

One file per clip and one per caption (`utils/data/tensor_cache.py`): a file that is damaged, truncated or made from
other inputs is made again. An interrupted encoding resumes where it stopped, and processes divide the clips.

    CACHE/clips-<identity>/<clip>.safetensors     float16, h and w in latent cells:
        video, edges [2, 13, 16, h, w]            mean and standard deviation of the VAE's posterior
        start, end   [4, 16, h, w]                the end images, noised four times and sampled from their posterior
        noise        [13, 16, h, w]               N(0, 1), warped along with the frames
        caption      uint8 [bytes]                UTF-8
    CACHE/texts-<identity>/<caption>.safetensors
        embeds       float32 [T, D]
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors import safe_open
from tqdm import tqdm

from models.finite import DAMAGE, PRECISION, require_finite_tensors
from models.latents import draw_noise, to_signed
from utils.cli import InputError
from utils.data.clips import LATENT_SCALE, Clip, ClipSource
from utils.data.tensor_cache import read_arrays, write_arrays
from utils.layout import LATENT_FRAMES, NOISE_CHANNELS, edge_frame_indices
from utils.runs import derive_seed

Tensors = dict[str, torch.Tensor]
FORMAT = 1  # increase it when the files' contents change
END_DRAWS = 4  # noised copies of each end image
END_NOISE = (-3.0, 0.5)  # mean and standard deviation of the logarithm of their noise
STORED = torch.float16


class ClipCache:
    """Cached latents of one dataset and VAE, and caption embeddings of one text encoder."""

    def __init__(self, folder: Path, source: ClipSource, identity: dict, text_identity: dict):
        """identity: what latents depend on besides the clips (VAE, precision …). text_identity: the same for texts."""
        self.source = source
        self._about = {"format": FORMAT, "dataset": source.identity(), **identity}
        self._text_about = {"format": FORMAT, **text_identity}
        self._names = [source.name(i) for i in range(len(source))]
        self._clips = folder / f"clips-{short_hash(self._about)}"
        self._texts = folder / f"texts-{short_hash(self._text_about)}"

    def __len__(self) -> int:
        return len(self._names)

    def clip_path(self, i: int) -> Path:
        return self._clips / f"{self._names[i]}.safetensors"

    def text_path(self, caption: str) -> Path:
        return self._texts / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"

    def _clip_about(self, i: int) -> dict:
        return self._about | {"clip": self._names[i]}

    def _caption_about(self, caption: str) -> dict:
        return self._text_about | {"caption": caption}

    def missing_clips(self, rank: int = 0, processes: int = 1) -> list[int]:
        """This process's share of the clips whose file is missing or damaged; checks every existing file."""
        share = range(rank, len(self), processes)
        return [i for i in share if not is_whole(self.clip_path(i), self._clip_about(i))]

    def add_clips(self, numbers: list[int], encode: Callable[[Clip, int], Tensors], quiet: bool = False) -> None:
        """Load, encode and store these clips, one after the other. encode: `ClipEncoder.encode`."""
        clips = prefetch(self.source.load, numbers)
        for i, clip in tqdm(clips, "encode", len(numbers), unit="clip", disable=quiet):
            seed = int(hashlib.sha256(self._names[i].encode()).hexdigest()[:15], 16)
            tensors = encode(clip, seed)
            require_finite_tensors(tensors, f"latents of the clip {self._names[i]}", f"{PRECISION}; {DAMAGE}")
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            arrays["caption"] = np.frombuffer(clip.caption.encode(), np.uint8)
            write_arrays(self.clip_path(i), arrays, self._clip_about(i))

    def missing_texts(self) -> list[str]:
        """Captions (and the empty caption) without an embedding yet; all clips must be encoded already."""
        texts = sorted({"", *(self.caption(i) for i in range(len(self)))})
        return [text for text in texts if not is_whole(self.text_path(text), self._caption_about(text))]

    def add_texts(self, embeds: Tensors) -> None:
        """embeds: {caption: [1, T, D]}."""
        for caption, embed in embeds.items():
            write_arrays(self.text_path(caption), {"embeds": embed[0].float().numpy()}, self._caption_about(caption))

    def clip(self, i: int) -> Tensors:
        """The latents of clip i, float32; shapes as in the module's docstring."""
        arrays = self._read(self.clip_path(i), self._clip_about(i))
        return {name: torch.from_numpy(array).float() for name, array in arrays.items() if name != "caption"}

    def caption(self, i: int) -> str:
        with safe_open(self.clip_path(i), "numpy") as file:
            return file.get_tensor("caption").tobytes().decode()

    def text(self, caption: str) -> torch.Tensor:
        """Embedding float32 [T, D] of one of the captions."""
        return torch.from_numpy(self._read(self.text_path(caption), self._caption_about(caption))["embeds"])

    def _read(self, path: Path, about: dict) -> dict[str, np.ndarray]:
        arrays = read_arrays(path, about)
        if arrays is None:
            raise InputError(f"{path} was removed or damaged during training; run the same command again")
        return arrays


def is_whole(path: Path, about: dict) -> bool:
    """Whether a file is intact and matches `about`; prints one line about an existing file that is not."""
    whole = read_arrays(path, about) is not None
    if path.exists() and not whole:
        print(f"{path} is damaged or foreign and will be made again", file=sys.stderr, flush=True)
    return whole


def short_hash(about: dict) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def prefetch(load: Callable[[int], Clip], numbers: Iterable[int]) -> Iterator[tuple[int, Clip]]:
    """(number, clip) in order; the next clip is loaded while the caller works on this one."""
    numbers = list(numbers)
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(load, numbers[0]) if numbers else None
        for k, number in enumerate(numbers):
            clip = coming.result()
            if k + 1 < len(numbers):
                coming = executor.submit(load, numbers[k + 1])
            yield number, clip


# --- encoding ---


class ClipEncoder:
    """Encodes the frames, edges and end images of a clip with the video VAE."""

    def __init__(
        self, vae: AutoencoderKLCogVideoX, size: tuple[int, int], num_frames: int, autocast: torch.dtype | None
    ):
        """vae: already on its device. size: (width, height) in pixels. num_frames: the model's, padding included."""
        self._vae, self._size, self._num_frames, self._autocast = vae, size, num_frames, autocast

    @torch.no_grad()
    def encode(self, clip: Clip, seed: int) -> Tensors:
        """All tensors of one clip, on the CPU. seed: draws the end images' noise. Raises InputError for a wrong size.

        The 46 frames are padded with three copies of the last, so that the 13th latent frame holds only the end.
        """
        self._check(clip)
        padded = edge_frame_indices(self._num_frames)
        tensors = {
            "video": self._posterior(to_signed(clip.frames[padded])),
            "edges": self._posterior(to_signed(clip.edges[padded])),
            "start": self._noised(clip.frames[0], derive_seed(seed, 0)),
            "end": self._noised(clip.frames[-1], derive_seed(seed, 1)),
            "noise": torch.from_numpy(clip.noise).movedim(-1, 1),
        }
        return {name: tensor.to("cpu", STORED) for name, tensor in tensors.items()}

    def _check(self, clip: Clip) -> None:
        width, height = self._size
        found, noise = clip.frames.shape[2:0:-1], (LATENT_FRAMES, height // LATENT_SCALE, width // LATENT_SCALE)
        if found != self._size or clip.edges.shape != clip.frames.shape or clip.noise.shape[:3] != noise:
            raise InputError(
                f"the dataset's clips are {found[0]}x{found[1]} with noise {list(clip.noise.shape)}; these weights "
                f"need {width}x{height} with noise {[*noise, NOISE_CHANNELS]}"
            )

    def _posterior(self, video: torch.Tensor) -> torch.Tensor:
        """Video float32 [F, 3, H, W] in [-1, 1] -> scaled mean and deviation of its latents [2, F', 16, h, w]."""
        pixels = video.movedim(0, 1)[None].to(self._vae.device, self._vae.dtype)
        with torch.autocast(self._vae.device.type, self._autocast, enabled=self._autocast is not None):
            posterior = self._vae.encode(pixels).latent_dist
        both = torch.cat([posterior.mean, posterior.std]).float().movedim(1, 2)
        return self._vae.config.scaling_factor * both

    def _noised(self, image: np.ndarray, seed: int) -> torch.Tensor:
        """Latents of noised copies of uint8 [H, W, 3], sampled from their posteriors: [END_DRAWS, 16, h, w]."""
        clean, latents = to_signed(image), []
        for k in range(END_DRAWS):
            sigma = np.exp(np.random.default_rng([seed, k]).normal(*END_NOISE))
            noised = clean + sigma * draw_noise(clean.shape, derive_seed(seed, k, 0))
            mean, deviation = self._posterior(noised[None])[:, 0].cpu()
            latents.append(mean + deviation * draw_noise(mean.shape, derive_seed(seed, k, 1)))
        return torch.stack(latents)
