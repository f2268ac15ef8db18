"""Pictures as cameras, scanners and paint programs write them, read as uint8 RGB."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.cli import InputError
from utils.images import ORIENTATION, picture_size, read_image

CORNERS = np.zeros((20, 30, 3), np.uint8)
CORNERS[:10, :15], CORNERS[:10, 15:], CORNERS[10:, :15] = (255, 0, 0), (0, 255, 0), (0, 0, 255)  # the last is black
# orientation -> how the stored pixels are turned to stand upright (EXIF 2.3, tag 0x0112)
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_turned_picture_stands_upright(tmp_path: Path, orientation: int, suffix: str):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(CORNERS).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    wanted = UPRIGHT[orientation](CORNERS)
    assert (read_image(path) == wanted).all()
    assert picture_size(path) == wanted.shape[1::-1]


def grey_ramp(dtype: type, most: int) -> np.ndarray:
    return np.linspace(0, most, 600).reshape(20, 30).astype(dtype)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_keeps_its_levels(tmp_path: Path, name: str):
    values = grey_ramp(np.uint16, 65535)
    Image.fromarray(values).save(tmp_path / name)
    found = read_image(tmp_path / name)
    assert found.dtype == np.uint8 and found.shape == (20, 30, 3)
    assert np.abs(found - values[..., None] / 257).max() <= 0.5 + 1e-4


def test_white_may_be_zero_and_transparent(tmp_path: Path):
    values = grey_ramp(np.uint16, 65535)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.abs(read_image(tmp_path / "a.tif") - (65535 - values[..., None]) / 257).max() <= 0.5 + 1e-4
    Image.fromarray(values).save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_every_mode_shows_its_colours(tmp_path: Path, mode: str):
    picture = Image.fromarray(CORNERS)
    picture.convert(mode).save(tmp_path / "a.tif")
    wanted = np.asarray(picture.convert(mode).convert("RGB") if mode in "L1" else picture).astype(int)
    assert np.abs(read_image(tmp_path / "a.tif") - wanted).max() <= 2


def test_transparent_parts_are_white_and_noted(tmp_path: Path, capsys: pytest.CaptureFixture):
    alpha = np.full((20, 30, 1), 255, np.uint8)
    Image.fromarray(np.dstack([CORNERS, alpha])).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == CORNERS).all()
    assert capsys.readouterr().err == ""
    alpha[:10] = 0
    alpha[10:, :15] = 51
    for name in ("b.png", "c.png"):
        Image.fromarray(np.dstack([CORNERS, alpha])).save(tmp_path / name)
        found = read_image(tmp_path / name)
        assert (found[:10] == 255).all() and (found[10:, :15] == (204, 204, 255)).all() and not found[10:, 15:].any()
    assert capsys.readouterr().err == f"note: {tmp_path}: transparent parts of pictures are white\n"
    Image.fromarray(CORNERS).quantize(8).save(tmp_path / "d.gif", transparency=0)
    assert (read_image(tmp_path / "d.gif") == 255).all(-1).any()


def test_the_first_of_several_pictures_is_used(tmp_path: Path, capsys: pytest.CaptureFixture):
    first = Image.fromarray(CORNERS)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[first.rotate(180)])
    assert (read_image(tmp_path / "a.tif") == CORNERS).all()
    assert "the first is used" in capsys.readouterr().err


def write(path: Path, content: bytes | Image.Image) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tif", Image.fromarray(grey_ramp(np.float32, 9)), "floating-point numbers, .*tone-map"),
        ("a.tif", Image.fromarray(grey_ramp(np.int32, 9)), "32-bit integers"),
        ("a.exr", b"v/1\x01\x02\0\0\0", "OpenEXR"),
        ("a.hdr", b"#?RADIANCE\n", "Radiance"),
        ("a.tif", b"II*\0\x08\0\0\0\0\0", "cannot be read as an image"),
        ("a.png", b"", "empty file"),
        ("a.png", b"<html>", "unknown format"),
        ("a.png", Image.new("RGB", (400, 1)), "400x1"),
        ("a.png", Image.new("1", (12_000, 9_000)), "more than 89 million pixels"),
        ("a.png", Image.new("1", (20_000, 18_000)), "more than 89 million pixels"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | Image.Image, words: str, recwarn: pytest.WarningsRecorder
):
    write(tmp_path / name, content)
    with pytest.raises(InputError, match=words) as error:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert not [warning for warning in recwarn if "DecompressionBomb" in warning.category.__name__]


def test_a_folder_is_named_as_one(tmp_path: Path):
    with pytest.raises(InputError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp"])
def test_a_damaged_picture_is_read_or_refused(tmp_path: Path, suffix: str):
    """Cut short, or with bytes changed in its first part, where the structure is."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(CORNERS).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(3):
            data[rng.integers(min(len(data), 200))] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert read_image(path).dtype == np.uint8
        except InputError as error:
            assert str(path) in str(error)
