"""Metrics that need downloaded networks: CLIP, LPIPS, PSNR-D. Optional extras: nothing is downloaded here.

    distance = load_lpips()          # raises Unavailable: what to install or download
    distance(frames[::15], truth[::15])

A network is available when its files are in the cache of its own library: the hub's for CLIP and the depth network,
torch's for LPIPS. Frames are uint8 [F, H, W, 3].
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.images import resize_image

CLIP = "openai/clip-vit-large-patch14"
DEPTH = "depth-anything/Depth-Anything-V2-Small-hf"
LPIPS_BACKBONE = "alexnet-owt-*.pth"  # in torch's hub cache; the package lpips contains the small remaining weights
EVERY = 15  # frames; networks see every 15th, which includes the anchors

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTH_SIDE, DEPTH_MULTIPLE = 518, 14  # pixels
NEAREST = 98  # percentile of a frame's inverse depths; larger ones are clipped to it


class Unavailable(Exception):
    """A network is not available. The message continues the word "needs"."""


def _cached(repo: str, what: str) -> Path:
    """Folder of a repository in the hub's cache, with its weights. what: its name in the message."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, OSError) as error:
        raise Unavailable(f"{what} (hf download {repo})") from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise Unavailable(f"{what} (hf download {repo})")
    return folder


def load_clip(folder: Path | None = None) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function of (frames, reference [H, W, 3]): mean cosine of CLIP's image embeddings, in [-1, 1], 1 is best.

    folder: a CLIP model in the transformers layout (default: CLIP in the hub's cache). Raises Unavailable.
    """
    folder = folder or _cached(CLIP, "CLIP")
    import torch
    from transformers import CLIPVisionModelWithProjection

    network = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    side = network.config.image_size

    def embed(picture: np.ndarray) -> np.ndarray:
        scale = side / min(picture.shape[:2])
        size = [max(side, round(length * scale)) for length in picture.shape[1::-1]]
        large = resize_image(picture, *size)
        top, left = ((length - side) // 2 for length in large.shape[:2])
        pixels = _normalised(large[top : top + side, left : left + side], CLIP_MEAN, CLIP_STD)
        with torch.no_grad():
            vector = network(pixel_values=torch.from_numpy(pixels)).image_embeds[0].numpy()
        return vector / np.linalg.norm(vector)

    def similarity(frames: np.ndarray, reference: np.ndarray) -> float:
        wanted = embed(reference)
        return float(np.mean([embed(frame) @ wanted for frame in frames]))

    return similarity


def load_lpips() -> Callable[[np.ndarray, np.ndarray], float]:
    """A function of (frames, truth): the mean LPIPS distance (AlexNet, version 0.1); 0 is best.

    Raises Unavailable.
    """
    if importlib.util.find_spec("lpips") is None:
        raise Unavailable("lpips (pip install lpips)")
    import torch

    if not any((Path(torch.hub.get_dir()) / "checkpoints").glob(LPIPS_BACKBONE)):
        raise Unavailable("the weights of AlexNet (python -c 'import lpips; lpips.LPIPS()' downloads them)")
    try:
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).eval()
    except (ImportError, RuntimeError) as error:  # torchvision built for another torch
        raise Unavailable(f"an lpips that can be loaded ({str(error).splitlines()[0]})") from error

    def distance(frames: np.ndarray, truth: np.ndarray) -> float:
        def signed(frame: np.ndarray) -> "torch.Tensor":
            return torch.from_numpy(frame.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]

        with torch.no_grad():
            return float(np.mean([network(signed(a), signed(b)).item() for a, b in zip(frames, truth, strict=True)]))

    return distance


def load_depth(folder: Path | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function of a picture [H, W, 3]: inverse depth up to scale and shift, float64 [H, W].

    folder: a model of transformers' AutoModelForDepthEstimation that predicts inverse depth (default: DEPTH in the
    hub's cache). Raises Unavailable.
    """
    folder = folder or _cached(DEPTH, "a depth network")
    import torch
    from transformers import AutoModelForDepthEstimation

    network = AutoModelForDepthEstimation.from_pretrained(folder).eval()

    def inverse_depth(picture: np.ndarray) -> np.ndarray:
        scale = DEPTH_SIDE / min(picture.shape[:2])
        size = [
            DEPTH_MULTIPLE * max(1, round(length * scale / DEPTH_MULTIPLE)) for length in picture.shape[1::-1]
        ]  # fmt: skip
        pixels = _normalised(resize_image(picture, *size), IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            found = network(pixel_values=torch.from_numpy(pixels)).predicted_depth[None]
        large = torch.nn.functional.interpolate(found, picture.shape[:2], mode="bilinear", align_corners=False)
        return large[0, 0].double().numpy()

    return inverse_depth


def depth_psnr(found: np.ndarray, true: np.ndarray) -> float:
    """PSNR-D in dB: how well inverse depths [F, H, W] fit the true ones, after the best scale and shift per frame.

    true: 1 / metres, 0 for the sky. Each true frame is scaled to [0, 1], 1 being its NEAREST percentile; then
    10 log10(1 / MSE) of the least-squares fit a·found + b, averaged over frames.
    """
    values = []
    for a, b in zip(found, true, strict=True):
        near = np.percentile(b, NEAREST)
        wanted = np.clip(b / near, 0, 1) if near > 0 else np.zeros_like(b)
        design = np.stack([a.ravel(), np.ones(a.size)], axis=1)
        fit = design @ np.linalg.lstsq(design, wanted.ravel(), rcond=None)[0]
        values.append(-10 * np.log10(max(np.mean(np.square(fit - wanted.ravel())), 1e-10)))
    return float(np.mean(values))


def _normalised(picture: np.ndarray, mean: tuple, std: tuple) -> np.ndarray:
    """float32 [1, 3, H, W]."""
    values = (picture.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])
