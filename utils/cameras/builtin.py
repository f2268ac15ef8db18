"""Built-in camera paths around a scene: orbit, dolly, flythrough."""

import math

import numpy as np

from utils.cameras.path import DEFAULT_SIZE, UP_AXES, Z_UP_TO_Y_UP, CameraPath, _arc_poses, _tame, look_at, make_path
from utils.cli import InputError

KINDS = ("orbit", "dolly", "flythrough")
FIELD_OF_VIEW = math.radians(45)  # vertical
ORBIT_PER_ARC = math.radians(40)  # small enough that neighbouring anchors see the same surfaces
ORBIT_ELEVATION, DOLLY_ELEVATION = math.radians(25), math.radians(15)
MARGIN = 1.05  # of the distance at which the unit sphere fills the image


def builtin_path(
    kind: str,
    bounds: np.ndarray,
    up: str,
    num_arcs: int = 1,
    fps: float = 24.0,
    size: tuple[int, int] = DEFAULT_SIZE,
) -> CameraPath:
    """Make a path around or over the box `bounds`: 45 N + 1 poses for images of `size`, (width, height) in pixels.

    orbit: circles the centre, 40 degrees an arc up to a full turn; dolly: moves straight towards the centre, to half
    the distance; flythrough: crosses above the scene along its longer side. No pose is inside the bounds. bounds:
    [2, 3], minimum and maximum coordinates in metres; up: the up axis of their world. The paths are the same in
    both worlds: 'in front' is +z of a Y-up and -y of a Z-up world.
    """
    bounds = np.asarray(bounds, dtype=np.float64)
    if kind not in KINDS:
        raise InputError(f"path {kind!r} is not known; choose one of {', '.join(KINDS)}")
    if up not in UP_AXES:
        raise InputError(f"up axis {up!r} is not known; choose +y or +z")
    poses = _arc_poses(num_arcs)
    if not (_tame(bounds).all() and (bounds[0] <= bounds[1]).all() and (bounds[0] < bounds[1]).any()):
        raise InputError(f"the scene spans {bounds.tolist()}: a path needs a scene of some size")
    turn = Z_UP_TO_Y_UP if up == "+z" else np.eye(3)
    corners = np.sort(bounds @ turn.T, axis=0)
    progress = np.linspace(0, 1, poses)
    shape = {"orbit": _orbit, "dolly": _dolly, "flythrough": _fly}[kind]
    center, half = corners.mean(0), np.diff(corners, axis=0)[0] / 2
    # The default's own aspect gives its numbers, to the last bit, at any size.
    width, height = DEFAULT_SIZE if size[0] * DEFAULT_SIZE[1] == size[1] * DEFAULT_SIZE[0] else size
    narrow = FIELD_OF_VIEW / 2
    if width < height:  # the view is narrower than it is high
        narrow = math.atan(math.tan(narrow) * width / height)
    # Built at unit size: a scene may be a coin or a continent.
    eye, target = shape(half / np.linalg.norm(half), progress, num_arcs, MARGIN / math.sin(narrow))
    c2w = look_at(eye, target, UP_AXES["+y"], kind)
    c2w[:, :3, 3] = c2w[:, :3, 3] * np.linalg.norm(half) + center
    c2w[:, :3] = turn.T @ c2w[:, :3]
    focal = np.full((len(c2w), 2), height / 2 / math.tan(FIELD_OF_VIEW / 2))
    center = np.tile([width / 2, height / 2], (len(c2w), 1))
    return make_path(kind, c2w, focal, center, (width, height), up, range(1, len(c2w) + 1), fps)


def _from_front(azimuth: np.ndarray, elevation: float, distance: np.ndarray) -> np.ndarray:
    flat = math.cos(elevation) * distance
    return np.stack([flat * np.sin(azimuth), math.sin(elevation) * distance, flat * np.cos(azimuth)], axis=-1)


# The three shapes: half: [3], half extents of norm 1 about the origin, Y-up. progress: [P], 0 to 1. Return eye and
# target, each [P, 3].


def _orbit(half: np.ndarray, progress: np.ndarray, num_arcs: int, far: float) -> tuple[np.ndarray, np.ndarray]:
    sweep = min(2 * math.pi, ORBIT_PER_ARC * num_arcs)
    eye = _from_front((progress - 0.5) * sweep, ORBIT_ELEVATION, np.full_like(progress, far))
    return eye, np.zeros_like(eye)


def _dolly(half: np.ndarray, progress: np.ndarray, num_arcs: int, far: float) -> tuple[np.ndarray, np.ndarray]:
    eye = _from_front(np.zeros_like(progress), DOLLY_ELEVATION, far * (1 - progress / 2))
    return eye, np.zeros_like(eye)


def _fly(half: np.ndarray, progress: np.ndarray, num_arcs: int, far: float) -> tuple[np.ndarray, np.ndarray]:
    along_x = half[0] > half[2]
    length, breadth = (half[0], half[2]) if along_x else (half[2], half[0])
    ahead = -(length + 0.5) + progress * (1.3 * length + 0.5)  # ends before the far side, so that something is in view
    aside = 0.15 * breadth * np.sin(2 * np.pi * progress)
    height = np.full_like(progress, half[1] + 0.15)
    straight, middle = np.zeros_like(progress), np.zeros_like(progress)
    if along_x:
        return np.stack([ahead, height, aside], -1), np.stack([ahead + 1, middle, straight], -1)
    return np.stack([aside, height, -ahead], -1), np.stack([straight, middle, -ahead - 1], -1)
