"""Cache files: atomic, of one identity, and made again when they are damaged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import synthetic.clips
import synthetic.pictures
from synthetic.clips import VARIANTS, SyntheticClips, cached_clip, clip_styles, draw_clips
from synthetic.pictures import DETECTED, SIZE, STYLES, VIEWS, cached_town, load_towns, style_seeds
from synthetic.styles import make_style
from utils.data.tensor_cache import read_arrays, write_arrays

IDENTITY = {"town": 3, "size": [36, 24], "split": "train"}
SMALL = (36, 24)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8),
        "noise": rng.standard_normal((3, 5)).astype(np.float32),
        "empty": np.zeros((0, 4), np.int64),
        "flipped": rng.standard_normal((4, 6))[:, ::-1],
    }


def assert_equal(found: dict[str, np.ndarray] | None, wanted: dict[str, np.ndarray]) -> None:
    assert found is not None and found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def flip_bit(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"no arrays here",
    "half": lambda data: data[: len(data) // 2],
    "last byte gone": lambda data: data[:-1],
    "longer": lambda data: data + b"\0" * 8,
    "zeros at the end": lambda data: data[:-64] + b"\0" * 64,
    "first payload bit": lambda data: flip_bit(data, 8 + int.from_bytes(data[:8], "little")),
    "last payload bit": lambda data: flip_bit(data, len(data) - 1),
    "header": lambda data: flip_bit(data, 20),
    "header length": lambda data: b"\xff" * 8 + data[8:],
}


def test_round_trip(tmp_path: Path, arrays: dict[str, np.ndarray]):
    path = tmp_path / "deep" / "a.safetensors"
    write_arrays(path, arrays, IDENTITY)
    assert_equal(read_arrays(path, IDENTITY), arrays)
    assert_equal(read_arrays(path, dict(reversed(IDENTITY.items()))), arrays)  # the order does not matter
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]
    write_arrays(path, {"noise": arrays["noise"]}, IDENTITY)
    assert_equal(read_arrays(path, IDENTITY), {"noise": arrays["noise"]})


def test_a_missing_file_or_a_folder_is_none(tmp_path: Path):
    assert read_arrays(tmp_path / "a.safetensors", IDENTITY) is None
    assert read_arrays(tmp_path, IDENTITY) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_none(tmp_path: Path, arrays: dict[str, np.ndarray], damage: str):
    path = tmp_path / "a.safetensors"
    write_arrays(path, arrays, IDENTITY)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert read_arrays(path, IDENTITY) is None
    write_arrays(path, arrays, IDENTITY)
    assert_equal(read_arrays(path, IDENTITY), arrays)


@pytest.mark.parametrize("other", [{"town": 4}, {"size": [24, 36]}, {"version": 2}, {"split": "test"}])
def test_a_foreign_identity_is_none(tmp_path: Path, arrays: dict[str, np.ndarray], other: dict):
    path = tmp_path / "a.safetensors"
    write_arrays(path, arrays, IDENTITY)
    assert read_arrays(path, IDENTITY | other) is None
    assert read_arrays(path, {}) is None


def test_a_file_of_someone_else_is_none(tmp_path: Path, arrays: dict[str, np.ndarray]):
    path = tmp_path / "a.safetensors"
    whole = {"noise": arrays["noise"]}
    save_file(whole, path)
    assert read_arrays(path, IDENTITY) is None
    save_file(whole, path, {"identity": "{}"})  # no hash
    assert read_arrays(path, {}) is None


def test_swapped_arrays_are_none(tmp_path: Path):
    """The hash covers names, types and shapes, not bytes alone."""
    a, b = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(6, 12, dtype=np.int32).reshape(2, 3)
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for name, pair in ((path, (a, b)), (other, (b, a))):
        write_arrays(name, dict(zip("ab", pair, strict=True)), IDENTITY)
    ours, theirs = path.read_bytes(), other.read_bytes()
    start = 8 + int.from_bytes(ours[:8], "little")
    path.write_bytes(ours[:start] + theirs[start:])
    assert list(load_file(path)) == ["a", "b"] and read_arrays(path, IDENTITY) is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, arrays: dict[str, np.ndarray]):
    path = tmp_path / "a.safetensors"
    write_arrays(path, arrays, IDENTITY)
    with pytest.raises(Exception):  # noqa: B017  # any exception of the library for an array that it cannot store
        write_arrays(path, {"a": np.array(["words"])}, IDENTITY)
    assert_equal(read_arrays(path, IDENTITY), arrays)
    assert len(list(tmp_path.iterdir())) == 1


# Towns and clips


@pytest.mark.slow
def test_a_town_is_drawn_once_and_again_when_damaged(tmp_path: Path):
    town = cached_town("test", 0, tmp_path, SMALL)
    assert town.images.shape == (VIEWS, STYLES, 24, 36, 3) and town.edges.shape == (VIEWS, 24, 36)
    assert town.detected.shape == (len(DETECTED), 24, 36) and town.detected.max() > 60
    assert town.captions == tuple(make_style(seed).caption for seed in style_seeds("test", 0))
    assert town.images.std() > 20 and town.edges.max() > 60
    (path,) = tmp_path.iterdir()
    made, whole = path.stat().st_mtime_ns, path.read_bytes()
    again = cached_town("test", 0, tmp_path, SMALL)
    assert path.stat().st_mtime_ns == made and np.array_equal(again.images, town.images)
    path.write_bytes(flip_bit(whole, len(whole) - 5))
    again = cached_town("test", 0, tmp_path, SMALL)
    assert np.array_equal(again.images, town.images) and np.array_equal(again.edges, town.edges)
    assert cached_town("test", 0, tmp_path, SMALL).captions == town.captions and path.stat().st_mtime_ns > made


def store_town(folder: Path, number: int, views: int) -> np.ndarray:
    """Store a town of `views` views in the cache; its pictures are noise."""
    images = np.random.default_rng(number).integers(0, 256, (views, STYLES, *SIZE[::-1], 3), dtype=np.uint8)
    identity = {"split": "train", "number": number, "size": list(SIZE), "version": synthetic.pictures.VERSION}
    lines = {"edges": images[:, 0, :, :, 0], "coarse": images[:, 0, :, :, 1], "detected": images[:2, 1, :, :, 0]}
    arrays = {"images": images, **lines}
    write_arrays(folder / f"train_{number:05d}.safetensors", arrays, identity)
    return images


def test_towns_without_pictures_are_left_out(tmp_path: Path):
    stored = [store_town(tmp_path, number, views) for number, views in enumerate((2, 0, 3))]
    towns = load_towns("train", 3, tmp_path)
    assert [len(town.images) for town in towns] == [2, 3]
    assert np.array_equal(towns[1].images, stored[2])
    assert towns[1].captions[0] == make_style(style_seeds("train", 2)[0]).caption


def store_clip(folder: Path, number: int, frames: int = 3) -> dict[str, np.ndarray]:
    """Store a clip of noise in the cache. No frames: a town without a path."""
    rng = np.random.default_rng(number)
    arrays = {
        "images": rng.integers(0, 256, (synthetic.clips.STYLES, frames, 8, 16, 3), dtype=np.uint8),
        "edges": rng.integers(0, 256, (frames, 8, 16), dtype=np.uint8),
        "noise": rng.standard_normal((2, 1, 2, 16)).astype(np.float32),
    }
    identity = {"split": "train", "number": number, "size": list(SIZE), "version": synthetic.clips.VERSION}
    write_arrays(folder / f"train_{number:05d}.safetensors", arrays, identity)
    return arrays


def test_clips_come_in_every_style_and_flipped(tmp_path: Path):
    stored = [store_clip(tmp_path, number) for number in range(2)]
    clips = SyntheticClips(2 * VARIANTS, "train", tmp_path)
    clips.prepare()
    assert len({clips.name(i) for i in range(len(clips))}) == len(clips) == 8
    for i in range(len(clips)):
        number, style, way = i // VARIANTS, i % VARIANTS // 2, (1, -1)[i % 2]
        clip, arrays = clips.load(i), stored[number]
        assert np.array_equal(clip.frames, arrays["images"][style][:, :, ::way])
        assert np.array_equal(clip.edges[..., 1], arrays["edges"][:, :, ::way]) and clip.edges.shape[-1] == 3
        assert np.array_equal(clip.noise, arrays["noise"][:, :, ::way])
        assert clip.caption == clip_styles("train", number)[style].caption
    assert clips.identity() != SyntheticClips(8, "validation", tmp_path).identity()


def test_a_town_without_a_path_gives_its_neighbours_clip(tmp_path: Path):
    stored = [store_clip(tmp_path, number, frames) for number, frames in enumerate((0, 3, 0, 0))]
    assert cached_clip("train", 0, tmp_path) is None
    clips = SyntheticClips(4 * VARIANTS, "train", tmp_path)
    for number in (0, 1, 2, 3):
        clip = clips.load(number * VARIANTS)
        assert np.array_equal(clip.frames, stored[1]["images"][0])
        assert clip.caption == clip_styles("train", 1)[0].caption


@pytest.mark.slow
def test_a_clip_is_drawn_once_and_again_when_damaged(tmp_path: Path):
    draw_clips("test", 1, tmp_path, 1)
    (path,) = tmp_path.iterdir()
    made, whole = path.stat().st_mtime_ns, path.read_bytes()
    clip = cached_clip("test", 0, tmp_path)
    draw_clips("test", 1, tmp_path, 1)
    assert path.stat().st_mtime_ns == made and clip is not None
    assert clip["images"].shape == (2, 46, *SIZE[::-1], 3) and clip["edges"].shape == (46, *SIZE[::-1])
    noise = clip["noise"]
    assert noise.shape == (13, SIZE[1] // 8, SIZE[0] // 8, 16) and noise.std() == pytest.approx(1, abs=0.02)
    assert np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1] > 0.1  # it follows the camera
    path.write_bytes(whole[: len(whole) // 2])
    assert_equal(cached_clip("test", 0, tmp_path), clip)  # drawn again, the same
    assert path.stat().st_size == len(whole)
