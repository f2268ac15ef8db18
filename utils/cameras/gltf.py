"""Reader of animated cameras in GLB and glTF files.

Frame n is sampled at t = n / fps, from the first key to the last, as Blender's exporter numbers frames. The file
stores no image size: images are 720 pixels high, and as wide as the camera's aspect ratio asks for.
"""

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Slerp

from utils.cameras.path import DEFAULT_SIZE, MAX_NUMBER, MAX_POSES, CameraPath, make_path
from utils.cameras.values import Given, required, to_number, to_numbers, unit_rotation, world_up
from utils.cli import InputError
from utils.layout import ARC_FRAMES
from utils.meshes.gltf import FLOATS, FLOATS_OR_NORMALIZED, GltfFile, Refused, entry, open_gltf, refusals

PATHS = {
    "translation": ("VEC3", (0.0, 0.0, 0.0)),
    "rotation": ("VEC4", (0.0, 0.0, 0.0, 1.0)),
    "scale": ("VEC3", (1.0, 1.0, 1.0)),
}


def read_gltf_camera(path: Path, given: Given) -> CameraPath:
    """Read the animated camera of a .glb or .gltf file; the only camera, if it stands still, for one arc.

    Its world is Y-up unless `world_up` (an extra of the asset or the scene) or `up` says otherwise; both must agree.
    """
    if given.axes == "opencv":
        raise InputError(f"{path}: cameras in glTF have OpenGL axes by definition; drop --camera_axes")
    with refusals(path, "the camera"):
        return _read(open_gltf(path), given)


def _read(file: GltfFile, given: Given) -> CameraPath:
    path, fps = file.path, given.fps
    chain, channels = _animated_camera(file)
    up = world_up({"world_up": file.world_up(file.scene())}, given.up, path, "+y")
    keys = cache(partial(_keys, file))  # samplers share accessors: decode each only once
    samplers = {target: _sampler(keys, sampler, target[1]) for target, sampler in channels.items()}
    if samplers:
        numbers = _frame_numbers(path, [sampler[0] for sampler in samplers.values()], fps)
    else:
        print(f"warning: the camera of {path} is not animated: all frames are alike", file=sys.stderr)
        numbers = range(1, ARC_FRAMES + 1)
    times = np.array(numbers, dtype=np.float64) / fps
    c2w = np.tile(np.eye(4), (len(times), 1, 1))
    for index in reversed(chain):  # from the root down to the camera
        c2w = c2w @ _local(file, index, samplers, times, fps)
    # A camera ignores the scale of its node, even an uneven one; make_path refuses shear and mirroring.
    lengths = np.linalg.norm(c2w[:, :3, :3], axis=1, keepdims=True)
    c2w[:, :3, :3] = np.divide(c2w[:, :3, :3], lengths, out=np.zeros_like(c2w[:, :3, :3]), where=lengths > 1e-12)
    size, focal = _lens(file, file.tree["nodes"][chain[0]]["camera"], given.size)
    center = np.tile([size[0] / 2, size[1] / 2], (len(times), 1))
    return make_path(path, c2w, np.full((len(times), 2), focal), center, size, up, numbers, fps)


def _frame_numbers(path: Path, keys: list[np.ndarray], fps: float) -> range:
    """The frames from the first of all keys to the last. keys: seconds, increasing, of each sampler."""
    first, last = min(times[0] for times in keys), max(times[-1] for times in keys)
    if not 0 < fps < MAX_NUMBER or last * fps > MAX_POSES:
        raise InputError(f"{path}: {last:g} s at {fps:g} frames per second are more than {MAX_POSES} frames")
    return range(math.ceil(first * fps - _slack(first * fps)), round(last * fps) + 1)


def _slack(frames: np.ndarray) -> np.ndarray:
    """Tolerance in frames for a key to count as lying on a frame: times are stored as float32 seconds."""
    return 1e-3 + 1e-7 * frames


def _keys(file: GltfFile, index: object, kind: str) -> np.ndarray:
    """The values of an accessor of an animation: float64 [count, width]. kind: 'SCALAR', 'VEC3' or 'VEC4'."""
    values = file.array(index, kind, FLOATS_OR_NORMALIZED if kind == "VEC4" else FLOATS)
    if values.dtype.kind != "f":
        raise Refused(f"accessor {index} holds integers that are not normalized, which no rotation is")
    if not len(values):
        raise Refused(f"accessor {index} is empty")
    values = values.astype(np.float64)
    if not (np.abs(values) <= MAX_NUMBER).all():
        raise Refused(f"accessor {index} holds NaN, infinity or huge numbers")
    return values


# --- which camera, and what moves it ---

Channels = dict[tuple[int, str], dict]


def _animated_camera(file: GltfFile) -> tuple[list[int], Channels]:
    """The node indices from the only animated camera up to its root, and the samplers that move them.

    A single camera that nothing moves has no samplers.
    """
    path, nodes = file.path, file.tree.get("nodes", [])
    cameras = [i for i in range(len(nodes)) if entry(file.tree, "nodes", i).get("camera") is not None]
    if not cameras:
        raise InputError(f"{path} holds no camera; export one with the scene, or use another camera file")
    chains, still, parents = {}, [], _parents(file)
    for camera in cameras:
        chain = [camera]
        while (parent := parents.get(chain[-1])) is not None:
            if parent in chain:
                raise Refused(f"node {parent} is its own ancestor")
            chain.append(parent)
        if channels := _channels(file, chain):
            chains[camera] = chain, channels
        else:
            still.append(chain)
    if not chains and len(still) == 1:
        return still[0], {}
    if not chains:
        names = ", ".join(str(nodes[chain[0]].get("name")) for chain in still)
        raise InputError(f"{path} holds {len(still)} cameras ({names}), none of them animated; export only one")
    if len(chains) > 1:
        names = ", ".join(str(nodes[i].get("name")) for i in chains)
        raise InputError(f"{path} holds {len(chains)} animated cameras ({names}); export only one")
    return next(iter(chains.values()))


