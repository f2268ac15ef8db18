"""Draw the reference pictures of assets/references: random towns in random styles, both from the seeds kept for tests.

    python -m synthetic.reference [--output_dir assets/references] [--overwrite]

Beside them, references.json says which town and style each picture shows. They are chosen by hand, so that every sky
and most colours appear; each view shows every major class of object, and the sky.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
from tqdm import tqdm

from synthetic.reference_views import find_reference
from synthetic.styles import Style, make_style
from utils.cli import InputError, Parser, require_writable, run_script
from utils.files import read_json, write_json
from utils.images import write_image

FOLDER, INDEX = Path("assets/references"), "references.json"
SIZE = (1152, 768)  # width, height in pixels
CHOSEN = {  # name: seeds of the town and of the style
    "boxtown": (200_130, 200_069),  # red brick and orange trees in the evening; the demo's picture
    "autumn": (200_101, 200_101),  # yellow brick under a blue sky
    "blossom": (200_122, 200_027),  # white walls and pink trees
    "dawn": (200_114, 200_037),  # blue brick on yellow ground
    "heather": (200_129, 200_087),  # green boards on purple ground
    "rain": (200_134, 200_047),  # pink walls under grey clouds
    "snow": (200_116, 200_043),  # blue walls and red roofs on white ground
    "sunset": (200_100, 200_138),  # green brick, purple ground and pink trees
}


@dataclass(frozen=True)
class Entry:
    """What a picture shows; caption: that of the style."""

    scene_seed: int
    style_seed: int
    caption: str


def chosen_entries() -> dict[str, Entry]:
    """{name: entry} of the pictures that the command draws."""
    return {name: Entry(town, style, make_style(style).caption) for name, (town, style) in CHOSEN.items()}


def style_of(picture: Path) -> Style | None:
    """The style that a reference picture is drawn in; None for a picture that no references.json beside it names.

    Raises InputError when that file is damaged, or names another style than its seed gives now.
    """
    index = picture.parent / INDEX
    if not index.is_file():
        return None
    entry = read_json(index).get(picture.stem)
    if entry is None:
        return None
    try:
        seed, caption = int(entry["style_seed"]), entry["caption"]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{index}: the entry of {picture.stem} needs style_seed and caption") from error
    if seed < 0 or (style := make_style(seed)).caption != caption:
        raise InputError(f"{index}: style {seed} is not {caption!r}; draw it again: python -m synthetic.reference")
    return style


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.reference")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="folder of the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cv2.setNumThreads(1)
    entries, index = chosen_entries(), args.output_dir / INDEX
    pictures = {name: args.output_dir / f"{name}.png" for name in entries}
    for path in (*pictures.values(), index):
        if path.exists() and not args.overwrite:
            raise InputError(f"{path} exists already; pass --overwrite to replace it, or choose another --output_dir")
    require_writable(args.output_dir)
    for name, entry in tqdm(entries.items(), desc="draw", unit="picture"):
        write_image(pictures[name], find_reference(entry.scene_seed, make_style(entry.style_seed), SIZE))
    write_json(index, {name: asdict(entry) for name, entry in entries.items()})
    for path in (*pictures.values(), index):
        print(path)


if __name__ == "__main__":
    run_script(main)
