"""Meshes as glTF 2.0 defines them: skins, morph targets, sparse and quantised accessors, instances, extensions."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tests.scene.geometry_common import CUBE, CUBE_FACES, corners, glb_bytes, gltf_tree, write
from utils.cli import InputError
from utils.meshes.gltf import FLOAT
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, face_normals

COMPONENTS = {"f4": FLOAT, "u1": 5121, "i1": 5120, "u2": 5123, "i2": 5122, "u4": 5125}
KINDS = {1: "SCALAR", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


class Builder:
    """A glTF tree with the cube as mesh 0, to which accessors are added."""

    def __init__(self, nodes: list[dict] | None = None, faces: np.ndarray = CUBE_FACES) -> None:
        self.tree, self.blob = gltf_tree(CUBE, faces, nodes or [{"mesh": 0, "name": "Cube"}])
        self.primitive = self.tree["meshes"][0]["primitives"][0]

    def view(self, data: bytes, **more: object) -> int:
        self.blob += b"\0" * (-len(self.blob) % 4)
        self.tree["bufferViews"].append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data), **more})
        self.blob += data
        self.tree["buffers"][0]["byteLength"] = len(self.blob)
        return len(self.tree["bufferViews"]) - 1

    def accessor(self, values: np.ndarray, **more: object) -> int:
        values = np.atleast_2d(values.T).T
        kind = {"componentType": COMPONENTS[values.dtype.str[1:]], "type": KINDS[values.shape[1]]}
        entry = {"bufferView": self.view(values.tobytes()), "count": len(values), **kind, **more}
        self.tree["accessors"].append(entry)
        return len(self.tree["accessors"]) - 1

    def load(self, folder: Path) -> Geometry:
        return load_geometry(write(folder / "a.glb", self.tree, self.blob))


def points(geometry: Geometry) -> np.ndarray:
    """The triangles' corners, [12, 3, 3], as those of the cube."""
    return corners(geometry)


def assert_cube(geometry: Geometry, scale: float = 1, move: tuple = (0, 0, 0)) -> None:
    np.testing.assert_allclose(points(geometry), CUBE[CUBE_FACES] * scale + move, atol=1e-6)


@pytest.mark.parametrize("weights", ["f4", "u1"])
def test_joints_place_a_skinned_mesh_not_its_node(tmp_path: Path, weights: str) -> None:
    nodes = [
        {"name": "Armature", "children": [1], "scale": [0.01] * 3},
        {"name": "Hips", "translation": [100, 0, 0]},
        {"name": "Body", "mesh": 0, "skin": 0, "scale": [100, 100, 100], "translation": [9, 9, 9]},
    ]
    built = Builder(nodes)
    one = 1 if weights == "f4" else 255
    built.primitive["attributes"]["JOINTS_0"] = built.accessor(np.zeros((8, 4), "u1"))
    share = np.tile(np.array([one, 0, 0, 0], weights), (8, 1))
    built.primitive["attributes"]["WEIGHTS_0"] = built.accessor(share, normalized=weights != "f4")
    bind = np.diag([100, 100, 100, 1]).astype("f4").T.reshape(1, 16)
    built.tree["skins"] = [{"joints": [1], "inverseBindMatrices": built.accessor(bind)}]
    assert_cube(built.load(tmp_path), move=(1, 0, 0))
    del built.tree["skins"][0]["inverseBindMatrices"]
    assert_cube(built.load(tmp_path), scale=0.01, move=(1, 0, 0))


