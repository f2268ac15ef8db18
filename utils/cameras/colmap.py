"""Reader of COLMAP models, text and binary.

Written here because pycolmap, the only library for them, installs all of COLMAP (38 MB) to read two short tables.
"""

import struct
import sys
from pathlib import Path

import numpy as np

from utils.cameras.path import MAX_NUMBER, CameraPath, make_path
from utils.cameras.values import (
    Given,
    lines_of,
    natural,
    note_distortion,
    one_size,
    opengl_poses,
    stated_up,
    unit_rotation,
)
from utils.cli import InputError

COLMAP_NAMES = ("cameras.txt", "images.txt", "cameras.bin", "images.bin")
COLMAP_MODELS = {  # name: (id, focal lengths, parameters); after the focal lengths come cx, cy, then distortion
    "SIMPLE_PINHOLE": (0, 1, 3),
    "PINHOLE": (1, 2, 4),
    "SIMPLE_RADIAL": (2, 1, 4),
    "RADIAL": (3, 1, 5),
    "OPENCV": (4, 2, 8),
    "OPENCV_FISHEYE": (5, 2, 8),
    "FULL_OPENCV": (6, 2, 12),
    "FOV": (7, 2, 5),
    "SIMPLE_RADIAL_FISHEYE": (8, 1, 4),
    "RADIAL_FISHEYE": (9, 1, 5),
    "THIN_PRISM_FISHEYE": (10, 2, 12),
    "RAD_TAN_THIN_PRISM_FISHEYE": (11, 2, 16),
}


def read_colmap(path: Path, given: Given) -> CameraPath:
    """Read a COLMAP model, text or binary; images in the order of their names, numbered from 1.

    path: the model's folder, one that holds it as sparse/0, or one of its files.
    """
    folder = path if path.is_dir() else path.parent
    found = [
        (folder / sub, suffix)
        for sub in ("", "sparse/0", "sparse")
        for suffix in ("bin", "txt")
        if (folder / sub / f"images.{suffix}").is_file() and (folder / sub / f"cameras.{suffix}").is_file()
    ]
    if not found:
        raise InputError(f"{folder} holds no COLMAP model: expected cameras and images as .txt or .bin")
    up = stated_up(given, folder)
    model, suffix = found[0]
    read_images, read_cameras = (_images_bin, _cameras_bin) if suffix == "bin" else (_images_txt, _cameras_txt)
    cameras, images = read_cameras(model / f"cameras.{suffix}"), read_images(model / f"images.{suffix}")
    images.sort(key=lambda image: natural(image[0]))
    _note_choices(model, [image[0] for image in images])
    used = [_colmap_intrinsics(cameras, image, model) for image in images]
    note_distortion(model, [(value, camera[3]) for camera in used for value in camera[4]])
    focal, center = (np.array([camera[i] for camera in used]).reshape(-1, 2) for i in (1, 2))
    size, focal, center = one_size([camera[0] for camera in used], focal, center, model)
    poses = np.array([image[1] for image in images]).reshape(-1, 7)
    if not (np.abs(poses) <= MAX_NUMBER).all():
        raise InputError(f"{model}: an image's pose holds NaN, infinity or huge numbers")
    c2w = opengl_poses(_colmap_poses(poses, model), given.axes or "opencv", model)
    return make_path(model, c2w, focal, center, size, up, range(1, len(images) + 1), given.fps)


def _note_choices(model: Path, names: list[str]) -> None:
    """Say that images of several cameras make one path, and that other models lie beside this one."""
    folders = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
    if len(folders) > 1:
        shown = ", ".join([*map(repr, folders[:3]), *["…"][: len(folders) > 3]])
        print(
            f"note: {model} holds images of {len(folders)} folders ({shown}); of a rig? The path runs through one "
            "after the other: for a path of one alone, leave the images of the others out",
            file=sys.stderr,
        )
    beside = sorted({found.parent.name for found in model.parent.glob("[0-9]*/images.*")} - {model.name})
    if model.name == "0" and beside:
        print(f"note: {model} is read, not the other parts of the capture: {', '.join(beside)}", file=sys.stderr)


