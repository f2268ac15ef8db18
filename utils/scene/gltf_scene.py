"""Reads the scene of a glTF or GLB file without trusting it; `utils.gltf` checks every size against the file.

`read_gltf` returns a new, minimal glTF tree: triangles, positions, normals and the nodes of the default scene, nothing
else. Materials, images, cameras, skins and animations are left out, so the loader behind it opens no other file and
decodes no picture. Buffers come as memory views of the file: nothing is copied.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.gltf import (
    FLOAT,
    MAX_TRIANGLES,
    GltfFile,
    Refused,
    entry,
    open_gltf,
    refusals,
)

FAR = 1e15  # metres; beyond, float32 squares overflow
POINTS_AND_LINES, TRIANGLES, STRIP, FAN = (0, 1, 2, 3), 4, 5, 6
INDEX_BYTES = {5121: 1, 5123: 2, 5125: 4}
UNSUPPORTED = {
    "KHR_draco_mesh_compression": "without compression",
    "EXT_meshopt_compression": "without compression",
    "KHR_meshopt_compression": "without compression",
    "EXT_mesh_gpu_instancing": "with instances as ordinary nodes",
}


@dataclass
class CheckedGltf:
    """What is left of a glTF file after the checks.

    Only nodes with a mesh are left, without parents: `matrix` takes them to the world. Each is named by its index in
    the file, a mesh "m<number>"; `names` gives a node's name in the file. `world_up` is the extra of that name on the
    asset or the scene, None where the file has none.
    """

    tree: dict
    buffers: dict[str, memoryview]
    names: dict[int, str]
    world_up: str | None


def read_gltf(path: Path) -> CheckedGltf:
    """Read and check a .glb or .gltf file. Raises InputError when anything in it cannot be relied on."""
    with refusals(path, "the scene"):
        return _Checker(open_gltf(path)).run()


def _empty_tree() -> dict:
    lists = ("buffers", "bufferViews", "accessors", "meshes", "nodes", "scenes")
    return {"asset": {"version": "2.0"}, "scene": 0, **{name: [] for name in lists}}


@dataclass
class _Checker:
    file: GltfFile
    accessors: dict[int, int] = field(default_factory=dict)  # index in the file -> index in the reduced tree
    views: dict[int, int] = field(default_factory=dict)
    buffers: dict[int, int] = field(default_factory=dict)
    tree: dict = field(default_factory=_empty_tree)
    data: dict[str, memoryview] = field(default_factory=dict)
    vertices: int = 0

    def run(self) -> CheckedGltf:
        source = self.file.tree
        for name in [*source.get("extensionsRequired", []), *source.get("extensionsUsed", [])]:
            if name in UNSUPPORTED:
                raise Refused(f"it uses {name}, which is not read: export it {UNSUPPORTED[name]}")
        for image in source.get("images", []):
            if "uri" in image and not image["uri"].startswith("data:"):
                self.file.inside(image["uri"])  # never opened, but a scene that points elsewhere is refused
        scene = self.file.scene()
        names = self._nodes(scene["nodes"])
        self.tree["scenes"] = [{"nodes": list(range(len(self.tree["nodes"])))}]
        return CheckedGltf(self.tree, self.data, names, self.file.world_up(scene))

    def _nodes(self, roots: list[int]) -> dict[int, str]:
        """Put the nodes with a mesh into the reduced tree, in the world; returns {index: object name}."""
        meshes, names, seen, triangles = {}, {}, set(), 0
        stack = [(root, np.eye(4)) for root in reversed(roots)]
        while stack:
            index, parent = stack.pop()
            node = entry(self.file.tree, "nodes", index)
            if index in seen:
                raise Refused(f"node {index} is reached twice: the nodes must form a tree")
            seen.add(index)
            world = parent @ _local_matrix(node)
            stack += [(child, world) for child in reversed(node.get("children", []))]
            if "mesh" not in node:
                continue
            mesh = entry(self.file.tree, "meshes", node["mesh"])
            if node["mesh"] not in meshes:
                meshes[node["mesh"]] = (len(self.tree["meshes"]), self._mesh(mesh))
            number, count = meshes[node["mesh"]]
            triangles += count
            if triangles > MAX_TRIANGLES:
                raise Refused(f"it has more than {MAX_TRIANGLES:,} triangles with its instances: simplify it")
            self.tree["nodes"].append({"name": str(index), "mesh": number, "matrix": world.T.ravel().tolist()})
            names[index] = _text(node.get("name") or mesh.get("name") or f"object_{index:03d}")
        return names

    def _mesh(self, mesh: dict) -> int:
        """Copy a mesh into the reduced tree; returns its number of triangles."""
        primitives, triangles = [], 0
        for primitive in mesh["primitives"]:
            mode = primitive.get("mode", TRIANGLES)
            if mode in POINTS_AND_LINES or "POSITION" not in primitive["attributes"]:
                continue
            if mode not in (TRIANGLES, STRIP):
                raise Refused(f"mesh {_text(mesh.get('name', ''))!r} has triangle fans (mode {mode}): triangulate it")
            kept, count = self._primitive(primitive, mode)
            if count:
                primitives.append(kept)
                triangles += count
        self.tree["meshes"].append({"name": f"m{len(self.tree['meshes'])}", "primitives": primitives})
        return triangles

    def _primitive(self, primitive: dict, mode: int) -> tuple[dict, int]:
        attributes = primitive["attributes"]
        position, vertices = self._accessor(attributes["POSITION"], "VEC3", {FLOAT: 4})
        kept = {"attributes": {"POSITION": position}, "mode": mode}
        if "NORMAL" in attributes:
            kept["attributes"]["NORMAL"], normals = self._accessor(attributes["NORMAL"], "VEC3", {FLOAT: 4})
            if normals != vertices:
                raise Refused(f"a mesh has {vertices} positions but {normals} normals")
        corners = vertices
        if "indices" in primitive:
            kept["indices"], corners = self._accessor(primitive["indices"], "SCALAR", INDEX_BYTES)
        if mode == TRIANGLES and corners % 3:
            raise Refused(f"a mesh has {corners} triangle corners, not a multiple of 3")
        self.vertices += vertices
        if self.vertices > 3 * MAX_TRIANGLES:
            raise Refused(f"its meshes have more than {3 * MAX_TRIANGLES:,} vertices: simplify it")
        return kept, corners // 3 if mode == TRIANGLES else max(0, corners - 2)

    def _accessor(self, index: int, kind: str, sizes: dict[int, int]) -> tuple[int, int]:
        """Copy an accessor into the reduced tree; returns its index there and its count."""
        checked = self.file.accessor(index, kind, sizes)
        if index not in self.accessors:
            self.accessors[index] = len(self.tree["accessors"])
            self.tree["accessors"].append(
                {
                    "bufferView": self._view(checked.view),
                    "byteOffset": checked.offset,
                    "componentType": checked.component,
                    "count": checked.count,
                    "type": kind,
                }
            )
        return self.accessors[index], checked.count

    def _view(self, index: int) -> int:
        if index not in self.views:
            view = self.file.view(index)
            self.views[index] = len(self.tree["bufferViews"])
            kept = {"buffer": self._buffer(view.buffer), "byteOffset": view.start, "byteLength": view.length}
            if view.stride is not None:
                kept["byteStride"] = view.stride
            self.tree["bufferViews"].append(kept)
        return self.views[index]

    def _buffer(self, index: int) -> int:
        if index not in self.buffers:
            self.buffers[index] = kept = len(self.tree["buffers"])
            self.data[str(kept)] = self.file.buffer(index)
            self.tree["buffers"].append({"uri": str(kept), "byteLength": len(self.data[str(kept)])})
        return self.buffers[index]


def _local_matrix(node: dict) -> np.ndarray:
    """float64 [4, 4] to the node's parent: its matrix (stored by columns), or translation · rotation · scale."""
    if "matrix" in node:
        return _numbers(node["matrix"], 16, "matrix").reshape(4, 4).T
    matrix = np.eye(4)
    x, y, z, w = _numbers(node.get("rotation", (0, 0, 0, 1)), 4, "rotation")
    if norm := math.hypot(x, y, z, w):
        x, y, z, w = x / norm, y / norm, z / norm, w / norm
        matrix[0, :3] = 1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)
        matrix[1, :3] = 2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)
        matrix[2, :3] = 2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
    matrix[:3, :3] *= _numbers(node.get("scale", (1, 1, 1)), 3, "scale")
    matrix[:3, 3] = _numbers(node.get("translation", (0, 0, 0)), 3, "translation")
    return matrix


def _numbers(values: object, size: int, what: str) -> np.ndarray:
    numbers = np.array([float(value) for value in values])
    if len(numbers) != size or not (np.abs(numbers) < FAR).all():
        raise Refused(f"a node's {what} is not {size} finite numbers")
    return numbers


def _text(value: object) -> str:
    """A name that can be printed and written: lone surrogates are legal in JSON, not in UTF-8."""
    return str(value).encode(errors="replace").decode()
