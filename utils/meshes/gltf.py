"""Read untrusted glTF and GLB files: every size is checked against the file before anything is allocated.

    with refusals(path, "the scene"):
        file = open_gltf(path)
        positions = file.array(3, "VEC3", FLOATS)

Used by `gltf_scene` and `cameras.gltf`. Buffers are memory views of the file: nothing is copied.
"""

import base64
import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from utils.cli import InputError

GLB_MAGIC, JSON_CHUNK, BIN_CHUNK = 0x46546C67, 0x4E4F534A, 0x004E4942
FLOAT = 5126
COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", FLOAT: "<f4"}  # numpy's names
FLOATS, FLOATS_OR_NORMALIZED, INDICES = (FLOAT,), (FLOAT, 5120, 5121, 5122, 5123), (5121, 5123, 5125)
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}
QUANTIZATION, MESHOPT = "KHR_mesh_quantization", ("EXT_meshopt_compression", "KHR_meshopt_compression")
MAX_TRIANGLES = 16_000_000  # in a whole scene, instances included; 4 million take about 3 GiB to load
MAX_BYTES = 36 * 3 * MAX_TRIANGLES  # limit for all accessors in use together
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error)


class Refused(ValueError):
    """A known problem of the file, named in the message."""


@contextmanager
def refusals(path: Path, what: str) -> Iterator[None]:
    """Turn every error of reading a broken file into InputError. what: its name in messages, such as 'the scene'."""
    try:
        yield
    except InputError:
        raise
    except Refused as error:
        raise InputError(f"{path}: {error}; export {what} again") from error
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(f"{path} is not a valid glTF file ({reason}); export {what} again") from error


@dataclass(frozen=True)
class BufferView:
    """A part of a buffer. stride: bytes from one element to the next; None where the file gives none."""

    data: memoryview
    stride: int | None


