"""Reader of animated cameras in GLB and glTF files.

Frame n is sampled at t = n / fps, from 1 to the last key, which is how Blender numbers what it exports. The file
stores no image size: the path gets 720 rows and as many columns as the camera's aspect ratio asks for.
"""

import base64
import math
import struct
import warnings
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from pygltflib import GLTF2, Accessor, AnimationSampler, Node
from scipy.spatial.transform import Slerp

from utils.camera_files import to_number, to_numbers, unit_rotation
from utils.cameras import DEFAULT_SIZE, MAX_NUMBER, MAX_POSES, CameraPath, make_path
from utils.cli import InputError

MAGIC, JSON_CHUNK, BINARY_CHUNK = b"glTF", b"JSON", b"BIN\0"
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}
FLOAT = 5126
NORMALIZED = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2"}  # component types that may store rotations
PATHS = {"translation": (3, (0.0, 0.0, 0.0)), "rotation": (4, (0.0, 0.0, 0.0, 1.0)), "scale": (3, (1.0, 1.0, 1.0))}


def read_gltf(path: Path, up: str | None, fps: float) -> CameraPath:
    """Read the animated camera of a .glb or .gltf file; its world is Y-up unless `up` says otherwise."""
    try:
        return _read(path, up or "+y", fps)
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:
        # pygltflib checks no types: whatever is wrong in the JSON surfaces as one of many exceptions, here or there.
        raise InputError(
            f"{path} is not a valid glTF file ({type(error).__name__}: {error}); export it again"
        ) from error


def _read(path: Path, up: str, fps: float) -> CameraPath:
    file = _File(path)
    chain, channels = _animated_camera(file.gltf, path)
    samplers = {target: _sampler(file, sampler, target[1]) for target, sampler in channels.items()}
    duration = max(sampler[0][-1] for sampler in samplers.values())
    if not 0 < fps < MAX_NUMBER or duration * fps > MAX_POSES:
        raise InputError(f"{path}: {duration:g} s at {fps:g} frames per second are more than {MAX_POSES} frames")
    numbers = range(1, round(duration * fps) + 1)
    times = np.array(numbers, dtype=np.float64) / fps
    c2w = np.tile(np.eye(4), (len(times), 1, 1))
    for index in reversed(chain):  # from the root down to the camera
        c2w = c2w @ _local(file, index, samplers, times, fps)
    # A camera ignores the scale of its node, even an uneven one; shear and mirroring are left for make_path to find.
    lengths = np.linalg.norm(c2w[:, :3, :3], axis=1, keepdims=True)
    c2w[:, :3, :3] = np.divide(c2w[:, :3, :3], lengths, out=np.zeros_like(c2w[:, :3, :3]), where=lengths > 1e-12)
    size, focal = _lens(file, file.gltf.nodes[chain[0]].camera)
    center = np.tile([size[0] / 2, size[1] / 2], (len(times), 1))
    return make_path(path, c2w, np.full((len(times), 2), focal), center, size, up, numbers, fps)


