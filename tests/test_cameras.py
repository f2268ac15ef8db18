"""Camera paths: every format against known values, resampling, built-in paths, and bad files."""

import base64
import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from utils.cameras.builtin import KINDS, builtin_path
from utils.cameras.keyframes import smooth_curve
from utils.cameras.path import Z_UP_TO_Y_UP, CameraPath, catmull_rom, make_path, resample, to_arcs
from utils.cameras.read import read_cameras, write_transforms
from utils.cli import InputError

TOWN = Path(__file__).parents[1] / "../shared/data/town"
needs_town = pytest.mark.skipif(not TOWN.is_dir(), reason="the town data is not here")
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


# --- the town: the same cameras in three files ---


@needs_town
def test_town_transforms() -> None:
    z_up, y_up = read_cameras(TOWN / "cameras.json"), read_cameras(TOWN / "cameras_yup.json")
    assert (len(z_up), z_up.up, y_up.up, z_up.size, z_up.fps) == (91, "+z", "+y", (720, 480), 24)
    assert z_up.numbers == tuple(range(1, 92))
    np.testing.assert_allclose(Z_UP_TO_Y_UP @ z_up.c2w[:, :3], y_up.c2w[:, :3], atol=1e-12)
    stored = [frame["transform_matrix"] for frame in json.loads((TOWN / "cameras.json").read_text())["frames"]]
    np.testing.assert_allclose(z_up.c2w, stored, atol=1e-12)
    np.testing.assert_array_equal(to_arcs(z_up).c2w, z_up.c2w)


@needs_town
def test_town_animated_camera() -> None:
    animated, baked = read_cameras(TOWN / "town_animcam.glb"), read_cameras(TOWN / "cameras_yup.json")
    assert (len(animated), animated.up, animated.numbers[-1]) == (100, "+y", 100)
    cut = animated.subset(1, 91)
    assert cut.numbers == baked.numbers
    assert np.abs(cut.c2w - baked.c2w)[:, :3, :3].max() < 1e-6
    assert np.abs(cut.c2w - baked.c2w)[:, :3, 3].max() < 1e-5
    np.testing.assert_allclose(cut.intrinsics(720, 480), baked.intrinsics(720, 480), atol=1e-4)


# --- transforms.json ---


@pytest.mark.parametrize("up", ["+y", "+z"])
def test_transforms_round_trip_is_exact(tmp_path: Path, up: str) -> None:
    path, file = random_path(up=up), tmp_path / "transforms.json"
    write_transforms(file, path)
    back = read_cameras(file)
    assert_same(path, back, 0)
    assert (back.up, back.fps) == (up, 25.0)
    write_transforms(tmp_path / "again.json", back)
    assert file.read_bytes() == (tmp_path / "again.json").read_bytes()


def test_constant_intrinsics_are_stored_once(tmp_path: Path) -> None:
    write_transforms(tmp_path / "a.json", builtin_path("orbit", [[-1] * 3, [1] * 3], "+y"))
    write_transforms(tmp_path / "b.json", random_path())
    shared, varying = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert {"fl_x", "fl_y", "cx", "cy", "k1"} <= set(shared) and "fl_x" not in shared["frames"][0]
    assert {"fl_x", "fl_y", "cx", "cy"} <= set(varying["frames"][0]) and "fl_x" not in varying


def test_transforms_as_others_write_them(tmp_path: Path) -> None:
    """No frame numbers (order of file names), a field of view instead of a focal length, 3x4 matrices, no world_up."""
    poses = [np.eye(4).tolist() for _ in range(3)]
    for x, pose in enumerate(poses):
        pose[0][3] = float(x)
    names = ["f_10.png", "f_9.png", "f_2.png"]
    frames = [{"file_path": n, "transform_matrix": p[:3]} for n, p in zip(names, poses, strict=True)]
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"camera_angle_x": np.pi / 2, "w": 100, "h": 50, "frames": frames}))
    path = read_cameras(file)
    assert path.c2w[:, 0, 3].tolist() == [2, 1, 0]
    np.testing.assert_allclose(path.intrinsics(100, 50), [[50, 50, 50, 25]] * 3)
    assert path.up == "+z" and path.numbers == (1, 2, 3) and path.fps == 24
    assert read_cameras(file, up="+y").up == "+y"


def test_scale_is_stripped_and_numbers_are_sorted(tmp_path: Path) -> None:
    data = transforms()
    for frame, scale in zip(data["frames"], (0.6, 2, 30), strict=True):
        frame["transform_matrix"][:3] = [
            [scale * v for v in row[:3]] + row[3:] for row in frame["transform_matrix"][:3]
        ]
    data["frames"].reverse()
    (tmp_path / "t.json").write_text(json.dumps(data))
    path, plain = read_cameras(tmp_path / "t.json"), random_path(3)
    np.testing.assert_allclose(path.c2w, plain.c2w, atol=1e-12)
    assert path.numbers == (1, 2, 3)


# --- the dataclass ---


def test_intrinsics_scale_with_the_width() -> None:
    path = random_path()
    own = path.intrinsics(*path.size)
    np.testing.assert_array_equal(own, np.hstack([path.focal, path.center]))
    np.testing.assert_allclose(path.intrinsics(1280, 960), 2 * own)
    wide = path.intrinsics(640, 360)  # another aspect crops: same scale, the middle row stays the middle row
    np.testing.assert_allclose(wide[:, :3], own[:, :3])
    np.testing.assert_allclose(wide[:, 3], own[:, 3] - 60)


def test_subset() -> None:
    path = random_path(10)
    part = path.subset(3, 6)
    assert part.numbers == (3, 4, 5, 6)
    np.testing.assert_array_equal(part.c2w, path.c2w[2:6])
    for wrong in ((0, 5), (5, 11), (6, 6), (7, 3)):
        with pytest.raises(InputError, match="1 to 10"):
            path.subset(*wrong)


