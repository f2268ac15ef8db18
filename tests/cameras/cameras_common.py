"""Helpers that the tests of cameras share."""

import json
import struct
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from utils.cameras.path import CameraPath, make_path
from utils.cameras.read import read_cameras

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL <-> OpenCV camera axes


def random_path(poses: int = 5, seed: int = 0, up: str = "+y") -> CameraPath:
    rng = np.random.default_rng(seed)
    c2w = np.tile(np.eye(4), (poses, 1, 1))
    c2w[:, :3, :3] = Rotation.random(poses, rng=rng).as_matrix()
    c2w[:, :3, 3] = rng.normal(size=(poses, 3))
    focal, center = rng.uniform(400, 600, (poses, 2)), rng.uniform(200, 300, (poses, 2))
    return make_path("test", c2w, focal, center, (640, 480), up, range(1, poses + 1), 25.0)


def turns_about(axis: str, degrees: object) -> Rotation:
    return Rotation.from_euler(axis, np.asarray(degrees)[:, None], degrees=True)


def assert_same(a: CameraPath, b: CameraPath, tolerance: float = 1e-12) -> None:
    for name in ("c2w", "focal", "center"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance)
    assert (a.size, a.numbers) == (b.size, b.numbers)


def keyframes(**changes: object) -> dict:
    rng = np.random.default_rng(1)
    entries = [
        {"frame": frame, "position": rng.normal(0, 5, 3).tolist(), "look_at": [0, 0, 20], "fov": fov}
        for frame, fov in ((1, 40), (20, 50), (80, 45), (91, 45))
    ]
    return {"world_up": "+y", "keyframes": entries, **changes}


def write(file: Path, data: object) -> Path:
    file.write_text(json.dumps(data))
    return file


def write_colmap(folder: Path, path: CameraPath, binary: bool, model: str = "PINHOLE", extra: tuple = ()) -> Path:
    """One camera per image; images are stored in reverse, with 2-D points."""
    folder.mkdir(parents=True, exist_ok=True)
    w2c = np.linalg.inv(path.c2w @ FLIP)
    quaternions = Rotation.from_matrix(w2c[:, :3, :3]).as_quat()[:, [3, 0, 1, 2]]
    model_id = {"PINHOLE": 1, "OPENCV": 4, "FOV": 7}[model]
    cameras = [(i + 1, [*path.focal[i], *path.center[i], *extra]) for i in range(len(path))]
    images = [(i + 1, [*quaternions[i], *w2c[i, :3, 3]], i + 1, f"im age_{i + 1}.png") for i in range(len(path))][::-1]
    if binary:
        data = struct.pack("<Q", len(cameras))
        for i, values in cameras:
            data += struct.pack(f"<iiQQ{len(values)}d", i, model_id, *path.size, *values)
        (folder / "cameras.bin").write_bytes(data)
        data = struct.pack("<Q", len(images))
        for i, pose, camera, name in images:
            data += struct.pack("<i7di", i, *pose, camera) + name.encode() + b"\0"
            data += struct.pack("<Q2dq2dq", 2, 1.5, 2.5, 7, 3.5, 4.5, -1)
        (folder / "images.bin").write_bytes(data)
        return folder
    lines = [f"{i} {model} {path.size[0]} {path.size[1]} {' '.join(map(repr, map(float, v)))}" for i, v in cameras]
    (folder / "cameras.txt").write_text("# Camera list\n" + "\n".join(lines) + "\n")
    lines = [f"{i} {' '.join(map(repr, map(float, p)))} {c} {n}\n{'1.5 2.5 7' * (i % 2)}" for i, p, c, n in images]
    (folder / "images.txt").write_text("# Image list\n#\n" + "\n".join(lines) + "\n")
    return folder


class Gltf:
    """A hand-made animated camera: nodes and channels are given, buffers and accessors follow."""

    def __init__(self, nodes: list[dict], **camera: float) -> None:
        lens = {"type": "perspective", "perspective": {"yfov": 0.8, "aspectRatio": 1.5, "znear": 0.1, **camera}}
        self.blob = b""
        self.json = {
            "asset": {"version": "2.0"},
            "nodes": nodes,
            "cameras": [lens],
            "animations": [{"channels": [], "samplers": []}],
            "accessors": [],
            "bufferViews": [],
            "buffers": [{"byteLength": 0}],
        }

    def accessor(self, values: np.ndarray, kind: str = "<f4", **more: object) -> int:
        values = np.asarray(values)
        data = values.astype(kind).tobytes()
        j = self.json
        j["bufferViews"].append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data)})
        width = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}[values.shape[1] if values.ndim > 1 else 1]
        view = len(j["bufferViews"]) - 1
        j["accessors"].append({"bufferView": view, "componentType": 5126, "count": len(values), "type": width, **more})
        self.blob += data
        j["buffers"][0]["byteLength"] = len(self.blob)
        return len(j["accessors"]) - 1

    def animate(self, node: int, path: str, times: object, values: object, mode: str | None = None) -> "Gltf":
        sampler = {"input": self.accessor(times), "output": self.accessor(values)}
        animation = self.json["animations"][0]
        animation["samplers"].append({**sampler, "interpolation": mode} if mode else sampler)
        target = {"node": node, "path": path}
        animation["channels"].append({"sampler": len(animation["samplers"]) - 1, "target": target})
        return self

    def glb(self) -> bytes:
        text = json.dumps(self.json).encode()
        text += b" " * (-len(text) % 4)
        blob = self.blob + b"\0" * (-len(self.blob) % 4)
        chunks = struct.pack("<I", len(text)) + b"JSON" + text + struct.pack("<I", len(blob)) + b"BIN\0" + blob
        return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks

    def read(self, folder: Path, fps: float = 24.0) -> CameraPath:
        (folder / "camera.glb").write_bytes(self.glb())
        return read_cameras(folder / "camera.glb", fps=fps)


def slide(**camera: float) -> Gltf:
    """A camera that moves 1 m along x in a second."""
    return Gltf([{"camera": 0}], **camera).animate(0, "translation", [0, 1], [[0, 0, 0], [1, 0, 0]])


def transforms() -> dict:
    path = random_path(3)
    frames = [
        {"frame": n, "transform_matrix": m.tolist(), "fl_x": f[0], "fl_y": f[1], "cx": c[0], "cy": c[1]}
        for n, m, f, c in zip(path.numbers, path.c2w, path.focal, path.center, strict=True)
    ]
    return {"camera_model": "OPENCV", "w": 640, "h": 480, "world_up": "+y", "frames": frames}
