"""COLMAP models, text and binary."""

from pathlib import Path

import numpy as np
import pytest

from tests.cameras.cameras_common import assert_same, random_path, write_colmap
from utils.cameras.read import read_cameras
from utils.cli import InputError


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
    ("model", "extra", "largest"),
    [
        ("OPENCV", (0.1, -0.2, 0, 0), "OPENCV, largest coefficient -0.2"),
        ("FOV", (0.5,), "FOV, largest coefficient 0.5"),
    ],
)
def test_colmap_distortion_is_noted_once(
    tmp_path: Path, capsys, binary: bool, model: str, extra: tuple, largest: str
) -> None:
    path = random_path()
    assert_same(path, read_cameras(write_colmap(tmp_path, path, binary, model, extra), up="+z"), 1e-9)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and largest in notes[0]


def test_colmap_images_of_two_sizes(tmp_path: Path, capsys) -> None:
    """As COLMAP's image_undistorter writes them, with one camera for each image."""
    path = random_path(3)
    folder = write_colmap(tmp_path, path, False)
    file = folder / "cameras.txt"
    file.write_text(file.read_text().replace("2 PINHOLE 640 480", "2 pinhole 320 242"))
    back = read_cameras(folder, up="+y")
    assert back.size == (640, 480) and "1 of 3 are brought to 640x480" in capsys.readouterr().err
    np.testing.assert_allclose(back.focal[1], 2 * path.focal[1])
    np.testing.assert_allclose(back.center[1], 2 * path.center[1] - (0, 2))  # the middle row stays the middle row
    np.testing.assert_allclose(back.center[[0, 2]], path.center[[0, 2]])


def test_colmap_models_of_several_cameras_or_parts_are_noted(tmp_path: Path, capsys) -> None:
    """A rig's images lie in a folder for each of its cameras, and newer models have rigs.bin and frames.bin beside."""
    path = random_path(12)
    for part in ("0", "1"):
        folder = write_colmap(tmp_path / "sparse" / part, path, False)
    for name in ("rigs.bin", "frames.bin"):
        (tmp_path / "sparse" / "0" / name).write_bytes(bytes(8))
    assert_same(path, read_cameras(tmp_path, up="+z"), 1e-9)
    assert "sparse/0 is read, not the other parts of the capture: 1" in capsys.readouterr().err
    read_cameras(folder, up="+z")
    assert not capsys.readouterr().err
    (folder / "images.txt").write_text((folder / "images.txt").read_text().replace("im age_2.", "right/im age_2."))
    moved = read_cameras(folder, up="+z")
    np.testing.assert_allclose(moved.c2w[-1], path.c2w[1], atol=1e-9)
    assert "holds images of 2 folders ('', 'right')" in capsys.readouterr().err


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
