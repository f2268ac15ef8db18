"""Soft edges of an image: white lines on black that look like the output of the HED network.

    python -m utils.edges reference.png edges.png                # classical detector, needs nothing
    python -m utils.edges reference.png edges.png --edges hed    # HED network, needs `pip install controlnet_aux`

`soft_edges` imitates HED with OpenCV alone: Lab contrast that is present at several scales and is not texture,
thinned to its crest and drawn with a soft pen. Lengths are in pixels at REFERENCE_WIDTH and scale with the picture.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.cli import InputError, Parser, require_writable, run_script
from utils.images import read_image, resize_image, write_image

DETECTORS = ("lines", "hed")
HED_WEIGHTS = "lllyasviel/Annotators"
REFERENCE_WIDTH = 1080  # wider pictures are analysed at this width and their lines enlarged
SMALL_WIDTH = 320  # narrower ones are enlarged, at most twofold: their details are finer than the smallest kernels
STEP_PEAK = math.sqrt(2 * math.pi)  # a step of height 1, blurred by sigma, has the gradient 1 / (STEP_PEAK sigma)

# Standard deviations of Gaussians: (at REFERENCE_WIDTH, minimum), in pixels.
FINE = (1.2, 0.8)
COARSER = (((2.2, 1.2), 0.6), ((5.0, 2.0), 0.25))  # added to FINE; share of unsigned gradients, which thin lines need
CREST = (2.0, 0.7)  # joins the two sides of a thin line into one crest
SURROUND = (20.0, 4.0)
PEN = (2.0, 0.8)

TEXTURE_PENALTY = 2.0
CONTRAST = (4.0, 7.5)  # Lab units that an isolated edge needs: at REFERENCE_WIDTH, and in a tiny, coarser picture
SURROUND_WEIGHT = 2.2  # how much nearby edges raise that threshold
FAINTEST, FULL = 0.08, 0.5  # visibility drawn as black, as white
SHORTEST = (50.0, 6.0)  # extent of a line drawn at half brightness; half as long: gone
THINNED, SCRIBBLE_PEN = 1.5, 0.7  # pixels of the video: blur that joins a soft line into one crest, pen of a scribble
PEN_PRESSURE = 1.7  # above 1 the middle of a line saturates, which makes it wider than the pen


def soft_edges(image: np.ndarray) -> np.ndarray:
    """Soft edges of a photograph, painting or render: uint8 [H, W, 3], three equal channels, 255 = clear contour.

    image: uint8 [H, W, 3], RGB. Lines are 3-8 px wide at a width of 1080. The same image gives the same bytes.
    """
    _require_rgb(image, "image")
    height, width = image.shape[:2]
    worked_at = min(max(width, min(2 * width, SMALL_WIDTH)), REFERENCE_WIDTH)
    scale = worked_at / REFERENCE_WIDTH
    size = (worked_at, max(1, round(height * worked_at / width)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if worked_at < width else cv2.INTER_CUBIC)

    strength = _blur(_edge_strength(image, scale), CREST, scale)
    crest, visibility = _crest(strength), _visibility(strength, scale)
    lines = crest * visibility * _long_enough((crest > 0.25) & (visibility > 0), scale)
    # Blurring leaves a line of weight 1 with a peak of 1 / (STEP_PEAK sigma): undo that.
    drawn = np.minimum(PEN_PRESSURE * STEP_PEAK * _length(PEN, scale) * _blur(lines, PEN, scale), 1)
    enlarged = worked_at > width
    drawn = cv2.resize(drawn, (width, height), interpolation=cv2.INTER_AREA if enlarged else cv2.INTER_LINEAR)
    return np.repeat((drawn * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def resize_edges(edges: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize of an edge image for the models, in training and inference alike: uint8 [H, W, 3] -> [height, width, 3].

    The resampling is Pillow's default, bicubic, because that is what the reference does to every edge image.
    """
    _require_rgb(edges, "edges")
    return resize_image(edges, width, height)