# --- resampling ---


def straight_path(poses: int, numbers: list[int] | None = None) -> CameraPath:
    """Constant velocity, angular velocity and zoom."""
    numbers = numbers or list(range(1, poses + 1))
    return sample_straight(np.array(numbers, dtype=float), numbers)


def sample_straight(t: np.ndarray, numbers: list[int]) -> CameraPath:
    c2w = np.tile(np.eye(4), (len(t), 1, 1))
    c2w[:, :3, :3] = Rotation.from_rotvec(t[:, None] * [0.02, 0.05, -0.01]).as_matrix()
    c2w[:, :3, 3] = [1, 2, 3] + t[:, None] * [0.3, -0.1, 0.2]
    focal = np.column_stack([500 + t, 500 + 2 * t])
    return make_path("t", c2w, focal, np.tile([50.0, 40.0], (len(t), 1)), (100, 80), "+y", numbers, 24.0)


@pytest.mark.parametrize("numbers", [list(range(1, 31)), [1, 2, 5, 11, 12, 30]])
def test_resampling_constant_velocity_is_exact(numbers: list[int]) -> None:
    path = to_arcs(straight_path(len(numbers), numbers), 2)
    assert_same(path, sample_straight(np.linspace(1, 30, 91), list(range(1, 92))))


def test_resampling_passes_through_the_poses() -> None:
    path = random_path(6)
    dense = resample(path, 26)
    np.testing.assert_allclose(dense.c2w[::5], path.c2w, atol=1e-12)
    np.testing.assert_allclose(dense.focal[::5], path.focal, atol=1e-9)
    gram = dense.c2w[:, :3, :3].transpose(0, 2, 1) @ dense.c2w[:, :3, :3]
    np.testing.assert_allclose(gram, np.tile(np.eye(3), (26, 1, 1)), atol=1e-12)
    steps = Rotation.from_matrix(dense.c2w[1:, :3, :3] @ dense.c2w[:-1, :3, :3].transpose(0, 2, 1)).magnitude()
    np.testing.assert_allclose(steps.reshape(5, 5), steps.reshape(5, 5)[:, :1].repeat(5, 1), atol=1e-9)


def test_spline_is_exact_for_parabolas_between_uneven_knots() -> None:
    knots = np.array([0.0, 1, 1.5, 4, 6])
    at = np.linspace(1, 4, 31)  # the end segments have one neighbour only
    curve = catmull_rom(knots, np.stack([knots**2, 3 - knots], -1))
    np.testing.assert_allclose(curve(at), np.stack([at**2, 3 - at], -1), atol=1e-12)


def test_reversed_resampling_is_resampling_reversed() -> None:
    path = random_path(7, seed=3)
    backwards = make_path(
        "t", path.c2w[::-1], path.focal[::-1], path.center[::-1], path.size, path.up, path.numbers, 24.0
    )
    np.testing.assert_allclose(resample(backwards, 46).c2w, resample(path, 46).c2w[::-1], atol=1e-12)


@pytest.mark.parametrize(
    ("poses", "wanted", "arcs"), [(91, None, 2), (2, None, 1), (100, None, 2), (115, None, 3), (91, 3, 3), (46, 1, 1)]
)
def test_number_of_arcs(poses: int, wanted: int | None, arcs: int) -> None:
    path = straight_path(poses, list(range(5, poses + 5)))
    result = to_arcs(path, wanted)
    assert len(result) == 45 * arcs + 1 and result.numbers == tuple(range(1, 45 * arcs + 2))
    if poses == len(result):
        np.testing.assert_array_equal(result.c2w, path.c2w)
    np.testing.assert_allclose(result.c2w[[0, -1]], path.c2w[[0, -1]], atol=1e-12)


def test_no_arcs_and_too_many_are_refused() -> None:
    for arcs, message in ((0, "1 or more"), (-1, "1 or more"), (10**11, "at most 100000"), (2223, "at most 100000")):
        with pytest.raises(InputError, match=message):
            to_arcs(random_path(), arcs)
        with pytest.raises(InputError, match=message):
            builtin_path("orbit", [[-1] * 3, [1] * 3], "+y", arcs)
    assert len(to_arcs(random_path(), 2222)) == 99_991


# --- keyframes ---


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


def test_keyframes_are_met_and_the_path_is_smooth(tmp_path: Path) -> None:
    data = keyframes()
    path = read_cameras(write(tmp_path / "k.json", data))
    assert path.numbers == tuple(range(1, 92)) and path.size == (1080, 720)
    for entry in data["keyframes"]:
        i = entry["frame"] - 1
        np.testing.assert_allclose(path.c2w[i, :3, 3], entry["position"], atol=1e-9)
        assert path.focal[i, 1] == pytest.approx(360 / np.tan(np.radians(entry["fov"]) / 2))
    to_target = np.array([0, 0, 20]) - path.c2w[:, :3, 3]
    to_target /= np.linalg.norm(to_target, axis=1, keepdims=True)
    np.testing.assert_allclose(-path.c2w[:, :3, 2], to_target, atol=1e-12)
    np.testing.assert_allclose(path.c2w[:, 1, 0], 0, atol=1e-12)  # level horizon


def test_curve_has_continuous_velocity_and_rests() -> None:
    times, points = np.array([0.0, 1, 4, 5, 7]), np.array([[0.0, 0, 0], [1, 0, 0], [1, 5, 0], [1, 5, 0], [0, 5, 2]])
    h = 1e-6
    for t in times[1:-1]:
        before, here, after = smooth_curve(times, points, np.array([t - h, t, t + h]))
        np.testing.assert_allclose((after - here) / h, (here - before) / h, atol=1e-4)
    np.testing.assert_allclose(smooth_curve(times, points, times), points, atol=1e-12)
    np.testing.assert_allclose(smooth_curve(times, points, np.linspace(4, 5, 9)), np.tile([1, 5, 0], (9, 1)))
    even = smooth_curve(np.arange(4.0), np.arange(4.0)[:, None] * [1, 2, 3], np.linspace(0, 3, 31))
    np.testing.assert_allclose(even, np.linspace(0, 3, 31)[:, None] * [1, 2, 3], atol=1e-12)
    np.testing.assert_array_equal(smooth_curve(times, np.ones((5, 3)), np.arange(3.0)), np.ones((3, 3)))


