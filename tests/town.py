"""Compare preprocessing with Blender's ground truth.

    python -m tests.town FOLDER

FOLDER holds town.glb, cameras.json and any subset of position/, projector/, passes720/, lineart_1080x720/, each with
any subset of its frames. One line per figure:

    <name> <value> <bar> ok|short|skip

Exit code 1 when a figure is short of its bar, 2 when nothing could be run.
"""

import itertools
import operator
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.arcs import ARC_STEPS, latent_frame_numbers
from utils.cameras import CameraPath, read_cameras
from utils.cli import InputError, Parser, run_script
from utils.correspondence import read_map, source_positions
from utils.geometry import Geometry, RayCaster, load_geometry, turn
from utils.images import read_image
from utils.line_art import LineScene, find_lines, make_line_scene
from utils.views import View, correspondence, make_views

WITHIN = 1.5  # pixels; how far apart two lines may be and still count as the same


@dataclass(frozen=True)
class Figure:
    """One measured figure; value None means that its input is absent."""

    name: str
    value: float | None
    bar: str  # '<0.002' or '>0.99'

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "skip"
        compare = operator.lt if self.bar[0] == "<" else operator.gt
        return "ok" if compare(self.value, float(self.bar[1:])) else "short"


@dataclass(frozen=True)
class Town:
    """The scene, and the cameras by frame number."""

    folder: Path
    geometry: Geometry
    caster: RayCaster
    lines: LineScene
    path: CameraPath

    def view(self, number: int, width: int, height: int) -> View:
        return make_views(self.path, (width, height))[self.path.numbers.index(number)]

    def frames(self, name: str, suffix: str) -> list[Path]:
        """Files of a sub-folder whose frame has a camera, in order."""
        found = sorted((self.folder / name).glob(f"*{suffix}"))
        return [path for path in found if path.stem.isdigit() and int(path.stem) in self.path.numbers]


def load_town(folder: Path) -> Town:
    path = read_cameras(folder / "cameras.json")
    geometry = turn(load_geometry(folder / "town.glb"), path.up)
    caster = RayCaster(geometry)
    return Town(folder, geometry, caster, make_line_scene(geometry, caster), path)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def positions(town: Town) -> Iterator[Figure]:
    """Consecutive files of position/: world positions that Blender hit at exact pixel centres."""
    files = town.frames("position", ".npz")
    errors, visible, truly = [], [], []
    for before, after in itertools.pairwise(files):
        source, target = np.load(before, allow_pickle=False), np.load(after, allow_pickle=False)
        height, width = target["object_index"].shape
        views = [town.view(int(path.stem), width, height) for path in (before, after)]
        found = correspondence(town.caster, *views)
        points = target["position"].reshape(-1, 3).astype(np.float64)
        hit = target["object_index"].ravel() > 0
        place, inside = views[0].project(points - views[0].eye)
        both = hit & inside & found.visible.ravel()
        errors.append(np.linalg.norm(found.position.reshape(-1, 2)[both] - place[both], axis=1))
        known, seen = _truly_visible(source, target, views[0], points, hit & inside, place)
        use = known & hit
        visible.append(found.visible.ravel()[use])
        truly.append(seen[use])
    if not errors:
        yield Figure("position_p50_px", None, "<0.002")
        return
    everything = np.concatenate(errors)
    yield Figure("position_p50_px", float(np.percentile(everything, 50)), "<0.002")
    yield Figure("position_p99_px", float(np.percentile(everything, 99)), "<0.01")
    yield Figure("position_visible_iou", iou(np.concatenate(visible), np.concatenate(truly)), ">0.99")