def test_two_joints_bend_a_mesh(tmp_path: Path) -> None:
    nodes = [{"mesh": 0, "skin": 0}, {}, {"translation": [0, 0, 4], "scale": [1, 1, -1]}]
    built = Builder(nodes)
    share = np.zeros((8, 4), "f4")
    share[:, 0], share[:, 1] = 1 - CUBE[:, 0], CUBE[:, 0]
    built.primitive["attributes"]["JOINTS_0"] = built.accessor(np.tile(np.array([0, 1, 0, 0], "u2"), (8, 1)))
    built.primitive["attributes"]["WEIGHTS_0"] = built.accessor(2 * share)  # weights need not add up to one
    built.tree["skins"] = [{"joints": [1, 2]}]
    expected = CUBE.copy()
    expected[4:, 2] = 4 - expected[4:, 2]
    np.testing.assert_allclose(points(built.load(tmp_path)), expected[CUBE_FACES], atol=1e-6)
    built.tree["nodes"][1]["scale"] = [1, -1, 1]  # now both mirror: the winding is kept
    turned = points(built.load(tmp_path))
    expected = CUBE * [1, -1, 1]
    expected[4:] = CUBE[4:] * [1, 1, -1] + [0, 0, 4]
    np.testing.assert_allclose(turned, expected[CUBE_FACES[:, ::-1]], atol=1e-6)
    built.tree["skins"] = [{"joints": [1]}]
    with pytest.raises(InputError, match="joint 1, but its skin has 1"):
        built.load(tmp_path)
    built.tree["skins"], built.tree["nodes"][2]["children"] = [{"joints": [2]}], [2]
    built.tree["scenes"] = [{"nodes": [0]}]
    with pytest.raises(InputError, match="its own ancestor"):
        built.load(tmp_path)


@pytest.mark.parametrize("owner", ["meshes", "nodes"])
def test_morph_targets_stand_at_their_default_weights(tmp_path: Path, owner: str) -> None:
    built = Builder()
    target = np.zeros((8, 3), "f4")
    target[CUBE[:, 1] == 1, 1] = 2
    built.primitive["targets"] = [{"POSITION": built.accessor(target)}, {"NORMAL": 0}]
    assert_cube(built.load(tmp_path))
    built.tree[owner][0]["weights"] = [0.5, 1]
    assert built.load(tmp_path).vertices.max(0).tolist() == [1, 2, 1]
    built.tree["meshes"][0]["weights"], built.tree["nodes"][0]["weights"] = [1, 0], [0, 0]
    assert_cube(built.load(tmp_path))


@pytest.mark.parametrize("base", [True, False])
def test_sparse_accessors(tmp_path: Path, base: bool) -> None:
    built = Builder()
    places = np.array([2, 3, 6, 7] if base else range(1, 8), "u1")
    values = (CUBE[places] * [1, 3, 1]).astype("f4")
    built.tree["accessors"][0]["sparse"] = {
        "count": len(places),
        "indices": {"bufferView": built.view(places.tobytes()), "componentType": 5121},
        "values": {"bufferView": built.view(values.tobytes())},
    }
    if not base:  # zeros, of which all but the first are replaced
        del built.tree["accessors"][0]["bufferView"]
    np.testing.assert_allclose(points(built.load(tmp_path)), CUBE[CUBE_FACES] * [1, 3, 1])


@pytest.mark.parametrize(("kind", "normalized"), [("u2", True), ("i1", True), ("u1", False), ("i2", False)])
def test_quantised_attributes(tmp_path: Path, kind: str, normalized: bool) -> None:
    built = Builder()
    top = np.iinfo(kind).max if normalized else 1
    padded = np.zeros((8, 4), kind)
    padded[:, :3] = CUBE * top
    view = built.view(padded.tobytes(), byteStride=4 * padded.itemsize)
    built.tree["accessors"][0] = {
        **{"bufferView": view, "count": 8, "type": "VEC3", "componentType": COMPONENTS[kind]},
        "normalized": normalized,
    }
    normals = np.zeros((8, 4), "i1")
    normals[:, :3] = np.where(CUBE > 0, 73, -73)
    view = built.view(normals.tobytes(), byteStride=4)
    built.tree["accessors"].append(
        {"bufferView": view, "count": 8, "type": "VEC3", "componentType": 5120, "normalized": True}
    )
    built.primitive["attributes"]["NORMAL"] = 2
    built.tree["extensionsUsed"] = built.tree["extensionsRequired"] = ["KHR_mesh_quantization"]
    geometry = built.load(tmp_path)
    assert_cube(geometry)
    assert geometry.smooth.all() and not geometry.notes