def test_keyframe_quaternions(tmp_path: Path) -> None:
    turns = turns_about("y", [0, 30, 90, 100])
    entries = [{"position": [0, 0, 0], "quaternion": (2 * q).tolist()} for q in turns.as_quat()]
    entries[1] = {"position": [0, 0, 0], "look_at": (-turns[1].as_matrix()[:, 2]).tolist()}
    path = read_cameras(write(tmp_path / "k.json", {"world_up": "+y", "fov": 60, "keyframes": entries}))
    assert len(path) == 136  # 45 frames apart by default: an anchor each
    rotations = Rotation.from_matrix(path.c2w[:, :3, :3])
    np.testing.assert_allclose((rotations[::45] * turns.inv()).magnitude(), 0, atol=1e-12)
    velocity = (rotations[1:] * rotations[:-1].inv()).magnitude()
    assert np.abs(np.diff(velocity)).max() < 0.05 * velocity.max()  # no jump at a keyframe


# --- COLMAP ---


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


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("sub", ["", "sparse/0"])
def test_colmap_model(tmp_path: Path, binary: bool, sub: str) -> None:
    path = random_path(12)
    write_colmap(tmp_path / sub, path, binary, "OPENCV", (0.0, 0.0, 0.0, 0.0))
    back = read_cameras(tmp_path, up="+z", fps=30)
    assert_same(path, back, 1e-9)  # image_10 comes after image_9
    assert (back.up, back.fps) == ("+z", 30)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize(
    ("model", "extra"), [("OPENCV", (0.1, 0.0, 0.0, 0.0)), ("OPENCV", (0, 0, 0, 1e-3)), ("FOV", (0.0,))]
)
def test_colmap_distortion_is_refused(tmp_path: Path, binary: bool, model: str, extra: tuple) -> None:
    write_colmap(tmp_path, random_path(), binary, model, extra)
    with pytest.raises(InputError, match="distortion"):
        read_cameras(tmp_path, up="+z")


