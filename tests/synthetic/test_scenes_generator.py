"""Random towns and camera paths: sizes, valid meshes, clearance, smoothness, visibility, and the files."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from synthetic import scenes
from synthetic.scenes import PATHS, Part, cast, distances, make_path, make_town, triangles_of
from utils.cli import InputError

SEEDS = range(4)
CLASSES = {"wall", "roof", "window", "door", "balcony", "chimney", "trunk", "tree", "rock", "fence", "road", "ground"}
BUILT = ("wall", "roof", "balcony", "chimney", "fence")


@pytest.fixture(scope="module")
def towns() -> list[list[Part]]:
    return [make_town(seed) for seed in SEEDS]


def normals(triangles: np.ndarray) -> np.ndarray:
    normal = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


def pixel_rays(width: int, height: int) -> np.ndarray:
    """Directions through the pixel centres in camera axes, [height * width, 3]."""
    focal = width / 2 / np.tan(np.radians(scenes.FIELD_OF_VIEW / 2))
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([(x - width / 2) / focal, (height / 2 - y) / focal, 0 * x - 1], axis=-1).reshape(-1, 3)


def covisible(triangles: np.ndarray, source: np.ndarray, target: np.ndarray, size: tuple[int, int]) -> float:
    """Share of the target's pixels whose point, or sky, is seen in the source too."""
    width, height = size
    rays = pixel_rays(width, height)
    directions = rays @ target[:3, :3].T
    t = cast(np.broadcast_to(target[:3, 3], rays.shape), directions, triangles)
    sky = np.isinf(t)
    to_point = np.where(sky[:, None], directions, target[:3, 3] + np.where(sky, 0, t)[:, None] * directions)
    to_point[~sky] -= source[:3, 3]
    x, y, z = (to_point @ source[:3, :3]).T
    right, top = -rays[0, 0] * width / (width - 1), rays[0, 1] * height / (height - 1)
    inside = (z < 0) & (abs(x) <= -z * right) & (abs(y) <= -z * top)
    reached = cast(np.broadcast_to(source[:3, 3], rays.shape), to_point, triangles)
    return (inside & np.where(sky, np.isinf(reached), reached > 1 - 1e-4)).mean()


def test_towns_have_their_classes_and_sizes(towns: list[list[Part]]) -> None:
    for town in towns:
        kinds = [part.kind for part in town]
        assert set(kinds) <= CLASSES | {"hill"} and set(kinds) >= CLASSES - {"balcony", "chimney", "fence"} | {"hill"}
        assert 6 <= kinds.count("wall") <= 14
        assert 3000 <= sum(len(part.faces) for part in town) <= 9000
        assert len({part.name for part in town}) == len(town)
    assert set.union(*({part.kind for part in town} for town in towns)) == CLASSES | {"hill"}


def test_a_seed_gives_one_town_and_one_path() -> None:
    again, other = make_town(3), make_town(4)
    for one, two in zip(make_town(3), again, strict=True):
        assert one.name == two.name
        np.testing.assert_array_equal(one.vertices, two.vertices)
        np.testing.assert_array_equal(one.faces, two.faces)
    np.testing.assert_array_equal(make_path(again, "walk", 1, 46), make_path(again, "walk", 1, 46))
    assert len(other) != len(again) or any(
        one.faces.shape != two.faces.shape for one, two in zip(other, again, strict=True)
    )


def test_meshes_are_sound(towns: list[list[Part]]) -> None:
    """No degenerate faces, no face wound against its neighbour, closed solids closed and turned outwards."""
    for part in itertools.chain(*towns):
        triangles = part.vertices[part.faces]
        area = (
            np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1) / 2
        )
        assert area.min() > 1e-4, part.name
        _, position = np.unique(part.vertices, axis=0, return_inverse=True)
        corners = position.reshape(-1)[part.faces]
        edges = np.concatenate([corners[:, (0, 1)], corners[:, (1, 2)], corners[:, (2, 0)]])
        directed = {tuple(edge) for edge in edges.tolist()}
        assert len(directed) == len(edges), part.name
        if part.kind not in ("wall", "window", "door", "ground"):
            assert all((b, a) in directed for a, b in directed), part.name
            volume = (triangles[:, 0] * np.cross(triangles[:, 1], triangles[:, 2])).sum() / 6
            assert volume > 0, part.name


def test_cameras_only_see_front_faces(towns: list[list[Part]]) -> None:
    """Panes close the openings and no face is inside out. A few rays may slip between two faces."""
    for town, kind in zip(towns, itertools.cycle(PATHS)):
        triangles = triangles_of(town)
        facing = normals(triangles)
        for pose in make_path(town, kind, 0, 46)[::45]:
            directions = pixel_rays(30, 20) @ pose[:3, :3].T
            origins = np.broadcast_to(pose[:3, 3], directions.shape)
            front = facing @ pose[:3, 3] > (facing * triangles[:, 0]).sum(axis=1)
            t, t_front = cast(origins, directions, triangles), cast(origins, directions, triangles[front])
            assert (t < t_front - 1e-6).sum() <= 1