def scribble(edges: np.ndarray) -> np.ndarray:
    """Soft edges as a drawing: thin dark lines on white, about as grey as the edges were bright.

    edges: uint8 [H, W, 3], white on black, at the size that is looked at. Returns the same shape.
    """
    _require_rgb(edges, "edges")
    grey = edges[..., 0].astype(np.float32)
    crest = _crest(cv2.GaussianBlur(grey, (0, 0), THINNED))
    lines = cv2.GaussianBlur(crest * grey / 255, (0, 0), SCRIBBLE_PEN)
    drawn = np.minimum(STEP_PEAK * SCRIBBLE_PEN * lines, 1)
    return np.repeat((255 * (1 - drawn) + 0.5).astype(np.uint8)[..., None], 3, axis=2)


def hed_edges(image: np.ndarray) -> np.ndarray:
    """Edges from the HED network: uint8 [H, W, 3]. image: uint8 [H, W, 3], RGB.

    As in the reference's training, the network sees the image at its default size (short side 512) and the result is
    resized back. Raises InputError when controlnet_aux or its weights cannot be loaded.
    """
    _require_rgb(image, "image")
    found = _hed_network()(Image.fromarray(image)).convert("RGB")
    return resize_edges(np.asarray(found), image.shape[1], image.shape[0])


def check_edge_detector(name: str) -> None:
    """Raise InputError when the detector `name` (lines or hed) does not exist or is not installed. Loads nothing."""
    if name not in DETECTORS:
        raise InputError(f"--edges {name} is unknown: choose {' or '.join(DETECTORS)}")
    if name == "hed" and importlib.util.find_spec("controlnet_aux") is None:
        raise InputError("--edges hed needs controlnet_aux: pip install controlnet_aux, or use --edges lines")


