"""Read the scene of an untrusted glTF or GLB file; `utils.gltf` checks every size against the file.

Reads the nodes of the default scene, their triangles, positions and normals. Ignores materials, images, cameras, skins
and animations: opens no other file but its buffers, and decodes no picture.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.gltf import FLOATS, INDICES, MAX_TRIANGLES, GltfFile, Refused, entry, open_gltf, refusals
from utils.scene.mesh import FAR, Part, make_part, place, unique_names

POINTS_AND_LINES, TRIANGLES, STRIP = (0, 1, 2, 3), 4, 5  # modes; 6 is a fan
UNSUPPORTED = {
    "KHR_draco_mesh_compression": "without compression",
    "EXT_meshopt_compression": "without compression",
    "KHR_meshopt_compression": "without compression",
    "EXT_mesh_gpu_instancing": "with instances as ordinary nodes",
}


def read_gltf(path: Path) -> tuple[list[Part], str | None]:
    """The parts of a .glb or .gltf file in its world, in the order of their nodes, and its `world_up`, unchecked.

    Raises InputError when the file is damaged, unsupported or too large.
    """
    with refusals(path, "the scene"):
        file = open_gltf(path)
        _refuse_unsupported(file)
        scene, meshes = file.scene(), _Meshes(file)
        found = [(node, parts) for node in _walk(file, scene["nodes"]) if (parts := meshes.parts(node.mesh))]
        found.sort(key=lambda item: item[0].index)
        names = unique_names([node.name for node, _ in found])
        placed = []  # only after all triangles have been counted
        for (node, parts), name in zip(found, names, strict=True):
            placed += [place(part, name, node.world) for part in parts]
        return placed, file.world_up(scene)


def _refuse_unsupported(file: GltfFile) -> None:
    """Refuse files that need unsupported extensions, or that refer to files outside their folder."""
    for name in [*file.tree.get("extensionsRequired", []), *file.tree.get("extensionsUsed", [])]:
        if name in UNSUPPORTED:
            raise Refused(f"it uses {name}, which is not read: export it {UNSUPPORTED[name]}")
    for image in file.tree.get("images", []):
        if "uri" in image and not image["uri"].startswith("data:"):
            file.inside(image["uri"])  # never opened, but must be inside the folder


# --- nodes ---


@dataclass(frozen=True)
class _Node:
    """A node with a mesh. index, mesh: indices in the file; world: float64 [4, 4] from the node to the world."""

    index: int
    name: str
    mesh: int
    world: np.ndarray


def _walk(file: GltfFile, roots: list[int]) -> Iterator[_Node]:
    """The nodes with a mesh, in no special order."""
    stack, seen = [(root, np.eye(4)) for root in roots], set()
    while stack:
        index, parent = stack.pop()
        node = entry(file.tree, "nodes", index)
        if index in seen:
            raise Refused(f"node {index} is reached twice: the nodes must form a tree")
        seen.add(index)
        world = parent @ _local_matrix(node)
        stack += [(child, world) for child in node.get("children", [])]
        if "mesh" in node:
            mesh = entry(file.tree, "meshes", node["mesh"])
            name = _text(node.get("name") or mesh.get("name") or f"object_{index:03d}")
            yield _Node(index, name, node["mesh"], world)


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


# --- meshes ---


@dataclass
class _Meshes:
    """Meshes in their own coordinates, each read once, and counts of the scene's vertices and triangles."""

    file: GltfFile
    vertices: int = 0  # of all primitives
    triangles: int = 0  # instances included
    read: dict[int, list[Part]] = field(default_factory=dict)

    def parts(self, index: int) -> list[Part]:
        """One part, without a name, for each primitive that has triangles. Each call counts as an instance."""
        if index in self.read:
            self._count(0, sum(len(part.faces) for part in self.read[index]))
        else:
            mesh = entry(self.file.tree, "meshes", index)
            parts = [self._part(primitive, mesh) for primitive in mesh["primitives"]]
            self.read[index] = [part for part in parts if part]
        return self.read[index]

    def _part(self, primitive: dict, mesh: dict) -> Part | None:
        attributes, mode = primitive["attributes"], primitive.get("mode", TRIANGLES)
        if mode in POINTS_AND_LINES or "POSITION" not in attributes:
            return None
        if mode not in (TRIANGLES, STRIP):
            raise Refused(f"mesh {_text(mesh.get('name', ''))!r} has triangle fans (mode {mode}): triangulate it")
        positions, normals = self.file.array(attributes["POSITION"], "VEC3", FLOATS), None
        if "NORMAL" in attributes:
            normals = self.file.array(attributes["NORMAL"], "VEC3", FLOATS)
            if len(normals) != len(positions):
                raise Refused(f"a mesh has {len(positions)} positions but {len(normals)} normals")
        corners = np.arange(len(positions))
        if "indices" in primitive:
            corners = self.file.array(primitive["indices"], "SCALAR", INDICES)[:, 0]
        faces = _triangles(corners, mode)
        self._count(len(positions), len(faces))
        return make_part(self.file.path, "", positions, faces, normals) if len(faces) else None

    def _count(self, vertices: int, triangles: int) -> None:
        """Refuse a scene that is too large, before allocating more memory for it."""
        self.vertices, self.triangles = self.vertices + vertices, self.triangles + triangles
        if self.vertices > 3 * MAX_TRIANGLES:
            raise Refused(f"its meshes have more than {3 * MAX_TRIANGLES:,} vertices: simplify it")
        if self.triangles > MAX_TRIANGLES:
            raise Refused(f"it has more than {MAX_TRIANGLES:,} triangles with its instances: simplify it")


def _triangles(corners: np.ndarray, mode: int) -> np.ndarray:
    """Faces [F, 3] from vertex indices [N], grouped as the primitive `mode` defines."""
    if mode == STRIP:
        faces = np.stack([corners[:-2], corners[1:-1], corners[2:]], axis=1)
        faces[1::2] = faces[1::2, ::-1]  # every other triangle runs backwards
        return faces
    if len(corners) % 3:
        raise Refused(f"a mesh has {len(corners)} triangle corners, not a multiple of 3")
    return corners.reshape(-1, 3)
