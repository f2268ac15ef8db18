"""Camera paths: one form in memory, and resampling to arcs.

    path = to_arcs(read_cameras(Path("cameras.json")))      # 45 N + 1 poses

Files are read by `utils/cameras/read.py`; paths that need none are made by `utils/cameras/builtin.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation, Slerp

from utils.cli import InputError
from utils.layout import ARC_STEPS

UP_AXES = {"+y": np.array([0.0, 1.0, 0.0]), "+z": np.array([0.0, 0.0, 1.0])}
Z_UP_TO_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # as Blender exports glTF
DEFAULT_SIZE = (1080, 720)  # width, height for formats that store none
MAX_POSES = 100_000  # more than an hour at 24 fps: a number beyond it is a broken file
MAX_NUMBER = 1e9  # metres, pixels or frames; keeps squares and products finite
SHEAR_TOLERANCE = 1e-3  # largest deviation of R^T R from the identity; some files are rounded to four digits


@dataclass(frozen=True, eq=False)
class CameraPath:
    """P cameras, one per frame.

    c2w: float64 [P, 4, 4], camera-to-world, OpenGL axes (+x right, +y up, -z forward), metres, no scale. focal:
    float64 [P, 2], fl_x and fl_y, and center: float64 [P, 2], cx and cy, in pixels of `size` (width, height), with
    the origin at the outer corner of the top-left pixel. up: the world's up axis, '+y' or '+z'. numbers: frame
    numbers, increasing. fps: frames per second.
    """

    c2w: np.ndarray
    focal: np.ndarray
    center: np.ndarray
    size: tuple[int, int]
    up: str
    numbers: tuple[int, ...]
    fps: float

    def __len__(self) -> int:
        return len(self.c2w)

    def intrinsics(self, width: int, height: int) -> np.ndarray:
        """float64 [P, 4]: fx, fy, cx, cy in pixels of a width x height image.

        Everything scales with the width, so that square pixels stay square; another aspect crops or extends the
        image above and below, around its middle.
        """
        scale = width / self.size[0]
        center_x = scale * self.center[:, 0]
        center_y = height / 2 + scale * (self.center[:, 1] - self.size[1] / 2)
        return np.column_stack([scale * self.focal, center_x, center_y])

    def subset(self, start: int, stop: int) -> "CameraPath":
        """The frames numbered `start` to `stop`, both included. Raises InputError unless two or more are left."""
        has = f"the path has frames {self.numbers[0]} to {self.numbers[-1]}"
        if not self.numbers[0] <= start < stop <= self.numbers[-1]:
            raise InputError(f"frames {start}:{stop} cannot be taken: {has}")
        kept = [i for i, number in enumerate(self.numbers) if start <= number <= stop]
        if len(kept) < 2:
            raise InputError(f"frames {start}:{stop} hold fewer than two poses: {has}, with gaps")
        arrays = {name: getattr(self, name)[kept] for name in ("c2w", "focal", "center")}
        return replace(self, **arrays, numbers=tuple(self.numbers[i] for i in kept))


def make_path(
    where: object,
    c2w: np.ndarray,
    focal: np.ndarray,
    center: np.ndarray,
    size: tuple[int, int],
    up: str,
    numbers: Sequence[int],
    fps: float,
) -> CameraPath:
    """Check the values read and build the path. Arguments as in CameraPath, but c2w may hold a uniform scale.

    where: the file, for messages. Raises InputError naming the first pose that cannot be used.
    """
    if len(c2w) < 2:
        raise InputError(f"{where} holds {len(c2w)} camera pose(s): a path needs at least two")
    if len(c2w) > MAX_POSES:
        raise InputError(f"{where} holds {len(c2w)} camera poses: at most {MAX_POSES} can be read")
    for before, after in pairwise(numbers):
        if before >= after:
            raise InputError(
                f"{where}: frame {after} comes after frame {before}; frame numbers must be unique, in order"
            )
    if min(size) < 1 or max(size) > MAX_NUMBER:
        raise InputError(f"{where}: image size {size[0]}x{size[1]} is not usable; give w and h in pixels")
    if not (math.isfinite(fps) and 0 < fps < MAX_NUMBER):
        raise InputError(f"{where}: {fps} frames per second is not usable; give a positive number")
    poses = [f"{where}: frame {number}" for number in numbers]
    _require(_tame(focal) & (focal > 0).all(1), poses, "focal length must be positive and finite")
    _require(_tame(center), poses, "cx and cy must be finite")
    return CameraPath(_rigid(c2w, poses), focal, center, size, up, tuple(numbers), float(fps))


def _tame(values: np.ndarray) -> np.ndarray:
    """bool [P]: whether all numbers of a pose are finite and small enough for later arithmetic. values: [P, ...]."""
    return (np.abs(values) <= MAX_NUMBER).reshape(len(values), -1).all(1)


def _require(good: np.ndarray, poses: list[str], problem: str) -> None:
    if not good.all():
        raise InputError(f"{poses[int(np.argmin(good))]}: {problem}")


def _rigid(c2w: np.ndarray, poses: list[str]) -> np.ndarray:
    """Check matrices [P, 4, 4] and strip their scale; rotations are made orthonormal to rounding."""
    _require(_tame(c2w), poses, "the camera matrix holds NaN, infinity or huge numbers")
    last_row = np.abs(c2w[:, 3] - (0, 0, 0, 1)).max(1)
    _require(last_row < 1e-6, poses, "the last row of the camera matrix must be 0 0 0 1 (is it stored transposed?)")
    axes = c2w[:, :3, :3]
    scale = np.linalg.norm(axes, axis=1).mean(1)
    _require(scale > 1e-9, poses, "the camera matrix has scale 0")
    axes = axes / scale[:, None, None]
    _require(np.linalg.det(axes) > 0, poses, "the camera matrix is mirrored or flat; remove negative and zero scales")
    error = np.abs(axes.transpose(0, 2, 1) @ axes - np.eye(3)).max((1, 2))
    _require(error < SHEAR_TOLERANCE, poses, "the camera matrix is sheared or scaled unevenly; only rotate and move")
    left, _, right = np.linalg.svd(axes)
    rigid = np.zeros_like(c2w)
    # Rotations that are already orthonormal stay unchanged, so that a written path reads back bit for bit.
    exact = (np.abs(c2w[:, :3, :3].transpose(0, 2, 1) @ c2w[:, :3, :3] - np.eye(3)).max((1, 2)) < 1e-12)[:, None, None]
    rigid[:, :3, :3] = np.where(exact, c2w[:, :3, :3], left @ right)
    rigid[:, :3, 3], rigid[:, 3, 3] = c2w[:, :3, 3], 1
    return rigid


# --- interpolation ---


def catmull_rom(knots: np.ndarray, points: np.ndarray) -> CubicHermiteSpline:
    """The Catmull-Rom spline through points [P, C] at increasing knots [P], P >= 2; straight where the points are."""
    slopes = np.diff(points, axis=0) / np.diff(knots)[:, None]
    chords = (points[2:] - points[:-2]) / (knots[2:] - knots[:-2])[:, None]
    return CubicHermiteSpline(knots, points, np.vstack([slopes[:1], slopes[:-1] + slopes[1:] - chords, slopes[-1:]]))


def resample(path: CameraPath, poses: int) -> CameraPath:
    """Resample to `poses` cameras, evenly spaced in time and numbered from 1. Frame numbers serve as time.

    Positions follow a Catmull-Rom spline in time (constant velocities stay exact), rotations are slerped and
    intrinsics interpolated linearly. fps is kept: a path with more poses plays longer.
    """
    times = np.array(path.numbers, dtype=np.float64)
    at = np.linspace(times[0], times[-1], poses)
    c2w = np.tile(np.eye(4), (poses, 1, 1))
    c2w[:, :3, :3] = Slerp(times, Rotation.from_matrix(path.c2w[:, :3, :3]))(at).as_matrix()
    c2w[:, :3, 3] = catmull_rom(times, path.c2w[:, :3, 3])(at)
    focal, center = (
        np.column_stack([np.interp(at, times, column) for column in values.T]) for values in (path.focal, path.center)
    )
    return replace(path, c2w=c2w, focal=focal, center=center, numbers=tuple(range(1, poses + 1)))


def _arc_poses(num_arcs: int) -> int:
    """Number of poses of `num_arcs` arcs: 45 N + 1."""
    poses = ARC_STEPS * num_arcs + 1
    if num_arcs < 1:
        raise InputError(f"{num_arcs} arcs cannot be made: give 1 or more")
    if poses > MAX_POSES:
        raise InputError(f"{num_arcs} arcs would be {poses} camera poses: at most {MAX_POSES} can be made")
    return poses


def to_arcs(path: CameraPath, num_arcs: int | None = None) -> CameraPath:
    """The path with exactly 45 N + 1 poses, numbered from 1; resampled unless it already has that many.

    N = num_arcs, or the whole number of arcs nearest to the path's length.
    """
    poses = _arc_poses(max(1, round((len(path) - 1) / ARC_STEPS)) if num_arcs is None else num_arcs)
    return replace(path, numbers=tuple(range(1, poses + 1))) if len(path) == poses else resample(path, poses)


def look_at(eye: np.ndarray, target: np.ndarray, up: np.ndarray, where: object) -> np.ndarray:
    """Camera-to-world [P, 4, 4] of cameras at eye [P, 3] looking at target [P, 3]; up [3] keeps the horizon level."""
    forward = target - eye
    distance = np.linalg.norm(forward, axis=1, keepdims=True)
    if not (distance > 1e-9).all():
        raise InputError(f"{where}: a camera looks at its own position; move one of the two")
    forward = forward / distance
    right = np.cross(forward, up)
    level = np.linalg.norm(right, axis=1, keepdims=True)
    if not (level > 1e-6).all():
        raise InputError(f"{where}: a camera looks straight up or down, which leaves its roll open; tilt it a little")
    right = right / level
    c2w = np.tile(np.eye(4), (len(eye), 1, 1))
    c2w[:, :3] = np.stack([right, np.cross(right, forward), -forward, eye], axis=-1)
    return c2w
