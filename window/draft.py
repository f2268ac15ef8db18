"""A camera path while it is drawn: keyframes with a lens and a duration each, saved in three formats.

    draft = PathDraft("+z", (1080, 720))
    draft.add(Key(position, rotation, distance, fov=40.0))
    draft.save(Path("paths/walk"))

What is between the keyframes is what `read_cameras` makes of the saved file: both use `read_keyframes`.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from utils.cameras.keyframes import read_keyframes
from utils.cameras.path import MAX_POSES, UP_AXES, CameraPath
from utils.cameras.read import read_cameras, write_transforms
from utils.cameras.values import Given
from utils.cameras.viewers import write_camera_path
from utils.cli import InputError
from utils.files import read_json, write_json
from utils.layout import ARC_STEPS
from window.poses import is_level

KEYFRAMES, TRANSFORMS, CAMERA_PATH = "keyframes.json", "transforms.json", "camera_path.json"


def require_lens(fov: float) -> None:
    """Raise InputError unless `fov` is a field of view in degrees."""
    if not 0 < fov < 180:
        raise InputError(f"a field of view of {fov:g} degrees is not between 0 and 180")


@dataclass(frozen=True, eq=False)
class Key:
    """A keyframe.

    position: float64 [3], metres. rotation: float64 [3, 3], camera-to-world, OpenGL axes. distance: metres to the
    point that it looks at; None where that is not known. fov: vertical, degrees. frames: to the next keyframe; of the
    last one, back to the first of a loop.
    """

    position: np.ndarray
    rotation: np.ndarray
    distance: float | None
    fov: float = 45.0
    frames: int = ARC_STEPS

    def __post_init__(self) -> None:
        if not (np.isfinite(self.position).all() and np.isfinite(self.rotation).all()):
            raise InputError("a camera of NaN or infinity is no keyframe: look at the scene from elsewhere")
        require_lens(self.fov)
        if not 1 <= self.frames < MAX_POSES:
            raise InputError(f"{self.frames} frames between keyframes: give 1 to {MAX_POSES - 1}")

    @property
    def target(self) -> np.ndarray:
        """The point that is looked at, [3]."""
        return self.position - self.distance * self.rotation[:, 2]

    def is_aimed(self, up: np.ndarray) -> bool:
        """Whether the target alone, with a level horizon, gives the rotation."""
        return self.distance is not None and self.distance > 0 and is_level(self.rotation, up)


@dataclass
class PathDraft:
    """Keyframes in order. up: '+y' or '+z'. size: width, height, pixels. tension: 0 to 1. loop: back to the first."""

    up: str
    size: tuple[int, int]
    fps: float = 24.0
    tension: float = 0.0
    loop: bool = False
    keys: list[Key] = field(default_factory=list)

    def add(self, key: Key, after: int | None = None) -> int:
        """Put a keyframe behind the one numbered `after`, from 0, else at the end; returns its number."""
        place = len(self.keys) if after is None else self._known(after) + 1
        self.keys.insert(place, key)
        return place

    def move(self, k: int, to: Key) -> None:
        """Give keyframe k another pose; its lens and its duration stay."""
        old = self.keys[self._known(k)]
        self.keys[k] = replace(to, fov=old.fov, frames=old.frames)

    def change(self, k: int, **values: float) -> None:
        """Set fov or frames of keyframe k."""
        self.keys[k] = replace(self.keys[self._known(k)], **values)

    def delete(self, k: int) -> None:
        del self.keys[self._known(k)]

    def _known(self, k: int) -> int:
        if not 0 <= k < len(self.keys):
            raise InputError(f"there is no keyframe {k + 1}: the path has {len(self.keys)}")
        return k

    def frame_numbers(self) -> list[int]:
        """Numbers of the frames that are keyframes, from 1."""
        return [1 + sum(key.frames for key in self.keys[:k]) for k in range(len(self.keys))]

    def data(self) -> dict:
        """The path as keyframes JSON (see `utils.cameras.keyframes`).

        Where all cameras are level, their targets are written, which keeps the horizon level between them too.
        """
        aimed = all(key.is_aimed(UP_AXES[self.up]) for key in self.keys)
        entries = [
            {
                "frame": number,
                "position": key.position.tolist(),
                **(
                    {"look_at": key.target.tolist()}
                    if aimed
                    else {"quaternion": Rotation.from_matrix(key.rotation).as_quat().tolist()}
                ),
                "fov": key.fov,
            }
            for number, key in zip(self.frame_numbers(), self.keys, strict=True)
        ]
        header = {"world_up": self.up, "fps": self.fps, "w": self.size[0], "h": self.size[1], "tension": self.tension}
        closing = {"loop": self.keys[-1].frames} if self.loop and self.keys else {}
        return {**header, **closing, "keyframes": entries}

    def path(self) -> CameraPath:
        """All frames. Raises InputError where the keyframes make no path, such as a single one."""
        return read_keyframes(Path("the path"), self.data(), Given())

    def save(self, folder: Path, *, replace_old: bool = False) -> list[Path]:
        """Write the path as keyframes, `transforms.json` and `camera_path.json`; returns the files.

        Raises InputError for what is no path, and where one of the files is there, unless `replace_old`.
        """
        path = self.path()
        files = [folder / name for name in (KEYFRAMES, TRANSFORMS, CAMERA_PATH)]
        for file in files:
            if file.exists() and not replace_old:
                raise InputError(f"{file} is there already: choose another name, or replace it on purpose")
        write_json(files[0], self.data())
        write_transforms(files[1], path)
        write_camera_path(files[2], path)
        return files

    def is_saved(self, folder: Path) -> bool:
        """Whether the keyframes in a folder make the path as it is now, up to rounding."""
        file = folder / KEYFRAMES
        if not file.is_file():
            return False
        saved, now = read_cameras(file), self.path()
        return (saved.numbers, saved.size) == (now.numbers, now.size) and all(
            np.allclose(getattr(saved, name), getattr(now, name), 1e-9, 1e-9) for name in ("c2w", "focal")
        )


def open_draft(file: Path) -> PathDraft:
    """The draft that a keyframes JSON holds. Raises InputError for any other file."""
    if not file.exists():
        raise InputError(f"keyframes file {file} does not exist")
    data = read_json(file)
    if "keyframes" not in data or "camera_path" in data:
        raise InputError(f"{file} holds no keyframes of ours: the window goes on with the {KEYFRAMES} that it saved")
    path = read_keyframes(file, data, Given())
    entries = data["keyframes"]
    numbers = [entry.get("frame", 1 + ARC_STEPS * k) for k, entry in enumerate(entries)]
    gaps = [*np.diff(numbers).astype(int).tolist(), int(data.get("loop", 0)) or ARC_STEPS]
    draft = PathDraft(path.up, path.size, path.fps, float(data.get("tension", 0)), bool(data.get("loop")))
    for entry, number, frames in zip(entries, numbers, gaps, strict=True):
        pose = path.c2w[int(number - numbers[0])]
        position = np.array(entry["position"], float)
        distance = math.dist(position, entry["look_at"]) if "look_at" in entry else None
        draft.add(Key(position, pose[:3, :3], distance, float(entry.get("fov", data.get("fov"))), frames))
    return draft