def test_colmap_says_nothing_about_up(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--cameras_up"):
        read_cameras(write_colmap(tmp_path, random_path(), True))


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin"])
def test_colmap_binary_of_another_length(tmp_path: Path, name: str) -> None:
    file = write_colmap(tmp_path, random_path(3), True) / name
    whole = file.read_bytes()
    for data in [whole[:cut] for cut in range(0, len(whole), 7)] + [whole + b"\0", b"\xff" * 8 + whole[8:]]:
        file.write_bytes(data)
        with pytest.raises(InputError, match="copy it again"):
            read_cameras(tmp_path, up="+y")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("cameras.txt", "PINHOLE", "PIN", "not a COLMAP camera"),
        ("cameras.txt", " 480", "", "not a COLMAP camera|expected CAMERA_ID"),
        ("cameras.txt", "640 480", "640 0", "image size"),
        ("cameras.txt", "640 480", "640 x", "expected CAMERA_ID"),
        ("cameras.txt", "\n2 ", "\n9 ", "camera 2"),
        ("cameras.txt", "2 PINHOLE 640", "2 PINHOLE 320", "one size"),
        ("images.txt", " 2 im age_2.png", "", "expected IMAGE_ID"),
        ("images.txt", "1.5 2.5 7", "1.5 2.5", "2-D points"),
    ],
)
def test_bad_colmap_text(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    file = write_colmap(tmp_path, random_path(3), False) / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        read_cameras(tmp_path, up="+y")


def test_bad_colmap_poses_and_folders(tmp_path: Path) -> None:
    folder = write_colmap(tmp_path, random_path(3), False)
    for pose, message in (("0 0 0 0 1 1 1", "zero"), ("nan 0 0 1 1 1 1", "NaN"), ("1 0 0 0 inf 1 1", "NaN")):
        (folder / "images.txt").write_text(f"1 {pose} 1 a\n\n2 1 0 0 0 1 2 3 1 b\n\n")
        with pytest.raises(InputError, match=message):
            read_cameras(folder, up="+y")
    (folder / "images.txt").write_text("# none\n")
    with pytest.raises(InputError, match="at least two"):
        read_cameras(folder / "images.txt", up="+y")
    (folder / "images.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="not a text file"):
        read_cameras(folder, up="+y")
    (folder / "images.txt").unlink()
    with pytest.raises(InputError, match="no COLMAP model"):
        read_cameras(folder, up="+y")


# --- glTF ---


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


def test_gltf_linear_translation_and_lens(tmp_path: Path) -> None:
    path = slide().read(tmp_path, fps=10)
    assert path.numbers == tuple(range(11)) and path.up == "+y" and path.fps == 10
    np.testing.assert_allclose(path.c2w[:, 0, 3], np.arange(11) / 10, atol=1e-7)
    assert path.size == (1080, 720)
    np.testing.assert_allclose(path.intrinsics(300, 200)[0], [100 / np.tan(0.4)] * 2 + [150, 100])
    assert slide(aspectRatio=2.0).read(tmp_path).size == (1440, 720)
    assert read_cameras(tmp_path / "camera.glb", up="+z").up == "+z"


def test_gltf_step(tmp_path: Path) -> None:
    times = np.arange(1, 25) / 24  # in float32 some keys lie just after their frame
    values = np.arange(24)[:, None] * np.ones(3)
    path = Gltf([{"camera": 0}]).animate(0, "translation", times, values, "STEP").read(tmp_path)
    np.testing.assert_array_equal(path.c2w[:, 0, 3], np.arange(24))
    held = Gltf([{"camera": 0}]).animate(0, "translation", [0.25, 0.75, 1], values[:3], "STEP").read(tmp_path, 8)
    assert held.numbers == tuple(range(2, 9)) and held.c2w[:, 0, 3].tolist() == [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("mode", ["LINEAR", "STEP"])
@pytest.mark.parametrize(
    ("first", "count", "fps"), [(0, 46, 24), (1, 46, 24), (100, 46, 24), (7, 50, 30), (7, 50, 29.97), (99_900, 46, 24)]
)
def test_gltf_frames_are_the_keys(tmp_path: Path, first: int, count: int, fps: float, mode: str) -> None:
    """One key per frame, in float32 seconds: every key is a pose, and none stands still before the first."""
    frames = np.arange(first, first + count)
    values = np.arange(count)[:, None] * np.ones(3)
    path = Gltf([{"camera": 0}]).animate(0, "translation", frames / fps, values, mode).read(tmp_path, fps)
    assert path.numbers == tuple(frames.tolist())
    np.testing.assert_allclose(path.c2w[:, 0, 3], np.arange(count), atol=0.02 if first > 1000 else 1e-3)


def test_gltf_frames_cover_all_channels(tmp_path: Path) -> None:
    gltf = Gltf([{"camera": 0}]).animate(0, "translation", [0.55, 1], [[0, 0, 0], [1, 0, 0]])
    path = gltf.animate(0, "rotation", [0.31, 0.8], [[0, 0, 0, 1], [0, 0, 1, 0]]).read(tmp_path, 10)
    assert path.numbers == tuple(range(4, 11))  # between frames, the first whole one


def test_gltf_cubic_spline_is_the_cubic(tmp_path: Path) -> None:
    keys = np.array([0.0, 0.5, 2.0])

    def cubic(t: np.ndarray) -> np.ndarray:
        return np.stack([t**3 - t, 2 * t**2, 1 - t], -1)

    tangent = np.stack([3 * keys**2 - 1, 4 * keys, -np.ones(3)], -1)
    values = np.stack([tangent, cubic(keys), tangent], 1).reshape(-1, 3)
    path = Gltf([{"camera": 0}]).animate(0, "translation", keys, values, "CUBICSPLINE").read(tmp_path, 12)
    np.testing.assert_allclose(path.c2w[:, :3, 3], cubic(np.arange(25) / 12), atol=1e-5)


def test_gltf_cubic_spline_rotation(tmp_path: Path) -> None:
    turns = turns_about("y", [0, 60]).as_quat()
    values = np.stack([0 * turns, turns, 0 * turns], 1).reshape(-1, 4)
    path = Gltf([{"camera": 0}]).animate(0, "rotation", [0, 1], values, "CUBICSPLINE").read(tmp_path, 10)
    s = np.arange(11)[:, None] / 10
    blend = turns[0] + (3 * s**2 - 2 * s**3) * (turns[1] - turns[0])
    np.testing.assert_allclose(path.c2w[:, :3, :3], Rotation.from_quat(blend).as_matrix(), atol=1e-6)


def test_gltf_rotation_takes_the_short_way(tmp_path: Path) -> None:
    turns = turns_about("x", [0, 80])
    quaternions = turns.as_quat() * [[1], [-1]]  # the same rotation, written the other way
    path = Gltf([{"camera": 0}]).animate(0, "rotation", [0, 1], quaternions).read(tmp_path, 10)
    wanted = Slerp([0, 1], turns)(np.arange(11) / 10).as_matrix()
    np.testing.assert_allclose(path.c2w[:, :3, :3], wanted, atol=1e-6)


def test_gltf_parents_and_scale(tmp_path: Path) -> None:
    """root (matrix) > rig (turns, scale 2) > camera (moves, uneven scale): scale moves it but does not stay."""
    turn = turns_about("y", [0, 90])
    matrix = np.eye(4)
    matrix[:3, 3] = [10, 0, 0]
    nodes = [
        {"camera": 0, "scale": [0.6, 0.5, 0.4], "translation": [9, 9, 9]},
        {"children": [0], "scale": [2, 2, 2]},
        {"children": [1], "matrix": matrix.T.ravel().tolist()},
    ]
    gltf = Gltf(nodes).animate(1, "rotation", [0, 1], turn.as_quat())
    path = gltf.animate(0, "translation", [0, 2], [[0, 0, 1], [0, 2, 1]]).read(tmp_path, 10)
    assert len(path) == 21
    t = np.arange(21) / 10
    rotation = turns_about("y", np.minimum(t, 1) * 90)
    local = np.stack([0 * t, t, np.ones(21)], -1)
    np.testing.assert_allclose(path.c2w[:, :3, :3], rotation.as_matrix(), atol=1e-6)
    np.testing.assert_allclose(path.c2w[:, :3, 3], 2 * rotation.apply(local) + [10, 0, 0], atol=1e-5)


def test_gltf_normalized_rotations_and_stride(tmp_path: Path) -> None:
    turns = turns_about("z", [0, 90]).as_quat()
    gltf = Gltf([{"camera": 0}]).animate(0, "rotation", [0, 1], turns)
    packed = np.hstack([np.round(turns * 32767), np.full((2, 4), 99)]).astype("<i2")  # 8 bytes of value, 8 of others
    view = gltf.json["accessors"][gltf.accessor(packed[:, :4], "<i2", componentType=5122, normalized=True)]
    gltf.blob = gltf.blob[: gltf.json["bufferViews"][-1]["byteOffset"]] + packed.tobytes()
    gltf.json["bufferViews"][view["bufferView"]] |= {"byteLength": 32, "byteStride": 16}
    gltf.json["buffers"][0]["byteLength"] = len(gltf.blob)
    gltf.json["animations"][0]["samplers"][0]["output"] = 2
    path = gltf.read(tmp_path, 2)
    np.testing.assert_allclose(path.c2w[2, :3, :3], Rotation.from_euler("z", 90, degrees=True).as_matrix(), atol=1e-4)


@pytest.mark.parametrize("uri", ["sub/anim%20one.bin", "data:application/octet-stream;base64,"])
def test_gltf_text_file(tmp_path: Path, uri: str) -> None:
    gltf = slide()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "anim one.bin").write_bytes(gltf.blob)
    gltf.json["buffers"][0]["uri"] = uri + (base64.b64encode(gltf.blob).decode() if uri.startswith("data") else "")
    assert len(read_cameras(write(tmp_path / "a.gltf", gltf.json))) == 25


def inlined(gltf: Gltf) -> Gltf:
    """With its buffer in the JSON, so that this is a whole .gltf file."""
    gltf.json["buffers"][0]["uri"] = "data:;base64," + base64.b64encode(gltf.blob).decode()
    return gltf


def change(*keys: object, value: object) -> Callable[[Gltf], None]:
    """Set one entry of the JSON; None removes it."""

    def apply(gltf: Gltf) -> None:
        place = gltf.json
        for key in keys[:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("nodes", 0, "camera", value=None), "no camera"),
        (change("animations", value=None), "not animated"),
        (change("nodes", 0, "camera", value=3), "cameras\\[3\\]"),
        (change("cameras", 0, value={"type": "orthographic", "orthographic": {}}), "orthographic"),
        (change("cameras", 0, "perspective", "yfov", value=0), "yfov"),
        (change("cameras", 0, "perspective", "yfov", value="wide"), "yfov"),
        (change("cameras", 0, "perspective", "aspectRatio", value=1e-9), "aspect ratio"),
        (change("nodes", 0, "children", value=[0]), "own ancestor"),
        (change("nodes", 0, "children", value=[7]), "nodes\\[7\\]"),
        (change("nodes", 0, "scale", value=[-1, 1, 1]), "mirrored"),
        (change("nodes", 0, "scale", value=[0, 0, 0]), "scale 0"),
        (change("nodes", 0, "rotation", value=[0, 0, 0, 0]), "quaternion is zero"),
        (change("nodes", 0, "rotation", value=[0, 0, 1]), "4 finite numbers"),
        (change("nodes", 0, "matrix", value=np.eye(4).ravel().tolist()), "matrix and an animation"),
        (change("animations", 0, "channels", 0, "sampler", value=5), "samplers\\[5\\]"),
        (change("animations", 0, "samplers", 0, "input", value=5), "accessors\\[5\\]"),
        (change("animations", 0, "samplers", 0, "input", value=-1), "accessors is -1"),
        (change("animations", 0, "samplers", 0, "output", value=0), "VEC3"),
        (change("animations", 0, "samplers", 0, "interpolation", value="BOUNCE"), "BOUNCE"),
        (change("animations", 0, "samplers", 0, "interpolation", value="CUBICSPLINE"), "2 times but 2 values"),
        (change("accessors", 1, "count", value=1000), "more than its buffer view"),
        (change("accessors", 1, "count", value=1), "2 times but 1 values"),
        (change("accessors", 1, "byteOffset", value=8), "more than its buffer view"),
        (change("accessors", 1, "byteOffset", value=-8), "not a whole number"),
        (change("accessors", 0, "bufferView", value=9), "bufferViews\\[9\\]"),
        (change("accessors", 0, "sparse", value={"count": 1, "indices": {}, "values": {}}), "sparse"),
        (change("bufferViews", 1, "byteLength", value=4), "more than its buffer view"),
        (change("bufferViews", 1, "byteOffset", value=10**9), "beyond buffer 0"),
        (change("bufferViews", 0, "buffer", value=2), "buffers\\[2\\]"),
        (change("bufferViews", 0, "extensions", value={"EXT_meshopt_compression": {}}), "compressed"),
        (change("buffers", 0, "byteLength", value=10**9), "promises 1000000000 bytes"),
        (change("buffers", 0, "uri", value="../anim.bin"), "outside its own folder"),
        (change("buffers", 0, "uri", value="%2e%2e/anim.bin"), "outside its own folder"),
        (change("buffers", 0, "uri", value="/anim.bin"), "outside its own folder"),
        (change("buffers", 0, "uri", value="file:///anim.bin"), "outside its own folder"),
        (change("buffers", 0, "uri", value="gone.bin"), "missing"),
        (change("buffers", 0, "uri", value="x" * 300), "cannot be read"),
        (change("buffers", 0, "uri", value="."), "cannot be read"),
        (change("nodes", value=5), "not a valid glTF"),
    ],
)
def test_bad_gltf(tmp_path: Path, damage: Callable[[Gltf], None], message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "anim.bin").write_bytes(slide().blob)
    gltf = slide()
    damage(gltf)
    with pytest.raises(InputError, match=message):
        gltf.read(tmp_path / "in")


