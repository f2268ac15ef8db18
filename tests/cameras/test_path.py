"""Camera paths: the dataclass, resampling, built-in paths."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.cameras.cameras_common import assert_same, random_path
from utils.cameras.builtin import KINDS, builtin_path
from utils.cameras.path import Z_UP_TO_Y_UP, CameraPath, catmull_rom, make_path, resample, to_arcs
from utils.cli import InputError


def test_intrinsics_scale_with_the_width() -> None:
    path = random_path()
    own = path.intrinsics(*path.size)
    np.testing.assert_array_equal(own, np.hstack([path.focal, path.center]))
    np.testing.assert_allclose(path.intrinsics(1280, 960), 2 * own)
    wide = path.intrinsics(640, 360)  # another aspect crops: same scale, the middle row stays the middle row
    np.testing.assert_allclose(wide[:, :3], own[:, :3])
    np.testing.assert_allclose(wide[:, 3], own[:, 3] - 60)


def test_subset() -> None:
    path = random_path(10)
    part = path.subset(3, 6)
    assert part.numbers == (3, 4, 5, 6)
    np.testing.assert_array_equal(part.c2w, path.c2w[2:6])
    for wrong in ((0, 5), (5, 11), (6, 6), (7, 3)):
        with pytest.raises(InputError, match="1 to 10"):
            path.subset(*wrong)


def straight_path(poses: int, numbers: list[int] | None = None) -> CameraPath:
    """Constant velocity, angular velocity and zoom."""
    numbers = numbers or list(range(1, poses + 1))
    return sample_straight(np.array(numbers, dtype=float), numbers)


def sample_straight(t: np.ndarray, numbers: list[int]) -> CameraPath:
    c2w = np.tile(np.eye(4), (len(t), 1, 1))
    c2w[:, :3, :3] = Rotation.from_rotvec(t[:, None] * [0.02, 0.05, -0.01]).as_matrix()
    c2w[:, :3, 3] = [1, 2, 3] + t[:, None] * [0.3, -0.1, 0.2]
    focal = np.column_stack([500 + t, 500 + 2 * t])
    return make_path("t", c2w, focal, np.tile([50.0, 40.0], (len(t), 1)), (100, 80), "+y", numbers, 24.0)


@pytest.mark.parametrize("numbers", [list(range(1, 31)), [1, 2, 5, 11, 12, 30]])
def test_resampling_constant_velocity_is_exact(numbers: list[int]) -> None:
    path = to_arcs(straight_path(len(numbers), numbers), 2)
    assert_same(path, sample_straight(np.linspace(1, 30, 91), list(range(1, 92))))


def test_resampling_passes_through_the_poses() -> None:
    path = random_path(6)
    dense = resample(path, 26)
    np.testing.assert_allclose(dense.c2w[::5], path.c2w, atol=1e-12)
    np.testing.assert_allclose(dense.focal[::5], path.focal, atol=1e-9)
    gram = dense.c2w[:, :3, :3].transpose(0, 2, 1) @ dense.c2w[:, :3, :3]
    np.testing.assert_allclose(gram, np.tile(np.eye(3), (26, 1, 1)), atol=1e-12)
    steps = Rotation.from_matrix(dense.c2w[1:, :3, :3] @ dense.c2w[:-1, :3, :3].transpose(0, 2, 1)).magnitude()
    np.testing.assert_allclose(steps.reshape(5, 5), steps.reshape(5, 5)[:, :1].repeat(5, 1), atol=1e-9)


def test_spline_is_exact_for_parabolas_between_uneven_knots() -> None:
    knots = np.array([0.0, 1, 1.5, 4, 6])
    at = np.linspace(1, 4, 31)  # the end segments have one neighbour only
    curve = catmull_rom(knots, np.stack([knots**2, 3 - knots], -1))
    np.testing.assert_allclose(curve(at), np.stack([at**2, 3 - at], -1), atol=1e-12)


def test_reversed_resampling_is_resampling_reversed() -> None:
    path = random_path(7, seed=3)
    backwards = make_path(
        "t", path.c2w[::-1], path.focal[::-1], path.center[::-1], path.size, path.up, path.numbers, 24.0
    )
    np.testing.assert_allclose(resample(backwards, 46).c2w, resample(path, 46).c2w[::-1], atol=1e-12)


@pytest.mark.parametrize(
    ("poses", "wanted", "arcs"), [(91, None, 2), (2, None, 1), (100, None, 2), (115, None, 3), (91, 3, 3), (46, 1, 1)]
)
def test_number_of_arcs(poses: int, wanted: int | None, arcs: int) -> None:
    path = straight_path(poses, list(range(5, poses + 5)))
    result = to_arcs(path, wanted)
    assert len(result) == 45 * arcs + 1 and result.numbers == tuple(range(1, 45 * arcs + 2))
    if poses == len(result):
        np.testing.assert_array_equal(result.c2w, path.c2w)
    np.testing.assert_allclose(result.c2w[[0, -1]], path.c2w[[0, -1]], atol=1e-12)


def test_no_arcs_and_too_many_are_refused() -> None:
    for arcs, message in ((0, "1 or more"), (-1, "1 or more"), (10**11, "at most 100000"), (2223, "at most 100000")):
        with pytest.raises(InputError, match=message):
            to_arcs(random_path(), arcs)
        with pytest.raises(InputError, match=message):
            builtin_path("orbit", [[-1] * 3, [1] * 3], "+y", arcs)
    assert len(to_arcs(random_path(), 2222)) == 99_991


@pytest.mark.parametrize("up", ["+y", "+z"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_builtin_paths(kind: str, scale: float, up: str) -> None:
    bounds = scale * np.array([[-2.0, -1, -3], [4, 5, 1]])
    path = builtin_path(kind, bounds, up, 2, 30)
    assert len(path) == 91 and path.up == up and path.fps == 30 and to_arcs(path, 2).numbers == path.numbers
    eyes, forward, upward = path.c2w[:, :3, 3], -path.c2w[:, :3, 2], path.c2w[:, :3, 1]
    assert not ((eyes > bounds[0]) & (eyes < bounds[1])).all(1).any()
    assert (upward[:, "xyz".index(up[1])] > 0.4).all()  # upright
    steps = np.linalg.norm(np.diff(eyes, axis=0), axis=1)
    assert steps.max() < 0.2 * scale and steps.min() > 0.3 * steps.max()
    corners = np.array(np.meshgrid(*bounds.T)).reshape(3, -1).T
    to_scene = corners.mean(0) - eyes
    distance = np.linalg.norm(to_scene, axis=1)
    if kind != "flythrough":
        np.testing.assert_allclose(forward, to_scene / distance[:, None], atol=1e-9)
    if kind == "orbit":
        np.testing.assert_allclose(distance, distance[0])
        local = (corners - eyes[:, None]) @ path.c2w[:, :3, :3]  # every corner is in the picture
        assert np.abs(path.focal[0, 1] * local[..., 1] / local[..., 2]).max() < path.size[1] / 2
    if kind == "dolly":
        assert distance[-1] == pytest.approx(distance[0] / 2)


@pytest.mark.parametrize("size", [(320, 180), (1920, 1080), (2560, 1080), (1024, 1024), (720, 1280), (480, 720)])
@pytest.mark.parametrize("bounds", [[[-1, -1, 0], [1, 1, 20]], [[-9, -1, 0], [9, 1, 1]], [[-4, -4, -4], [4, 4, 4]]])
def test_an_orbit_has_the_whole_scene_in_the_picture(bounds: list, size: tuple[int, int]) -> None:
    path = builtin_path("orbit", bounds, "+z", size=size)
    assert path.size == size
    np.testing.assert_allclose(2 * np.degrees(np.arctan(size[1] / 2 / path.focal)), 45)
    corners = np.array(np.meshgrid(*np.transpose(bounds))).reshape(3, -1).T
    local = (corners - path.c2w[:, None, :3, 3]) @ path.c2w[:, :3, :3]
    shown = path.focal[0] * np.abs(local[..., :2] / local[..., 2:]) / size * 2  # 1 at the picture's edges
    assert local[..., 2].max() < 0 and 0.3 < shown.max() < 1


def test_sizes_of_the_papers_aspect_share_its_path() -> None:
    box = [[-1, -1, 0], [1, 1, 2]]
    assert_same(builtin_path("orbit", box, "+z"), builtin_path("orbit", box, "+z", size=(360, 240)), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_builtin_paths_are_the_same_in_both_worlds(kind: str) -> None:
    z_up = np.array([[-2.0, -1, -3], [4, 9, 1]])
    y_up = np.sort(z_up @ Z_UP_TO_Y_UP.T, axis=0)
    a, b = builtin_path(kind, z_up, "+z"), builtin_path(kind, y_up, "+y")
    np.testing.assert_allclose(Z_UP_TO_Y_UP @ a.c2w[:, :3], b.c2w[:, :3], atol=1e-9)


def test_builtin_paths_that_cannot_be() -> None:
    box = [[-1, -1, -1], [1, 1, 1]]
    for arguments in (
        ("spiral", box, "+y"),
        ("orbit", box, "x"),
        ("orbit", box, "+y", 0),
        ("orbit", [[0, 0, 0], [0, 0, 0]], "+y"),
        ("orbit", [[1, 1, 1], [0, 0, 0]], "+y"),
        ("orbit", [[0, 0, 0], [np.nan, 1, 1]], "+y"),
        ("orbit", [[0, 0, 0], [np.inf, 1, 1]], "+y"),
    ):
        with pytest.raises(InputError):
            builtin_path(*arguments)
    for flat in ([[0, 0, 0], [1, 0, 1]], [[0, 0, 0], [0, 1, 0]]):
        assert all(len(builtin_path(kind, flat, "+y")) == 46 for kind in KINDS)
