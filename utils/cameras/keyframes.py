"""Camera paths from keyframes in JSON: positions and targets, joined by a smooth curve.

A format for paths written by hand:

    {"world_up": "+y", "fps": 24, "w": 1080, "h": 720, "fov": 45,
     "keyframes": [{"frame": 1,  "position": [0, 1, 5], "look_at": [0, 1, 0]},
                   {"frame": 46, "position": [3, 1, 4], "quaternion": [0, 0.3, 0, 0.95], "fov": 40}]}

position, look_at: metres; quaternion: x, y, z, w, camera-to-world, OpenGL camera axes; fov: vertical, in degrees,
for all keyframes or for each. Without `frame`, keyframes are 45 frames apart, which makes each of them an anchor.
"tension", 0 (default, smooth) to 1 (straight, resting at each keyframe), and "loop", the frames from the last keyframe
back to the first, may stand beside "fps": a loop ends with the pose that it begins with.
"""

import math
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.spatial.transform import Rotation, RotationSpline, Slerp

from utils.cameras.path import (
    MAX_NUMBER,
    MAX_POSES,
    UP_AXES,
    CameraPath,
    catmull_rom,
    look_at,
    make_path,
)
from utils.cameras.transforms import focal_of_angle
from utils.cameras.values import (
    Given,
    entries_of,
    fps_of,
    required,
    size_of,
    to_int,
    to_number,
    to_numbers,
    unit_rotation,
    world_up,
)
from utils.cli import InputError
from utils.layout import ARC_STEPS

AROUND = 8  # keyframes of a loop that are repeated on either side of it, before a curve is drawn through them


def read_keyframes(path: Path, data: dict, given: Given) -> CameraPath:
    entries = entries_of(data, "keyframes", path)
    if len(entries) < 2:
        raise InputError(f"{path} holds {len(entries)} keyframe(s): a path needs at least two")
    if any("matrix" in entry for entry in entries):
        raise InputError(
            f"{path} holds keyframes of nerfstudio without their 'camera_path'; save it from Render again"
        )
    names = [f"{path}: keyframe {i}" for i in range(1, len(entries) + 1)]
    closing = to_int(data["loop"], f"{path}: 'loop'") if "loop" in data else 0
    frames = _keyframe_numbers(entries, path, closing)
    numbers = np.arange(int(frames[0]), int(frames[-1]) + closing + 1)
    tension = to_number(data.get("tension", 0), f"{path}: 'tension'")
    if not 0 <= tension <= 1:
        raise InputError(f"{path}: 'tension' is {tension:g}, but must lie between 0 (smooth) and 1 (straight)")
    size = size_of({"w": given.size[0], "h": given.size[1], **data}, str(path))
    focal = [
        focal_of_angle(
            math.radians(to_number(required({**data, **e}, "fov", n), f"{n}: 'fov'")), size[1], f"{n}: 'fov'"
        )
        for n, e in zip(names, entries, strict=True)
    ]
    up = world_up(data, given.up, path, None)
    for entry, name in zip(entries, names, strict=True):
        if ("look_at" in entry) == ("quaternion" in entry):
            raise InputError(f"{name}: give 'look_at' or 'quaternion', one of the two")
    if given.axes == "opencv":
        raise InputError(f"{path}: keyframes have OpenGL camera axes; drop --camera_axes, or correct the quaternions")
    times, order = _around(frames, closing) if closing else (frames, np.arange(len(frames)))
    eyes = smooth_curve(times, _vectors(entries, names, "position", 3)[order], numbers, tension)
    if all("look_at" in entry for entry in entries):
        # Interpolating the target keeps the horizon level and the target centred between keyframes too.
        targets = smooth_curve(times, _vectors(entries, names, "look_at", 3)[order], numbers, tension)
        c2w = look_at(eyes, targets, UP_AXES[up], path)
    else:
        rotations = Rotation.concatenate([_rotation(e, n, UP_AXES[up]) for n, e in zip(names, entries, strict=True)])
        c2w = np.tile(np.eye(4), (len(numbers), 1, 1))
        c2w[:, :3, :3] = smooth_turns(times, rotations[order], numbers, tension).as_matrix()
        c2w[:, :3, 3] = eyes
    focal = np.repeat(PchipInterpolator(times, np.array(focal)[order])(numbers)[:, None], 2, axis=1)
    center = np.tile([size[0] / 2, size[1] / 2], (len(numbers), 1))
    return make_path(path, c2w, focal, center, size, up, numbers.tolist(), fps_of(data, given.fps, path))


