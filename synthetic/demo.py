"""Show a finished video beside its inputs and the true pictures: a contact sheet and an mp4. Ends `make demo`.

    python -m synthetic.demo --run RUN --scene assets/sampleA --reference assets/references/boxtown.png

RUN is a folder of sag_generate_anchor_view.py that holds a video of ggi.py. Writes demo.png and demo.mp4
beside that video. A reference of synthetic/reference.py has a known style: the scene is then rendered exactly in it,
as a perfect video would show it; so does its page. Without one there are no true frames.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from synthetic.reference import style_of
from synthetic.render import make_world, paint, trace
from synthetic.styles import Style
from utils.cli import InputError, Parser, require_writable, run_script
from utils.files import read_json
from utils.images import contact_sheet, read_image, resize_image, write_image, write_video
from utils.layout import ARC_STEPS, CAMERAS_FILE, SCENE_FILE, VIDEO_FILE, Scene, find_anchors, load_scene
from utils.runs import MANIFEST
from utils.scene.scene_geometry import load_scene_geometry
from utils.videos.page import add_to_page, has_page
from utils.videos.read import read_frames

SHEET_FILE, MP4_FILE = "demo.png", "demo.mp4"
SHEET_WIDTH, MOMENTS = 1600, 9  # pixels, and columns: fewer or more where moments do not divide evenly over the arcs
PANEL_WIDTH = 432  # pixels, at least, of each of the three panels of the mp4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, "python -m synthetic.demo")
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder with the anchors image_00.png … and one video folder")
    add("--scene", type=Path, required=True, help="scene folder that the run was made for")
    add("--reference", type=Path, required=True, metavar="PNG", help="reference picture that the run was made with")
    add("--video", metavar="NAME", help="name of the video folder in RUN (default: the only one)")
    return parser.parse_args(argv)


def find_video(run: Path, name: str | None) -> tuple[Path, float]:
    """The folder of a finished video in a run folder, and its frames per second. Raises InputError without one."""
    found = sorted(path.parent.name for path in run.glob(f"*/{VIDEO_FILE}"))
    if not found:
        raise InputError(f"{run} holds no video: run ggi.py --target {run} first")
    if name is None and len(found) > 1:
        raise InputError(f"{run} holds {len(found)} videos: choose one with --video: {', '.join(found)}")
    if name is not None and name not in found:
        raise InputError(f"--video {name}: {run} holds {', '.join(found)}")
    folder = run / (name or found[0])
    manifest = read_json(folder / MANIFEST)
    fps = manifest.get("fps")
    if not manifest.get("finished") or not isinstance(fps, int | float) or fps <= 0:
        raise InputError(f"{folder} is not finished: run ggi.py again")
    return folder, float(fps)


def edge_paths(scene: Scene) -> list[Path]:
    """Edge frames along the whole path, those that two arcs share once."""
    return [path for arc in scene.arcs for path in arc.edge_paths[bool(arc.index) :]]


def true_frames(scene: Scene, style: Style, size: tuple[int, int]) -> np.ndarray:
    """Render the scene's mesh along its path in a style: uint8 [45 N + 1, H, W, 3]. size: width, height.

    Raises InputError when the mesh or the path is missing, has no classes, or does not belong to the edges.
    """
    loaded = load_scene_geometry(scene, size, "the truth")
    if loaded.up != "+z":
        raise InputError(f"{scene.folder / CAMERAS_FILE}: styles are for Z-up worlds, this one is {loaded.up} up")
    try:
        world = make_world(loaded.geometry)
    except ValueError as error:
        raise InputError(f"{scene.folder / SCENE_FILE}: {error}") from error
    views = tqdm(loaded.views, desc="true frames", unit="frame")
    return np.stack([paint(trace(world, view), style) for view in views])


def demo_sheet(
    reference: tuple[str, np.ndarray],
    anchors: Sequence[np.ndarray],
    edges: Sequence[Path],
    frames: np.ndarray,
    truth: np.ndarray | None,
) -> np.ndarray:
    """Reference and anchors, large; below, one column per moment: edges, frames, true frames. uint8 [H, W, 3].

    reference: its name and picture. frames, truth: uint8 [45 N + 1, H, W, 3]; edges: as many.
    """
    num_arcs = len(anchors) - 1
    per_arc = max(1, round((MOMENTS - 1) / num_arcs))
    moments = np.linspace(0, ARC_STEPS * num_arcs, per_arc * num_arcs + 1).round().astype(int).tolist()
    name, picture = reference
    label = f"reference: {name}; anchors in its style: frames {numbered(moments[::per_arc])}"
    rows = [(f"edges: frames {numbered(moments)}", [read_image(edges[m]) for m in moments])]
    rows.append(("generated frames", [frames[m] for m in moments]))
    if truth is not None:
        rows.append(("true frames: the scene rendered in the reference's style", [truth[m] for m in moments]))
    top = contact_sheet([(label, [apart(p) for p in (picture, *anchors)])], SHEET_WIDTH // (len(anchors) + 1))
    bottom = contact_sheet([(label, [apart(p) for p in row]) for label, row in rows], SHEET_WIDTH // len(moments))
    wide = max(top.shape[1], bottom.shape[1])
    padded = [np.pad(a, ((0, 0), (0, wide - a.shape[1]), (0, 0)), constant_values=255) for a in (top, bottom)]
    return np.concatenate(padded)


def apart(picture: np.ndarray) -> np.ndarray:
    """Add a white margin, which separates neighbouring pictures."""
    margin = max(1, picture.shape[1] // 72)
    return np.pad(picture, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)


def numbered(moments: Sequence[int]) -> str:
    """Frame numbers, from 1, as in the scene folder."""
    return ", ".join(str(moment + 1) for moment in moments)


def panels(edges: Sequence[Path], frames: np.ndarray, truth: np.ndarray | None) -> Iterator[np.ndarray]:
    """Frames of the mp4, one by one: edges, generated and true frame side by side under a label; even sides."""
    height, width = frames.shape[1:3]
    scale = -(-PANEL_WIDTH // width)
    label = "edges | generated frames" + (" | true frames" if truth is not None else "")
    for k, frame in enumerate(frames):
        shown = [resize_image(read_image(edges[k]), width, height), frame]
        row = contact_sheet([(label, shown if truth is None else [*shown, truth[k]])], scale * width)
        yield np.pad(row, [(0, side % 2) for side in row.shape[:2]] + [(0, 0)], constant_values=255)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cv2.setNumThreads(1)
    scene, picture = load_scene(args.scene), read_image(args.reference)
    style = style_of(args.reference)
    anchors = [read_image(path) for path in find_anchors(args.run, len(scene.arcs) + 1)]
    folder, fps = find_video(args.run, args.video)
    require_writable(folder)
    frames = read_frames(folder, len(scene.arcs))
    if style is None:
        print(f"no true frames: the style of {args.reference} is not known", file=sys.stderr)
    truth = None if style is None else true_frames(scene, style, frames.shape[2:0:-1])
    edges = edge_paths(scene)
    write_video(folder / MP4_FILE, panels(edges, frames, truth), fps)
    write_image(folder / SHEET_FILE, demo_sheet((args.reference.stem, picture), anchors, edges, frames, truth))
    if has_page(folder):
        add_to_page(folder, truth=truth)
    print(folder / MP4_FILE)
    print(folder / SHEET_FILE)


if __name__ == "__main__":
    run_script(main)
