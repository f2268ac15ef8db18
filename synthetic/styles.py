"""Styles of random towns: a palette per object class, textures, sun, sky and haze, and a caption that names them.

    python -m synthetic.styles --seed 200000          # print the caption

Colours come from a short list per class and vary a little around it. Everything is a function of the position in the
world, so that a surface point has one colour in every view: textures are solid, light is Lambert's without shadows,
and haze grows with the distance from the town's middle rather than from the camera.
"""

import argparse
from dataclasses import dataclass

import numpy as np

from utils.cli import Parser, non_negative_int, run_script

COLOURS = {
    "wall": {
        "white": (230, 224, 212), "yellow": (226, 190, 110), "red": (178, 90, 74),
        "green": (140, 168, 114), "blue": (122, 152, 190), "pink": (224, 164, 164),
    },
    "roof": {"red": (160, 72, 54), "grey": (88, 98, 116), "brown": (108, 76, 54), "green": (78, 112, 90)},
    "ground": {
        "green": (120, 158, 84), "yellow": (202, 184, 116), "purple": (146, 116, 158), "white": (228, 232, 240),
    },
    "road": {"grey": (134, 130, 134), "brown": (152, 122, 92), "red": (170, 112, 98)},
    "tree": {"green": (72, 114, 64), "orange": (208, 132, 62), "pink": (220, 152, 180)},
    "window": {"dark": (52, 66, 94), "blue": (164, 198, 218), "yellow": (244, 210, 122)},
    "door": {"brown": (98, 64, 44), "white": (236, 232, 224), "red": (160, 50, 50), "blue": (62, 88, 140)},
}  # fmt: skip
TEXTURES = {
    "wall": ("plain", "brick", "board", "striped"),
    "roof": ("plain", "striped"),
    "ground": ("plain", "grassy"),
    "road": ("plain", "cobbled"),
}
PLURALS = {"wall": "walls", "roof": "roofs", "ground": "ground", "road": "road", "tree": "trees", "window": "windows",
           "door": "doors"}  # fmt: skip
SKIES = {  # low, high, sunlight, ambient light
    "blue day": ((216, 230, 240), (98, 154, 214), (0.42, 0.40, 0.37), (0.65, 0.67, 0.71)),
    "orange evening": ((252, 206, 148), (158, 126, 150), (0.46, 0.37, 0.26), (0.65, 0.59, 0.61)),
    "pink dawn": ((246, 200, 204), (142, 156, 206), (0.40, 0.34, 0.34), (0.69, 0.63, 0.69)),
    "grey cloudy": ((206, 208, 210), (150, 156, 164), (0.24, 0.24, 0.24), (0.80, 0.80, 0.82)),
}
JITTER = 7.0  # of each channel of each colour: half the width of a uniform distribution, of 255
SUN_ELEVATION = (60, 75)  # degrees. High, since a picture of another town does not show which side of a wall is lit
HAZE_START = 60.0  # metres from the town's middle
CLASSES = ("wall", "roof", "window", "door", "balcony", "chimney", "trunk", "tree", "rock", "fence", "road", "ground",
           "hill", "sky")  # fmt: skip
MAJOR_CLASSES = ("wall", "roof", "window", "tree", "road", "ground", "sky")


@dataclass(frozen=True)
class Style:
    """How a town looks. colours: {class: float64 [3] in 0..255}; textures: {class: name}; sun: unit vector towards it,
    Z up; sunlight, ambient: float64 [3], factors; low_sky, high_sky: float64 [3] in 0..255; haze: metres to 1/e."""

    seed: int
    caption: str
    colours: dict[str, np.ndarray]
    textures: dict[str, str]
    sun: np.ndarray
    sunlight: np.ndarray
    ambient: np.ndarray
    low_sky: np.ndarray
    high_sky: np.ndarray
    haze: float