class _File:
    """The JSON part of a file and its buffers; buffers are loaded when they are needed."""

    def __init__(self, path: Path) -> None:
        self.path, data = path, path.read_bytes()
        self.blob: bytes | None = None
        if path.suffix.lower() == ".glb":
            data, self.blob = _chunks(path, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.gltf: GLTF2 = GLTF2.from_json(data.decode("utf-8"), infer_missing=True)

    def item(self, name: str, index: object) -> object:
        """Element `index` of one of the file's lists."""
        return _item(getattr(self.gltf, name), index, f"{self.path}: {name}")

    def buffer(self, index: object) -> bytes:
        buffer = self.item("buffers", index)
        if buffer.uri is None:
            data = self.blob if index == 0 else None
        elif buffer.uri.startswith("data:"):
            data = base64.b64decode(buffer.uri.partition(",")[2], validate=True)
        else:
            data = self._external(buffer.uri)
        if data is None or _whole(buffer.byteLength) > len(data):
            raise InputError(f"{self.path}: buffer {index} is shorter than the file says; export it again")
        return data[: buffer.byteLength]

    def _external(self, uri: str) -> bytes:
        folder = self.path.parent.resolve()
        target = (folder / unquote(uri)).resolve()
        if ":" in uri or "\\" in uri or not target.is_relative_to(folder):
            raise InputError(f"{self.path}: buffer {uri!r} is outside the file's folder; put it beside the file")
        if not target.is_file():
            raise InputError(f"{self.path}: buffer {uri!r} is missing; put it beside the file")
        return target.read_bytes()

    def accessor(self, index: object, width: int) -> np.ndarray:
        """float64 [count, width]."""
        where = f"{self.path}: accessor {index}"
        accessor: Accessor = self.item("accessors", index)
        if accessor.sparse is not None or accessor.bufferView is None:
            raise InputError(f"{where} is sparse, which is not supported for animations; export dense keys")
        view = self.item("bufferViews", accessor.bufferView)
        if any("compression" in name for name in view.extensions or {}):
            raise InputError(f"{where} is compressed; export without mesh or animation compression")
        normalized = accessor.componentType in NORMALIZED and accessor.normalized and width == 4
        if WIDTHS.get(accessor.type) != width or not (normalized or accessor.componentType == FLOAT):
            raise InputError(f"{where} must hold {width} float(s) per key, but is {accessor.type}")
        kind = np.dtype(NORMALIZED[accessor.componentType] if normalized else "<f4")
        data, count = self.buffer(view.buffer), _whole(accessor.count)
        start, length = _whole(view.byteOffset or 0), _whole(view.byteLength)
        offset, row = _whole(accessor.byteOffset or 0), kind.itemsize * width
        stride = _whole(view.byteStride or row)
        last_byte = offset + stride * (count - 1) + row
        if count < 1 or stride < row or last_byte > length or start + length > len(data):
            raise InputError(f"{where} reaches beyond its buffer, or is empty; export the file again")
        values = np.ndarray((count, width), kind, data, start + offset, (stride, kind.itemsize)).astype(np.float64)
        if normalized:
            values = np.maximum(values / np.iinfo(kind).max, -1)
        if not (np.abs(values) <= MAX_NUMBER).all():
            raise InputError(f"{where} holds NaN, infinity or huge numbers")
        return values


def _chunks(path: Path, data: bytes) -> tuple[bytes, bytes | None]:
    """(JSON, binary or None) of a GLB; every length it states is checked against the file."""
    if len(data) < 20 or data[:4] != MAGIC:
        raise InputError(f"{path} is not a GLB file")
    version, total = struct.unpack_from("<II", data, 4)
    if version != 2 or total > len(data):
        raise InputError(f"{path} is glTF version {version} of {total} bytes, but has {len(data)}; export it again")
    chunks, at = {}, 12
    while at + 8 <= total:
        (length,) = struct.unpack_from("<I", data, at)
        kind = data[at + 4 : at + 8]
        if length > total - at - 8:
            raise InputError(f"{path}: a chunk of {length} bytes reaches beyond the end of the file; export it again")
        chunks.setdefault(kind, data[at + 8 : at + 8 + length])
        at += 8 + length
    if JSON_CHUNK not in chunks:
        raise InputError(f"{path} has no JSON chunk; export it again")
    return chunks[JSON_CHUNK], chunks.get(BINARY_CHUNK)


def _whole(value: object) -> int:
    """An int that is not negative; read_gltf turns the ValueError into a message."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a length or an offset")
    return value


def _item(items: list, index: object, name: str) -> object:
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(items):
        raise InputError(f"{name}[{index}] does not exist (there are {len(items)}); export the file again")
    return items[index]


# --- which camera, and what moves it ---

Channels = dict[tuple[int, str], AnimationSampler]


def _animated_camera(gltf: GLTF2, path: Path) -> tuple[list[int], Channels]:
    """The node indices from the only animated camera up to its root, and the samplers that move them."""
    cameras = [i for i, node in enumerate(gltf.nodes) if node.camera is not None]
    if not cameras:
        raise InputError(f"{path} holds no camera; export one with the scene, or use another camera file")
    chains, parents = {}, _parents(gltf, path)
    for camera in cameras:
        chain = [camera]
        while (parent := parents.get(chain[-1])) is not None:
            if parent in chain:
                raise InputError(f"{path}: node {parent} is its own ancestor; export the file again")
            chain.append(parent)
        if channels := _channels(gltf, chain, path):
            chains[camera] = chain, channels
    if not chains:
        raise InputError(f"{path}: its camera is not animated; export the animation, or use another camera file")
    if len(chains) > 1:
        names = ", ".join(str(gltf.nodes[i].name) for i in chains)
        raise InputError(f"{path} holds {len(chains)} animated cameras ({names}); export only one")
    return next(iter(chains.values()))


def _parents(gltf: GLTF2, path: Path) -> dict[int, int]:
    parents = {}
    for index, node in enumerate(gltf.nodes):
        for child in node.children or []:
            _item(gltf.nodes, child, f"{path}: nodes")
            if child in parents:
                raise InputError(f"{path}: node {child} has two parents; export the file again")
            parents[child] = index
    return parents


def _channels(gltf: GLTF2, chain: list[int], path: Path) -> Channels:
    """Samplers by (node, path). Exporters write one animation per object, so all of them count."""
    channels: Channels = {}
    for animation in gltf.animations:
        for channel in animation.channels:
            target = channel.target
            if target.path == "pointer" and "/cameras/" in str(target.extensions):
                raise InputError(f"{path}: animated lenses are not supported; use transforms.json with fl_x per frame")
            if target.node not in chain or target.path not in PATHS:
                continue
            key = (target.node, target.path)
            if key in channels:
                raise InputError(
                    f"{path}: two animations set the {target.path} of node {target.node}; export only one"
                )
            channels[key] = _item(animation.samplers, channel.sampler, f"{path}: samplers")
    return channels


def _lens(file: _File, index: object) -> tuple[tuple[int, int], float]:
    """(width, height) and focal length in pixels, which are square."""
    lens = file.item("cameras", index).perspective
    if lens is None:
        raise InputError(f"{file.path}: the camera is orthographic; only perspective cameras are supported")
    height = DEFAULT_SIZE[1]
    angle = to_number(lens.yfov, f"{file.path}: 'yfov'")
    aspect = DEFAULT_SIZE[0] / height if lens.aspectRatio is None else to_number(lens.aspectRatio, "'aspectRatio'")
    if not (0 < angle < math.pi and 0.01 < aspect < 100):
        raise InputError(f"{file.path}: a camera of yfov {angle:g} and aspect ratio {aspect:g} cannot be used")
    return (round(height * aspect), height), height / 2 / math.tan(angle / 2)


# --- animation ---


def _sampler(file: _File, sampler: AnimationSampler, target: str) -> tuple[np.ndarray, np.ndarray, str]:
    """(times [K], values [K, C] or, of a cubic spline, [K, 3, C]: in-tangent, value, out-tangent; interpolation)."""
    times, width = file.accessor(sampler.input, 1)[:, 0], PATHS[target][0]
    if times[0] < 0 or (np.diff(times) <= 0).any():
        raise InputError(f"{file.path}: the times of an animation must grow from key to key; export it again")
    values, mode = file.accessor(sampler.output, width), sampler.interpolation or "LINEAR"
    if mode not in ("STEP", "LINEAR", "CUBICSPLINE"):
        raise InputError(f"{file.path}: animation interpolation {mode!r} is not known")
    per_key = 3 if mode == "CUBICSPLINE" else 1
    if len(values) != per_key * len(times):
        raise InputError(f"{file.path}: an animation has {len(times)} times but {len(values)} values; export it again")
    return times, values.reshape(-1, 3, width) if per_key == 3 else values, mode


def _local(file: _File, index: int, samplers: dict, times: np.ndarray, fps: float) -> np.ndarray:
    """Node-to-parent matrices [P, 4, 4] at `times` [P]."""
    node: Node = file.gltf.nodes[index]
    where = f"{file.path}: node {index}"
    animated = {path: samplers[index, path] for path in PATHS if (index, path) in samplers}
    if node.matrix is not None:
        if animated:
            raise InputError(f"{where} has a matrix and an animation, which glTF forbids; export the file again")
        return np.tile(to_numbers(node.matrix, (16,), f"{where}: 'matrix'").reshape(4, 4).T, (len(times), 1, 1))
    values = {}
    for path, (width, default) in PATHS.items():
        if path in animated:
            values[path] = _sample(*animated[path], times, fps, path == "rotation", where)
        else:
            stored = getattr(node, path)
            rest = to_numbers(default if stored is None else stored, (width,), f"{where}: {path!r}")
            values[path] = np.tile(rest, (len(times), 1))
    local = np.tile(np.eye(4), (len(times), 1, 1))
    local[:, :3, :3] = unit_rotation(values["rotation"], where).as_matrix() * values["scale"][:, None]
    local[:, :3, 3] = values["translation"]
    return local


def _sample(
    keys: np.ndarray, values: np.ndarray, mode: str, times: np.ndarray, fps: float, rotation: bool, where: str
) -> np.ndarray:
    """Values [P, C] at `times` [P]; before the first and after the last key they stay. keys, values: as `_sampler`."""
    if len(keys) == 1:
        return np.tile(values[0, 1] if mode == "CUBICSPLINE" else values[0], (len(times), 1))
    times = np.clip(times, keys[0], keys[-1])
    if mode == "LINEAR":
        if rotation:
            return Slerp(keys, unit_rotation(values, where))(times).as_quat()
        return np.column_stack([np.interp(times, keys, column) for column in values.T])
    # Keys are float32: a frame that falls on one must not land just before it.
    now = np.searchsorted(keys, times + 1e-3 / fps, side="right") - 1
    if mode == "STEP":
        return values[now]
    now = np.minimum(now, len(keys) - 2)
    span = (keys[now + 1] - keys[now])[:, None]
    s = (times - keys[now])[:, None] / span
    _, start, leaving = values[now].transpose(1, 0, 2)
    arriving, end, _ = values[now + 1].transpose(1, 0, 2)
    # glTF 2.0, appendix C: a cubic Hermite segment with tangents per second.
    return (
        (2 * s**3 - 3 * s**2 + 1) * start
        + (s**3 - 2 * s**2 + s) * span * leaving
        + (3 * s**2 - 2 * s**3) * end
        + (s**3 - s**2) * span * arriving
    )
