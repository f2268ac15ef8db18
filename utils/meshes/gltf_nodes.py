"""The nodes of a glTF scene: which are visible, their world matrices, and the joints of skinned meshes.

Everything is taken at rest: as the nodes say, before any animation.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from utils.meshes.gltf import FLOATS, FLOATS_OR_NORMALIZED, GltfFile, Refused, entry, whole
from utils.meshes.mesh import FAR

INSTANCING, VISIBILITY = "EXT_mesh_gpu_instancing", "KHR_node_visibility"
MOST_INSTANCES = 1_000_000  # in a scene
POINTER = re.compile(r"/nodes/(\d+)/")  # of KHR_animation_pointer


@dataclass(frozen=True)
class Node:
    """A node with a mesh, or an instance of it.

    index, mesh, skin: indices in the file; world: float64 [4, 4] from the mesh to the world; weights: of the mesh's
    morph targets; moves: whether an animation moves it.
    """

    index: int
    name: str
    mesh: int
    world: np.ndarray
    skin: int | None
    weights: tuple[float, ...]
    moves: bool


def walk(file: GltfFile, roots: list[int]) -> Iterator[Node]:
    """The visible nodes with a mesh, in no special order; instances after each other."""
    joints, animated, instances = Joints(file), _animated(file), 0
    stack, seen = [(root, np.eye(4), False) for root in roots], set()
    while stack:
        index, parent, moves = stack.pop()
        node = entry(file.tree, "nodes", index)
        if index in seen:
            raise Refused(f"node {index} is reached twice: the nodes must form a tree")
        seen.add(index)
        if node.get("extensions", {}).get(VISIBILITY, {}).get("visible") is False:
            continue
        world, moves = parent @ local_matrix(node), moves or index in animated
        stack += [(child, world, moves) for child in node.get("children", [])]
        if "mesh" not in node:
            continue
        mesh, skin = entry(file.tree, "meshes", node["mesh"]), node.get("skin")
        name = text(node.get("name") or mesh.get("name") or f"object_{index:03d}")
        weights = tuple(float(weight) for weight in node.get("weights") or mesh.get("weights") or ())
        if skin is not None:  # the joints place it, wherever the node itself stands
            world, moves = np.eye(4), any(joints.is_moved(joint, animated) for joint in joints.of(skin))
        for matrix in _instances(file, node):
            instances += 1
            if instances > MOST_INSTANCES:
                raise Refused(f"it has more than {MOST_INSTANCES:,} instances: simplify it")
            yield Node(index, name, node["mesh"], world @ matrix, skin, weights, moves)


def _animated(file: GltfFile) -> set[int]:
    """Indices of the nodes that an animation changes."""
    targets = [channel["target"] for one in file.tree.get("animations", []) for channel in one.get("channels", [])]
    pointers = (POINTER.search(str(target["extensions"])) for target in targets if target.get("path") == "pointer")
    return {target["node"] for target in targets if "node" in target} | {int(found[1]) for found in pointers if found}


def _instances(file: GltfFile, node: dict) -> Iterator[np.ndarray]:
    """Matrices [4, 4] of the node's instances, to the node; the identity where it has none."""
    attributes = node.get("extensions", {}).get(INSTANCING, {}).get("attributes")
    if not attributes:
        yield np.eye(4)
        return
    wanted = {"TRANSLATION": ("VEC3", FLOATS), "ROTATION": ("VEC4", FLOATS_OR_NORMALIZED), "SCALE": ("VEC3", FLOATS)}
    arrays = {key: file.array(attributes[key], *wanted[key]) for key in wanted if key in attributes}
    counts = {len(array) for array in arrays.values()}
    if len(counts) > 1:
        raise Refused(f"its instances have {' and '.join(map(str, sorted(counts)))} places, turns or sizes")
    for k in range(min(counts, default=1)):
        yield local_matrix({key.lower(): array[k].tolist() for key, array in arrays.items()})


def local_matrix(node: dict) -> np.ndarray:
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


def text(value: object) -> str:
    """A name that can be printed and written: lone surrogates are legal in JSON, not in UTF-8."""
    return str(value).encode(errors="replace").decode()


# --- joints ---


@dataclass
class Joints:
    """The joints of a file's skins; any node may be one, also outside the scene."""

    file: GltfFile
    _parents: dict[int, int] | None = None
    _worlds: dict[int, np.ndarray] = field(default_factory=dict)

    def of(self, skin: int) -> list[int]:
        """Indices of the nodes that are the skin's joints."""
        return entry(self.file.tree, "skins", skin)["joints"]

    def matrices(self, skin: int) -> np.ndarray:
        """The matrix of each joint for vertices: its world matrix · its inverse bind matrix, float64 [J, 4, 4]."""
        joints, inverse = self.of(skin), entry(self.file.tree, "skins", skin).get("inverseBindMatrices")
        worlds = np.array([self._world(joint) for joint in joints]).reshape(-1, 4, 4)
        if inverse is None:
            return worlds
        binds = self.file.array(inverse, "MAT4", FLOATS).astype(np.float64).reshape(-1, 4, 4).transpose(0, 2, 1)
        if len(binds) < len(joints):
            raise Refused(f"skin {skin} has {len(joints)} joints but {len(binds)} inverse bind matrices")
        return worlds @ binds[: len(joints)]

    def is_moved(self, joint: int, animated: set[int]) -> bool:
        return any(index in animated for index in self._chain(joint))

    def _world(self, index: int) -> np.ndarray:
        if index not in self._worlds:
            world = np.eye(4)
            for ancestor in self._chain(index):
                world = local_matrix(entry(self.file.tree, "nodes", ancestor)) @ world
            self._worlds[index] = world
        return self._worlds[index]

    def _chain(self, index: int) -> list[int]:
        """The node and its ancestors."""
        if self._parents is None:
            nodes = self.file.tree.get("nodes", [])
            self._parents = {whole(c, "child"): k for k, node in enumerate(nodes) for c in node.get("children", [])}
        chain = [whole(index, "joint")]
        while (parent := self._parents.get(chain[-1])) is not None:
            if parent in chain:
                raise Refused(f"node {parent} is its own ancestor")
            chain.append(parent)
        return chain
