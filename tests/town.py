"""Compare preprocessing with Blender's ground truth.

    python -m tests.town FOLDER

FOLDER holds town.glb, cameras.json and any subset of position/, projector/, passes720/, lineart_1080x720/, each with
any subset of its frames. One line per figure:

    <name> <value> <bar> ok|short|skip

Exit code 1 when a figure is short of its bar, 2 when nothing could be run.
"""

import itertools
import operator
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.cameras.path import CameraPath
from utils.cameras.read import read_cameras
from utils.cli import InputError, Parser, run_script
from utils.correspondence import read_map, source_positions
from utils.images import read_image
from utils.layout import Arc, latent_frame_numbers
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, turn
from utils.scene.lines import LineScene, find_lines, make_line_scene
from utils.scene.raycast import RayCaster
from utils.scene.views import View, correspondence, make_views

WITHIN = 1.5  # pixels; how far apart two lines may be and still count as the same


@dataclass(frozen=True)
class Figure:
    """One measured figure; value None means that its input is absent, or holds no pixel to measure."""

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
        found = [path for path in (self.folder / name).glob(f"*{suffix}") if path.stem.isdecimal()]
        return sorted((path for path in found if int(path.stem) in self.path.numbers), key=lambda path: int(path.stem))


def load_town(folder: Path) -> Town:
    path = read_cameras(folder / "cameras.json")
    geometry = turn(load_geometry(folder / "town.glb"), path.up)
    caster = RayCaster(geometry)
    return Town(folder, geometry, caster, make_line_scene(geometry, caster), path)


def pooled(function: Callable[[np.ndarray], float], parts: list[np.ndarray]) -> float | None:
    """`function` of the values of all files together; None if there are none."""
    values = np.concatenate(parts) if parts else np.empty(0)
    return float(function(values)) if len(values) else None


def p99(values: np.ndarray) -> float:
    return np.percentile(values, 99)


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether both are set, for pixels where either is: bool [N]. The mean is the intersection over union."""
    return (a & b)[a | b]


def read_passes(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of an npz file with one row per pixel, float64, zero where nothing is hit; and its `shape` (H, W).

    `hit`: bool, `object_index`: 0 where nothing is hit. Raises InputError when the file is damaged or lacks one.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("object_index", *names)}
        shape = arrays["object_index"].shape
        width, height = shape[1], shape[0]
        rows = {name: array.reshape(height * width, *array.shape[2:]).astype(float) for name, array in arrays.items()}
        channels = {name: array.shape[2:] == ((3,) if name == "position" else ()) for name, array in arrays.items()}
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged or lacks an array ({error}); render it again") from error
    if not all(channels.values()) or not height * width:
        raise InputError(f"{path} holds arrays of unexpected shapes; render it again")
    hit = rows["object_index"] > 0
    for array in rows.values():
        array[~hit] = 0  # the renderer may leave anything there, such as infinity
    return rows | {"hit": hit, "shape": np.array(shape)}


def positions(town: Town) -> Iterator[Figure]:
    """Consecutive files of position/: world positions that Blender hit at exact pixel centres."""
    errors, visible = [], []
    for before, after in itertools.pairwise(town.frames("position", ".npz")):
        source, target = (read_passes(path, "position") for path in (before, after))
        height, width = target["shape"]
        if (source["shape"] != target["shape"]).any():
            raise InputError(f"{after} is {width}x{height}, unlike the file before it; render them at one size")
        views = [town.view(int(path.stem), width, height) for path in (before, after)]
        found = correspondence(town.caster, *views)
        seen = found.visible.ravel()
        place, inside = views[0].project(target["position"] - views[0].eye)
        asked = target["hit"] & inside
        both = asked & seen
        errors.append(np.linalg.norm(found.position.reshape(-1, 2)[both] - place[both], axis=1))
        known, truly = _truly_visible(source, target, views[0], asked, place)
        use = known & target["hit"]
        visible.append(overlap(seen[use], truly[use]))
    yield Figure("position_p50_px", pooled(np.median, errors), "<0.002")
    yield Figure("position_p99_px", pooled(p99, errors), "<0.01")
    yield Figure("position_visible_iou", pooled(np.mean, visible), ">0.99")


def _truly_visible(
    source: dict, target: dict, view: View, asked: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(whether visibility is known, visibility), from the four source pixels around each projected point.

    Visible: one of them shows the same object at a position within 1 % of its depth. Unknown: the depths of the four
    differ by more.
    """
    height, width = target["shape"]
    depth = np.where(source["hit"], np.linalg.norm(source["position"] - view.eye, axis=1), np.inf)
    x, y = np.floor(np.where(asked[:, None], place, 0) - 0.5).astype(int).T
    corners = [
        np.clip(y + dy, 0, height - 1) * width + np.clip(x + dx, 0, width - 1) for dy in (0, 1) for dx in (0, 1)
    ]
    depths = np.stack([depth[corner] for corner in corners])
    flat = np.isfinite(depths).all(0) & (depths.max(0) <= 1.01 * depths.min(0))
    same = np.zeros(len(asked), bool)
    for corner, d in zip(corners, depths, strict=True):
        close = np.linalg.norm(source["position"][corner] - target["position"], axis=1) < 0.01 * d
        same |= (source["object_index"][corner] == target["object_index"]) & close
    return flat | ~asked, same & asked


