"""Keyframes in JSON, and the curve through them."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.cameras.cameras_common import keyframes, turns_about, write
from utils.cameras.keyframes import smooth_curve
from utils.cameras.read import read_cameras
from utils.cli import InputError


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


def test_tension_leads_from_the_smooth_curve_to_straight_lines_that_rest() -> None:
    times, points = np.array([0.0, 2, 3]), np.array([[0.0, 0, 0], [4, 0, 0], [4, 9, 0]])
    at = np.array([0.0, 0.5, 1, 1.5, 2, 2.5, 3])
    smooth, tense = (smooth_curve(times, points, at, tension) for tension in (0, 1))
    np.testing.assert_array_equal(smooth, smooth_curve(times, points, at))
    np.testing.assert_allclose(smooth_curve(times, points, at, 0.25), 0.75 * smooth + 0.25 * tense, atol=1e-12)
    np.testing.assert_allclose(tense[:5, 1], 0, atol=1e-12)
    np.testing.assert_allclose(tense[4:, 0], 4, atol=1e-12)
    np.testing.assert_allclose(tense[[0, 4, 6]], points, atol=1e-12)
    h = 1e-4
    around = smooth_curve(times, points, np.array([2 - h, 2, 2 + h]), 1)
    assert np.abs(np.diff(around, axis=0)).max() < 1e-2 * h  # at rest


def test_tension_of_turns(tmp_path: Path) -> None:
    turns = turns_about("y", [0, 40, 100])
    entries = [{"position": [0, 0, 0], "quaternion": q.tolist()} for q in turns.as_quat()]
    angles = {}
    for tension in (0, 0.5, 1):
        data = {"world_up": "+y", "fov": 60, "tension": tension, "keyframes": entries}
        c2w = read_cameras(write(tmp_path / "k.json", data)).c2w
        angles[tension] = Rotation.from_matrix(c2w[:, :3, :3]).as_euler("YXZ", degrees=True)[:, 0]
    share = np.arange(46) / 45
    eased = share**2 * (3 - 2 * share)
    np.testing.assert_allclose(angles[1], np.concatenate([40 * eased, 40 + 60 * eased[1:]]), atol=1e-9)
    np.testing.assert_allclose(angles[0.5], (angles[0] + angles[1]) / 2, atol=1e-9)


@pytest.mark.parametrize("turning", ["look_at", "quaternion"])
def test_a_loop_closes_without_a_jump(tmp_path: Path, turning: str) -> None:
    corners = np.array([[0.0, 0, 0], [8, 0, 1], [7, 5, 0]])
    turns = turns_about("z", [0, 50, 170]).as_quat()
    turned = turns if turning == "quaternion" else corners[:, ::-1] - 20
    entries = [
        {"frame": 1 + 30 * k, "position": corners[k].tolist(), "fov": (40, 60, 50)[k], turning: turned[k].tolist()}
        for k in range(3)
    ]
    path = read_cameras(write(tmp_path / "k.json", {"world_up": "+z", "loop": 30, "keyframes": entries}))
    assert path.numbers == tuple(range(1, 92))
    np.testing.assert_allclose(path.c2w[0], path.c2w[-1], atol=1e-9)
    np.testing.assert_allclose(path.c2w[::30, :3, 3], corners[[0, 1, 2, 0]], atol=1e-9)
    np.testing.assert_allclose(path.focal[0], path.focal[-1])
    seam = np.concatenate([path.c2w[-4:-1], path.c2w[:4]])
    second = np.abs(np.diff(seam, n=2, axis=0)).max((1, 2))
    assert second[2] < 2 * max(second[0], second[-1])  # the step over the seam is like those beside it
    open_path = read_cameras(write(tmp_path / "k.json", {"world_up": "+z", "keyframes": entries}))
    assert len(open_path) == 61


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"tension": 1.5}, "between 0 (smooth) and 1 (straight)"),
        ({"tension": "0.5"}, "'tension' must be a finite number"),
        ({"loop": -3}, "frames from the last keyframe to the first"),
        ({"loop": True}, "'loop' must be a finite number"),
        ({"loop": 100_000}, "span 100090 frames"),
    ],
)
def test_wrong_tension_and_loop_are_refused(tmp_path: Path, change: dict, telling: str) -> None:
    with pytest.raises(InputError, match=re.escape(telling)):
        read_cameras(write(tmp_path / "k.json", keyframes(**change)))