@dataclass
class GltfFile:
    """The JSON of a file, known only to be an object, and its binary chunk."""

    path: Path
    tree: dict
    chunk: memoryview | None
    claimed: int = 0  # total bytes of the accessors in use
    _arrays: dict[int, np.ndarray] = field(default_factory=dict)
    _views: dict[int, BufferView] = field(default_factory=dict)
    _buffers: dict[int, memoryview] = field(default_factory=dict)

    def scene(self) -> dict:
        """The default scene; without scenes, all nodes without a parent."""
        if self.tree.get("scenes"):
            scene = entry(self.tree, "scenes", self.tree.get("scene", 0))
            return {"nodes": [], **scene}
        nodes = self.tree.get("nodes", [])
        children = {child for node in nodes for child in node.get("children", [])}
        return {"nodes": [k for k in range(len(nodes)) if k not in children]}

    def world_up(self, scene: dict) -> str | None:
        """The extra `world_up` of the asset or the scene, unchecked; None if the file has none."""
        for owner in (self.tree["asset"], scene):
            extras = owner.get("extras")
            if isinstance(extras, dict) and "world_up" in extras:
                return str(extras["world_up"])
        return None

    def is_used(self, extension: str) -> bool:
        return extension in self.tree.get("extensionsUsed", [])

    def array(self, index: int, kind: str, types: tuple[int, ...]) -> np.ndarray:
        """The elements of an accessor, [count, width]: a read-only view of the file, of the stored type.

        Normalized integers become float64 in [-1, 1] where `types` has FLOAT. kind: such as 'VEC3'. types: allowed
        component types.
        """
        accessor = entry(self.tree, "accessors", index)
        component = accessor["componentType"]
        if accessor["type"] != kind or component not in types:
            raise Refused(
                f"accessor {index} is {str(accessor['type'])[:9]} of type {str(component)[:9]}, where {kind} of "
                f"{' or '.join(map(str, types))} is read (is it quantised?)"
            )
        if index not in self._arrays:
            self._arrays[index] = self._stored(index, accessor)
        values = self._arrays[index]
        if accessor.get("normalized") is True and component != FLOAT and FLOAT in types:
            return np.maximum(values.astype(np.float64) / np.iinfo(values.dtype).max, -1)
        return values

    def _stored(self, index: int, accessor: dict) -> np.ndarray:
        """The elements of an accessor of known type and component type: a view of its buffer view, unless sparse."""
        count = whole(accessor["count"], "count")
        dtype, width = np.dtype(COMPONENTS[accessor["componentType"]]), WIDTHS[accessor["type"]]
        # Accessors may overlap or be zero, but a small file must not claim much memory that way.
        self.claimed += count * width * dtype.itemsize
        if self.claimed > MAX_BYTES:
            raise Refused("its accessors ask for more memory than a scene may have")
        sparse = accessor.get("sparse")
        if "bufferView" in accessor:
            values = self._elements(index, accessor, count, dtype, width)
        elif sparse is None:
            raise Refused(f"accessor {index} has neither a buffer view nor sparse values")
        else:
            values = np.zeros((count, width), dtype)
        return values if sparse is None else self._overlaid(index, values, sparse)

    def _elements(self, index: int, where: dict, count: int, dtype: np.dtype, width: int) -> np.ndarray:
        """[count, width], a view of the buffer view that `where` names. index: of the accessor, for messages."""
        offset, size = whole(where.get("byteOffset", 0), "byteOffset"), width * dtype.itemsize
        view = self._view(where["bufferView"])
        stride = size if view.stride is None else view.stride
        if stride < size or offset + (count - 1) * stride + size > len(view.data):
            raise Refused(f"accessor {index} asks for {count} elements, more than its buffer view holds")
        return np.ndarray((count, width), dtype, view.data, offset, (stride, dtype.itemsize))

    def _overlaid(self, index: int, values: np.ndarray, sparse: dict) -> np.ndarray:
        """A copy of `values` [count, width] with the elements that the sparse accessor replaces."""
        count, component = whole(sparse["count"], "count"), sparse["indices"]["componentType"]
        if component not in INDICES or count > len(values):
            raise Refused(
                f"accessor {index} replaces {count} of {len(values)} elements, by indices of type {component}"
            )
        places = self._elements(index, sparse["indices"], count, np.dtype(COMPONENTS[component]), 1)[:, 0]
        if count and places.max() >= len(values):
            raise Refused(f"accessor {index} replaces element {places.max()} of {len(values)}")
        values = values.copy()
        values[places] = self._elements(index, sparse["values"], count, values.dtype, values.shape[1])
        return values

    def _view(self, index: int) -> BufferView:
        if index not in self._views:
            view = entry(self.tree, "bufferViews", index)
            packed = next((view["extensions"][name] for name in MESHOPT if name in view.get("extensions", {})), None)
            if packed is not None and not self._has_data(view["buffer"]):
                self._views[index] = self._unpack(index, packed)
                return self._views[index]
            start, length = whole(view.get("byteOffset", 0), "byteOffset"), whole(view["byteLength"], "byteLength")
            buffer = self._buffer(view["buffer"])
            if start + length > len(buffer):
                raise Refused(f"buffer view {index} reaches beyond buffer {view['buffer']}")
            stride = whole(view["byteStride"], "byteStride") if "byteStride" in view else None
            self._views[index] = BufferView(buffer[start : start + length], stride)
        return self._views[index]

    def _has_data(self, index: int) -> bool:
        """Whether a buffer has bytes; the fallback buffer of compressed data has none."""
        buffer = entry(self.tree, "buffers", index)
        fallback = any(buffer.get("extensions", {}).get(name, {}).get("fallback") for name in MESHOPT)
        return "uri" in buffer or (index == 0 and self.chunk is not None and not fallback)

    def _unpack(self, index: int, packed: dict) -> BufferView:
        """A buffer view that meshopt has compressed. packed: the extension's object."""
        try:
            import meshoptimizer
        except ImportError as error:
            raise Refused(
                f"buffer view {index} is compressed by meshopt: pip install meshoptimizer==0.2.30a0, or unpack it "
                f"with npx @gltf-transform/cli copy {self.path.name} unpacked.glb"
            ) from error
        start, length = whole(packed.get("byteOffset", 0), "byteOffset"), whole(packed["byteLength"], "byteLength")
        count, stride = whole(packed["count"], "count"), whole(packed["byteStride"], "byteStride")
        self.claimed += count * stride
        if self.claimed > MAX_BYTES:
            raise Refused("its buffer views ask for more memory than a scene may have")
        data = bytes(self._buffer(packed["buffer"])[start : start + length])
        mode, name = packed["mode"], packed.get("filter", "NONE")
        decode = {"ATTRIBUTES": "vertex_buffer", "TRIANGLES": "index_buffer", "INDICES": "index_sequence"}[mode]
        try:
            values = getattr(meshoptimizer, f"decode_{decode}")(count, stride, data)
        except RuntimeError as error:
            raise Refused(f"buffer view {index} is not what meshopt wrote ({error})") from error
        if name != "NONE":
            short = {"OCTAHEDRAL": "oct", "QUATERNION": "quat", "EXPONENTIAL": "exp"}[name]
            values = getattr(meshoptimizer, f"decode_filter_{short}")(values, count, stride)
        return BufferView(memoryview(np.ascontiguousarray(values)).cast("B")[: count * stride], stride)

    def bytes_of(self, view: int) -> bytes:
        """The contents of a buffer view."""
        return bytes(self._view(view).data)

    def _buffer(self, index: int) -> memoryview:
        if index not in self._buffers:
            buffer = entry(self.tree, "buffers", index)
            length, data = whole(buffer["byteLength"], "byteLength"), self._buffer_data(index, buffer.get("uri"))
            if length > len(data):
                raise Refused(f"buffer {index} promises {length} bytes, but there are {len(data)}")
            self._buffers[index] = data[:length]
        return self._buffers[index]

    def _buffer_data(self, index: int, uri: str | None) -> memoryview:
        if uri is None:
            if index or self.chunk is None:
                raise Refused(f"buffer {index} has no data")
            return self.chunk
        if uri.startswith("data:"):
            return memoryview(base64.b64decode(uri.partition(";base64,")[2], validate=True))
        path = self.inside(uri)
        try:
            if path.exists() and not path.is_file():
                raise Refused(f"its buffer {path} cannot be read (it is no file)")
            return memoryview(path.read_bytes())
        except FileNotFoundError as error:
            raise Refused(f"its buffer {path} is missing") from error
        except OSError as error:
            raise Refused(f"its buffer {str(path)[:200]} cannot be read ({error.strerror})") from error

    def inside(self, uri: str) -> Path:
        """The file a relative URI names. Refuses paths that, as written, leave the folder of the glTF file.

        Links are followed: whoever made them knows where they lead.
        """
        text = unquote(uri)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|[/\\]", text) or ".." in re.split(r"[/\\]", text):
            raise Refused(f"it refers to {text[:80]!r}, outside its own folder: put that file beside this one")
        return self.path.parent / text


