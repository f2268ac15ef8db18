"""nerfstudio's transforms.json, and the same town in three files."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cameras.cameras_common import assert_same, random_path, transforms
from tests.support.helpers import DATA
from utils.cameras.builtin import builtin_path
from utils.cameras.path import Z_UP_TO_Y_UP, to_arcs
from utils.cameras.read import read_cameras, write_transforms

TOWN = DATA / "town"


needs_town = pytest.mark.skipif(not TOWN.is_dir(), reason="the town data is not here")


@needs_town
def test_town_transforms() -> None:
    z_up, y_up = read_cameras(TOWN / "cameras.json"), read_cameras(TOWN / "cameras_yup.json")
    assert (len(z_up), z_up.up, y_up.up, z_up.size, z_up.fps) == (91, "+z", "+y", (720, 480), 24)
    assert z_up.numbers == tuple(range(1, 92))
    np.testing.assert_allclose(Z_UP_TO_Y_UP @ z_up.c2w[:, :3], y_up.c2w[:, :3], atol=1e-12)
    stored = [frame["transform_matrix"] for frame in json.loads((TOWN / "cameras.json").read_text())["frames"]]
    np.testing.assert_allclose(z_up.c2w, stored, atol=1e-12)
    np.testing.assert_array_equal(to_arcs(z_up).c2w, z_up.c2w)


@needs_town
def test_town_animated_camera() -> None:
    animated, baked = read_cameras(TOWN / "town_animcam.glb"), read_cameras(TOWN / "cameras_yup.json")
    assert (len(animated), animated.up, animated.numbers[-1]) == (100, "+y", 100)
    cut = animated.subset(1, 91)
    assert cut.numbers == baked.numbers
    assert np.abs(cut.c2w - baked.c2w)[:, :3, :3].max() < 1e-6
    assert np.abs(cut.c2w - baked.c2w)[:, :3, 3].max() < 1e-5
    np.testing.assert_allclose(cut.intrinsics(720, 480), baked.intrinsics(720, 480), atol=1e-4)


@pytest.mark.parametrize("up", ["+y", "+z"])
def test_transforms_round_trip_is_exact(tmp_path: Path, up: str) -> None:
    path, file = random_path(up=up), tmp_path / "transforms.json"
    write_transforms(file, path)
    back = read_cameras(file)
    assert_same(path, back, 0)
    assert (back.up, back.fps) == (up, 25.0)
    write_transforms(tmp_path / "again.json", back)
    assert file.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_constant_intrinsics_are_stored_once(tmp_path: Path) -> None:
    write_transforms(tmp_path / "a.json", builtin_path("orbit", [[-1] * 3, [1] * 3], "+y"))
    write_transforms(tmp_path / "b.json", random_path())
    shared, varying = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert {"fl_x", "fl_y", "cx", "cy", "k1"} <= set(shared) and "fl_x" not in shared["frames"][0]
    assert {"fl_x", "fl_y", "cx", "cy"} <= set(varying["frames"][0]) and "fl_x" not in varying


def test_transforms_as_others_write_them(tmp_path: Path) -> None:
    """No frame numbers (order of file names), a field of view instead of a focal length, 3x4 matrices, no world_up."""
    poses = [np.eye(4).tolist() for _ in range(3)]
    for x, pose in enumerate(poses):
        pose[0][3] = float(x)
    names = ["f_10.png", "f_9.png", "f_2.png"]
    frames = [{"file_path": n, "transform_matrix": p[:3]} for n, p in zip(names, poses, strict=True)]
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"camera_angle_x": np.pi / 2, "w": 100, "h": 50, "frames": frames}))
    path = read_cameras(file)
    assert path.c2w[:, 0, 3].tolist() == [2, 1, 0]
    np.testing.assert_allclose(path.intrinsics(100, 50), [[50, 50, 50, 25]] * 3)
    assert path.up == "+z" and path.numbers == (1, 2, 3) and path.fps == 24
    assert read_cameras(file, up="+y").up == "+y"


def test_scale_is_stripped_and_numbers_are_sorted(tmp_path: Path) -> None:
    data = transforms()
    for frame, scale in zip(data["frames"], (0.6, 2, 30), strict=True):
        frame["transform_matrix"][:3] = [
            [scale * v for v in row[:3]] + row[3:] for row in frame["transform_matrix"][:3]
        ]
    data["frames"].reverse()
    (tmp_path / "t.json").write_text(json.dumps(data))
    path, plain = read_cameras(tmp_path / "t.json"), random_path(3)
    np.testing.assert_allclose(path.c2w, plain.c2w, atol=1e-12)
    assert path.numbers == (1, 2, 3)
