"""Reads glTF and GLB files without trusting them: every size is checked against the file before anything is allocated.

`read_gltf` returns a new, minimal glTF tree: triangles, positions, normals and the nodes of the default scene, nothing
else. Materials, images, cameras, skins and animations are left out, so the loader behind it opens no other file and
decodes no picture. Buffers come as memory views of the file: nothing is copied.
"""

import base64
import json
import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from utils.cli import InputError

MAX_TRIANGLES = 16_000_000  # in the whole scene, instances included; 4 million take about 3 GiB to load
FAR = 1e15  # metres; beyond, float32 squares overflow
GLB_MAGIC, JSON_CHUNK, BIN_CHUNK = 0x46546C67, 0x4E4F534A, 0x004E4942
POINTS_AND_LINES, TRIANGLES, STRIP, FAN = (0, 1, 2, 3), 4, 5, 6
FLOAT, INDEX_BYTES = 5126, {5121: 1, 5123: 2, 5125: 4}
UNSUPPORTED = {
    "KHR_draco_mesh_compression": "without compression",
    "EXT_meshopt_compression": "without compression",
    "KHR_meshopt_compression": "without compression",
    "EXT_mesh_gpu_instancing": "with instances as ordinary nodes",
}
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error)


class _Refused(ValueError):
    """Something in the file that we can name."""


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
    data = memoryview(path.read_bytes())
    try:
        text, chunk = _split_glb(data) if path.suffix.lower() == ".glb" else (data, None)
        tree = json.loads(bytes(text).decode("utf-8-sig"))
        if not isinstance(tree, dict):
            raise _Refused("its JSON is not an object")
        return _Checker(path, tree, chunk).run()
    except _Refused as error:
        raise InputError(f"{path}: {error}; export the scene again") from error
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(f"{path} is not a valid glTF file ({reason}); export the scene again") from error


def _split_glb(data: memoryview) -> tuple[memoryview, memoryview | None]:
    """JSON and binary chunk of a GLB file."""
    if len(data) < 20 or struct.unpack_from("<I", data)[0] != GLB_MAGIC:
        raise _Refused("it is not a GLB file")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise _Refused(f"it is glTF version {version}, only 2 is read")
    if length != len(data):
        raise _Refused(f"its header promises {length} bytes, the file has {len(data)}")
    chunks, position = [], 12
    while position < length:
        if position + 8 > length:
            raise _Refused(f"it ends inside a chunk header at byte {position}")
        size, kind = struct.unpack_from("<II", data, position)
        if position + 8 + size > length:
            raise _Refused(f"its chunk at byte {position} promises {size} bytes, more than the file holds")
        chunks.append((kind, data[position + 8 : position + 8 + size]))
        position += 8 + size
    if chunks[0][0] != JSON_CHUNK:
        raise _Refused("its first chunk is not JSON")
    return chunks[0][1], next((chunk for kind, chunk in chunks[1:] if kind == BIN_CHUNK), None)