def _parents(file: GltfFile) -> dict[int, int]:
    parents = {}
    for index, node in enumerate(file.tree["nodes"]):
        for child in node.get("children") or []:
            entry(file.tree, "nodes", child)
            if child in parents:
                raise Refused(f"node {child} has two parents")
            parents[child] = index
    return parents


def _channels(file: GltfFile, chain: list[int]) -> Channels:
    """Samplers by (node, path). Exporters write one animation per object, so all of them count."""
    channels: Channels = {}
    for animation in file.tree.get("animations", []):
        for channel in animation["channels"]:
            target = channel["target"]
            node, name = target.get("node"), target.get("path")
            if name == "pointer" and "/cameras/" in str(target.get("extensions")):
                raise InputError(
                    f"{file.path}: animated lenses are not supported; use transforms.json with fl_x per frame"
                )
            if node not in chain or name not in PATHS:
                continue
            if (node, name) in channels:
                raise InputError(f"{file.path}: two animations set the {name} of node {node}; export only one")
            channels[node, name] = entry(animation, "samplers", channel["sampler"])
    return channels


def _lens(file: GltfFile, index: object, size: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """(width, height) and focal length in pixels; pixels are square. size: has the aspect of lenses without one."""
    camera = entry(file.tree, "cameras", index)
    if camera.get("type") == "orthographic":
        raise InputError(f"{file.path}: the camera is orthographic; only perspective cameras are supported")
    lens, height = camera.get("perspective"), DEFAULT_SIZE[1]
    if not isinstance(lens, dict):
        raise InputError(f"{file.path}: the camera has no lens ('perspective'); export the camera again")
    angle = to_number(required(lens, "yfov", f"{file.path}: camera {index}"), f"{file.path}: 'yfov'")
    aspect = to_number(lens.get("aspectRatio", size[0] / size[1]), f"{file.path}: 'aspectRatio'")
    if not (0 < angle < math.pi and 0.01 < aspect < 100):
        raise InputError(f"{file.path}: a camera of yfov {angle:g} and aspect ratio {aspect:g} cannot be used")
    return (round(height * aspect), height), height / 2 / math.tan(angle / 2)


# --- animation ---


def _sampler(keys: Callable, sampler: dict, target: str) -> tuple[np.ndarray, np.ndarray, str]:
    """(times [K], values [K, C] or, for cubic splines, [K, 3, C]: in-tangent, value, out-tangent; interpolation)."""
    times = keys(sampler["input"], "SCALAR")[:, 0]
    if times[0] < 0 or (np.diff(times) <= 0).any():
        raise Refused("the times of an animation must grow from key to key")
    values, mode = keys(sampler["output"], PATHS[target][0]), sampler.get("interpolation", "LINEAR")
    if mode not in ("STEP", "LINEAR", "CUBICSPLINE"):
        raise Refused(f"animation interpolation {str(mode)[:20]!r} is not known")
    per_key = 3 if mode == "CUBICSPLINE" else 1
    if len(values) != per_key * len(times):
        raise Refused(f"an animation has {len(times)} times but {len(values)} values")
    return times, values.reshape(len(times), 3, -1) if per_key == 3 else values, mode


def _local(file: GltfFile, index: int, samplers: dict, times: np.ndarray, fps: float) -> np.ndarray:
    """Node-to-parent matrices [P, 4, 4] at `times` [P]."""
    node = file.tree["nodes"][index]
    where = f"{file.path}: node {index}"
    animated = {path: samplers[index, path] for path in PATHS if (index, path) in samplers}
    if "matrix" in node:
        if animated:
            raise Refused(f"node {index} has a matrix and an animation, which glTF forbids")
        return np.tile(to_numbers(node["matrix"], (16,), f"{where}: 'matrix'").reshape(4, 4).T, (len(times), 1, 1))
    values = {}
    for path, (_, default) in PATHS.items():
        if path in animated:
            values[path] = _sample(*animated[path], times, fps, path == "rotation", where)
        else:
            rest = to_numbers(node.get(path, default), (len(default),), f"{where}: {path!r}")
            values[path] = np.tile(rest, (len(times), 1))
    local = np.tile(np.eye(4), (len(times), 1, 1))
    local[:, :3, :3] = unit_rotation(values["rotation"], where).as_matrix() * values["scale"][:, None]
    local[:, :3, 3] = values["translation"]
    return local


def _sample(
    keys: np.ndarray, values: np.ndarray, mode: str, times: np.ndarray, fps: float, rotation: bool, where: str
) -> np.ndarray:
    """Values [P, C] at `times` [P], constant before the first and after the last key. keys, values: see `_sampler`."""
    if len(keys) == 1:
        return np.tile(values[0, 1] if mode == "CUBICSPLINE" else values[0], (len(times), 1))
    times = np.clip(times, keys[0], keys[-1])
    if mode == "LINEAR":
        if rotation:
            return Slerp(keys, unit_rotation(values, where))(times).as_quat()
        return np.column_stack([np.interp(times, keys, column) for column in values.T])
    # A frame that falls on a key must not land just before it.
    now = np.searchsorted(keys, times + _slack(times * fps) / fps, side="right") - 1
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