def edge_detector(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function for `--edges NAME`: RGB uint8 [H, W, 3] -> edges uint8 [H, W, 3]. Loads its network, if any."""
    check_edge_detector(name)
    if name == "lines":
        return soft_edges
    _hed_network()  # load now, so that missing weights are reported before work begins, and before threads start
    return hed_edges


def _edge_strength(image: np.ndarray, scale: float) -> np.ndarray:
    """Contrast across each pixel in Lab units, float32 [H, W]: the geometric mean over three scales.

    Gradients of a texture point everywhere and cancel when averaged: each scale is weighted by the share left. The
    two sides of a thin line cancel too, unless opposite gradients count as equal: each scale mixes both averages.
    """
    lab = _blur(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), FINE, scale)
    gx, gy = cv2.Scharr(lab, -1, 1, 0, scale=1 / 32), cv2.Scharr(lab, -1, 0, 1, scale=1 / 32)
    xx, yy, xy = _over_channels(gx * gx), _over_channels(gy * gy), _over_channels(gx * gy)
    slope = np.sqrt(xx + yy)
    doubled = cv2.merge([xx - yy, 2 * xy]) / np.maximum(slope, 1e-6)[..., None]  # doubled angles: opposites agree
    product = STEP_PEAK * _length(FINE, scale) * slope
    for added, unsigned_share in COARSER:
        signed = np.sqrt(sum(_over_channels(_blur(g, added, scale) ** 2) for g in (gx, gy)))
        unsigned = cv2.magnitude(*cv2.split(_blur(doubled, added, scale)))
        kept = (1 - unsigned_share) * signed + unsigned_share * unsigned
        share = kept / (_blur(slope, added, scale) + 0.05)  # 0.05: less than 8 bits can tell from flat
        sigma = math.hypot(_length(FINE, scale), _length(added, scale))
        product *= STEP_PEAK * sigma * kept * share**TEXTURE_PENALTY
    return np.cbrt(product)


def _crest(strength: np.ndarray) -> np.ndarray:
    """Thin lines on the crests of `strength`: float32 [H, W], 1 on a crest, 0 from a distance of one pixel on.

    The distance comes from the second-order expansion at each pixel (Steger 1998). Weights across a crest sum to 1 in
    every direction, so slanted lines come out as bright as upright ones, and a mirrored image gives mirrored lines.
    """
    gx, gy = (cv2.Sobel(strength, -1, dx, 1 - dx, ksize=3, scale=1 / 8) for dx in (1, 0))
    xx, xy, yy = (cv2.Sobel(strength, -1, dx, 2 - dx, ksize=3, scale=1 / 4) for dx in (2, 1, 0))
    spread = cv2.magnitude((xx - yy) / 2, xy)
    curvature = (xx + yy) / 2 - spread  # lower eigenvalue of the Hessian; its eigenvector points across the crest
    turn = ((gx * gx - gy * gy) * (xx - yy) / 2 + 2 * gx * gy * xy) / np.maximum(spread, 1e-9)
    slope_across = np.sqrt(np.maximum(gx * gx + gy * gy - turn, 0) / 2)
    distance = slope_across / np.maximum(-curvature, 1e-2)
    return np.where(curvature < -1e-2, np.maximum(1 - distance, 0), 0).astype(np.float32)


def _visibility(strength: np.ndarray, scale: float) -> np.ndarray:
    """Brightness of each edge, float32 [H, W] in [0, 1]: its strength relative to what its surroundings demand."""
    contrast = scale * CONTRAST[0] + (1 - scale) * CONTRAST[1]
    demanded = contrast**2 + (SURROUND_WEIGHT * _blur(strength, SURROUND, scale)) ** 2
    visibility = strength**2 / (strength**2 + demanded)
    return np.clip((visibility - FAINTEST) / (FULL - FAINTEST), 0, 1)


def _long_enough(lines: np.ndarray, scale: float) -> np.ndarray:
    """Weight of each connected line, float32 [H, W] in [0, 1]: short strokes are texture. lines: bool [H, W]."""
    _, label, stats, _ = cv2.connectedComponentsWithStats(lines.astype(np.uint8), connectivity=8)
    extent = np.hypot(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT]) / _length(SHORTEST, scale)
    weight = np.clip(extent - 0.5, 0, 1).astype(np.float32)
    weight[0] = 0  # the background
    return weight[label]


def _over_channels(values: np.ndarray) -> np.ndarray:
    return cv2.transform(values, np.ones((1, 3), np.float32))  # 10 times as fast as values.sum(axis=2)


def _length(length: tuple[float, float], scale: float) -> float:
    at_reference_width, least = length
    return max(least, at_reference_width * scale)


def _blur(values: np.ndarray, sigma: tuple[float, float], scale: float) -> np.ndarray:
    return cv2.GaussianBlur(values, (0, 0), _length(sigma, scale))


def _require_rgb(image: np.ndarray, name: str) -> None:
    if image.dtype != np.uint8:
        raise ValueError(f"{name} has dtype {image.dtype}, expected uint8")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{name} has shape {image.shape}, expected [H, W, 3]")


@functools.cache
def _hed_network() -> Callable[[Image.Image], Image.Image]:
    check_edge_detector("hed")
    try:
        from controlnet_aux import HEDdetector

        return HEDdetector.from_pretrained(HED_WEIGHTS)
    except (ImportError, OSError) as error:
        raise InputError(f"--edges hed cannot load {HED_WEIGHTS} ({error}); --edges lines needs no weights") from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "python -m utils.edges")
    parser.add_argument("image", type=Path, help="picture to read, in any format that Pillow knows")
    parser.add_argument("output", type=Path, help="PNG to write, of the picture's size")
    parser.add_argument("--edges", choices=DETECTORS, default="lines", help="classical detector or HED network")
    args = parser.parse_args(argv)
    if args.output.suffix.lower() != ".png" or args.output.is_dir():
        raise InputError(f"{args.output} must be a file name that ends in .png")
    if args.output.resolve() == args.image.resolve():
        raise InputError(f"{args.output} is the picture itself; name another file")
    detect = edge_detector(args.edges)
    image = read_image(args.image)
    require_writable(args.output.parent)
    write_image(args.output, detect(image))
    print(args.output)


if __name__ == "__main__":
    run_script(main)