def test_gltf_keys_that_cannot_be(tmp_path: Path) -> None:
    cases = {
        "grow": ([1, 0.5], [[0, 0, 0], [1, 0, 0]]),
        "NaN": ([0, 1], [[0, 0, 0], [np.nan, 0, 0]]),
        "more than": ([0, 1e8], [[0, 0, 0], [1, 0, 0]]),
        "at least two": ([0], [[0, 0, 0]]),
    }
    for message, (times, values) in cases.items():
        with pytest.raises(InputError, match=message):
            Gltf([{"camera": 0}]).animate(0, "translation", times, values).read(tmp_path)
    twice = slide().animate(0, "translation", [0, 1], [[0, 0, 0], [2, 0, 0]])
    with pytest.raises(InputError, match="two animations"):
        twice.read(tmp_path)
    two = Gltf([{"camera": 0}, {"camera": 0}]).animate(0, "translation", [0, 1], np.eye(3)[:2])
    with pytest.raises(InputError, match="2 animated cameras"):
        two.animate(1, "translation", [0, 1], np.eye(3)[:2]).read(tmp_path)
    sheared = Gltf([{"camera": 0, "rotation": [0, 0, 0.3827, 0.9239]}, {"children": [0], "scale": [1, 3, 1]}])
    with pytest.raises(InputError, match="sheared"):
        sheared.animate(0, "translation", [0, 1], np.eye(3)[:2]).read(tmp_path)