def projector(town: Town) -> Iterator[Figure]:
    """Maps made with the reference's own projector set-up, which itself has an error of a third of a pixel."""
    errors, visible = [], []
    for path, (a, b) in _projector_pairs(town.folder / "projector"):
        if not path.is_file() or not {a, b} <= set(town.path.numbers):
            continue
        place, valid = source_positions(read_map(path))
        views = [town.view(n, *valid.shape[::-1]) for n in (a, b)]
        found = correspondence(town.caster, *views, sky=False)
        both = valid & found.visible
        errors.append(np.linalg.norm(place[both] - found.position[both], axis=1))
        visible.append(overlap(valid, found.visible))
    yield Figure("projector_p50_px", pooled(np.median, errors), "<0.35")
    yield Figure("projector_iou", pooled(np.mean, visible), ">0.99")


def _projector_pairs(folder: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Maps that the reference would write, with the frames that each connects."""
    for child in sorted(folder.glob("arc*")):
        if re.fullmatch(r"arc\d+", child.name):
            arc = Arc(int(child.name.removeprefix("arc")), child)
            yield from zip(
                arc.corres_paths, itertools.pairwise(latent_frame_numbers(arc.first, arc.last)), strict=True
            )
            yield arc.corres_end_path, (arc.first, arc.last)


def passes(town: Town) -> Iterator[Figure]:
    """Depth and position passes at 720x480."""
    depth_errors, position_errors, hits = [], [], []
    for path in town.frames("passes720", ".npz"):
        wanted = read_passes(path, "depth", "position")
        height, width = wanted["shape"]
        view = town.view(int(path.stem), width, height)
        rays = view.rays().reshape(-1, 3)
        face = town.caster.cast(view.eye, rays)
        hits.append(overlap(face >= 0, wanted["hit"]))
        both = (face >= 0) & wanted["hit"]
        depth = town.caster.plane_depth(face[both], view.eye, rays[both])
        depth_errors.append(np.abs(depth - wanted["depth"][both]))
        offset = view.eye + depth[:, None] * rays[both] - wanted["position"][both]
        position_errors.append(np.linalg.norm(offset, axis=1))
    yield Figure("passes_depth_p99_m", pooled(p99, depth_errors), "<0.001")
    yield Figure("passes_position_p99_m", pooled(p99, position_errors), "<0.001")
    yield Figure("passes_hit_iou", pooled(np.mean, hits), ">0.999")


def line_art(town: Town) -> Iterator[Figure]:
    """One-pixel lines against Blender's Line Art."""
    right, covered = [], []
    for path in town.frames("lineart_1080x720", ".png"):
        truth = read_image(path)[..., 0] > 127
        view = town.view(int(path.stem), truth.shape[1], truth.shape[0])
        lines = find_lines(town.lines, view).brightness > 0
        right.append(_near(truth)[lines])
        covered.append(_near(lines)[truth])
    yield Figure("lines_precision", pooled(np.mean, right), ">0.98")
    yield Figure("lines_recall", pooled(np.mean, covered), ">0.97")


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