@dataclass
class _Checker:
    path: Path
    source: dict
    chunk: memoryview | None
    accessors: dict[int, int] = field(default_factory=dict)  # index in the file -> index in the reduced tree
    views: dict[int, int] = field(default_factory=dict)
    buffers: dict[int, int] = field(default_factory=dict)
    tree: dict = field(
        default_factory=lambda: {
            **{"asset": {"version": "2.0"}, "scene": 0, "buffers": [], "bufferViews": [], "accessors": []},
            **{"meshes": [], "nodes": [], "scenes": []},
        }
    )
    data: dict[str, memoryview] = field(default_factory=dict)
    claimed: int = 0  # bytes that the accessors and views in use ask for, all together
    vertices: int = 0

    def run(self) -> CheckedGltf:
        version = str(self.source["asset"]["version"])
        if not version.startswith("2."):
            raise _Refused(f"it is glTF version {version[:20]}, only 2 is read")
        for name in [*self.source.get("extensionsRequired", []), *self.source.get("extensionsUsed", [])]:
            if name in UNSUPPORTED:
                raise _Refused(f"it uses {name}, which is not read: export it {UNSUPPORTED[name]}")
        for image in self.source.get("images", []):
            if "uri" in image and not image["uri"].startswith("data:"):
                self._inside(image["uri"])  # never opened, but a scene that points elsewhere is refused
        scene = self._scene()
        names = self._nodes(scene["nodes"])
        self.tree["scenes"] = [{"nodes": list(range(len(self.tree["nodes"])))}]
        return CheckedGltf(self.tree, self.data, names, self._world_up(scene))

    def _scene(self) -> dict:
        """The default scene; without scenes, all nodes that are nobody's child."""
        if self.source.get("scenes"):
            scene = _get(self.source, "scenes", self.source.get("scene", 0))
            return {"nodes": [], **scene}
        nodes = self.source.get("nodes", [])
        children = {child for node in nodes for child in node.get("children", [])}
        return {"nodes": [k for k in range(len(nodes)) if k not in children]}

    def _world_up(self, scene: dict) -> str | None:
        for owner in (self.source["asset"], scene):
            extras = owner.get("extras")
            if isinstance(extras, dict) and "world_up" in extras:
                return str(extras["world_up"])
        return None

    def _nodes(self, roots: list[int]) -> dict[int, str]:
        """Put the nodes with a mesh into the reduced tree, in the world; returns {index: object name}."""
        meshes, names, seen, triangles = {}, {}, set(), 0
        stack = [(root, np.eye(4)) for root in reversed(roots)]
        while stack:
            index, parent = stack.pop()
            node = _get(self.source, "nodes", index)
            if index in seen:
                raise _Refused(f"node {index} is reached twice: the nodes must form a tree")
            seen.add(index)
            world = parent @ _local_matrix(node)
            stack += [(child, world) for child in reversed(node.get("children", []))]
            if "mesh" not in node:
                continue
            mesh = _get(self.source, "meshes", node["mesh"])
            if node["mesh"] not in meshes:
                meshes[node["mesh"]] = (len(self.tree["meshes"]), self._mesh(mesh))
            number, count = meshes[node["mesh"]]
            triangles += count
            if triangles > MAX_TRIANGLES:
                raise _Refused(f"it has more than {MAX_TRIANGLES:,} triangles with its instances: simplify it")
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
                raise _Refused(f"mesh {_text(mesh.get('name', ''))!r} has triangle fans (mode {mode}): triangulate it")
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
                raise _Refused(f"a mesh has {vertices} positions but {normals} normals")
        corners = vertices
        if "indices" in primitive:
            kept["indices"], corners = self._accessor(primitive["indices"], "SCALAR", INDEX_BYTES)
        if mode == TRIANGLES and corners % 3:
            raise _Refused(f"a mesh has {corners} triangle corners, not a multiple of 3")
        self.vertices += vertices
        if self.vertices > 3 * MAX_TRIANGLES:
            raise _Refused(f"its meshes have more than {3 * MAX_TRIANGLES:,} vertices: simplify it")
        return kept, corners // 3 if mode == TRIANGLES else max(0, corners - 2)

    def _accessor(self, index: int, kind: str, sizes: dict[int, int]) -> tuple[int, int]:
        """Check an accessor and what it stands on; returns its index in the reduced tree and its count."""
        accessor = _get(self.source, "accessors", index)
        count, component = _whole(accessor["count"], "count"), accessor["componentType"]
        if accessor["type"] != kind or component not in sizes:
            raise _Refused(
                f"accessor {index} is {str(accessor['type'])[:9]} of type {str(component)[:9]}, "
                "which is not read here (are positions or normals quantised?)"
            )
        if "sparse" in accessor or "bufferView" not in accessor:
            raise _Refused(f"accessor {index} is sparse or has no buffer view, which is not read")
        if index in self.accessors:
            return self.accessors[index], count
        view_index = accessor["bufferView"]
        view = _get(self.source, "bufferViews", view_index)
        offset = _whole(accessor.get("byteOffset", 0), "byteOffset")
        size = sizes[component] * (3 if kind == "VEC3" else 1)
        stride = _whole(view.get("byteStride", size), "byteStride")
        if stride < size or offset + (count - 1) * stride + size > _whole(view["byteLength"], "byteLength"):
            raise _Refused(f"accessor {index} asks for {count} elements, more than its buffer view holds")
        self._claim(count * size)
        self.accessors[index] = len(self.tree["accessors"])
        self.tree["accessors"].append(
            {
                **{"bufferView": self._view(view_index, view), "byteOffset": offset, "componentType": component},
                **{"count": count, "type": kind},
            }
        )
        return self.accessors[index], count

    def _view(self, index: int, view: dict) -> int:
        if index not in self.views:
            buffer_index = view["buffer"]
            buffer = self._buffer(buffer_index)
            start, length = _whole(view.get("byteOffset", 0), "byteOffset"), _whole(view["byteLength"], "byteLength")
            if start + length > len(self.data[str(buffer)]):
                raise _Refused(f"buffer view {index} reaches beyond buffer {buffer_index}")
            self.views[index] = len(self.tree["bufferViews"])
            kept = {"buffer": buffer, "byteOffset": start, "byteLength": length}
            if "byteStride" in view:
                kept["byteStride"] = view["byteStride"]
            self.tree["bufferViews"].append(kept)
        return self.views[index]

    def _buffer(self, index: int) -> int:
        if index not in self.buffers:
            buffer = _get(self.source, "buffers", index)
            length = _whole(buffer["byteLength"], "byteLength")
            data = self._buffer_data(index, buffer.get("uri"))
            if length > len(data):
                raise _Refused(f"buffer {index} promises {length} bytes, but there are {len(data)}")
            self.buffers[index] = kept = len(self.tree["buffers"])
            self.data[str(kept)] = data[:length]
            self.tree["buffers"].append({"uri": str(kept), "byteLength": length})
        return self.buffers[index]

    def _buffer_data(self, index: int, uri: str | None) -> memoryview:
        if uri is None:
            if index or self.chunk is None:
                raise _Refused(f"buffer {index} has no data")
            return self.chunk
        if uri.startswith("data:"):
            return memoryview(base64.b64decode(uri.partition(";base64,")[2], validate=True))
        path = self._inside(uri)
        if not path.is_file():
            raise _Refused(f"its buffer {path} is missing")
        return memoryview(path.read_bytes())

    def _inside(self, uri: str) -> Path:
        """The file a relative URI names. Refuses everything that leaves the folder of the scene."""
        text, folder = unquote(uri), self.path.parent.resolve()
        plain = not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|[/\\]", text) and ".." not in re.split(r"[/\\]", text)
        if not plain or not (folder / text).resolve().is_relative_to(folder):
            raise _Refused(f"it refers to {text[:80]!r}, outside its own folder: put that file beside the scene")
        return folder / text

    def _claim(self, size: int) -> None:
        """Accessors may overlap, but not so often that a small file asks for a large memory."""
        self.claimed += size
        if self.claimed > 36 * 3 * MAX_TRIANGLES:
            raise _Refused("its accessors ask for more memory than a scene may have")


def _get(tree: dict, key: str, index: int) -> dict:
    """tree[key][index], refused unless the index exists and the entry is a JSON object."""
    entries = tree.get(key, [])
    if not isinstance(entries, list) or _whole(index, f"index into {key}") >= len(entries):
        raise _Refused(f"it refers to {key}[{index}], which does not exist")
    if not isinstance(entries[index], dict):
        raise _Refused(f"{key}[{index}] is not a JSON object")
    return entries[index]


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise _Refused(f"{what} is {str(value)[:30]}, not a whole number in range")
    return value


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
        raise _Refused(f"a node's {what} is not {size} finite numbers")
    return numbers


def _text(value: object) -> str:
    """A name that can be printed and written: lone surrogates are legal in JSON, not in UTF-8."""
    return str(value).encode(errors="replace").decode()
