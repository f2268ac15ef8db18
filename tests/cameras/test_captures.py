"""Camera files of real captures and of other programs are read as the path that they hold."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.cameras.cameras_common import FLIP, assert_same, random_path, transforms, write
from utils.cameras.builtin import builtin_path
from utils.cameras.check import suspicions
from utils.cameras.path import CameraPath, to_arcs
from utils.cameras.read import read_cameras, write_transforms
from utils.cameras.viewers import write_camera_path
from utils.cli import InputError

BOX = np.array([[-1.0, -2, 0], [1, 2, 3]])


def orbit(size: tuple[int, int] = (1080, 720), up: str = "+z") -> CameraPath:
    return builtin_path("orbit", BOX, up, size=size)


@pytest.mark.parametrize("key", ["k1", "k2", "k3", "k4", "p1", "p2"])
def test_distortion_is_noted_once_and_left_out(tmp_path: Path, capsys, key: str) -> None:
    data = transforms()
    plain = read_cameras(write(tmp_path / "t.json", data))
    data["frames"][1][key], data["frames"][2][key] = -0.05, 0.03
    assert_same(plain, read_cameras(write(tmp_path / "t.json", data)), 0)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and "largest coefficient -0.05" in notes[0]


def test_models_in_any_letter_case(tmp_path: Path, capsys) -> None:
    plain = read_cameras(write(tmp_path / "t.json", transforms()))
    for model in ("pinhole", "Simple_Pinhole", "opencv"):
        assert_same(plain, read_cameras(write(tmp_path / "t.json", {**transforms(), "camera_model": model})), 0)
    assert not capsys.readouterr().err
    for change in ({"camera_model": "opencv_fisheye"}, {"is_fisheye": True}):
        assert_same(plain, read_cameras(write(tmp_path / "t.json", {**transforms(), **change})), 0)
        assert "FISHEYE" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(1080, 720), (800, 800), (720, 1280)])
def test_nerf_synthetic_takes_the_size_of_the_edges(tmp_path: Path, size: tuple[int, int]) -> None:
    path = orbit()
    frames = [
        {"file_path": f"./train/r_{i}", "rotation": 0.01, "transform_matrix": pose.tolist()}
        for i, pose in enumerate(path.c2w)
    ]
    back = read_cameras(
        write(tmp_path / "transforms_train.json", {"camera_angle_x": 0.69, "frames": frames}), size=size
    )
    np.testing.assert_array_equal(back.c2w, path.c2w)
    assert back.size == size and back.up == "+z"
    np.testing.assert_allclose(2 * np.arctan(size[0] / 2 / back.focal), 0.69)
    np.testing.assert_allclose(back.center, np.tile(np.array(size) / 2, (46, 1)))


def test_several_image_sizes_become_one(tmp_path: Path, capsys) -> None:
    data = transforms()
    data["frames"][1] |= {"w": 1280, "h": 964}
    path, plain = read_cameras(write(tmp_path / "t.json", data)), random_path(3)
    assert path.size == (640, 480) and "1 of 3 are brought to 640x480" in capsys.readouterr().err
    np.testing.assert_array_equal(path.c2w, read_cameras(write(tmp_path / "t.json", transforms())).c2w)
    np.testing.assert_allclose(path.focal, plain.focal * [[1], [0.5], [1]])
    np.testing.assert_allclose(path.center, [plain.center[0], plain.center[1] / 2 - (0, 1), plain.center[2]])


def test_sizes_that_differ_by_pixels_are_cropped(tmp_path: Path) -> None:
    data = transforms()
    data["frames"][2] |= {"w": 638, "h": 481}
    path, plain = read_cameras(write(tmp_path / "t.json", data)), random_path(3)
    np.testing.assert_array_equal(path.focal, plain.focal)  # the focal length does not jitter
    np.testing.assert_allclose(path.center - plain.center, [[0, 0], [0, 0], [1, -0.5]], atol=1e-9)


def test_splat_cameras(tmp_path: Path) -> None:
    """cameras.json of 3D Gaussian Splatting: OpenCV axes, camera-to-world, test images before the others."""
    path = orbit()
    cameras = [
        {
            "id": i,
            "img_name": f"frame_{i + 1}",
            "width": 1080,
            "height": 720,
            "position": pose[:3, 3].tolist(),
            "rotation": (pose @ FLIP)[:3, :3].tolist(),
            "fx": focal[0],
            "fy": focal[1],
        }
        for i, (pose, focal) in enumerate(zip(path.c2w, path.focal, strict=True))
    ]
    file = write(tmp_path / "cameras.json", cameras[::8] + [c for i, c in enumerate(cameras) if i % 8])
    assert_same(path, read_cameras(file, up="+z"), 1e-12)
    assert_same(path, read_cameras(write(file, [{**c, "cx": 540, "cy": 360} for c in cameras]), up="+z"), 1e-12)
    unnamed = [{key: value for key, value in c.items() if key != "img_name"} for c in cameras]
    for others in (unnamed, [{**c, "img_name": c["id"]} for c in cameras], [{**c, "img_name": "a"} for c in cameras]):
        assert_same(path, read_cameras(write(file, others[::-1]), up="+z"), 1e-12)
    with pytest.raises(InputError, match="--cameras_up y or z"):
        read_cameras(file)
    with pytest.raises(InputError, match="camera 1: 'fx' must be"):
        read_cameras(write(file, [{**cameras[0], "fx": "wide"}, *cameras[1:]]), up="+z")


def viewer_file(path: CameraPath, fov: float = 50.0, **more: object) -> dict:
    frames = [{"camera_to_world": pose.ravel().tolist(), "fov": fov, "aspect": 1.5} for pose in path.c2w]
    keys = [{"matrix": str(pose.T.ravel().tolist()), "fov": fov, "aspect": 1.5} for pose in path.c2w[::45]]
    return {"keyframes": keys, "camera_type": "perspective", "camera_path": frames, **more}


def test_nerfstudio_camera_paths(tmp_path: Path) -> None:
    path, file = orbit(), tmp_path / "camera_path.json"
    for more, size, fps in (
        ({"render_width": 1080, "render_height": 720, "fps": 30, "seconds": 2}, (1080, 720), 30),
        ({"render_width": 1920, "render_height": 1080, "seconds": 2}, (1920, 1080), 23),  # 46 frames
        ({"fps": None}, (1620, 1080), 24),  # as high as the edges, with the stored aspect
    ):
        back = read_cameras(write(file, viewer_file(path, **more)), size=(1920, 1080))
        np.testing.assert_array_equal(back.c2w, path.c2w)
        assert (back.size, back.fps, back.up) == (size, fps, "+z")
        np.testing.assert_allclose(2 * np.arctan(size[1] / 2 / back.focal), np.radians(50))
    add_on = viewer_file(path, render_width=1080, render_height=720)
    for frame in add_on["camera_path"]:
        frame["aspect"] = 1  # whatever the size is
    assert read_cameras(write(file, add_on)).size == (1080, 720)
    for frame in add_on["camera_path"][1:]:
        del frame["fov"]  # the file's own is taken
    with pytest.raises(InputError, match="frame 2: 'fov' is missing"):
        read_cameras(write(file, add_on))
    focal = read_cameras(write(file, add_on | {"default_fov": 40})).focal[:, 1]
    np.testing.assert_allclose(np.degrees(2 * np.arctan(360 / focal)), [50, *[40] * (len(focal) - 1)])
    for change, message in (
        ({"camera_type": "equirectangular"}, "not a perspective camera"),
        ({"camera_path": []}, "at least two"),
        ({"camera_path": None}, "list of objects"),
        ({"render_width": 0, "render_height": 720}, "image size 0x720"),
        ({"camera_path": [{"camera_to_world": [1, 2]}]}, "frame 1: 'camera_to_world' must be"),
        ({"camera_path": [{"camera_to_world": np.eye(4).ravel().tolist(), "fov": 180}]}, "frame 1: 'fov'"),
    ):
        with pytest.raises(InputError, match=message):
            read_cameras(write(file, viewer_file(path) | change))


@pytest.mark.parametrize("up", ["+y", "+z"])
@pytest.mark.parametrize("size", [(1080, 720), (720, 1280)])
def test_a_written_camera_path_reads_back(tmp_path: Path, capsys, up: str, size: tuple[int, int]) -> None:
    path = orbit(size, up)
    write_camera_path(tmp_path / "new" / "camera_path.json", path)
    back = read_cameras(tmp_path / "new" / "camera_path.json")
    assert_same(path, back, 1e-6)
    assert (back.up, back.fps) == (up, path.fps) and not capsys.readouterr().err
    data = json.loads((tmp_path / "new" / "camera_path.json").read_text())
    for key, frame, pose in zip(data["keyframes"], data["camera_path"], path.c2w, strict=True):
        # What the viewer does with a keyframe: np.array(frame["matrix"]).reshape(4, 4).
        np.testing.assert_array_equal(np.array(key["matrix"]).reshape(4, 4), pose)
        assert key["fov"] == frame["fov"] == pytest.approx(45) and key["aspect"] == size[0] / size[1]
    assert len(data["keyframes"]) * data["default_transition_sec"] == pytest.approx(data["seconds"])


def test_a_camera_path_says_what_it_leaves_out(tmp_path: Path, capsys) -> None:
    write_camera_path(tmp_path / "c.json", random_path())
    assert "pixels off the middle" in capsys.readouterr().err


def realestate(path: CameraPath, stamps: np.ndarray) -> str:
    w2c = np.linalg.inv(path.c2w @ FLIP)[:, :3].reshape(len(path), 12)
    lens = np.hstack([path.focal / path.size, path.center / path.size, np.zeros((len(path), 2))])
    rows = [f"{int(t)} " + " ".join(f"{v:.9f}" for v in [*a, *b]) for t, a, b in zip(stamps, lens, w2c, strict=True)]
    return "https://www.youtube.com/watch?v=x\n" + "\n".join(rows) + "\n"


def test_realestate_text(tmp_path: Path, capsys) -> None:
    path, file = orbit(), tmp_path / "clip.txt"
    for size, wanted in (((1080, 720), (1080, 720)), ((1280, 720), (1080, 720)), ((720, 1280), (1920, 1280))):
        file.write_text(realestate(path, np.arange(46) * 33366.7))
        back = read_cameras(file, up="+z", size=size)
        np.testing.assert_allclose(back.c2w, path.c2w, atol=1e-6)
        assert back.size == wanted and back.fps == pytest.approx(29.97, abs=0.01)
        np.testing.assert_allclose(back.focal / back.size[1], path.focal / 720, rtol=1e-6)
    file.write_text(realestate(path, np.arange(46) * 2e6))  # a pose every other second is no frame number either
    back = read_cameras(file, up="+z")
    assert back.numbers == path.numbers and back.fps == 0.5
    with pytest.raises(InputError, match="--cameras_up"):
        read_cameras(file)
    with pytest.raises(InputError, match="lens of their own"):
        read_cameras(file, up="+z", fov=50)
    assert not capsys.readouterr().err


def tum(path: CameraPath, stamps: np.ndarray) -> str:
    quaternions = Rotation.from_matrix((path.c2w @ FLIP)[:, :3, :3]).as_quat()
    rows = [
        f"{t:.6f} " + " ".join(f"{v:.9f}" for v in [*pose[:3, 3], *q])
        for t, pose, q in zip(stamps, path.c2w, quaternions, strict=True)
    ]
    return "# timestamp tx ty tz qx qy qz qw\n" + "\n".join(rows) + "\n"


def test_tum_trajectories(tmp_path: Path) -> None:
    path, file = orbit(), tmp_path / "groundtruth.txt"
    file.write_text(tum(path, 1305031102.1753 + np.arange(46) / 30))
    back = read_cameras(file, up="+z", size=(640, 480), fov=45)
    np.testing.assert_allclose(back.c2w, path.c2w, atol=1e-6)
    assert (back.size, back.fps, back.numbers) == ((640, 480), 30, path.numbers)
    np.testing.assert_allclose(back.focal, 240 / np.tan(np.radians(22.5)))
    with pytest.raises(InputError, match="pass --fov"):
        read_cameras(file, up="+z")
    file.write_text(tum(path, np.arange(46)))  # frames instead of seconds
    back = read_cameras(file, up="+z", fov=45)
    assert back.fps == 24 and back.numbers == path.numbers


def test_time_stamps_keep_gaps_and_uneven_rates(tmp_path: Path) -> None:
    path, file = orbit(), tmp_path / "t.txt"
    kept = [0, 1, 2, 5, 6, 7, 20, 21, 45]
    part = CameraPath(
        path.c2w[kept], path.focal[kept], path.center[kept], path.size, path.up, tuple(range(9)), path.fps
    )
    file.write_text(tum(part, np.array(kept) / 25))
    back = read_cameras(file, up="+z", fov=45)
    assert back.numbers == tuple(k + 1 for k in kept) and back.fps == 25
    uneven = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, 46))
    file.write_text(tum(path, uneven))
    back = read_cameras(file, up="+z", fov=45, fps=30)
    assert len(back) == round((uneven[-1] - uneven[0]) * 30) + 1 and back.fps == 30
    halfway = np.interp((uneven[0] + uneven[-1]) / 2, uneven, np.arange(46))  # in poses of an even circle
    angle = np.arctan2(*(to_arcs(back, 2).c2w[45, :2, 3] - BOX.mean(0)[:2])[::-1])
    wanted = np.radians(-90 - 20 + 40 * halfway / 45)
    assert angle == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no camera poses"),
        ("1 2 3\n", "line 1 holds 3 numbers"),
        ("0 0 0 0 0 0 0 1\n1 0 0 0 0 0 0\n", "line 2 holds 7 numbers"),
        ("0 0 0 0 0 0 0 1\n", "at least two"),
        ("0 0 0 0 0 0 0 1\n0 0 0 1 0 0 0 1\n", "times must grow"),
        ("0 0 0 0 0 0 0 1\n1 0 0 1 0 0 0 0\n", "quaternion is zero"),
        ("0 0 0 0 0 0 0 1\nnan 0 0 1 0 0 0 1\n", "pose 2 holds NaN"),
        ("0 0 0 0 0 0 0 1\nx 0 0 1 0 0 0 1\n", "line 2: expected numbers"),
        ("0 0 0 0 0 0 0 1\n0.1 0 0 0 0 0 0 1\n1e7 0 0 1 0 0 0 1\n1e7 0 0 1 0 0 0 1\n", "times must grow"),
        ("0 0 0 0 0 0 0 1\n0.1 0 0 0 0 0 0 1\n1e7 0 0 1 0 0 0 1\n2.3e7 0 0 1 0 0 0 1\n", "at most 100000"),
        ("1403636579763555584 0 0 0 0 0 0 1\n1403636579813555456 0 0 1 0 0 0 1\n", "5e\\+07 apart; give seconds"),
        ("0 0 1 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n1 0 1 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n", "focal length"),
    ],
)
def test_bad_text(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_cameras(tmp_path / "t.txt", up="+z", fov=None if "0.5 0.5" in text else 45)
    assert "\n" not in str(caught.value)


def changed(path: CameraPath, file: Path, change) -> Path:
    write_transforms(file, path)
    data = json.loads(file.read_text())
    for frame in data["frames"]:
        frame["transform_matrix"] = change(np.array(frame["transform_matrix"])).tolist()
    return write(file, data)


@pytest.mark.parametrize("up", ["+y", "+z"])
def test_other_axes_are_suspected_and_read_with_the_flag(tmp_path: Path, up: str) -> None:
    path = orbit(up=up)
    file = changed(path, tmp_path / "t.json", lambda pose: pose @ FLIP)
    assert not suspicions(path) and not suspicions(random_path(50))
    (warning,) = suspicions(read_cameras(file))
    assert "OpenCV axes" in warning and "--camera_axes opencv" in warning
    back = read_cameras(file, axes="opencv")
    assert_same(path, back, 1e-12)
    assert not suspicions(back)


def test_transposed_matrices(tmp_path: Path, capsys) -> None:
    path = orbit()
    assert_same(path, read_cameras(changed(path, tmp_path / "t.json", np.transpose)), 1e-12)
    assert "transposed" in capsys.readouterr().err
    (warning,) = suspicions(read_cameras(changed(path, tmp_path / "t.json", np.linalg.inv)))
    assert "world-to-camera" in warning


def test_flags_that_contradict_the_format(tmp_path: Path) -> None:
    file = write(tmp_path / "t.json", transforms())
    with pytest.raises(InputError, match="--fov is for TUM"):
        read_cameras(file, fov=40)
    data = {"world_up": "+y", "fov": 40, "keyframes": [{"position": [i, 0, 0], "look_at": [0, 0, 9]} for i in (0, 1)]}
    with pytest.raises(InputError, match="drop --camera_axes"):
        read_cameras(write(file, data), axes="opencv")
