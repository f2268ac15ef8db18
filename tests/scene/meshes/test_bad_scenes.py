"""Damaged and hostile scenes: one line that says what is wrong."""

import base64
import copy
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.scene.geometry_common import CUBE, CUBE_FACES, corners, glb_bytes, gltf_tree, write
from utils.cli import InputError
from utils.meshes.load import load_geometry


def change(tree: dict, where: str, value: object) -> dict:
    tree = copy.deepcopy(tree)
    *path, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    target = tree
    for key in path:
        target = target[key]
    target[last] = value
    return tree


SPARSE = {"count": 2, "indices": {"bufferView": 1, "componentType": 5123}, "values": {"bufferView": 0}}
BAD_TREES = [
    ("accessors.0.count", 9, "more than its buffer view"),
    ("accessors.0.count", 10**12, "ask for more memory"),
    ("accessors.0.count", -1, "not a whole number"),
    ("accessors.0.componentType", 5122, "quantised"),
    ("accessors.1.byteOffset", 1, "more than its buffer view"),
    ("accessors.0.sparse", {}, "valid glTF"),
    ("accessors.0.sparse", {**SPARSE, "count": 9}, "replaces 9 of 8 elements"),
    (
        "accessors.0.sparse",
        {**SPARSE, "indices": {"bufferView": 0, "componentType": 5125, "byteOffset": 20}},
        "replaces element",
    ),
    ("accessors.0.sparse", {**SPARSE, "indices": {"bufferView": 0, "componentType": 5126}}, "indices of type 5126"),
    ("accessors.0", {"componentType": 5126, "count": 8, "type": "VEC3"}, "neither a buffer view nor sparse"),
    ("bufferViews.0.byteLength", 10**9, "beyond buffer"),
    ("bufferViews.0.byteStride", 0, "more than its buffer view"),
    ("buffers.0.byteLength", 10**9, "promises"),
    ("buffers.0.uri", "../a.bin", "outside its own folder"),
    ("buffers.0.uri", "/etc/hostname", "outside its own folder"),
    ("buffers.0.uri", "a/%2e%2e/%2e%2e/b.bin", "outside its own folder"),
    ("buffers.0.uri", "file:///etc/hostname", "outside its own folder"),
    ("buffers.0.uri", "https://example.com/a.bin", "outside its own folder"),
    ("buffers.0.uri", "C:\\a.bin", "outside its own folder"),
    ("buffers.0.uri", "missing.bin", "missing"),
    ("buffers.0.uri", "device.bin", "no file"),
    ("nodes.0.children", [0], "reached twice"),
    ("nodes.0.scale", [1, float("nan"), 1], "finite"),
    ("nodes.0.scale", [1e30, 1, 1], "finite"),
    ("nodes", [{"scale": [1e14] * 3, "children": [1]}, {"mesh": 0, "scale": [1e14] * 3}], "infinity"),
    ("nodes.0.scale", [0, 0, 0], "without area"),
    ("nodes.0.mesh", 4, "does not exist"),
    ("scene", -1, "not a whole number"),
    ("meshes.0.primitives.0.mode", 7, "mode 7"),
    ("meshes.0.primitives.0.mode", 1, "no triangles"),
    ("meshes.0.primitives", [], "no triangles"),
    ("scenes.0.nodes", [], "no triangles"),
    ("nodes", {"0": {}}, "does not exist"),
    ("asset.version", "1.0", "only 2"),
    ("asset.extras", {"world_up": "+x"}, "up axis"),
    ("meshes", "nonsense", "does not exist|valid glTF"),
]


@pytest.mark.parametrize(("where", "value", "message"), BAD_TREES, ids=[f"{w}={v!s:.20}" for w, v, _ in BAD_TREES])
def test_bad_gltf_is_refused(tmp_path: Path, where: str, value: object, message: str) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(10_000))
    (folder / "device.bin").symlink_to("/dev/zero")
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


FACE = "element face 2\nproperty list uchar int vertex_indices\n"
PLAIN = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"


