"""Keyframes in JSON, and the curve through them."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.cameras.cameras_common import keyframes, turns_about, write
from utils.cameras.keyframes import smooth_curve
from utils.cameras.read import read_cameras


def test_keyframes_are_met_and_the_path_is_smooth(tmp_path: Path) -> None:
    data = keyframes()
    path = read_cameras(write(tmp_path / "k.json", data))
    assert path.numbers == tuple(range(1, 92)) and path.size == (1080, 720)
    for entry in data["keyframes"]:
        i = entry["frame"] - 1
        np.testing.assert_allclose(path.c2w[i, :3, 3], entry["position"], atol=1e-9)
        assert path.focal[i, 1] == pytest.approx(360 / np.tan(np.radians(entry["fov"]) / 2))
    to_target = np.array([0, 0, 20]) - path.c2w[:, :3, 3]
    to_target /= np.linalg.norm(to_target, axis=1, keepdims=True)
    np.testing.assert_allclose(-path.c2w[:, :3, 2], to_target, atol=1e-12)
    np.testing.assert_allclose(path.c2w[:, 1, 0], 0, atol=1e-12)  # level horizon


def test_curve_has_continuous_velocity_and_rests() -> None:
    times, points = np.array([0.0, 1, 4, 5, 7]), np.array([[0.0, 0, 0], [1, 0, 0], [1, 5, 0], [1, 5, 0], [0, 5, 2]])
    h = 1e-6
    for t in times[1:-1]:
        before, here, after = smooth_curve(times, points, np.array([t - h, t, t + h]))
        np.testing.assert_allclose((after - here) / h, (here - before) / h, atol=1e-4)
    np.testing.assert_allclose(smooth_curve(times, points, times), points, atol=1e-12)
    np.testing.assert_allclose(smooth_curve(times, points, np.linspace(4, 5, 9)), np.tile([1, 5, 0], (9, 1)))
    even = smooth_curve(np.arange(4.0), np.arange(4.0)[:, None] * [1, 2, 3], np.linspace(0, 3, 31))
    np.testing.assert_allclose(even, np.linspace(0, 3, 31)[:, None] * [1, 2, 3], atol=1e-12)
    np.testing.assert_array_equal(smooth_curve(times, np.ones((5, 3)), np.arange(3.0)), np.ones((3, 3)))


def test_keyframe_quaternions(tmp_path: Path) -> None:
    turns = turns_about("y", [0, 30, 90, 100])
    entries = [{"position": [0, 0, 0], "quaternion": (2 * q).tolist()} for q in turns.as_quat()]
    entries[1] = {"position": [0, 0, 0], "look_at": (-turns[1].as_matrix()[:, 2]).tolist()}
    path = read_cameras(write(tmp_path / "k.json", {"world_up": "+y", "fov": 60, "keyframes": entries}))
    assert len(path) == 136  # 45 frames apart by default: an anchor each
    rotations = Rotation.from_matrix(path.c2w[:, :3, :3])
    np.testing.assert_allclose((rotations[::45] * turns.inv()).magnitude(), 0, atol=1e-12)
    velocity = (rotations[1:] * rotations[:-1].inv()).magnitude()
    assert np.abs(np.diff(velocity)).max() < 0.05 * velocity.max()  # no jump at a keyframe