def _truly_visible(
    source: dict, target: dict, view: View, points: np.ndarray, asked: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(where the answer is known, the answer) by looking at the four source pixels around each projected point.

    Visible: one of them shows the same object at a position within 1 % of its depth. Where the four straddle a larger
    depth jump the answer is not known.
    """
    height, width = target["object_index"].shape
    depth = np.linalg.norm(source["position"] - view.eye, axis=-1)
    depth[source["object_index"] == 0] = np.inf
    x, y = np.floor(np.where(asked[:, None], place, 0) - 0.5).astype(int).T
    corners = [(np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)) for dy in (0, 1) for dx in (0, 1)]
    depths = np.stack([depth[corner] for corner in corners])
    near = depths.min(0)
    with np.errstate(invalid="ignore"):
        flat = (depths.max(0) - near) <= 0.01 * near
    same = np.zeros(len(points), bool)
    for corner, d in zip(corners, depths, strict=True):
        close = np.linalg.norm(source["position"][corner] - points, axis=1) < 0.01 * d
        same |= (source["object_index"][corner] == target["object_index"].ravel()) & close
    return flat | ~asked, same & asked


def projector(town: Town) -> Iterator[Figure]:
    """Maps made with the reference's own projector set-up, which is itself off by a third of a pixel."""
    errors, ours, theirs = [], [], []
    for folder in sorted((town.folder / "projector").glob("arc*")):
        first = ARC_STEPS * int(folder.name.removeprefix("arc")) + 1
        numbers = latent_frame_numbers(first, first + ARC_STEPS)
        pairs = {folder / "corres" / f"{b:04d}.png": (a, b) for a, b in itertools.pairwise(numbers)}
        pairs[folder / "corres_end.png"] = (first, first + ARC_STEPS)
        for path, (a, b) in pairs.items():
            if not path.exists() or not {a, b} <= set(town.path.numbers):
                continue
            place, valid = source_positions(read_map(path))
            views = [town.view(n, *valid.shape[::-1]) for n in (a, b)]
            found = correspondence(town.caster, *views, sky=False)
            both = valid & found.visible
            errors.append(np.linalg.norm(place[both] - found.position[both], axis=1))
            ours.append(found.visible.ravel())
            theirs.append(valid.ravel())
    value = float(np.median(np.concatenate(errors))) if errors else None
    yield Figure("projector_p50_px", value, "<0.35")
    yield Figure("projector_iou", iou(np.concatenate(ours), np.concatenate(theirs)) if errors else None, ">0.99")


def passes(town: Town) -> Iterator[Figure]:
    """Depth and position passes at 720x480."""
    files = town.frames("passes720", ".npz")
    depth_errors, position_errors, ours, theirs = [], [], [], []
    for path in files:
        wanted = np.load(path, allow_pickle=False)
        height, width = wanted["depth"].shape
        view = town.view(int(path.stem), width, height)
        rays = view.rays().reshape(-1, 3)
        face = town.caster.cast(view.eye, rays)
        depth = town.caster.plane_depth(face, view.eye, rays)
        hit, truth = face >= 0, wanted["object_index"].ravel() > 0
        both = hit & truth
        depth_errors.append(np.abs(depth - wanted["depth"].ravel())[both])
        offset = view.eye + depth[both, None] * rays[both] - wanted["position"].reshape(-1, 3)[both]
        position_errors.append(np.linalg.norm(offset, axis=1))
        ours.append(hit)
        theirs.append(truth)
    names = ("depth_p99_m", "position_p99_m")
    for name, errors in zip(names, (depth_errors, position_errors), strict=True):
        value = float(np.percentile(np.concatenate(errors), 99)) if errors else None
        yield Figure(f"passes_{name}", value, "<0.001")
    yield Figure("passes_hit_iou", iou(np.concatenate(ours), np.concatenate(theirs)) if files else None, ">0.999")


def line_art(town: Town) -> Iterator[Figure]:
    """One-pixel lines against Blender's Line Art."""
    files = town.frames("lineart_1080x720", ".png")
    right, found, covered, wanted = 0, 0, 0, 0
    for path in files:
        truth = read_image(path)[..., 0] > 127
        view = town.view(int(path.stem), truth.shape[1], truth.shape[0])
        lines = find_lines(town.lines, view).brightness > 0
        right, found = right + int((lines & _near(truth)).sum()), found + int(lines.sum())
        covered, wanted = covered + int((truth & _near(lines)).sum()), wanted + int(truth.sum())
    yield Figure("lines_precision", right / max(found, 1) if files else None, ">0.98")
    yield Figure("lines_recall", covered / max(wanted, 1) if files else None, ">0.97")


def _near(mask: np.ndarray) -> np.ndarray:
    """Pixels within WITHIN of one that is set."""
    return cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= WITHIN


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder laid out like the recorded town")
    folder = parser.parse_args().folder
    town = load_town(folder)
    verdicts = []
    for part in (positions, projector, passes, line_art):
        for figure in part(town):
            value = "-" if figure.value is None else f"{figure.value:.5g}"
            print(f"{figure.name} {value} {figure.bar} {figure.verdict}", flush=True)
            verdicts.append(figure.verdict)
    if "short" in verdicts:
        sys.exit(1)
    if "ok" not in verdicts:
        raise InputError(f"{folder} holds nothing to compare with")


if __name__ == "__main__":
    run_script(main)