BAD_FILES = {
    "a.txt": (b"x", "scenes are read from"),
    "empty.glb": (b"", "is empty"),
    "garbage.glb": (b"garbage" * 9, "not a GLB"),
    "garbage.gltf": (b"garbage", "not a valid glTF"),
    "deep.gltf": (b"[" * 200_000, "not a valid glTF"),
    "list.gltf": (b"[]", "not an object"),
    "a.fbx": (b"x", "Blender: File > Export > glTF"),
    "a.splat": (b"x", "Gaussian splats"),
    "garbage.obj": (b"garbage", "no triangles"),
    "beyond.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "number 9 of its vertices, but there are 3"),
    "zero.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\n\nf 0 1 2\n", "line 5 .*vertex 0 does not exist: OBJ counts from 1"),
    "back.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -4 1 2\n", "line 4 .*vertex -4 does not exist: 3 have been"),
    "normal.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0 0 1\nf 1//1 2//2 3//1\n", "number 2 of its normals"),
    "flat.obj": (b"v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "line 1 .*not understood"),
    "comma.obj": (b"v 0,5 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "line 1 .*not understood"),
    "small.obj": (b"v 0 0 0\nv 1e-30 0 0\nv 0 1e-30 0\nf 1 2 3\n", "less than 1e-12 metres across"),
    "nan.obj": (b"v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
    "inf.off": (b"OFF\n3 1 0\n0 0 inf\n1 0 0\n0 1 0\n3 0 1 2\n", "not finite"),
    "points.ply": (PLAIN.encode() + b"end_header\n0 0 0\n1 0 0\n0 1 0\n", "it is a point cloud"),
    "splats.ply": (PLAIN.encode() + b"property float f_dc_0\nend_header\n0 0 0 1\n", "it is Gaussian splats"),
    "huge.ply": (
        (PLAIN.replace(" 3\n", " 99999999999999\n") + FACE).encode() + b"end_header\n0 0 0\n",
        "promises 99999999999999 of element vertex, but there are 1",
    ),
    "cut.ply": (
        (PLAIN + FACE).encode() + b"end_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 0",
        "promises 2 of element face, but there are 1",
    ),
    "cut_binary.ply": (
        (PLAIN.replace("ascii", "binary_big_endian") + FACE).encode()
        + b"end_header\n"
        + bytes(36)
        + b"\3"
        + bytes(12)
        + b"\3"
        + bytes(5),
        "promises 2 of element face, but there are 1",
    ),
    "far.ply": (
        (PLAIN + FACE).encode() + b"end_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 0 1 7\n",
        "vertex number 7 .*there are 3 vertices",
    ),
    "half.ply": (
        (PLAIN + FACE).encode() + b"end_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 0 1 1.5\n",
        "no whole numbers",
    ),
    "type.ply": (PLAIN.encode() + b"property colour x\nend_header\n", "'property colour x' in its header"),
    "garbage.ply": (b"garbage", "cannot be read"),
    "cut.stl": (bytes(80) + struct.pack("<I", 10**9) + bytes(50), "promises 1000000000 triangles, but there are 1"),
    "cut_ascii.stl": (
        b"solid\nouter loop\nvertex 0 0 0\nvertex 1 0 0\n",
        "1 triangles need 3 corners, but there are 2",
    ),
    "short.stl": (b"x" * 50, "cannot be read as STL"),
    "mixed.stl": (b"solid x\nnormal x\n" + b"vertex 1 1 1\n" * 3 + b"endsolid", "without area"),
    "garbage.stl": (b"solid x\nfacet\nvertex 1 2 x\nendsolid", "cannot be read|no triangles"),
    "garbage.off": (b"OFF\n9 9 9\n1 2 3", "promises 9 vertices, but there are 1"),
    "cut.off": (b"OFF 3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 0", "promises 2 faces, but there are 1"),
    "size.off": (b"OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n-3 0 1 2\n3 0 1 2\n", "b'-3' is no number of corners"),
    "size.ply": (
        (PLAIN.replace("ascii", "binary_big_endian") + FACE.replace("uchar", "char")).encode()
        + b"end_header\n"
        + bytes(36)
        + b"\3"
        + bytes(12)
        + b"\xfd"
        + bytes(12),
        "a list of face has length -3",
    ),
    "binary.off": (b"OFF BINARY\n" + bytes(90), "save it as PLY"),
    "words.off": (b"OFF\nmany few\n", "its counts"),
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
