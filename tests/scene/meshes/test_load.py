"""Scenes of every format."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.scene.geometry_common import CUBE, CUBE_FACES, corners, cube_glb, gltf_tree, write
from tests.support.helpers import DATA
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, face_normals, turn

TOWN = DATA / "town"


def canonical(triangles: np.ndarray) -> np.ndarray:
    """Triangles as a sorted list, each begun at its smallest corner: equal for equal meshes with equal winding."""
    first = [min(range(3), key=lambda k: tuple(triangle[k])) for triangle in triangles]
    turned = np.array([np.roll(triangle, -k, axis=0) for triangle, k in zip(triangles, first, strict=True)])
    return np.array(sorted(turned.reshape(-1, 9).tolist()))


def signed_volume(geometry: Geometry, chosen: np.ndarray) -> float:
    """Positive for a closed mesh whose faces are counter-clockwise seen from outside."""
    a, b, c = corners(geometry)[chosen].transpose(1, 0, 2)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


@pytest.mark.skipif(not TOWN.is_dir(), reason="the town is not here")
def test_the_town_is_the_town() -> None:
    geometry = turn(load_geometry(TOWN / "town.glb"), "+z")
    known = np.load(TOWN / "town_zup.npz")
    triangles = known["vertices"].astype(float)[known["faces"]]
    height = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)
    solid = height > 1e-6 * np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2).max(1) ** 2
    assert geometry.names == tuple(known["object_names"])
    assert geometry.dropped == {"degenerate": int((~solid).sum()), "duplicate": 0}
    np.testing.assert_array_equal(corners(geometry), triangles[solid])
    np.testing.assert_array_equal(geometry.objects, known["face_object"][solid] - 1)
    for entry in json.loads((TOWN / "objects.json").read_text())["objects"]:
        shaded = geometry.smooth[geometry.objects == geometry.names.index(entry["name"])]
        assert (shaded == (entry["smooth"] == entry["polys"])).all(), entry["name"]


def test_turning_is_a_rotation(tmp_path: Path) -> None:
    geometry = load_geometry(cube_glb(tmp_path / "a.glb", [{"mesh": 0, "translation": [1, 2, 3]}]))
    turned = turn(geometry, "+z")
    np.testing.assert_array_equal(turned.vertices, geometry.vertices[:, [0, 2, 1]] * [1, -1, 1])
    assert (geometry.up, turned.up) == ("+y", "+z")
    np.testing.assert_array_equal(turn(turned, "+y").vertices, geometry.vertices)
    every = np.ones(len(turned.faces), bool)
    assert signed_volume(turned, every) == pytest.approx(1)
    with pytest.raises(ValueError, match="up is"):
        turn(geometry, "+x")


def test_nodes_are_nested_scaled_and_mirrored(tmp_path: Path) -> None:
    half = np.sqrt(0.5)
    nodes = [
        {"name": "root", "translation": [10, 0, 0], "children": [1, 2]},
        {"name": "house", "mesh": 0, "scale": [1, 2, 3], "rotation": [0, 0, half, half], "children": [3]},
        {"name": "house", "mesh": 0, "scale": [-1, 1, 1]},
        {"name": "shear", "mesh": 0, "matrix": [1, 0, 0, 0, 0.5, 1, 0, 0, 0, 0, 1, 0, 5, 6, 7, 1]},
        {"mesh": 0, "scale": [-2, -2, -2], "translation": [0, 0, 9]},
    ]
    geometry = load_geometry(cube_glb(tmp_path / "a.glb", nodes))
    assert geometry.names == ("house", "house.001", "shear", "mesh")
    house = CUBE * [1, 2, 3] @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]) + [10, 0, 0]
    shear = CUBE @ np.array([[1, 0, 0], [0.5, 1, 0], [0, 0, 1]]) + [5, 6, 7]
    shear = shear * [1, 2, 3] @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]) + [10, 0, 0]
    expected = [house, CUBE * [-1, 1, 1] + [10, 0, 0], shear, CUBE * -2 + [0, 0, 9]]
    for k, (points, volume) in enumerate(zip(expected, (6, 1, 6, 8), strict=True)):
        chosen = geometry.objects == k
        order = CUBE_FACES if k in (0, 2) else CUBE_FACES[:, ::-1]
        np.testing.assert_allclose(canonical(corners(geometry)[chosen].round(9)), canonical(points[order].round(9)))
        assert signed_volume(geometry, chosen) == pytest.approx(volume)
        assert len(set(geometry.components[chosen])) == 1
    assert geometry.components.max() == 3


def test_deep_trees_load_at_once(tmp_path: Path) -> None:
    nodes = [{"mesh": 0, "translation": [2, 0, 0], "children": [k + 1]} for k in range(2000)] + [{}]
    geometry = load_geometry(cube_glb(tmp_path / "a.glb", nodes))
    assert geometry.vertices[:, 0].max() == 4001
    assert geometry.names[::1999] == ("mesh", "mesh.1999")


def test_repeated_names_never_take_anothers_name(tmp_path: Path) -> None:
    nodes = [
        {"mesh": 0, "name": name, "translation": [k, 0, 9 * k]} for k, name in enumerate(["a", "a", "a.001", "a"])
    ]
    assert load_geometry(cube_glb(tmp_path / "a.glb", nodes)).names == ("a", "a.002", "a.001", "a.003")


def test_a_camera_node_carries_its_children(tmp_path: Path) -> None:
    tree, blob = gltf_tree(CUBE, CUBE_FACES, [{"camera": 0, "translation": [5, 0, 0], "children": [1]}, {"mesh": 0}])
    tree["cameras"] = [{"type": "perspective", "perspective": {"yfov": 1, "znear": 0.1}}]
    assert load_geometry(write(tmp_path / "a.glb", tree, blob)).vertices.min(0).tolist() == [5, 0, 0]


def test_primitives_of_one_mesh_are_one_object(tmp_path: Path) -> None:
    tree, blob = gltf_tree(CUBE, CUBE_FACES, [{"mesh": 0, "name": "house"}])
    tree["accessors"] += [
        {**tree["accessors"][1], "count": 18},
        {**tree["accessors"][1], "count": 18, "byteOffset": 36},
    ]
    tree["meshes"][0]["primitives"] = [{"attributes": {"POSITION": 0}, "indices": k, "material": 0} for k in (2, 3)]
    tree["materials"], tree["images"] = [{}], [{"uri": "missing.png"}]
    geometry = load_geometry(write(tmp_path / "a.glb", tree, blob))
    assert geometry.names == ("house",)
    assert set(geometry.components) == {0}
    np.testing.assert_array_equal(canonical(corners(geometry)), canonical(CUBE[CUBE_FACES].astype(float)))


def test_strips_and_unindexed_triangles(tmp_path: Path) -> None:
    square = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    tree, blob = gltf_tree(square, np.arange(4), [{"mesh": 0}])
    tree["meshes"][0]["primitives"][0]["mode"] = 5
    strip = load_geometry(write(tmp_path / "strip.glb", tree, blob))
    np.testing.assert_allclose(face_normals(strip.vertices, strip.faces), [[0, 0, 1]] * 2)
    tree, blob = gltf_tree(CUBE[CUBE_FACES].reshape(-1, 3), CUBE_FACES, [{"mesh": 0}])
    del tree["meshes"][0]["primitives"][0]["indices"]
    loose = load_geometry(write(tmp_path / "loose.glb", tree, blob))
    np.testing.assert_array_equal(corners(loose), CUBE[CUBE_FACES])
    assert set(loose.components) == {0}


@pytest.mark.parametrize("suffix", [".obj", ".ply", ".stl", ".off", ".glb", ".gltf"])
def test_every_format_holds_the_same_mesh(tmp_path: Path, suffix: str) -> None:
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.apply_translation([1, 2, 3])
    mesh.vertices = mesh.vertices.astype(np.float32)
    path = tmp_path / f"ball{suffix}"
    if suffix == ".gltf":
        for name, data in mesh.export(file_type="gltf").items():
            (tmp_path / (name if name != "model.gltf" else path.name)).write_bytes(data)
    else:
        mesh.export(path)
    geometry = load_geometry(path)
    assert geometry.up == ("+y" if suffix in (".glb", ".gltf", ".obj") else "+z")
    assert load_geometry(path, "+y").up == "+y"
    expected, found = canonical(mesh.triangles.round(5)), canonical(corners(geometry).round(5))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(geometry.names) == 1
    assert set(geometry.components) == {0}


OBJ = """mtllib ball.mtl
o front
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
v 0.5 2 0
usemtl red
f 1 2 3
usemtl blue
f 1 3 5 4
o back
v 0 0 -1
v 1 0 -1
v 1 1 -1
f -3 -2 -1
v 0 1 -1
f 6 8 9
"""


def test_obj_objects_polygons_and_negative_indices(tmp_path: Path) -> None:
    path = tmp_path / "a.obj"
    path.write_text(OBJ)
    geometry = load_geometry(path)
    assert geometry.names == ("front", "back")
    assert np.bincount(geometry.objects).tolist() == [3, 2]
    np.testing.assert_allclose(face_normals(geometry.vertices, geometry.faces), [[0, 0, 1]] * 5)
    areas = np.linalg.norm(np.cross(*(corners(geometry)[:, k] - corners(geometry)[:, 0] for k in (1, 2))), axis=1) / 2
    assert areas[geometry.objects == 0].sum() == pytest.approx(1.5)
    assert areas[geometry.objects == 1].sum() == pytest.approx(1)
    assert set(geometry.components) == {0, 1}
