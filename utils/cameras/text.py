"""Trajectories as lines of numbers: RealEstate10K (world-to-camera, relative focal) and TUM (positions, quaternions).

TIME FX FY CX CY K1 K2 and 3 x 4 world-to-camera matrix     after a first line with the address of the video
TIME TX TY TZ QX QY QZ QW                                   camera-to-world; comments begin with #
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.cameras.path import MAX_NUMBER, MAX_POSES, CameraPath, make_path, resample
from utils.cameras.transforms import focal_of_angle
from utils.cameras.values import Given, lines_of, note_distortion, opengl_poses, stated_up, unit_rotation
from utils.cli import InputError

REALESTATE, TUM = 19, 8  # numbers in a line
STEADY = 0.25  # of a frame; time stamps this close to a steady rate are taken as frames of it


def read_text(path: Path, given: Given) -> CameraPath:
    """Read a trajectory from a text file; both formats have OpenCV camera axes."""
    rows = _rows(path)
    up = stated_up(given, path)
    if rows.shape[1] == REALESTATE:
        if given.fov is not None:
            raise InputError(f"{path}: --fov is for TUM trajectories; RealEstate10K files hold a lens of their own")
        c2w, focal, center, size = _realestate(rows, given)
        note_distortion(path, [(value, "RealEstate10K") for value in rows[:, 5:7].ravel()])
        second = 1e6
    else:
        if given.fov is None:
            raise InputError(f"{path}: a TUM trajectory holds no lens; pass --fov with its vertical field of view")
        c2w = np.tile(np.eye(4), (len(rows), 1, 1))
        c2w[:, :3, :3] = unit_rotation(rows[:, 4:], path).as_matrix()
        c2w[:, :3, 3] = rows[:, 1:4]
        size, second = given.size, 1.0
        focal = np.full((len(rows), 2), focal_of_angle(math.radians(given.fov), size[1], "--fov"))
        center = np.tile(np.array(size) / 2, (len(rows), 1))
    c2w = opengl_poses(c2w, given.axes or "opencv", path)
    return _timed(
        make_path(path, c2w, focal, center, size, up, range(1, len(rows) + 1), given.fps), rows, second, path
    )


def _rows(path: Path) -> np.ndarray:
    """float64 [P, REALESTATE or TUM]."""
    rows = []
    for number, line in enumerate(lines_of(path), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#") or (number == 1 and "://" in words[0]):
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError as error:
            raise InputError(f"{path}, line {number}: expected numbers, found {line.strip()[:40]!r}") from error
        if len(words) not in (REALESTATE, TUM) or len(words) != len(rows[0]):
            raise InputError(
                f"{path}, line {number} holds {len(words)} numbers; RealEstate10K has {REALESTATE}, TUM {TUM} in each"
            )
    if not rows:
        raise InputError(f"{path} holds no camera poses")
    found = np.array(rows)
    good = (np.abs(found[:, 1:]) <= MAX_NUMBER).all(1) & np.isfinite(found[:, 0])
    if not good.all():
        raise InputError(f"{path}: pose {int(np.argmin(good)) + 1} holds NaN, infinity or huge numbers")
    return found


def _realestate(rows: np.ndarray, given: Given) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """(c2w as stored, focal, center, size): as high as the edges, and as wide as square pixels ask for."""
    rotation = rows[:, 7:].reshape(-1, 3, 4)[:, :, :3].transpose(0, 2, 1)
    c2w = np.tile(np.eye(4), (len(rows), 1, 1))
    c2w[:, :3, :3] = rotation
    c2w[:, :3, 3] = -(rotation @ rows[:, 7:].reshape(-1, 3, 4)[:, :, 3:])[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        aspect = np.median(rows[:, 2] / rows[:, 1])
    if not 0.01 < aspect < 100:
        aspect = given.size[0] / given.size[1]  # make_path refuses the focal lengths
    size = (max(1, round(given.size[1] * aspect)), given.size[1])
    return c2w, rows[:, 1:3] * size, rows[:, 3:5] * size, size


def _timed(path: CameraPath, rows: np.ndarray, second: float, where: Path) -> CameraPath:
    """The path with frame numbers and rate from its time stamps rows[:, 0]. second: of their unit.

    Stamps of a steady rate, gaps included, give the numbers; others are resampled to the rate of `path`. Whole stamps
    too close together for microseconds, or in a format of seconds, are frame numbers.
    """
    stamps = rows[:, 0]
    steps = np.diff(stamps)
    if (steps <= 0).any():
        late = int(np.argmax(steps <= 0))
        raise InputError(f"{where}: time {stamps[late + 1]:.15g} comes after {stamps[late]:.15g}; times must grow")
    usual = float(np.median(steps))
    if (stamps == stamps.round()).all() and (second == 1 or usual < 1e-3 * second):
        if stamps[-1] - stamps[0] > MAX_POSES:
            raise InputError(
                f"{where}: its whole time stamps are {usual:.3g} apart; give seconds (as decimals) or frame numbers"
            )
        return replace(path, numbers=tuple(int(n) for n in stamps - stamps[0] + 1))
    frames = np.round(steps / usual)
    if (frames >= 1).all() and (np.abs(steps / usual - frames) <= STEADY).all():
        numbers = (1, *(1 + int(n) for n in np.cumsum(frames)))
        return replace(path, numbers=numbers, fps=round(second / usual, 2) or path.fps)
    count = (stamps[-1] - stamps[0]) / second * path.fps
    if count > MAX_POSES:
        raise InputError(f"{where}: its time stamps span {count:.3g} frames, at most {MAX_POSES} can be made")
    ticks = np.round((stamps - stamps[0]) / steps.min() * 100)
    return resample(replace(path, numbers=tuple(int(n) for n in ticks)), max(2, round(count) + 1))
