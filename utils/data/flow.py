"""Optical flow between frames, for noise that follows a video."""

import functools
import importlib.util
from collections.abc import Callable

import cv2
import numpy as np

from utils.cli import InputError

FLOWS = ("dis", "raft")
RAFT_SIDE = 128  # pixels; least side that RAFT accepts
Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (from, to), uint8 [H, W, 3] each -> float32 [H, W, 2]


def flow_correspondence(target: np.ndarray, source: np.ndarray, flow: Flow) -> tuple[np.ndarray, np.ndarray]:
    """Position in `source` of each pixel of `target`, in the form that `warp_noise` expects.

    target, source: uint8 [H, W, 3]. Returns (position float64 [H, W, 2], x then y, origin at the outer corner; visible
    bool [H, W]). A pixel is visible where the backward flow leads back to it, within the tolerance of
    Sundaram, Brox and Keutzer (ECCV 2010): |f + b|² < 0.01 (|f|² + |b|²) + 0.5.
    """
    height, width = target.shape[:2]
    there, back = flow(target, source), flow(source, target)
    column, row = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    x, y = column + there[..., 0], row + there[..., 1]  # pixel indices, which are centres minus 0.5
    returned = cv2.remap(back, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    tolerance = 0.01 * ((there**2).sum(-1) + (returned**2).sum(-1)) + 0.5
    consistent = ((there + returned) ** 2).sum(-1) < tolerance
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    return np.stack([x, y], axis=-1).astype(np.float64) + 0.5, consistent & inside


def check_flow(name: str, size: tuple[int, int]) -> None:
    """Raise InputError when flow `name` is unknown, not installed or unfit for frames of this size. Loads nothing."""
    if name not in FLOWS:
        raise InputError(f"--flow {name} is unknown: choose {' or '.join(FLOWS)}")
    if name == "raft" and min(size) < RAFT_SIDE:
        raise InputError(f"--flow raft needs sides of {RAFT_SIDE} pixels, not {size[0]}x{size[1]}; use --flow dis")
    if name == "raft" and importlib.util.find_spec("torchvision") is None:
        raise InputError("--flow raft needs torchvision: pip install torchvision, or use --flow dis")


def flow_estimator(name: str) -> Flow:
    """The function for `--flow NAME`; call `check_flow` first. Raises InputError when RAFT's weights are missing."""
    if name == "dis":
        return dis_flow
    _raft()  # load now, so that missing weights are reported before work begins
    return raft_flow


def dis_flow(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Dense inverse search at full resolution. uint8 [H, W, 3] -> float32 [H, W, 2]."""
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    estimator.setFinestScale(0)
    return estimator.calc(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (start, end)), None)


def raft_flow(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """RAFT (large). uint8 [H, W, 3], sides multiples of 8 and at least RAFT_SIDE -> float32 [H, W, 2]."""
    import torch

    model, device = _raft()
    pair = [torch.tensor(frame, device=device).movedim(-1, 0)[None] / 127.5 - 1 for frame in (start, end)]
    with torch.no_grad():
        return model(*pair)[-1][0].movedim(0, -1).float().cpu().numpy()


@functools.cache
def _raft() -> tuple:
    """(network, its device)."""
    import torch
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return raft_large(weights=Raft_Large_Weights.DEFAULT, progress=False).eval().to(device), device
    except OSError as error:
        raise InputError(f"--flow raft cannot load its weights ({error}); --flow dis needs none") from error
