"""Write a scene as GLB: one mesh per object, coordinates unchanged, the up axis as an extra."""

import json
import struct
from pathlib import Path

import numpy as np

from utils.files import atomic_path
from utils.meshes.gltf import BIN_CHUNK, FLOAT, GLB_MAGIC, JSON_CHUNK
from utils.meshes.mesh import Geometry

VERTEX_DATA, INDICES, UINT32 = 34962, 34963, 5125


def write_glb(path: Path, geometry: Geometry) -> None:
    """Write a GLB, atomically: one mesh per object, coordinates unchanged, `world_up` in the asset's extras.

    `load_geometry` gives the same scene back: exactly if float32 can represent the coordinates, else to 1e-7 of an
    object's size (such objects are stored around their own centre). Other programs read the file as y-up, as in glTF.
    """
    tree = {
        **{"asset": {"version": "2.0", "extras": {"world_up": geometry.up}}, "scene": 0},
        **{"scenes": [{"nodes": list(range(len(geometry.names)))}], "nodes": [], "meshes": []},
        **{"accessors": [], "bufferViews": [], "buffers": []},
    }
    blob = bytearray()
    order = np.argsort(geometry.objects, kind="stable")
    ends = np.searchsorted(geometry.objects[order], np.arange(len(geometry.names) + 1))
    for k, name in enumerate(geometry.names):
        _add_object(tree, blob, name, geometry, order[ends[k] : ends[k + 1]])
    tree["buffers"].append({"byteLength": len(blob)})
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<III", GLB_MAGIC, 2, 28 + len(text) + len(blob)))
        file.write(struct.pack("<II", len(text), JSON_CHUNK) + text)
        file.write(struct.pack("<II", len(blob), BIN_CHUNK))
        file.write(blob)


def _add_object(tree: dict, blob: bytearray, name: str, geometry: Geometry, chosen: np.ndarray) -> None:
    """Append a node with its own mesh. chosen: indices of the object's faces."""
    used, faces = np.unique(geometry.faces[chosen], return_inverse=True)
    faces, vertices = faces.reshape(-1, 3), geometry.vertices[used]
    normals = None
    if geometry.corner_normals is not None:
        corners = geometry.corner_normals[chosen]
        normals = np.zeros((len(vertices), 3), np.float32)
        normals[faces] = corners
        if not np.array_equal(normals[faces], corners):  # a vertex has several normals: split all vertices
            vertices, normals = vertices[faces.ravel()], corners.reshape(-1, 3)
            faces = np.arange(len(vertices)).reshape(-1, 3)
    node = {"name": name, "mesh": len(tree["meshes"])}
    if not np.array_equal(vertices.astype(np.float32), vertices):
        centre = (vertices.min(0) + vertices.max(0)) / 2
        node["translation"], vertices = centre.tolist(), vertices - centre
    position = vertices.astype(np.float32)
    attributes = {"POSITION": _add_accessor(tree, blob, position, "VEC3")}
    low, high = position.min(0).tolist(), position.max(0).tolist()
    tree["accessors"][-1] |= {"min": low, "max": high}
    if normals is not None:
        attributes["NORMAL"] = _add_accessor(tree, blob, normals, "VEC3")
    indices = _add_accessor(tree, blob, faces.astype(np.uint32).ravel(), "SCALAR")
    tree["meshes"].append({"name": name, "primitives": [{"attributes": attributes, "indices": indices}]})
    tree["nodes"].append(node)


def _add_accessor(tree: dict, blob: bytearray, values: np.ndarray, kind: str) -> int:
    target = VERTEX_DATA if kind == "VEC3" else INDICES
    view = {"buffer": 0, "byteOffset": len(blob), "byteLength": values.nbytes, "target": target}
    tree["bufferViews"].append(view)
    blob += values.tobytes()
    component = FLOAT if values.dtype == np.float32 else UINT32
    view_index = len(tree["bufferViews"]) - 1
    entry = {"bufferView": view_index, "componentType": component, "count": len(values), "type": kind}
    tree["accessors"].append(entry)
    return len(tree["accessors"]) - 1