def test_fans(tmp_path: Path) -> None:
    ring = np.array([(np.cos(k), np.sin(k), 0) for k in np.arange(8) * np.pi / 4])
    tree, blob = gltf_tree(ring, np.arange(8), [{"mesh": 0}])
    tree["meshes"][0]["primitives"][0]["mode"] = 6
    geometry = load_geometry(write(tmp_path / "a.glb", tree, blob))
    np.testing.assert_allclose(face_normals(geometry.vertices, geometry.faces), [[0, 0, 1]] * 6, atol=1e-6)
    a, b, c = corners(geometry).transpose(1, 0, 2)
    assert np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2 == pytest.approx(2 * np.sqrt(2))


def test_instances(tmp_path: Path) -> None:
    built = Builder([{"mesh": 0, "name": "tree", "translation": [0, 0, 5]}])
    moves, sizes = np.array([[0, 0, 0], [7, 0, 0]], "f4"), np.array([[1, 1, 1], [2, 2, 2]], "f4")
    turns = np.array([[0, 0, 0, 127], [0, 0, 127, 0]], "i1")
    attributes = {
        "TRANSLATION": built.accessor(moves),
        "ROTATION": built.accessor(turns, normalized=True),
        "SCALE": built.accessor(sizes),
        "_ID": built.accessor(np.arange(2, dtype="f4")),
    }
    built.tree["nodes"][0]["extensions"] = {"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    built.tree["extensionsUsed"] = built.tree["extensionsRequired"] = ["EXT_mesh_gpu_instancing"]
    geometry = built.load(tmp_path)
    assert geometry.names == ("tree", "tree.001")
    np.testing.assert_allclose(points(geometry)[:12], CUBE[CUBE_FACES] + [0, 0, 5], atol=1e-6)
    np.testing.assert_allclose(points(geometry)[12:], CUBE[CUBE_FACES] * [-2, -2, 2] + [7, 0, 5], atol=1e-6)
    attributes["SCALE"] = built.accessor(sizes[:1])
    with pytest.raises(InputError, match="1 and 2"):
        built.load(tmp_path)
    del built.tree["nodes"][0]["extensions"]  # listed, but used by no node
    assert_cube(built.load(tmp_path), move=(0, 0, 5))


def test_hidden_nodes_and_their_children_are_left_out(tmp_path: Path) -> None:
    hidden = {"KHR_node_visibility": {"visible": False}}
    nodes = [{"children": [1], "extensions": hidden}, {"mesh": 0}, {"mesh": 0, "name": "seen"}]
    nodes[2]["extensions"] = {"KHR_node_visibility": {"visible": True}}
    assert Builder(nodes).load(tmp_path).names == ("seen",)


def test_what_is_not_needed_does_not_decide(tmp_path: Path) -> None:
    """Images at any path, optional compression beside plain data, bytes after the end, buffers that are symlinks."""
    built = Builder()
    built.primitive["extensions"] = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
    built.tree["bufferViews"][0]["extensions"] = {"EXT_meshopt_compression": {"buffer": 0, "byteLength": 9}}
    built.tree["extensionsUsed"] = ["KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_materials_unlit"]
    built.tree["images"] = [{"uri": uri} for uri in ("https://example.org/a.png", "../../a.png", "C:\\a.png")]
    (tmp_path / "a.glb").write_bytes(glb_bytes(built.tree, built.blob) + b"more")
    assert_cube(load_geometry(tmp_path / "a.glb"))
    (tmp_path / "glb.gltf").write_bytes(glb_bytes(built.tree, built.blob))
    assert_cube(load_geometry(tmp_path / "glb.gltf"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "blob").write_bytes(built.blob)
    folder = tmp_path / "scene"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "elsewhere" / "blob")
    built.tree["buffers"][0]["uri"] = "link.bin"
    (folder / "a.gltf").write_text(json.dumps(built.tree))
    assert_cube(load_geometry(folder / "a.gltf"))


def test_animated_objects_and_unknown_extensions_are_noted(tmp_path: Path) -> None:
    built = Builder([{"children": [1]}, {"mesh": 0, "name": "Cube"}])
    assert not built.load(tmp_path).notes
    built.tree["animations"] = [{"channels": [{"sampler": 0, "target": {"node": 0, "path": "translation"}}]}]
    built.tree["extensionsRequired"] = ["KHR_materials_unlit", "VENDOR_shape"]
    moving, unknown = built.load(tmp_path).notes
    assert "animates Cube: what moves stays at its first pose" in moving
    assert "VENDOR_shape" in unknown and "unlit" not in unknown
    pointer = {"KHR_animation_pointer": {"pointer": "/nodes/1/rotation"}}
    target = {"path": "pointer", "extensions": pointer}
    built.tree["animations"] = [{"channels": [{"sampler": 0, "target": target}]}]
    assert "first pose" in built.load(tmp_path).notes[0]


def test_splats_are_named(tmp_path: Path) -> None:
    built = Builder()
    built.primitive["mode"], built.tree["extensionsUsed"] = 0, ["KHR_gaussian_splatting"]
    with pytest.raises(InputError, match="is Gaussian splats: make a mesh"):
        built.load(tmp_path)


def packed_draco(built: Builder) -> None:
    """Replace the cube's data by a Draco buffer view; without the library, by invalid bytes."""
    data, number = b"not Draco", 0
    if importlib.util.find_spec("DracoPy"):
        import DracoPy

        data = DracoPy.encode(CUBE, CUBE_FACES.astype("u4"), quantization_bits=20, preserve_order=True)
        number = DracoPy.decode(data).attributes[0]["unique_id"]
    view = built.view(data)
    packed = {"bufferView": view, "attributes": {"POSITION": number}}
    built.primitive["extensions"] = {"KHR_draco_mesh_compression": packed}
    for accessor in built.tree["accessors"]:
        del accessor["bufferView"]


def test_draco_is_read_or_says_what_to_do(tmp_path: Path) -> None:
    built = Builder()
    packed_draco(built)
    if importlib.util.find_spec("DracoPy"):
        assert_cube(built.load(tmp_path))
        view = built.primitive["extensions"]["KHR_draco_mesh_compression"]
        view["bufferView"] = 0
        with pytest.raises(InputError, match="cannot be decoded"):
            built.load(tmp_path)
    else:
        with pytest.raises(InputError, match=r"pip install DracoPy.*npx @gltf-transform/cli copy a.glb"):
            built.load(tmp_path)


def test_meshopt_is_read_or_says_what_to_do(tmp_path: Path) -> None:
    built, data = Builder(), (b"nonsense", b"nonsense")
    found = importlib.util.find_spec("meshoptimizer")
    if found:
        import meshoptimizer

        indices = CUBE_FACES.astype("u4").ravel()
        data = (
            bytes(meshoptimizer.encode_vertex_buffer(CUBE, 8, 12)),
            bytes(meshoptimizer.encode_index_buffer(indices, 36, 8)),
        )
    built.tree["buffers"].append({"byteLength": 999, "extensions": {"EXT_meshopt_compression": {"fallback": True}}})
    for k, (mode, count, stride) in enumerate((("ATTRIBUTES", 8, 12), ("TRIANGLES", 36, 2))):
        view = built.tree["bufferViews"][built.view(data[k])]
        packed = {"buffer": 0, "byteOffset": view["byteOffset"], "byteLength": view["byteLength"]}
        packed |= {"byteStride": stride, "count": count, "mode": mode}
        old = {"buffer": 1, "byteLength": count * stride}
        built.tree["bufferViews"][k] = old | {"extensions": {"EXT_meshopt_compression": packed}}
    if found:
        expected = {tuple(sorted(map(tuple, face.tolist()))) for face in CUBE[CUBE_FACES]}
        assert {tuple(sorted(map(tuple, face.tolist()))) for face in points(built.load(tmp_path))} == expected
        built.tree["bufferViews"][0]["extensions"]["EXT_meshopt_compression"]["byteLength"] = 3
        with pytest.raises(InputError, match="not what meshopt wrote"):
            built.load(tmp_path)
    else:
        with pytest.raises(InputError, match=r"pip install meshoptimizer.*npx @gltf-transform/cli copy a.glb"):
            built.load(tmp_path)
