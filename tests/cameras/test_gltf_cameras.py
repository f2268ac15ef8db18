"""Animated cameras of glTF files."""

import base64
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from tests.cameras.cameras_common import (
    Gltf,
    slide,
    turns_about,
    write,
)
from utils.cameras.read import read_cameras
from utils.cli import InputError


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
        (change("nodes", 0, "camera", value=3), "cameras\\[3\\]"),
        (change("cameras", 0, value={"type": "orthographic", "orthographic": {}}), "orthographic"),
        (change("cameras", 0, "type", value="orthographic"), "orthographic"),  # whatever lens lies beside it
        (change("cameras", 0, "perspective", value=None), "no lens"),
        (change("cameras", 0, "perspective", value={"znear": 0.1}), "camera 0: 'yfov' is missing"),
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


def test_a_camera_that_stands_still(tmp_path: Path, capsys) -> None:
    gltf = Gltf([{"camera": 0, "translation": [1, 2, 3]}])
    del gltf.json["animations"]
    path = gltf.read(tmp_path)
    assert len(path) == 46 and (path.c2w[:, :3, 3] == (1, 2, 3)).all() and (path.c2w == path.c2w[0]).all()
    assert "not animated: all frames are alike" in capsys.readouterr().err
    gltf.json["nodes"].append({"camera": 0})
    with pytest.raises(InputError, match="2 cameras \\(None, None\\), none of them animated"):
        gltf.read(tmp_path)


def test_a_lens_without_aspect_takes_that_of_the_edges(tmp_path: Path) -> None:
    gltf = slide()
    del gltf.json["cameras"][0]["perspective"]["aspectRatio"]
    assert gltf.read(tmp_path).size == (1080, 720)
    assert read_cameras(tmp_path / "camera.glb", size=(1920, 1080)).size == (1280, 720)


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
    lies += [whole[:8] + struct.pack("<I", len(whole) + 4) + whole[12:] + b"more"]
    lies += [whole[:12] + struct.pack("<I", length) + whole[16:] for length in (0, 5, 10**9, 2**32 - 1)]
    for data in lies + [whole[:cut] for cut in range(0, len(whole) - 4, 37)]:
        file.write_bytes(data)
        with pytest.raises(InputError):
            read_cameras(file)
