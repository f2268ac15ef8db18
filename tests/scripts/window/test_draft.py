"""A path while it is drawn: keyframes added, moved and deleted, saved in three formats, and opened again."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.cameras.cameras_common import assert_same, keyframes, write
from utils.cameras.path import UP_AXES, look_at
from utils.cameras.read import read_cameras
from utils.cli import InputError
from window.draft import Key, PathDraft, open_draft
from window.poses import rotation_of, wxyz_of

EYES = np.array([[0.0, -8, 2], [4, -6, 3], [6, 0, 2.5]])


def key(k: int, roll: float = 0, **values: float) -> Key:
    """A keyframe at EYES[k] that looks at (0, 0, 1) in a z-up world. roll: degrees."""
    target = np.array([[0.0, 0, 1]])
    rotation = look_at(EYES[k : k + 1], target, UP_AXES["+z"], "test")[0, :3, :3]
    turned = rotation @ Rotation.from_euler("z", roll, degrees=True).as_matrix()
    return Key(EYES[k], turned, float(np.linalg.norm(EYES[k] - target)), **values)


def draft(roll: float = 0, **values: object) -> PathDraft:
    keys = [key(0, roll, fov=40.0), key(1, frames=30), key(2, fov=60.0, frames=15)]
    return PathDraft("+z", (108, 72), keys=keys, **values)


def test_quaternions_of_the_browser_have_opencv_axes():
    np.testing.assert_allclose(rotation_of(np.array([1.0, 0, 0, 0])), np.diag([1, -1, -1]))  # sees along +z, +y down
    about_y = np.array([np.cos(0.1), 0, np.sin(0.1), 0])  # by 0.2: turns the view, +z, towards +x
    np.testing.assert_allclose(-rotation_of(about_y)[:, 2], [np.sin(0.2), 0, np.cos(0.2)])
    for rotation in Rotation.random(20, rng=0).as_matrix():
        np.testing.assert_allclose(rotation_of(wxyz_of(rotation)), rotation, atol=1e-14)


def test_keyframes_are_added_moved_changed_and_deleted():
    drawn = PathDraft("+z", (108, 72))
    with pytest.raises(InputError, match="at least two"):
        drawn.path()
    assert [drawn.add(key(0)), drawn.add(key(2)), drawn.add(key(1, frames=20), after=0)] == [0, 1, 1]
    assert drawn.frame_numbers() == [1, 46, 66]
    np.testing.assert_allclose(drawn.path().c2w[[0, 45, 65], :3, 3], EYES, atol=1e-9)
    drawn.change(1, fov=70.0, frames=10)
    drawn.move(1, key(0, fov=5.0, frames=99))
    assert (drawn.keys[1].fov, drawn.keys[1].frames) == (70, 10) and drawn.frame_numbers() == [1, 46, 56]
    np.testing.assert_array_equal(drawn.keys[1].position, EYES[0])
    drawn.delete(0)
    assert drawn.frame_numbers() == [1, 11] and len(drawn.path()) == 11
    for wrong in (lambda: drawn.delete(2), lambda: drawn.move(-1, key(0)), lambda: drawn.change(2, fov=30.0)):
        with pytest.raises(InputError, match="there is no keyframe"):
            wrong()
    for values in ({"fov": 0.0}, {"fov": 180.0}, {"frames": 0}, {"frames": 100_000}):
        with pytest.raises(InputError):
            drawn.change(0, **values)
    with pytest.raises(InputError, match="NaN"):
        Key(np.array([np.nan, 0, 0]), np.eye(3), 1.0)


@pytest.mark.parametrize("values", [{}, {"tension": 0.6}, {"loop": True}, {"roll": 9, "loop": True, "tension": 0.5}])
def test_three_formats_give_the_same_path(tmp_path: Path, values: dict):
    drawn = draft(**values)
    path = drawn.path()
    assert len(path) == 76 + 15 * drawn.loop
    for k, number in enumerate(drawn.frame_numbers()):
        pose = path.c2w[number - 1]
        np.testing.assert_allclose(pose[:3, :3], drawn.keys[k].rotation, atol=1e-9)
        np.testing.assert_allclose(pose[:3, 3], drawn.keys[k].position, atol=1e-9)
        assert path.focal[number - 1, 1] == pytest.approx(36 / np.tan(np.radians(drawn.keys[k].fov) / 2))
    files = drawn.save(tmp_path / "walk")
    assert [file.name for file in files] == ["keyframes.json", "transforms.json", "camera_path.json"]
    for file in files:
        read = read_cameras(file)
        assert_same(read, path, 1e-6)
        assert (read.up, read.fps) == ("+z", 24)
    again = open_draft(files[0])
    assert_same(again.path(), path, 1e-12)
    assert (again.frame_numbers(), again.tension, again.loop) == (drawn.frame_numbers(), drawn.tension, drawn.loop)
    assert again.is_saved(tmp_path / "walk") and not again.is_saved(tmp_path)
    again.change(1, fov=46.0)
    assert not again.is_saved(tmp_path / "walk")


def test_level_cameras_keep_a_level_horizon_between_them():
    assert all("look_at" in entry for entry in draft().data()["keyframes"])
    np.testing.assert_allclose(draft().path().c2w[:, 2, 0], 0, atol=1e-12)
    assert all("quaternion" in entry for entry in draft(roll=5).data()["keyframes"])
    down = Key(EYES[0], np.eye(3), 5.0)  # straight down: no horizon
    assert "quaternion" in PathDraft("+z", (108, 72), keys=[down, key(1)]).data()["keyframes"][1]


def test_nothing_is_replaced_in_silence(tmp_path: Path):
    (tmp_path / "camera_path.json").write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'camera_path.json'} is there already")):
        draft().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["camera_path.json"]
    draft().save(tmp_path, replace_old=True)
    assert len(read_cameras(tmp_path / "camera_path.json")) == 76


def test_a_file_written_by_hand_is_opened_without_a_change_of_its_path(tmp_path: Path):
    data = keyframes(fps=30)
    data["keyframes"][2] = data["keyframes"][2] | {"quaternion": [0, 0.6, 0, 0.8]}
    del data["keyframes"][2]["look_at"]
    file = write(tmp_path / "hand.json", data)
    drawn = open_draft(file)
    assert (drawn.frame_numbers(), drawn.fps, drawn.up, drawn.size) == ([1, 20, 80, 91], 30, "+y", (1080, 720))
    assert_same(drawn.path(), read_cameras(file), 1e-9)
    for wrong in ({"frames": []}, {"keyframes": [], "camera_path": []}, []):
        with pytest.raises(InputError):
            open_draft(write(tmp_path / "other.json", wrong))
    with pytest.raises(InputError, match="does not exist"):
        open_draft(tmp_path / "none.json")
