"""Helpers that the tests of geometry share."""

import json
import struct
from pathlib import Path

import numpy as np

from utils.meshes.mesh import Geometry

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32)


CUBE_FACES = np.array(
    [
        *([0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1]),
        *([2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]),
    ]
)  # counter-clockwise seen from outside


def gltf_tree(vertices: np.ndarray, faces: np.ndarray, nodes: list[dict], normals=None) -> tuple[dict, bytes]:
    """A glTF tree with one mesh and these nodes; nodes without a parent are the scene's roots."""
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
    """A scene made of separate triangles [F, 3, 3]."""
    count = len(triangles)
    faces, zeros = np.arange(3 * count).reshape(-1, 3), np.zeros(count, np.int32)
    return Geometry(
        np.reshape(triangles, (-1, 3)), faces, zeros, ("soup",), zeros, np.zeros(count, bool), None, "+z", {}
    )


def corners(geometry: Geometry) -> np.ndarray:
    return geometry.vertices[geometry.faces]