def test_glb_of_another_length(tmp_path: Path) -> None:
    whole, file = slide().glb(), tmp_path / "a.glb"
    lies = [b"", b"glTF", b"nope" + whole[4:], whole[:8] + struct.pack("<I", 10**9) + whole[12:]]
    lies += [whole + b"more", whole[:8] + struct.pack("<I", len(whole) + 4) + whole[12:] + b"more"]
    lies += [whole[:12] + struct.pack("<I", length) + whole[16:] for length in (0, 5, 10**9, 2**32 - 1)]
    for data in lies + [whole[:cut] for cut in range(0, len(whole) - 4, 37)]:
        file.write_bytes(data)
        with pytest.raises(InputError):
            read_cameras(file)


# --- bad JSON ---


def transforms() -> dict:
    path = random_path(3)
    frames = [
        {"frame": n, "transform_matrix": m.tolist(), "fl_x": f[0], "fl_y": f[1], "cx": c[0], "cy": c[1]}
        for n, m, f, c in zip(path.numbers, path.c2w, path.focal, path.center, strict=True)
    ]
    return {"camera_model": "OPENCV", "w": 640, "h": 480, "world_up": "+y", "frames": frames}


def edited(*keys: object, value: object, base: Callable[[], dict] = transforms) -> dict:
    data = base()
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return data


