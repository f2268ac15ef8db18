"""Damaged camera JSON: one line that says what is wrong."""

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cameras.cameras_common import (
    Gltf,
    assert_same,
    keyframes,
    random_path,
    slide,
    transforms,
    write,
    write_colmap,
)
from utils.cameras.path import CameraPath
from utils.cameras.read import read_cameras
from utils.cli import InputError


def inlined(gltf: Gltf) -> Gltf:
    """With its buffer in the JSON, so that this is a whole .gltf file."""
    gltf.json["buffers"][0]["uri"] = "data:;base64," + base64.b64encode(gltf.blob).decode()
    return gltf


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
        ([{"position": [0, 0, 0]}], "Gaussian splats"),
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
        (edited("w", value=0), "image size 0x480"),
        (edited("h", value=-3), "image size"),
        (edited("w", value=10.5), "whole number"),
        (edited("camera_model", value="EQUIRECTANGULAR"), "not a perspective camera"),
        (edited("camera_model", value=["OPENCV"]), "not a perspective camera"),
        (edited("frames", 2, "k1", value="x"), "frame 3: 'k1' must be"),
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
    """The path to every value in a JSON tree."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in [(*trail, key), *leaves(value, (*trail, key))]]


def viewer_path() -> dict:
    frames = [{"camera_to_world": pose.ravel().tolist(), "fov": 50, "aspect": 1.5} for pose in random_path(3).c2w]
    size = {"render_width": 640, "render_height": 480}
    return {"camera_type": "perspective", **size, "fps": 24, "seconds": 2, "camera_path": frames}


def splats() -> list:
    return [
        {"id": i, "img_name": f"{i}", "width": 640, "height": 480, "fx": 500, "fy": 500}
        | {"position": pose[:3, 3].tolist(), "rotation": pose[:3, :3].tolist()}
        for i, pose in enumerate(random_path(3).c2w)
    ]


def is_read(source: Path) -> bool:
    """Whether a damaged file gives a path; False for a one-line InputError. Anything else is a failure."""
    try:
        path = read_cameras(source, up=None if source.suffix in (".glb", ".gltf") else "+y")
    except InputError as error:
        assert "\n" not in str(error)
        return False
    assert isinstance(path, CameraPath) and len(path) >= 2 and np.isfinite(path.c2w).all()
    return True


@pytest.mark.parametrize("kind", ["transforms", "keyframes", "gltf", "viewer", "splats"])
def test_damaged_values_never_end_in_another_error(tmp_path: Path, kind: str) -> None:
    """Put odd values in every place of a valid file: it is read, or refused with an InputError."""
    gltf = slide().animate(0, "rotation", [0, 1], [[0, 0, 0, 1], [0, 0, 1, 1]])
    made = {"transforms": transforms, "keyframes": keyframes, "viewer": viewer_path, "splats": splats}
    data = gltf.json if kind == "gltf" else made[kind]()
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