def open_gltf(path: Path) -> GltfFile:
    """Split a .glb or .gltf file, parse its JSON and check its version. Call it inside `refusals`."""
    data = memoryview(path.read_bytes())
    binary = path.suffix.lower() == ".glb" or data[:4] == GLB_MAGIC.to_bytes(4, "little")
    text, chunk = _split_glb(data) if binary else (data, None)
    tree = json.loads(bytes(text).decode("utf-8-sig"))
    if not isinstance(tree, dict):
        raise Refused("its JSON is not an object")
    version = str(tree["asset"]["version"])
    if not version.startswith("2."):
        raise Refused(f"it is glTF version {version[:20]}, only 2 is read")
    return GltfFile(path, tree, chunk)


def _split_glb(data: memoryview) -> tuple[memoryview, memoryview | None]:
    """JSON and binary chunk of a GLB file."""
    if len(data) < 20 or struct.unpack_from("<I", data)[0] != GLB_MAGIC:
        raise Refused("it is not a GLB file")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise Refused(f"it is glTF version {version}, only 2 is read")
    if length > len(data):  # what follows the length is not part of the file
        raise Refused(f"its header promises {length} bytes, the file has {len(data)}")
    chunks, position = [], 12
    while position < length:
        if position + 8 > length:
            raise Refused(f"it ends inside a chunk header at byte {position}")
        size, kind = struct.unpack_from("<II", data, position)
        if position + 8 + size > length:
            raise Refused(f"its chunk at byte {position} promises {size} bytes, more than the file holds")
        chunks.append((kind, data[position + 8 : position + 8 + size]))
        position += 8 + size
    if chunks[0][0] != JSON_CHUNK:
        raise Refused("its first chunk is not JSON")
    return chunks[0][1], next((chunk for kind, chunk in chunks[1:] if kind == BIN_CHUNK), None)


def entry(tree: dict, key: str, index: object) -> dict:
    """tree[key][index], refused unless the index exists and the entry is a JSON object."""
    entries = tree.get(key, [])
    if not isinstance(entries, list) or whole(index, f"index into {key}") >= len(entries):
        raise Refused(f"it refers to {key}[{index}], which does not exist")
    if not isinstance(entries[index], dict):
        raise Refused(f"{key}[{index}] is not a JSON object")
    return entries[index]


def whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
        raise Refused(f"{what} is {str(value)[:30]}, not a whole number in range")
    return value
