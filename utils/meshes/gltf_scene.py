"""Read the scene of an untrusted glTF or GLB file; `utils.meshes.gltf` checks every size against the file.

Reads the visible nodes of the default scene at rest, their triangles, positions and normals, with skins, morph targets
and instances. Ignores materials, images, cameras and animations: opens no other file but its buffers, and decodes no
picture.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.cli import InputError
from utils.meshes.gltf import (
    FLOAT,
    FLOATS,
    FLOATS_OR_NORMALIZED,
    INDICES,
    MAX_TRIANGLES,
    MESHOPT,
    QUANTIZATION,
    GltfFile,
    Refused,
    entry,
    open_gltf,
    refusals,
)
from utils.meshes.gltf_nodes import INSTANCING, VISIBILITY, Joints, text, walk
from utils.meshes.mesh import Part, make_part, place, unique_names

POINTS_AND_LINES, TRIANGLES, STRIP, FAN = (0, 1, 2, 3), 4, 5, 6  # modes
DRACO = "KHR_draco_mesh_compression"
READ = (QUANTIZATION, DRACO, *MESHOPT, INSTANCING, VISIBILITY)
SPLATS = "KHR_gaussian_splatting"
LOOKS = ("KHR_materials_", "KHR_texture_", "EXT_texture_", "KHR_lights_", "MSFT_texture_", "KHR_xmp")
WEIGHTS = (FLOAT, 5121, 5123)
LONGEST_LIST = 3  # names in a note


def read_gltf(path: Path) -> tuple[list[Part], str | None, list[str]]:
    """The parts of a .glb or .gltf file in its world, in the order of their nodes; its `world_up`, unchecked; notes.

    Raises InputError when the file is damaged, unsupported or too large.
    """
    with refusals(path, "the scene"):
        file = open_gltf(path)
        scene, meshes = file.scene(), _Meshes(file)
        nodes = walk(file, scene["nodes"])
        found = [(node, parts) for node in nodes if (parts := meshes.parts(node.mesh, node.weights, node.skin))]
        found.sort(key=lambda item: item[0].index)
        names = unique_names([node.name for node, _ in found])
        placed = []  # only after all triangles have been counted
        for (node, parts), name in zip(found, names, strict=True):
            placed += [place(part, name, node.world) for part in parts]
        if not placed and any(name.startswith(SPLATS) for name in file.tree.get("extensionsUsed", [])):
            raise InputError(f"{path} is Gaussian splats: make a mesh of it first, such as with SuGaR or 2DGS")
        moving = [name for (node, _), name in zip(found, names, strict=True) if node.moves]
        return placed, file.world_up(scene), _notes(file, moving)


def _notes(file: GltfFile, moving: list[str]) -> list[str]:
    notes = []
    if moving:
        more = f" and {len(moving) - LONGEST_LIST} more" if len(moving) > LONGEST_LIST else ""
        shown = ", ".join(moving[:LONGEST_LIST])
        notes.append(f"{file.path} animates {shown}{more}: what moves stays at its first pose, as the nodes say")
    unknown = [text(n) for n in file.tree.get("extensionsRequired", []) if n not in READ and not n.startswith(LOOKS)]
    if unknown:
        notes.append(f"{file.path} asks for {', '.join(unknown)}, which is not read: look whether the scene is whole")
    return notes


# --- meshes ---


@dataclass
class _Meshes:
    """Meshes in their own coordinates, each read once, and counts of the scene's vertices and triangles."""

    file: GltfFile
    vertices: int = 0  # of all primitives
    triangles: int = 0  # instances included
    read: dict[tuple, list[Part]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.joints = Joints(self.file)

    def parts(self, index: int, weights: tuple[float, ...], skin: int | None) -> list[Part]:
        """One part, without a name, for each primitive that has triangles. Each call counts as an instance."""
        key = index, weights, skin
        if key in self.read:
            self._count(0, sum(len(part.faces) for part in self.read[key]))
        else:
            mesh = entry(self.file.tree, "meshes", index)
            parts = [self._part(primitive, weights, skin) for primitive in mesh["primitives"]]
            self.read[key] = [part for part in parts if part]
        return self.read[key]

    def _part(self, primitive: dict, weights: tuple[float, ...], skin: int | None) -> Part | None:
        mode = primitive.get("mode", TRIANGLES)
        if mode in POINTS_AND_LINES or "POSITION" not in primitive["attributes"]:
            return None
        if mode not in (TRIANGLES, STRIP, FAN):
            raise Refused(f"a mesh has primitives of mode {str(mode)[:9]}, which glTF does not know")
        source = _open_primitive(self.file, primitive)
        positions, normals = (source.vectors(name) for name in ("POSITION", "NORMAL"))
        if normals is not None and len(normals) != len(positions):
            raise Refused(f"a mesh has {len(positions)} positions but {len(normals)} normals")
        faces = _triangles(source.corners(len(positions)), mode)
        self._count(len(positions), len(faces))
        for target, weight in zip(primitive.get("targets", []), weights, strict=False):
            positions = _morphed(self.file, positions, target.get("POSITION"), weight)
            normals = _morphed(self.file, normals, target.get("NORMAL"), weight)
        if skin is not None and "JOINTS_0" in primitive["attributes"]:
            matrices = _vertex_matrices(source, self.joints.matrices(skin), len(positions))
            mirrored = (np.linalg.det(matrices[:, :, :3]) < 0).mean() > 0.5
            faces = faces[:, ::-1] if mirrored else faces
            positions = np.einsum("vij,vj->vi", matrices[:, :, :3], positions) + matrices[:, :, 3]
            normals = None if normals is None else np.einsum("vij,vj->vi", matrices[:, :, :3], normals)
        return make_part(self.file.path, "", positions, faces, normals) if len(faces) else None

    def _count(self, vertices: int, triangles: int) -> None:
        """Refuse a scene that is too large, before allocating more memory for it."""
        self.vertices, self.triangles = self.vertices + vertices, self.triangles + triangles
        if self.vertices > 3 * MAX_TRIANGLES:
            raise Refused(f"its meshes have more than {3 * MAX_TRIANGLES:,} vertices: simplify it")
        if self.triangles > MAX_TRIANGLES:
            raise Refused(f"it has more than {MAX_TRIANGLES:,} triangles with its instances: simplify it")


@dataclass(frozen=True)
class _Primitive:
    """The attributes of a primitive by name, in its accessors or, for Draco, already decoded."""

    file: GltfFile
    attributes: dict[str, int]
    indices: int | None
    decoded: dict[str, np.ndarray] = field(default_factory=dict)

    def vectors(self, name: str) -> np.ndarray | None:
        """Positions or normals [V, 3], quantised ones as numbers; None if there are none."""
        return self.values(name, "VEC3", FLOATS_OR_NORMALIZED if self.file.is_used(QUANTIZATION) else FLOATS)

    def values(self, name: str, kind: str, types: tuple[int, ...]) -> np.ndarray | None:
        if name in self.decoded:
            return self.decoded[name]
        return self.file.array(self.attributes[name], kind, types) if name in self.attributes else None

    def corners(self, count: int) -> np.ndarray:
        """Indices of the vertices, [N]. count: of the vertices."""
        if "indices" in self.decoded:
            return self.decoded["indices"]
        if self.indices is None:
            return np.arange(count)
        return self.file.array(self.indices, "SCALAR", INDICES)[:, 0]


def _open_primitive(file: GltfFile, primitive: dict) -> _Primitive:
    source = _Primitive(file, primitive["attributes"], primitive.get("indices"))
    packed = primitive.get("extensions", {}).get(DRACO)
    plain = "bufferView" in entry(file.tree, "accessors", primitive["attributes"]["POSITION"])
    if packed is None or plain:
        return source
    try:
        import DracoPy
    except ImportError as error:
        raise Refused(
            "it is compressed by Draco: pip install DracoPy==2.2.0, or unpack it with npx @gltf-transform/cli copy "
            f"{file.path.name} unpacked.glb"
        ) from error
    try:
        mesh = DracoPy.decode(file.bytes_of(packed["bufferView"]))
    except Exception as error:  # DracoPy's own classes have no common base
        raise Refused(f"its Draco data cannot be decoded ({error})"[:200]) from error
    found = {one["unique_id"]: one["data"] for one in mesh.attributes}
    decoded = {name: found[number] for name, number in packed["attributes"].items()}
    return _Primitive(file, source.attributes, None, decoded | {"indices": np.asarray(mesh.faces, np.int64).ravel()})


def _morphed(file: GltfFile, values: np.ndarray | None, target: int | None, weight: float) -> np.ndarray | None:
    """Positions or normals [V, 3] moved by a share of a morph target."""
    if values is None or target is None or not weight:
        return values
    moves = file.array(target, "VEC3", FLOATS_OR_NORMALIZED if file.is_used(QUANTIZATION) else FLOATS)
    if len(moves) != len(values):
        raise Refused(f"a mesh has {len(values)} vertices but a morph target of {len(moves)}")
    return values.astype(np.float64) + weight * moves.astype(np.float64)


def _vertex_matrices(source: _Primitive, joints: np.ndarray, count: int) -> np.ndarray:
    """The skin's matrix for each of `count` vertices: float64 [V, 3, 4]. joints: float64 [J, 4, 4]."""
    matrices, total = np.zeros((count, 3, 4)), np.zeros(count)
    for k in range(len(source.attributes)):
        numbers = source.values(f"JOINTS_{k}", "VEC4", INDICES[:2])
        weights = source.values(f"WEIGHTS_{k}", "VEC4", WEIGHTS)
        if numbers is None or weights is None:
            break
        if not len(numbers) == len(weights) == count:
            raise Refused(f"a mesh has {count} vertices but {len(numbers)} joints and {len(weights)} weights")
        if numbers.max(initial=0) >= len(joints):
            raise Refused(f"a mesh hangs on joint {numbers.max()}, but its skin has {len(joints)}")
        for number, weight in zip(numbers.T, weights.T.astype(np.float64), strict=True):
            matrices += weight[:, None, None] * joints[number, :3]
            total += weight
    loose = total == 0  # such vertices go with the joint that is named first
    if loose.any():
        first = source.values("JOINTS_0", "VEC4", INDICES[:2])[loose, 0]
        matrices[loose], total[loose] = joints[first, :3], 1
    return matrices / total[:, None, None]


def _triangles(corners: np.ndarray, mode: int) -> np.ndarray:
    """Faces [F, 3] from vertex indices [N], grouped as the primitive `mode` defines."""
    if mode == STRIP:
        faces = np.stack([corners[:-2], corners[1:-1], corners[2:]], axis=1)
        faces[1::2] = faces[1::2, ::-1]  # every other triangle runs backwards
        return faces
    if mode == FAN:
        return np.stack([np.broadcast_to(corners[:1], max(len(corners) - 2, 0)), corners[1:-1], corners[2:]], axis=1)
    if len(corners) % 3:
        raise Refused(f"a mesh has {len(corners)} triangle corners, not a multiple of 3")
    return corners.reshape(-1, 3)