@pytest.mark.slow
def test_no_two_faces_share_a_plane(towns: list[list[Part]]) -> None:
    """Overlapping faces of different parts are at least 2 cm apart, so that every ray has one first hit."""
    for town in towns[:2]:
        built = [part for part in town if part.kind in (*BUILT, "window", "door", "road", "ground")]
        triangles, owner = triangles_of(built), np.repeat(np.arange(len(built)), [len(part.faces) for part in built])
        facing, middle = normals(triangles), triangles.mean(axis=1)
        for k in range(len(triangles)):
            same = (owner != owner[k]) & (abs(facing @ facing[k]) > 0.9999)
            same &= abs((middle[k] - triangles[:, 0]) @ facing[k]) < 0.02
            if same.any():
                count = same.sum()
                near = distances(np.broadcast_to(middle[k], (count, 3)), triangles[same])
                assert near.min() > 0.02, (
                    built[owner[k]].name,
                    built[owner[np.flatnonzero(same)[near.argmin()]]].name,
                )


def test_houses_stand_apart(towns: list[list[Part]]) -> None:
    angles = np.arange(36) * np.pi / 36
    axes = np.stack([np.cos(angles), np.sin(angles)])
    for town in towns:
        spans = [part.vertices[:, :2] @ axes for part in town if part.kind == "wall"]
        for one, two in itertools.combinations(spans, 2):
            gap = np.maximum(one.min(axis=0) - two.max(axis=0), two.min(axis=0) - one.max(axis=0))
            assert gap.max() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", PATHS)
def test_paths_keep_clear_and_see_the_town(towns: list[list[Part]], kind: str) -> None:
    for seed, town in zip(SEEDS, towns, strict=True):
        c2w = make_path(town, kind, seed, 91)
        assert c2w.shape == (91, 4, 4) and c2w.dtype == np.float64
        rotation, eyes, triangles = c2w[:, :3, :3], c2w[:, :3, 3], triangles_of(town)
        np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.tile(np.eye(3), (91, 1, 1)), atol=1e-12)
        assert (np.linalg.det(rotation) > 0).all() and (abs(rotation[:, 2, 0]) < 1e-12).all()  # level
        for eye in eyes[::10]:
            assert distances(np.broadcast_to(eye, (len(triangles), 3)), triangles).min() >= 0.8
        for pose in c2w[::45]:
            directions = pixel_rays(30, 20) @ pose[:3, :3].T
            t = cast(np.broadcast_to(pose[:3, 3], directions.shape), directions, triangles)
            assert np.isinf(t).mean() < 0.45


@pytest.mark.parametrize("kind", PATHS)
def test_paths_are_smooth(towns: list[list[Part]], kind: str) -> None:
    c2w = make_path(towns[0], kind, 0, 136)
    step, turn = np.diff(c2w[:, :3, 3], axis=0), np.diff(c2w[:, :3, 2], axis=0)
    assert 0.005 < np.linalg.norm(step, axis=1).mean() < 0.6  # metres a frame
    assert np.linalg.norm(turn, axis=1).max() < np.radians(2.5)
    assert np.linalg.norm(np.diff(step, axis=0), axis=1).max() < 0.03
    assert np.linalg.norm(np.diff(turn, axis=0), axis=1).max() < np.radians(0.3)


def test_speed_does_not_depend_on_the_length(towns: list[list[Part]]) -> None:
    short, long = (make_path(towns[0], "flyover", 0, frames) for frames in (46, 136))
    speeds = [np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1).mean() for c2w in (short, long)]
    assert 0.6 < speeds[0] / speeds[1] < 1.6


def test_the_sample_s_anchors_overlap() -> None:
    town = make_town(scenes.SAMPLE_SEED)
    c2w = make_path(town, scenes.SAMPLE_PATH, scenes.SAMPLE_SEED, scenes.SAMPLE_FRAMES)
    triangles = triangles_of(town)
    for source, target in ((0, 45), (45, 90)):
        assert 0.3 <= covisible(triangles, c2w[source], c2w[target], (36, 24)) <= 0.63
        assert 0.3 <= covisible(triangles, c2w[target], c2w[source], (36, 24)) <= 0.63


def test_an_impossible_path_is_refused() -> None:
    box = Part("road_00", *scenes.make_road(lambda y: 0 * y))
    with pytest.raises(InputError, match="no walk of 46 frames"):
        make_path([box], "walk", 0, 46)  # nothing to look at but sky


def test_the_command_writes_a_scene(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trimesh = pytest.importorskip("trimesh")
    scenes.main(["--output", str(tmp_path), "--seed", "2", "--path", "orbit", "--frames", "46"])
    assert "46 frames" in capsys.readouterr().out
    town = make_town(2)
    scene = trimesh.load(tmp_path / "scene.glb")
    assert set(scene.geometry) == {part.name for part in town}
    for part in town:
        mesh = scene.geometry[part.name]
        x, y, z = mesh.vertices.T  # Y up
        np.testing.assert_allclose(np.stack([x, -z, y], axis=1)[mesh.faces], part.vertices[part.faces], atol=1e-4)
    cameras = json.loads((tmp_path / "cameras.json").read_text())
    poses = np.array([frame["transform_matrix"] for frame in cameras["frames"]])
    np.testing.assert_array_equal(poses, make_path(town, "orbit", 2, 46))
    assert [frame["frame"] for frame in cameras["frames"]] == list(range(1, 47))
    assert (cameras["w"], cameras["h"], cameras["cx"], cameras["cy"]) == (1080, 720, 540, 360)
    assert cameras["fl_x"] == pytest.approx(540 / np.tan(np.radians(30))) and cameras["world_up"] == "+z"
    with pytest.raises(InputError, match="--overwrite"):
        scenes.main(["--output", str(tmp_path)])
