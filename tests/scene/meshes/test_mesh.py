"""Shading, welding, dropped faces, and writing."""

from pathlib import Path

import numpy as np

from tests.scene.geometry_common import CUBE, CUBE_FACES, corners, cube_glb, gltf_tree, make_geometry, write
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, face_normals, turn, weld
from utils.meshes.write import write_glb


def test_smooth_is_what_the_normals_say(tmp_path: Path) -> None:
    flat = np.repeat(face_normals(CUBE.astype(float), CUBE_FACES), 3, axis=0).astype("<f4")
    tree, blob = gltf_tree(CUBE[CUBE_FACES].reshape(-1, 3), np.arange(36), [{"mesh": 0, "scale": [1, 1, -3]}], flat)
    geometry = load_geometry(write(tmp_path / "flat.glb", tree, blob))
    assert not geometry.smooth.any()
    expected = np.repeat(face_normals(geometry.vertices, geometry.faces)[:, None], 3, axis=1)
    np.testing.assert_allclose(geometry.corner_normals, expected, atol=1e-6)
    assert set(geometry.components) == {0}  # welded again across the split vertices

    round_ = ((CUBE - 0.5) / np.linalg.norm(CUBE[0] - 0.5)).astype("<f4")
    round_[0], round_[1] = np.nan, 0
    tree, blob = gltf_tree(CUBE, CUBE_FACES, [{"mesh": 0}], round_)
    geometry = load_geometry(write(tmp_path / "round.glb", tree, blob))
    assert geometry.smooth.all()
    np.testing.assert_allclose(np.linalg.norm(geometry.corner_normals, axis=2), 1, atol=1e-6)


def test_a_flat_polygon_that_is_not_planar_is_not_smooth(tmp_path: Path) -> None:
    bent = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0.2], [0, 1, 0]])
    up = np.repeat(np.array([[0, 0, 1]], "<f4"), 4, axis=0)
    tree, blob = gltf_tree(bent, np.array([[0, 1, 2], [0, 2, 3]]), [{"mesh": 0}], up)
    assert not load_geometry(write(tmp_path / "a.glb", tree, blob)).smooth.any()


def test_meshes_without_normals_have_none(tmp_path: Path) -> None:
    assert load_geometry(cube_glb(tmp_path / "a.glb", [{"mesh": 0}])).corner_normals is None


def test_degenerate_and_duplicate_faces_go(tmp_path: Path) -> None:
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [2, 0, 0], [0, 0, 0], [np.pi, 9, 9]])
    faces = np.array([[0, 1, 2], [0, 1, 3], [1, 1, 2], [2, 1, 4], [1, 3, 2], [0, 4, 1]])
    nodes = [{"mesh": 0, "name": "a"}, {"mesh": 0, "name": "b"}]  # b duplicates a: all its faces are dropped
    geometry = load_geometry(write(tmp_path / "a.glb", *gltf_tree(points, faces, nodes)))
    assert geometry.dropped == {"degenerate": 6, "duplicate": 4}
    np.testing.assert_array_equal(corners(geometry), points[faces[[0, 4]]])
    assert geometry.names == ("a",)
    assert len(geometry.vertices) == 4


def test_a_degenerate_face_still_holds_components_together(tmp_path: Path) -> None:
    points = np.array([[0, 0, 0], [2, 0, 0], [1, -1, 0], [1, 0, 0], [1.5, 1, 0], [0.5, 1, 0]])
    faces = np.array([[0, 2, 1], [3, 4, 5], [0, 3, 1]])
    geometry = load_geometry(write(tmp_path / "a.glb", *gltf_tree(points, faces, [{"mesh": 0}])))
    assert geometry.dropped["degenerate"] == 1
    assert geometry.components.tolist() == [0, 0]


def test_components_are_joined_by_position_within_an_object(tmp_path: Path) -> None:
    points = np.array(
        [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [-0.0, 1, 0], [5, 5, 5], [6, 5, 5], [5, 6, 5]]
    )
    faces = np.arange(9).reshape(-1, 3)
    nodes = [{"mesh": 0}, {"mesh": 0, "translation": [1, 0, 0]}]
    geometry = load_geometry(write(tmp_path / "a.glb", *gltf_tree(points, faces, nodes)))
    assert geometry.components.tolist() == [0, 0, 1, 2, 2, 3]
    assert weld(points.astype(float)).tolist()[1:3] == weld(points.astype(float)).tolist()[3:6:2]


def test_writing_and_reading_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    normals = CUBE - 0.5
    tree, blob = gltf_tree(CUBE, CUBE_FACES, [{"mesh": 0, "name": "ä"}, {"mesh": 0, "matrix": None}], normals)
    matrix = np.eye(4)
    matrix[:3] = rng.normal(size=(3, 4))
    tree["nodes"][1]["matrix"] = matrix.T.ravel().tolist()
    once = turn(load_geometry(write(tmp_path / "a.glb", tree, blob)), "+z")
    write_glb(tmp_path / "b.glb", once)
    twice = load_geometry(tmp_path / "b.glb")
    write_glb(tmp_path / "c.glb", twice)
    assert (twice.up, twice.names) == ("+z", once.names)
    np.testing.assert_allclose(corners(twice), corners(once), atol=3e-7)
    np.testing.assert_array_equal(corners(twice)[:12], corners(once)[:12])  # float32 already: exact
    np.testing.assert_allclose(twice.corner_normals, once.corner_normals, atol=1e-6)
    for field in ("objects", "components", "smooth"):
        np.testing.assert_array_equal(getattr(twice, field), getattr(once, field))
    assert load_geometry(tmp_path / "b.glb", "+y").up == "+y"  # the argument overrides the file
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.glb", "b.glb", "c.glb"]


def test_far_scenes_are_written_around_their_centre(tmp_path: Path) -> None:
    far = np.random.default_rng(0).normal((1e5, -3e5, 20), size=(50, 3, 3))
    write_glb(tmp_path / "a.glb", make_geometry(far))
    np.testing.assert_allclose(corners(load_geometry(tmp_path / "a.glb")), far, atol=1e-6)


def test_a_split_vertex_keeps_its_normals(tmp_path: Path) -> None:
    cube = load_geometry(cube_glb(tmp_path / "a.glb", [{"mesh": 0}]))
    flat = np.repeat(face_normals(cube.vertices, cube.faces)[:, None], 3, axis=1).astype(np.float32)
    write_glb(tmp_path / "b.glb", Geometry(**{**vars(cube), "corner_normals": flat}))
    again = load_geometry(tmp_path / "b.glb")
    np.testing.assert_array_equal(again.corner_normals, flat)
    np.testing.assert_array_equal(corners(again), corners(cube))
    assert set(again.components) == {0}
