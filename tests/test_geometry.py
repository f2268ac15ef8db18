"""Scenes: the same world out of every format and node tree, exact rays, and no file that can hurt."""

import base64
import copy
import json
import struct
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import DATA
from utils.cli import InputError
from utils.scene import raycast
from utils.scene.bvh import NumpyHits
from utils.scene.load import load_geometry
from utils.scene.mesh import Geometry, face_normals, turn, weld
from utils.scene.raycast import RayCaster
from utils.scene.write import write_glb

TOWN = DATA / "town"
CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32)
CUBE_FACES = np.array(
    [
        *([0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]),
        *([2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]),
    ]
)  # counter-clockwise seen from outside


# --- making files ---


def gltf_tree(vertices: np.ndarray, faces: np.ndarray, nodes: list[dict], normals=None) -> tuple[dict, bytes]:
    """A glTF tree with one mesh and these nodes; nodes that are nobody's child are the scene's."""
    arrays = [vertices.astype("<f4"), faces.astype("<u2").ravel()] + ([] if normals is None else [normals])
    blob, views, accessors = b"", [], []
    for array in arrays:
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": array.nbytes})
        kind = (5126, "VEC3") if array.ndim == 2 else (5123, "SCALAR")
        accessors.append(
            {"bufferView": len(accessors), "componentType": kind[0], "count": len(array), "type": kind[1]}
        )
        blob += array.tobytes()
    attributes = {"POSITION": 0} | ({} if normals is None else {"NORMAL": 2})
    children = {child for node in nodes for child in node.get("children", [])}
    tree = {
        **{"asset": {"version": "2.0"}, "scene": 0, "nodes": nodes, "accessors": accessors, "bufferViews": views},
        "scenes": [{"nodes": [k for k in range(len(nodes)) if k not in children]}],
        "meshes": [{"name": "mesh", "primitives": [{"attributes": attributes, "indices": 1}]}],
        "buffers": [{"byteLength": len(blob)}],
    }
    return tree, blob


def glb_bytes(tree: dict, blob: bytes) -> bytes:
    text = json.dumps(tree).encode()
    text, blob = text + b" " * (-len(text) % 4), blob + b"\0" * (-len(blob) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(blob), 0x004E4942) + blob
    return struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks


def write(path: Path, tree: dict, blob: bytes) -> Path:
    path.write_bytes(glb_bytes(tree, blob))
    return path


def cube_glb(path: Path, nodes: list[dict]) -> Path:
    return write(path, *gltf_tree(CUBE, CUBE_FACES, nodes))


def make_geometry(triangles: np.ndarray) -> Geometry:
    """A scene out of loose triangles [F, 3, 3]."""
    count = len(triangles)
    faces, zeros = np.arange(3 * count).reshape(-1, 3), np.zeros(count, np.int32)
    return Geometry(
        np.reshape(triangles, (-1, 3)), faces, zeros, ("soup",), zeros, np.zeros(count, bool), None, "+z", {}
    )


def corners(geometry: Geometry) -> np.ndarray:
    return geometry.vertices[geometry.faces]


def canonical(triangles: np.ndarray) -> np.ndarray:
    """Triangles as a sorted list, each begun at its smallest corner: equal for equal meshes with equal winding."""
    first = [min(range(3), key=lambda k: tuple(triangle[k])) for triangle in triangles]
    turned = np.array([np.roll(triangle, -k, axis=0) for triangle, k in zip(triangles, first, strict=True)])
    return np.array(sorted(turned.reshape(-1, 9).tolist()))


def signed_volume(geometry: Geometry, chosen: np.ndarray) -> float:
    """Positive for a closed mesh whose faces are counter-clockwise seen from outside."""
    a, b, c = corners(geometry)[chosen].transpose(1, 0, 2)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


# --- loading ---


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
    assert geometry.up == ("+y" if suffix in (".glb", ".gltf") else "+z")
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


# --- shading, welding, dropping ---


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
    nodes = [{"mesh": 0, "name": "a"}, {"mesh": 0, "name": "b"}]  # b covers a: nothing of it is left
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


# --- writing ---


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
    assert load_geometry(tmp_path / "b.glb", "+y").up == "+y"  # what is said outright wins
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


# --- rays ---