def _keyframe_numbers(entries: list[dict], path: Path, closing: int) -> np.ndarray:
    """float64 [K], increasing. closing: frames from the last keyframe back to the first, 0 for an open path."""
    if closing < 0:
        raise InputError(f"{path}: 'loop' is {closing}, but must be the frames from the last keyframe to the first")
    numbered = ["frame" in entry for entry in entries]
    if any(numbered) and not all(numbered):
        raise InputError(f"{path}: some keyframes have the key 'frame' and some do not; number all or none")
    frames = [
        to_int(entry.get("frame", 1 + ARC_STEPS * i), f"{path}: keyframe {i + 1}: 'frame'")
        for i, entry in enumerate(entries)
    ]
    if (np.diff(frames) <= 0).any():
        raise InputError(f"{path}: 'frame' must grow from keyframe to keyframe, but is {frames}")
    if (span := frames[-1] - frames[0] + closing) >= MAX_POSES:
        raise InputError(f"{path}: the keyframes span {span} frames, at most {MAX_POSES} can be made")
    return np.array(frames, dtype=np.float64)


def _around(frames: np.ndarray, closing: int) -> tuple[np.ndarray, np.ndarray]:
    """A loop's keyframes, walked around several times: (times, indices of keyframes), each [M].

    Any curve through them closes without a jump in velocity, since it continues beyond both ends of the loop.
    """
    count, period = len(frames), frames[-1] - frames[0] + closing
    sides = math.ceil(AROUND / count)
    turns = np.arange(-sides, sides + 2)
    return (frames + period * turns[:, None]).ravel(), np.tile(np.arange(count), len(turns))


def _vectors(entries: list[dict], names: list[str], key: str, length: int) -> np.ndarray:
    """float64 [K, length], small enough for later arithmetic."""
    vectors = np.array(
        [to_numbers(required(e, key, n), (length,), f"{n}: {key!r}") for n, e in zip(names, entries, strict=True)]
    )
    if np.abs(vectors).max() > MAX_NUMBER:
        raise InputError(f"{names[int(np.abs(vectors).max(1).argmax())]}: {key!r} is too far away")
    return vectors


def _rotation(entry: dict, where: str, up: np.ndarray) -> Rotation:
    if "quaternion" in entry:
        return unit_rotation(_vectors([entry], [where], "quaternion", 4)[0], where)
    eye, target = (_vectors([entry], [where], key, 3) for key in ("position", "look_at"))
    return Rotation.from_matrix(look_at(eye, target, up, where)[0, :3, :3])


def smooth_curve(times: np.ndarray, points: np.ndarray, at: np.ndarray, tension: float = 0) -> np.ndarray:
    """Points [A, 3] of a curve through `points` [K, 3] at increasing `times` [K], continuous in position and velocity.

    The shape is a centripetal Catmull-Rom spline, which makes no loops between uneven keyframes; a monotone cubic
    maps time to the position along it, so that speed does not jump at a keyframe. Repeated points are a pause.
    tension: 0 to 1, of a cardinal spline; at 1 the camera moves straight and rests at every keyframe.
    """
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    moving = steps > 1e-9 * steps.sum()
    if not moving.any():
        return np.repeat(points[:1], len(at), axis=0)
    knots = np.concatenate([[0.0], np.cumsum(np.sqrt(np.where(moving, steps, 0)))])
    along = PchipInterpolator(times, knots)(at)
    distinct = np.concatenate([[True], moving])
    knots, points = knots[distinct], points[distinct]
    curve = catmull_rom(knots, points)(along)
    if not tension:
        return curve
    straight = np.column_stack([np.interp(_eased(knots, along), knots, column) for column in points.T])
    return (1 - tension) * curve + tension * straight


def smooth_turns(times: np.ndarray, rotations: Rotation, at: np.ndarray, tension: float = 0) -> Rotation:
    """Rotations at the times `at` [A] of a curve through `rotations`, K of them, continuous in angular velocity.

    times: [K], increasing. tension: 0 to 1; at 1 the camera turns about one axis between keyframes and rests at each.
    """
    curve = RotationSpline(times, rotations)(at)
    if not tension:
        return curve
    straight = Slerp(times, rotations)(_eased(times, at))
    return curve * Rotation.from_rotvec(tension * (curve.inv() * straight).as_rotvec())


def _eased(knots: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Positions `at` [A] among increasing knots [K], moved so that they slow down to rest at each of these."""
    left = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, len(knots) - 2)
    share = (at - knots[left]) / np.diff(knots)[left]
    return knots[left] + np.diff(knots)[left] * share**2 * (3 - 2 * share)