def make_style(seed: int) -> Style:
    """The style of this seed. Training takes 0-99,999, validation 100,000-109,999, tests 200,000 and above."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 10]))
    chosen = {kind: str(rng.choice(list(options))) for kind, options in COLOURS.items()}
    textures = {kind: str(rng.choice(options)) for kind, options in TEXTURES.items()}
    sky = str(rng.choice(list(SKIES)))
    low, high, sunlight, ambient = (np.array(value, float) for value in SKIES[sky])

    def vary(colour: np.ndarray) -> np.ndarray:
        return np.clip(colour + rng.uniform(-JITTER, JITTER, 3), 0, 255)

    colours = {kind: vary(np.array(COLOURS[kind][name], float)) for kind, name in chosen.items()}
    colours |= {
        "balcony": vary(0.5 * colours["wall"] + 0.5 * np.array((236.0, 230, 220))),
        "fence": vary(0.6 * colours["wall"] + 0.4 * np.array((150.0, 144, 136))),
        "chimney": vary(0.6 * colours["roof"] + 0.4 * np.array((130.0, 100, 90))),
        "trunk": vary(np.array((104.0, 78, 58))),
        "rock": vary(np.array((150.0, 144, 140))),
        "hill": vary(0.8 * colours["ground"] + 0.2 * np.array((90.0, 110, 100))),
    }
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(*SUN_ELEVATION))
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    haze = rng.uniform(120, 400)
    return Style(seed, _caption(chosen, textures, sky), colours, textures, sun, sunlight, ambient, vary(low),
                 vary(high), haze)  # fmt: skip


def _caption(colours: dict[str, str], textures: dict[str, str], sky: str) -> str:
    """For example "green brick walls, red roofs, ..., orange evening sky". Plain textures are not named."""
    words = [[name, textures.get(kind, "plain"), PLURALS[kind]] for kind, name in colours.items()]
    return ", ".join([" ".join(word for word in phrase if word != "plain") for phrase in [*words, [sky, "sky"]]])


def vocabulary() -> list[str]:
    """Every word that captions use, sorted."""
    names = [name for options in COLOURS.values() for name in options]
    names += [name for options in TEXTURES.values() for name in options if name != "plain"]
    words = " ".join([*names, *PLURALS.values(), *SKIES, "sky"])
    return sorted(set(words.split()))


def surface_colours(style: Style, kind: np.ndarray, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Colours of surface points, float32 [N, 3] in 0..255, lit and hazed.

    kind: int [N], index into CLASSES (no sky). points: [N, 3], world, metres, Z up. normals: [N, 3], unit, towards the
    viewer.
    """
    table = np.array([style.colours.get(name, (0, 0, 0)) for name in CLASSES], np.float32)
    colour = table[kind]
    for name, texture in style.textures.items():
        if texture == "plain":
            continue
        where = np.flatnonzero(kind == CLASSES.index(name))
        colour[where] *= _PATTERNS[texture](points[where], normals[where])[:, None]
    light = style.ambient + style.sunlight * np.clip(normals @ style.sun, 0, None)[:, None]
    far = np.clip(np.hypot(points[:, 0], points[:, 1]) - HAZE_START, 0, None)
    haze = (1 - np.exp(-far / style.haze)).astype(np.float32)[:, None]
    return np.clip(colour * light.astype(np.float32), 0, 255) * (1 - haze) + style.low_sky.astype(np.float32) * haze


def sky_colours(style: Style, rise: np.ndarray) -> np.ndarray:
    """Colours of the sky, float32 [N, 3] in 0..255. rise: [N], tangent of the elevation."""
    share = np.clip(rise / 0.5, 0, 1).astype(np.float32)[:, None]
    return (style.low_sky + (style.high_sky - style.low_sky) * share).astype(np.float32)


# --- Solid textures: factors near 1 at points [N, 3] with normals [N, 3] --------------------------------------------


def _on_wall(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Metres along a wall, horizontally."""
    length = np.maximum(np.hypot(normals[:, 0], normals[:, 1]), 1e-6)
    return (points[:, 1] * normals[:, 0] - points[:, 0] * normals[:, 1]) / length


def _brick(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    row = points[:, 2] / 0.8
    column = _on_wall(points, normals) / 1.6 + 0.5 * (np.floor(row) % 2)
    joint = ((row % 1) < 0.2) | ((column % 1) < 0.1)
    return np.where(joint, 1.09, 0.97).astype(np.float32)


def _board(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    return np.where((_on_wall(points, normals) % 1.0) < 0.5, 1.04, 0.95).astype(np.float32)


def _striped(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    return np.where((points[:, 2] % 1.2) < 0.6, 1.04, 0.95).astype(np.float32)


def _grassy(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    x, y = points[:, 0], points[:, 1]
    wave = np.sin(0.9 * x + 1.7 * np.sin(0.4 * y)) + np.sin(1.1 * y + 1.3 * np.sin(0.5 * x))
    return (1 + 0.035 * wave).astype(np.float32)


def _cobbled(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    odd = (np.floor(points[:, 0] / 1.5) + np.floor(points[:, 1] / 1.5)) % 2
    return np.where(odd > 0, 1.04, 0.955).astype(np.float32)


_PATTERNS = {"brick": _brick, "board": _board, "striped": _striped, "grassy": _grassy, "cobbled": _cobbled}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.styles")
    parser.add_argument("--seed", type=non_negative_int, default=200_000, help="of the style")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    print(make_style(parse_args(argv).seed).caption)


if __name__ == "__main__":
    run_script(main)