def _colmap_poses(poses: np.ndarray, where: Path) -> np.ndarray:
    """c2w [P, 4, 4] from world-to-camera poses [P, 7] (qw, qx, qy, qz, t), both with the axes of the file."""
    c2w = np.tile(np.eye(4), (len(poses), 1, 1))
    if len(poses):
        rotation = unit_rotation(poses[:, [1, 2, 3, 0]], where).inv()
        c2w[:, :3, :3] = rotation.as_matrix()
        c2w[:, :3, 3] = -rotation.apply(poses[:, 4:])
    return c2w


def _colmap_intrinsics(
    cameras: dict, image: tuple, where: Path
) -> tuple[tuple[int, int], list[float], list[float], str, list[float]]:
    """(size, focal [2], center [2], model, its distortion) of an image's camera."""
    name, _, camera_id = image
    if camera_id not in cameras:
        raise InputError(f"{where}: image {name!r} uses camera {camera_id}, which the model does not hold")
    model, size, values = cameras[camera_id]
    if min(size) < 1 or max(size) > MAX_NUMBER:
        raise InputError(f"{where}: camera {camera_id} has image size {size[0]}x{size[1]}")
    focals = COLMAP_MODELS[model][1]
    return size, [values[0], values[focals - 1]], values[focals : focals + 2], model, values[focals + 2 :]


def _cameras_txt(path: Path) -> dict[int, tuple[str, tuple[int, int], list[float]]]:
    """{camera id: (model, size, parameters)}."""
    cameras = {}
    for number, line in enumerate(lines_of(path), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            camera_id, model, size = int(words[0]), words[1].upper(), (int(words[2]), int(words[3]))
            values = [float(word) for word in words[4:]]
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}, line {number}: expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]") from error
        if model not in COLMAP_MODELS or len(values) != COLMAP_MODELS[model][2]:
            raise InputError(f"{path}, line {number}: {model} with {len(values)} parameters is not a COLMAP camera")
        cameras[camera_id] = (model, size, values)
    return cameras


def _images_txt(path: Path) -> list[tuple[str, list[float], int]]:
    """[(name, qw qx qy qz tx ty tz, camera id)]. Each image has a second line of 2-D points, which may be empty."""
    images, lines = [], iter(enumerate(lines_of(path), start=1))
    for number, line in lines:
        words = line.split(maxsplit=9)
        if not words or words[0].startswith("#"):
            continue
        try:
            pose, camera_id, name = [float(word) for word in words[1:8]], int(words[8]), words[9].strip()
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{path}, line {number}: expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
            ) from error
        images.append((name, pose, camera_id))
        number, points = next(lines, (number, ""))
        if len(points.split()) % 3:
            raise InputError(f"{path}, line {number}: expected the 2-D points of image {name!r} (or an empty line)")
    return images


class _Bytes:
    """A binary file, read sequentially. Raises InputError when it ends too early."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, path.read_bytes(), 0

    def take(self, layout: str) -> tuple:
        layout = "<" + layout
        start = self.at
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise InputError(f"{self.path} ends in the middle of an entry; copy it again")
        self.at += count

    def name(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise InputError(f"{self.path} ends in the middle of an image name; copy it again")
        start, self.at = self.at, end + 1
        return self.data[start:end].decode("utf-8", errors="replace")

    def finish(self) -> None:
        if self.at != len(self.data):
            raise InputError(
                f"{self.path} holds {len(self.data) - self.at} bytes more than its entries; copy it again"
            )


def _cameras_bin(path: Path) -> dict[int, tuple[str, tuple[int, int], list[float]]]:
    """As `_cameras_txt`."""
    file, cameras = _Bytes(path), {}
    names = {model_id: name for name, (model_id, _, _) in COLMAP_MODELS.items()}
    for _ in range(file.take("Q")[0]):
        camera_id, model_id, width, height = file.take("iiQQ")
        if model_id not in names:
            raise InputError(f"{path}: camera {camera_id} has the unknown model number {model_id}")
        values = file.take(f"{COLMAP_MODELS[names[model_id]][2]}d")
        cameras[camera_id] = (names[model_id], (width, height), list(values))
    file.finish()
    return cameras


def _images_bin(path: Path) -> list[tuple[str, list[float], int]]:
    """As `_images_txt`."""
    file, images = _Bytes(path), []
    for _ in range(file.take("Q")[0]):
        _, *pose, camera_id = file.take("i7di")
        name = file.name()
        file.skip(24 * file.take("Q")[0])  # 2-D points: x, y as doubles and the 64-bit id of the 3-D point
        images.append((name, pose, camera_id))
    file.finish()
    return images