def brute_force(triangles: np.ndarray, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hits by trying every triangle: (face, whether the ray stays clear of all edges and of a second hit)."""
    edge1, edge2 = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    across = np.cross(directions[:, None], edge2)
    scale = 1 / np.einsum("fx,nfx->nf", edge1, across)
    offset = origin - triangles[:, 0]
    u = np.einsum("fx,nfx->nf", offset, across) * scale
    v = np.einsum("nx,fx->nf", directions, np.cross(offset, edge1)) * scale
    t = np.einsum("fx,fx->f", edge2, np.cross(offset, edge1)) * scale
    margin = np.minimum(np.minimum(u, v), 1 - u - v)
    t = np.where((margin >= 0) & (t > 0), t, np.inf)
    face = np.where(np.isfinite(t.min(1)), t.argmin(1), -1)
    two = np.sort(t, axis=1)[:, :2]
    with np.errstate(invalid="ignore"):
        clear = (np.abs(margin).min(1) > 1e-4) & ~(two[:, 1] - two[:, 0] < 1e-4)
    return face, clear


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("hits", ["embree", "numpy"])
def test_rays_find_the_first_triangle(hits: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if hits == "numpy":
        monkeypatch.setattr("utils.scene.raycast._make_embree", lambda *_: None)
    else:
        pytest.importorskip("embreex")
    rng = np.random.default_rng(3)
    triangles = rng.normal(size=(200, 1, 3)) * 3 + rng.normal(size=(200, 3, 3)) * 0.7
    directions = rng.normal(size=(2000, 3)) * rng.uniform(0.01, 100, (2000, 1))
    eye = np.array([0.3, -0.2, 0.1])
    expected, clear = brute_force(triangles, eye, directions)
    caster = RayCaster(make_geometry(triangles + offset))
    found = caster.cast(eye + offset, directions)
    assert found.dtype == np.int32
    assert clear.mean() > 0.9
    assert 0.3 < (expected >= 0).mean() < 0.99
    np.testing.assert_array_equal(found[clear], expected[clear])
    np.testing.assert_array_equal(caster.cast(np.tile(eye + offset, (2000, 1)), directions), found)
    # Both sides count: the reversed triangles are hit alike.
    turned = RayCaster(make_geometry(triangles[:, ::-1] + offset)).cast(eye + offset, directions)
    np.testing.assert_array_equal(turned[clear], expected[clear])


def test_without_embree_it_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    raycast._say_slow.cache_clear()
    triangle = np.array([[[-1, -1, 2], [1, -1, 2], [0, 1, 2]]], float)
    for _ in range(2):
        assert RayCaster(make_geometry(triangle)).cast(np.zeros(3), np.array([[0, 0, 1.0], [0, 0, -1]])).tolist() == [
            0,
            -1,
        ]
    assert capsys.readouterr().err.count("embreex is not installed") == 1


def test_axis_aligned_rays_and_flat_boxes() -> None:
    grid = np.array([[[x, y, 1], [x + 1, y, 1], [x, y + 1, 1]] for x in range(9) for y in range(9)], float)
    rays = np.tile([0, 0, 1.0], (81, 1))
    origins = grid.mean(1) * [1, 1, 0]
    assert NumpyHits(grid.reshape(-1, 3), np.arange(243).reshape(-1, 3))(origins, rays).tolist() == list(range(81))


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_plane_depth_is_exact(offset: float) -> None:
    rng = np.random.default_rng(4)
    triangles = rng.normal((0, 0, -20), size=(50, 3, 3))
    caster = RayCaster(make_geometry(triangles + offset))
    pixels = np.concatenate([rng.uniform(-0.1, 0.1, (500, 2)), -np.ones((500, 1))], 1)
    eye = np.full(3, offset)
    face = caster.cast(eye, pixels)
    depth = caster.plane_depth(face, eye, pixels)
    hit = face >= 0
    assert hit.any()
    assert np.isinf(depth[~hit]).all()
    points = pixels[hit] * depth[hit, None]
    off_plane = np.einsum("ij,ij->i", points - triangles[face[hit], 0], caster.normals[face[hit]])
    assert np.abs(off_plane).max() < (1e-12 if not offset else 1e-8)
    np.testing.assert_allclose(points[:, 2], -depth[hit])  # planar depth: the rays were not normalised
    flat = RayCaster(make_geometry(np.array([[[0, 0, 5], [1, 0, 5], [0, 1, 5]]], float)))
    assert flat.plane_depth(np.array([0]), np.zeros(3), np.array([[1.0, 0, 0]])).tolist() == [np.inf]
    assert flat.plane_depth(np.array([0]), np.zeros(3), np.array([[0.0, 0, -1]])).tolist() == [-5]


def test_threads_share_a_caster() -> None:
    rng = np.random.default_rng(5)
    caster = RayCaster(make_geometry(rng.normal(size=(2000, 3, 3))))
    directions = [rng.normal(size=(20_000, 3)) for _ in range(8)]
    alone = [caster.cast(np.zeros(3), rays) for rays in directions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda rays: caster.cast(np.zeros(3), rays), directions))
    np.testing.assert_array_equal(together, alone)


# --- bad input ---


def change(tree: dict, where: str, value: object) -> dict:
    tree = copy.deepcopy(tree)
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    target = tree
    for key in path:
        target = target[key]
    target[last] = value
    return tree


BAD_TREES = [
    ("accessors.0.count", 9, "more than its buffer view"),
    ("accessors.0.count", 10**12, "not a whole number|more than its"),
    ("accessors.0.count", -1, "not a whole number"),
    ("accessors.0.componentType", 5122, "quantised"),
    ("accessors.1.byteOffset", 1, "more than its buffer view"),
    ("accessors.0.sparse", {}, "sparse"),
    ("bufferViews.0.byteLength", 10**9, "beyond buffer"),
    ("bufferViews.0.byteStride", 0, "more than its buffer view"),
    ("buffers.0.byteLength", 10**9, "promises"),
    ("buffers.0.uri", "../a.bin", "outside its own folder"),
    ("buffers.0.uri", "/etc/hostname", "outside its own folder"),
    ("buffers.0.uri", "a/%2e%2e/%2e%2e/b.bin", "outside its own folder"),
    ("buffers.0.uri", "file:///etc/hostname", "outside its own folder"),
    ("buffers.0.uri", "https://example.com/a.bin", "outside its own folder"),
    ("buffers.0.uri", "C:\\a.bin", "outside its own folder"),
    ("buffers.0.uri", "link.bin", "outside its own folder"),
    ("buffers.0.uri", "missing.bin", "missing"),
    ("images", [{"uri": "../../texture.png"}], "outside its own folder"),
    ("nodes.0.children", [0], "reached twice"),
    ("nodes.0.scale", [1, float("nan"), 1], "finite"),
    ("nodes.0.scale", [1e30, 1, 1], "finite"),
    ("nodes", [{"scale": [1e14] * 3, "children": [1]}, {"mesh": 0, "scale": [1e14] * 3}], "infinity"),
    ("nodes.0.scale", [0, 0, 0], "without area"),
    ("nodes.0.mesh", 4, "does not exist"),
    ("scene", -1, "not a whole number"),
    ("meshes.0.primitives.0.mode", 6, "fans"),
    ("meshes.0.primitives.0.mode", 1, "no triangles"),
    ("meshes.0.primitives", [], "no triangles"),
    ("scenes.0.nodes", [], "no triangles"),
    ("nodes", {"0": {}}, "does not exist"),
    ("asset.version", "1.0", "only 2"),
    ("asset.extras", {"world_up": "+x"}, "up axis"),
    ("extensionsRequired", ["KHR_draco_mesh_compression"], "without compression"),
    ("meshes", "nonsense", "does not exist|valid glTF"),
]


@pytest.mark.parametrize(("where", "value", "message"), BAD_TREES, ids=[f"{w}={v!s:.20}" for w, v, _ in BAD_TREES])
def test_bad_gltf_is_refused(tmp_path: Path, where: str, value: object, message: str) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(10_000))
    (folder / "link.bin").symlink_to(tmp_path / "a.bin")
    tree, blob = gltf_tree(CUBE, CUBE_FACES, [{"mesh": 0}])
    path = write(folder / "a.glb", change(tree, where, value), blob)
    with pytest.raises(InputError, match=message) as caught:
        load_geometry(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_small_files_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    tree, blob = gltf_tree(CUBE, CUBE_FACES, [{"mesh": 0}] * 40_000)
    tree["accessors"][1] |= {"count": 12_000, "componentType": 5121}
    tree["bufferViews"][1]["byteLength"] = 12_000
    tree["buffers"][0]["byteLength"] = 20_000
    path = write(tmp_path / "a.glb", tree, blob + bytes(20_000))
    tracemalloc.start()
    with pytest.raises(InputError, match="more than 16,000,000 triangles"):
        load_geometry(path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_gltf_with_its_buffer_beside_it_or_inside(tmp_path: Path) -> None:
    tree, blob = gltf_tree(CUBE, CUBE_FACES, [{"mesh": 0}])
    (tmp_path / "my data.bin").write_bytes(blob)
    inside = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
    for name, uri in (("a.gltf", "my%20data.bin"), ("b.gltf", inside)):
        (tmp_path / name).write_text(json.dumps(change(tree, "buffers.0.uri", uri)))
        np.testing.assert_array_equal(corners(load_geometry(tmp_path / name)), CUBE[CUBE_FACES])


PLAIN = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
BAD_FILES = {
    "a.txt": (b"x", "scenes are read from"),
    "empty.glb": (b"", "is empty"),
    "garbage.glb": (b"garbage" * 9, "not a GLB"),
    "garbage.gltf": (b"garbage", "not a valid glTF"),
    "deep.gltf": (b"[" * 200_000, "not a valid glTF"),
    "list.gltf": (b"[]", "not an object"),
    "garbage.obj": (b"garbage", "no triangles|cannot be read"),
    "far.obj": (b"mtllib ../../a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "outside its own folder"),
    "beyond.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "cannot be read"),
    "flat.obj": (b"v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "not x, y, z"),
    "nan.obj": (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite|cannot be read"),
    "inf.off": (b"OFF\n3 1 0\n0 0 inf\n1 0 0\n0 1 0\n3 0 1 2\n", "not finite"),
    "points.ply": (PLAIN.encode() + b"end_header\n0 0 0\n1 0 0\n0 1 0\n", "no triangles"),
    "huge.ply": (
        PLAIN.replace(" 3\n", " 99999999999999\n").encode() + b"end_header\n0 0 0\n",
        "cannot be read|no tri",
    ),
    "garbage.ply": (b"garbage", "cannot be read"),
    "cut.stl": (bytes(80) + struct.pack("<I", 10**9) + bytes(50), "cannot be read|no triangles"),
    "mixed.stl": (b"solid x\nnormal x\n" + b"vertex 1 1 1\n" * 3 + b"endsolid", "without area"),
    "garbage.stl": (b"solid x\nfacet\nvertex 1 2 x\nendsolid", "cannot be read|no triangles"),
    "garbage.off": (b"OFF\n9 9 9\n1 2 3", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_geometry(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_missing_files_and_lying_sizes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_geometry(tmp_path / "missing.glb")
    good = glb_bytes(*gltf_tree(CUBE, CUBE_FACES, [{"mesh": 0}]))
    path = tmp_path / "a.glb"
    for bad in (
        good[:-1],
        good[:30],
        good + b"more",
        good[:8] + b"\xff" * 4 + good[12:],
        good[:12] + b"\xff" * 4 + good[16:],
    ):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"promises|holds|not a GLB"):
            load_geometry(path)


VALUES = [
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    1e308,
    float("nan"),
    None,
    True,
    "x",
    "",
    [],
    {},
    [1, 2, 3],
    {"a": 1},
    "../x",
    5126,
]


def mutate(rng: np.random.Generator, tree: dict, blob: bytes) -> bytes:
    """One broken file: an entry of the JSON replaced or removed, or bytes of the file changed, cut or repeated."""
    kind = rng.integers(4)
    if kind < 2:
        tree = copy.deepcopy(tree)
        for _ in range(rng.integers(1, 3)):
            target = tree
            while True:
                keys = list(target) if isinstance(target, dict) else list(range(len(target)))
                key = keys[rng.integers(len(keys))]
                if isinstance(target[key], dict | list) and target[key] and rng.random() < 0.85:
                    target = target[key]
                    continue
                break
            if rng.random() < 0.2:
                del target[key]
            else:
                target[key] = VALUES[rng.integers(len(VALUES))]
            if not tree:
                break
        return glb_bytes(tree, blob)
    data = bytearray(glb_bytes(tree, blob))
    if kind == 2:
        for place in rng.integers(len(data), size=rng.integers(1, 9)):
            data[place] = rng.integers(256)
    else:
        start, length = rng.integers(len(data)), rng.integers(1, 200)
        data[start : start + length] = data[start : start + length] * 2 if rng.random() < 0.3 else b""
    return bytes(data)


def fuzz(folder: Path, count: int, seed: int) -> None:
    nodes = [
        {"mesh": 0, "name": "a", "children": [1], "translation": [1, 2, 3]},
        {"mesh": 0, "name": "a", "scale": [1, -2, 1], "rotation": [0, 0, 0, 1]},
    ]
    tree, blob = gltf_tree(CUBE, CUBE_FACES, nodes, (CUBE - 0.5).astype("<f4"))
    rng = np.random.default_rng(seed)
    outcomes = {True: 0, False: 0}
    for k in range(count):
        path = folder / "a.glb"
        data = mutate(rng, tree, blob)
        if k % 3 == 0:  # the same JSON as a .gltf file, its buffer beside it
            path = folder / "a.gltf"
            (folder / "a.bin").write_bytes(blob)
            data = data[20 : len(data) - len(blob) - 8].replace(
                b'"byteLength": 264', b'"uri": "a.bin", "byteLength": 264'
            )
        path.write_bytes(data)
        try:
            geometry = load_geometry(path)
            assert len(geometry.faces)
            assert np.isfinite(geometry.vertices).all()
            outcomes[True] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > count / 20, outcomes


def test_broken_files_end_in_success_or_one_line(tmp_path: Path) -> None:
    fuzz(tmp_path, 200, seed=0)


@pytest.mark.slow
def test_many_broken_files_end_in_success_or_one_line(tmp_path: Path) -> None:
    fuzz(tmp_path, 2000, seed=1)