IDENTITY = np.eye(4).tolist()
MATRIX = ("frames", 1, "transform_matrix")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "JSON object"),
        ({}, "neither 'frames'"),
        (edited("frames", value=[]), "at least two"),
        (edited("frames", value=transforms()["frames"][:1]), "at least two"),
        (edited("frames", value={}), "list of objects"),
        (edited("frames", value=[1, 2]), "list of objects"),
        (edited("frames", 1, value={"frame": 2}), "'transform_matrix' is missing"),
        (edited(*MATRIX, value=[[1]]), "frame 2: 'transform_matrix' must be 4 x 4"),
        (edited(*MATRIX, value=[[1, 2], [1]]), "transform_matrix"),
        (edited(*MATRIX, value="eye"), "transform_matrix"),
        (edited(*MATRIX, value=np.full((4, 4), np.nan).tolist()), "finite"),
        (edited(*MATRIX, 0, 3, value=np.inf), "finite"),
        (edited(*MATRIX, 0, 3, value=1e30), "huge"),
        (edited(*MATRIX, 0, 3, value=10**400), "transform_matrix"),
        (edited(*MATRIX, value=np.diag([-1.0, 1, 1, 1]).tolist()), "mirrored"),
        (edited(*MATRIX, value=np.diag([1.0, 2, 1, 1]).tolist()), "sheared"),
        (edited(*MATRIX, value=[[1, 0.1, 0, 0], *IDENTITY[1:]]), "sheared"),
        (edited(*MATRIX, value=np.diag([0.0, 0, 0, 1]).tolist()), "scale 0"),
        (edited(*MATRIX, value=np.diag([1.0, 1, 0, 1]).tolist()), "flat"),
        (edited(*MATRIX, value=[*IDENTITY[:3], [1, 2, 3, 1]]), "last row"),
        (edited("frames", 1, "fl_x", value=0), "frame 2: focal length"),
        (edited("frames", 1, "fl_y", value=-5), "focal length"),
        (edited("frames", 1, "fl_x", value="500"), "'fl_x' must be"),
        (edited("frames", 1, "fl_x", value=np.nan), "'fl_x' must be"),
        (edited("frames", 1, "cx", value=None), "'cx' must be"),
        (edited("frames", 1, "frame", value=1), "unique"),
        (edited("frames", 1, "frame", value=1.5), "whole number"),
        (edited("frames", 1, value={"transform_matrix": IDENTITY}), "number all or none"),
        (edited("frames", 1, "w", value=320), "one size"),
        (edited("w", value=0), "image size 0x480"),
        (edited("h", value=-3), "image size"),
        (edited("w", value=10.5), "whole number"),
        (edited("camera_model", value="OPENCV_FISHEYE"), "distortion"),
        (edited("camera_model", value=["OPENCV"]), "distortion"),
        (edited("is_fisheye", value=True), "distortion"),
        *((edited(key, value=1e-4), f"{key} is 0.0001; lens") for key in ("k1", "k2", "k3", "k4", "p1", "p2")),
        (edited("frames", 2, "k1", value=0.1), "frame 3: k1"),
        (edited("k1", value="none"), "'k1' must be"),
        (edited("fps", value=0), "frames per second"),
        (edited("fps", value="24"), "'fps' must be"),
        (edited("world_up", value="-y"), "'world_up' is '-y'"),
        (edited("world_up", value=["+y"]), "'world_up'"),
        (edited("keyframes", value=[], base=keyframes), "at least two"),
        (edited("keyframes", value=7, base=keyframes), "list of objects"),
        (edited("keyframes", 1, "frame", value=1, base=keyframes), "must grow"),
        (edited("keyframes", 3, "frame", value=10**8, base=keyframes), "span"),
        (edited("keyframes", 1, value={"position": [0, 0, 0]}, base=keyframes), "all or none"),
        (edited("keyframes", 1, "fov", value=180, base=keyframes), "keyframe 2: 'fov'"),
        (edited("keyframes", 1, "position", value=[0, 1], base=keyframes), "keyframe 2: 'position'"),
        (edited("keyframes", 1, "position", value=[0, 1, 1e20], base=keyframes), "too far"),
        (edited("keyframes", 1, "position", value=[0, 5, 20], base=keyframes), "straight up"),
        (edited("keyframes", 1, "position", value=[0, 0, 20], base=keyframes), "own position"),
        (edited("keyframes", 1, "quaternion", value=[0, 0, 0, 1], base=keyframes), "one of the two"),
        (edited("keyframes", 1, value={"frame": 9, "fov": 9, "look_at": [1, 1, 1]}, base=keyframes), "'position'"),
        (
            edited(
                "keyframes",
                1,
                value={"frame": 9, "position": [1, 1, 1], "quaternion": [0, 0, 0, 0], "fov": 40},
                base=keyframes,
            ),
            "zero",
        ),
        (edited("world_up", value=None, base=keyframes), "--cameras_up"),
    ],
)
def test_bad_json(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_cameras(write(tmp_path / "cameras.json", data))
    assert "\n" not in str(caught.value) and "cameras.json" in str(caught.value)


def test_missing_keys(tmp_path: Path) -> None:
    for key, message in (("w", "'w' is missing"), ("h", "'h' is missing"), ("frames", "neither 'frames'")):
        data = transforms()
        del data[key]
        with pytest.raises(InputError, match=message):
            read_cameras(write(tmp_path / "t.json", data))
    data = transforms()
    del data["frames"][2]["fl_x"]
    with pytest.raises(InputError, match="frame 3: 'fl_x' is missing"):
        read_cameras(write(tmp_path / "t.json", data))


def test_files_that_are_not_cameras(tmp_path: Path) -> None:
    for name, data, message in (
        ("gone.json", None, "does not exist"),
        ("gone", None, "does not exist"),
        ("a.json", b"{", "not valid JSON"),
        ("b.json", b"\xff\xff", "not valid JSON"),
        ("c.json", b'{"frames":' + b"[" * 200_000, "not valid JSON"),
        ("d.fbx", b"", "cameras come as"),
        ("e.gltf", b'{"asset": {"version": "2.0"}}', "no camera"),
        ("e1.gltf", b'{"asset": {"version": "1.0"}}', "only 2 is read"),
        ("e2.gltf", b"{}", "not a valid glTF"),
        ("e3.gltf", b"[]", "not an object"),
        ("f.gltf", b"[" * 200_000, "not a valid glTF"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_cameras(tmp_path / name)
    with pytest.raises(InputError, match="no COLMAP model"):
        read_cameras(tmp_path)


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    for name, data in (("t.json", transforms()), ("k.json", keyframes()), ("a.gltf", inlined(slide()).json)):
        plain = read_cameras(write(tmp_path / name, data))
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8-sig")
        assert_same(plain, read_cameras(tmp_path / name), 0)


@pytest.mark.parametrize("key", ["applied_transform", "applied_scale"])
def test_moved_poses_are_taken_as_they_stand_with_a_note(tmp_path: Path, key: str, capsys) -> None:
    file = tmp_path / "t.json"
    same = [1, 1.0] if key == "applied_scale" else [IDENTITY, IDENTITY[:3]]
    for value in same:
        assert len(read_cameras(write(file, {**transforms(), key: value}))) == 3
    assert not capsys.readouterr().err
    moved = [[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]]  # as nerfstudio writes it for COLMAP models
    for value in [0.5, -1] if key == "applied_scale" else [moved, [*IDENTITY[:2], [0, 0, 1, 0.1]]]:
        assert_same(
            read_cameras(write(file, {**transforms(), key: value})), read_cameras(write(file, transforms())), 0
        )
        assert "the mesh must be in the world of the poses" in capsys.readouterr().err
    for value in ("x", None, [], [[1]]):
        with pytest.raises(InputError, match=f"'{key}' must be"):
            read_cameras(write(file, {**transforms(), key: value}))


@pytest.mark.parametrize("where", ["asset", "scene"])
def test_gltf_says_which_way_is_up(tmp_path: Path, where: str) -> None:
    gltf, file = slide(), tmp_path / "camera.glb"
    gltf.json |= {"scene": 0, "scenes": [{"nodes": [0]}]}
    owner = gltf.json["asset"] if where == "asset" else gltf.json["scenes"][0]
    owner["extras"] = {"world_up": "+z"}
    assert gltf.read(tmp_path).up == read_cameras(file, up="+z").up == "+z"
    with pytest.raises(InputError, match="says 'world_up'"):
        read_cameras(file, up="+y")
    for wrong in ("-z", None, ["+z"]):
        owner["extras"] = {"world_up": wrong}
        with pytest.raises(InputError, match="must be '\\+y' or"):
            gltf.read(tmp_path)


def test_up_axis_contradictions(tmp_path: Path) -> None:
    file = write(tmp_path / "t.json", transforms())
    assert read_cameras(file, up="+y").up == "+y"
    with pytest.raises(InputError, match="says 'world_up'"):
        read_cameras(file, up="+z")
    with pytest.raises(InputError, match="choose"):
        read_cameras(file, up="x")


def leaves(data: object, trail: tuple = ()) -> list[tuple]:
    """The place of every value in a JSON tree."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in [(*trail, key), *leaves(value, (*trail, key))]]


def is_read(source: Path) -> bool:
    """Whether a path comes out of a damaged file, and not an InputError of one line; all else is a failure."""
    try:
        path = read_cameras(source)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    assert isinstance(path, CameraPath) and len(path) >= 2 and np.isfinite(path.c2w).all()
    return True


@pytest.mark.parametrize("kind", ["transforms", "keyframes", "gltf"])
def test_damaged_values_never_end_in_another_error(tmp_path: Path, kind: str) -> None:
    """Put odd values in every place of a valid file: it is read, or refused with an InputError."""
    gltf = slide().animate(0, "rotation", [0, 1], [[0, 0, 0, 1], [0, 0, 1, 1]])
    data = {"transforms": transforms, "keyframes": keyframes, "gltf": lambda: gltf.json}[kind]()
    rng = np.random.default_rng(0)
    odd = [None, True, -1, 0, 2**40, 1e300, "x", [], {}, [[]], [None], {"a": 1}]
    refused = 0
    for place in leaves(data):
        for value in rng.choice(len(odd), 5, replace=False):
            damaged = copy.deepcopy(data)
            entry = damaged
            for key in place[:-1]:
                entry = entry[key]
            entry[place[-1]] = odd[value]
            if kind == "gltf":
                gltf.json = damaged
                (tmp_path / "t.glb").write_bytes(gltf.glb())
                refused += not is_read(tmp_path / "t.glb")
            else:
                refused += not is_read(write(tmp_path / "t.json", damaged))
    assert refused > 50


def test_damaged_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = slide().glb()
    folder = write_colmap(tmp_path / "model", random_path(3), True)
    images = (folder / "images.bin").read_bytes()
    for _ in range(300):
        for file, data, source in ((tmp_path / "a.glb", whole, None), (folder / "images.bin", images, folder)):
            damaged = bytearray(data)
            damaged[rng.integers(len(data))] = rng.integers(256)
            file.write_bytes(damaged)
            try:
                read_cameras(source or file, up="+y")
            except InputError as error:
                assert "\n" not in str(error)


def test_broken_files_end_in_a_path_or_one_line(tmp_path: Path) -> None:
    """Bytes changed, cut, repeated or swapped, in every kind of file: 100 of each."""
    gltf = slide().animate(0, "rotation", [0, 1], [[0, 0, 0, 1], [0, 0, 1, 1]])
    gltf.json["asset"]["extras"] = {"world_up": "+z"}
    whole = {
        "a.glb": gltf.glb(),
        "t.json": json.dumps(transforms()).encode(),
        "k.json": json.dumps(keyframes()).encode(),
    }
    whole["a.gltf"] = json.dumps(inlined(gltf).json).encode()
    rng = np.random.default_rng(2)
    outcomes = {name: [] for name in whole}
    for name, data in whole.items():
        for _ in range(100):
            damaged = bytearray(data)
            start, length = rng.integers(len(data)), rng.integers(1, 30)
            piece = damaged[start : start + length]
            kind = rng.integers(4)
            if kind == 0:
                damaged[start] = rng.integers(256)
            elif kind == 1:
                damaged[start] = rng.choice(list(b"0123456789-.eE"))
            else:
                damaged[start : start + length] = piece * 2 if kind == 2 else b""
            (tmp_path / name).write_bytes(damaged)
            outcomes[name].append(is_read(tmp_path / name))
    assert all(0.05 < np.mean(read) < 0.95 for read in outcomes.values()), outcomes


# --- built-in paths ---


@pytest.mark.parametrize("up", ["+y", "+z"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_builtin_paths(kind: str, scale: float, up: str) -> None:
    bounds = scale * np.array([[-2.0, -1, -3], [4, 5, 1]])
    path = builtin_path(kind, bounds, up, 2, 30)
    assert len(path) == 91 and path.up == up and path.fps == 30 and to_arcs(path, 2).numbers == path.numbers
    eyes, forward, upward = path.c2w[:, :3, 3], -path.c2w[:, :3, 2], path.c2w[:, :3, 1]
    assert not ((eyes > bounds[0]) & (eyes < bounds[1])).all(1).any()
    assert (upward[:, "xyz".index(up[1])] > 0.4).all()  # upright
    steps = np.linalg.norm(np.diff(eyes, axis=0), axis=1)
    assert steps.max() < 0.2 * scale and steps.min() > 0.3 * steps.max()
    corners = np.array(np.meshgrid(*bounds.T)).reshape(3, -1).T
    to_scene = corners.mean(0) - eyes
    distance = np.linalg.norm(to_scene, axis=1)
    if kind != "flythrough":
        np.testing.assert_allclose(forward, to_scene / distance[:, None], atol=1e-9)
    if kind == "orbit":
        np.testing.assert_allclose(distance, distance[0])
        local = (corners - eyes[:, None]) @ path.c2w[:, :3, :3]  # every corner is in the picture
        assert np.abs(path.focal[0, 1] * local[..., 1] / local[..., 2]).max() < path.size[1] / 2
    if kind == "dolly":
        assert distance[-1] == pytest.approx(distance[0] / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_builtin_paths_are_the_same_in_both_worlds(kind: str) -> None:
    z_up = np.array([[-2.0, -1, -3], [4, 9, 1]])
    y_up = np.sort(z_up @ Z_UP_TO_Y_UP.T, axis=0)
    a, b = builtin_path(kind, z_up, "+z"), builtin_path(kind, y_up, "+y")
    np.testing.assert_allclose(Z_UP_TO_Y_UP @ a.c2w[:, :3], b.c2w[:, :3], atol=1e-9)


def test_builtin_paths_that_cannot_be() -> None:
    box = [[-1, -1, -1], [1, 1, 1]]
    for arguments in (
        ("spiral", box, "+y"),
        ("orbit", box, "x"),
        ("orbit", box, "+y", 0),
        ("orbit", [[0, 0, 0], [0, 0, 0]], "+y"),
        ("orbit", [[1, 1, 1], [0, 0, 0]], "+y"),
        ("orbit", [[0, 0, 0], [np.nan, 1, 1]], "+y"),
        ("orbit", [[0, 0, 0], [np.inf, 1, 1]], "+y"),
    ):
        with pytest.raises(InputError):
            builtin_path(*arguments)
    for flat in ([[0, 0, 0], [1, 0, 1]], [[0, 0, 0], [0, 1, 0]]):
        assert all(len(builtin_path(kind, flat, "+y")) == 46 for kind in KINDS)
