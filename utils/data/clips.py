"""Training clips for the in-between model: 46 frames, their edges, warped noise, and a caption.

`FolderClips` takes them from pictures or videos on disk, for example DL3DV-10K:

    FOLDER/<id>/images_2/*.png       frames of one clip; also images_4, images_8, images
    FOLDER/<id>/*.png                the same without the subfolder
    FOLDER/<id>.mp4                  a video

Folders may be nested; the path below FOLDER is the clip's id. Frames are cropped in the middle to the model's aspect;
edges are detected before the frames are downscaled, because a scene's edges are also drawn large and then downscaled.
Noise is warped by the same function as at inference; only its correspondences come from optical flow.
"""

import csv
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np

from utils.cli import InputError
from utils.data.flow import Flow, check_flow, flow_correspondence, flow_estimator
from utils.edges import check_edge_detector, edge_detector, resize_edges
from utils.images import find_ffmpeg, picture_size, read_image
from utils.layout import ARC_FRAMES, ARC_STEPS, cut_name, latent_frame_numbers
from utils.particles import warp_noise

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
VIDEOS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
FRAME_FOLDERS = ("images_2", "images_4", "images_8", "images")  # the first one found is used
ENDS = (0, ARC_STEPS)
LATENT_SCALE = 8  # pixels per latent cell


@dataclass(frozen=True)
class Clip:
    """One training clip of the in-between model, not yet encoded. H = 8 h, W = 8 w."""

    frames: np.ndarray  # uint8 [46, H, W, 3]
    edges: np.ndarray  # uint8 [46, H, W, 3], soft edges, white on black
    noise: np.ndarray  # float32 [13, h, w, 16], N(0, 1), warped along with the frames
    caption: str


class ClipSource(Protocol):
    """A data set of clips. `load` is deterministic: the same number gives the same clip."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """A file name, without suffix, that identifies the content of clip i."""
        ...

    def identity(self) -> dict:
        """Everything besides its name that decides the content of a clip; JSON values."""
        ...

    def prepare(self) -> None:
        """Called once before clips are loaded: set up what `load` needs, or raise InputError."""
        ...

    def load(self, i: int) -> Clip: ...


@dataclass(frozen=True)
class FrameFolder:
    """Frames of one clip as pictures, in the natural order of their names."""

    id: str
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, uint8 [H, W, 3] each. Raises InputError naming the damaged one."""
        return (read_image(self.paths[n]) for n in numbers)

    def size(self, numbers: Sequence[int]) -> tuple[int, int]:
        """(width, height) of the frames; reads their headers only. Raises InputError if they differ."""
        sizes = {n: picture_size(self.paths[n]) for n in numbers}
        first = sizes[numbers[0]]
        for n, size in sizes.items():
            if size != first:
                raise InputError(f"{self.paths[n]} is {size[0]}x{size[1]}, {self.paths[numbers[0]].name} is not")
        return first

    def fingerprint(self, numbers: Sequence[int]) -> list:
        """Names and sizes in bytes of these frames; hashing the content could mean reading terabytes."""
        return [(self.paths[n].name, self.paths[n].stat().st_size) for n in numbers]


@dataclass(frozen=True)
class VideoFile:
    """Frames of one clip in a video file."""

    id: str
    path: Path

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        find_ffmpeg()
        try:
            return imageio_ffmpeg.count_frames_and_secs(str(self.path))[0]
        except RuntimeError as error:
            raise InputError(f"{self.path} cannot be read as a video") from error

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """The frames of these ascending numbers, uint8 [H, W, 3] each. Raises InputError if one cannot be decoded."""
        missing = sorted(set(numbers), reverse=True)
        try:
            with imageio.get_reader(self.path, "ffmpeg") as reader:
                for n, frame in enumerate(reader):
                    if n == missing[-1]:
                        yield np.asarray(frame)
                        missing.pop()
                    if not missing:
                        return
        except (OSError, RuntimeError, ValueError, SyntaxError) as error:  # imageio turns ffmpeg's errors into these
            raise InputError(f"{self.path} cannot be read as a video") from error
        raise InputError(f"{self.path} breaks off before frame {missing[-1]}")

    def size(self, numbers: Sequence[int]) -> tuple[int, int]:
        """(width, height) of the frames; all frames of a video have one size."""
        height, width, _ = next(self.read(numbers[:1])).shape
        return width, height

    def fingerprint(self, numbers: Sequence[int]) -> list:
        return [self.path.name, self.path.stat().st_size, list(numbers)]


@dataclass(frozen=True)
class Window:
    """46 frames of a longer clip."""

    source: FrameFolder | VideoFile
    numbers: tuple[int, ...]
    caption: str


class FolderClips:
    """Windows of 46 frames from a folder of pictures and videos; a ClipSource."""

    def __init__(
        self,
        folder: Path,
        size: tuple[int, int],
        *,
        captions: Path | None = None,
        edges: str = "lines",
        flow: str = "dis",
        stride: int = 1,
        windows: int = 1,
    ):
        """size: (width, height) of the model. edges: see `edge_detector`. flow: dis or raft. stride: source frames
        per frame. windows: number taken from each clip, evenly spaced; fewer if the clip is too short for so many.

        Raises InputError when the folder holds no clips, or a clip that is too short, too small or has no caption.
        """
        self._size = size
        self._edges, self._flow = edges, flow
        check_edge_detector(edges)
        check_flow(flow, size)
        clips = find_clips(folder)
        texts = {clip.id: "" for clip in clips} if captions is None else read_captions(captions)
        if without := [clip.id for clip in clips if clip.id not in texts]:
            raise InputError(f"{captions} has no caption for clip {without[0]} ({len(without)} without)")
        span = ARC_STEPS * stride
        if short := [clip for clip in clips if len(clip) <= span]:
            raise InputError(
                f"clip {short[0].id} has {len(short[0])} frames, but {ARC_FRAMES} with --stride {stride} need "
                f"{span + 1} ({len(short)} of {len(clips)} clips are too short)"
            )
        self._windows = []
        for clip in clips:
            for first in sorted({round(s) for s in np.linspace(0, len(clip) - 1 - span, windows)}):
                numbers = tuple(range(first, first + span + 1, stride))
                _require_size(clip, clip.size([numbers[i] for i in ENDS]), size)
                self._windows.append(Window(clip, numbers, texts[clip.id]))

    def __len__(self) -> int:
        return len(self._windows)

    def identity(self) -> dict:
        return {"source": "folder", "size": list(self._size), "edges": self._edges, "flow": self._flow}

    def name(self, i: int) -> str:
        readable = cut_name(re.sub(r"[^\w.-]", "_", self._windows[i].source.id)[-60:], 180)
        return f"{readable}-{self._digest(i)[:16]}"

    def _digest(self, i: int) -> str:
        window = self._windows[i]
        content = [window.source.id, window.source.fingerprint(window.numbers), window.caption]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def prepare(self) -> None:
        """Load the networks for edges and flow, if any are used. Raises InputError when one is missing."""
        edge_detector(self._edges)
        flow_estimator(self._flow)

    def load(self, i: int) -> Clip:
        """Read, crop and resize the frames of window i; find its edges; warp noise along its flow."""
        window, (width, height), detect = self._windows[i], self._size, edge_detector(self._edges)
        frames, edges = [], []
        for frame in window.source.read(window.numbers):
            _require_size(window.source, frame.shape[1::-1], self._size)
            frame = crop_to_aspect(frame, self._size)
            frames.append(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))
            edges.append(resize_edges(detect(frame), width, height))
        digest = self._digest(i)
        noise = clip_noise(frames, flow_estimator(self._flow), [int(digest[k : k + 8], 16) for k in (0, 8)])
        return Clip(np.stack(frames), np.stack(edges), noise, window.caption)


def find_clips(folder: Path) -> list[FrameFolder | VideoFile]:
    """All clips below `folder`, in the order of their ids. Raises InputError when there are none."""
    if not folder.is_dir():
        raise InputError(f"dataset {folder} is not a folder")
    clips = sorted(_walk(folder, folder), key=lambda clip: _natural(clip.id))
    if not clips:
        raise InputError(f"{folder} holds no clips: expected <id>/images_2/*.png, <id>/*.png or <id>.mp4")
    return clips


def _walk(folder: Path, root: Path) -> Iterator[FrameFolder | VideoFile]:
    inside = next((folder / name for name in FRAME_FOLDERS if (folder / name).is_dir()), None)
    entries = sorted((inside or folder).iterdir())
    pictures = [path for path in entries if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    if pictures:
        pictures.sort(key=lambda path: _natural(path.name))
        yield FrameFolder(folder.name if folder == root else str(folder.relative_to(root)), tuple(pictures))
        return
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, root)
        elif path.suffix.lower() in VIDEOS:
            yield VideoFile(str(path.relative_to(root).with_suffix("")), path)


def _natural(name: str) -> list:
    """Sort key that puts frame_2 before frame_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def read_captions(path: Path) -> dict[str, str]:
    """{clip id: caption} from a JSON object, or from a CSV file with the columns id and caption."""
    try:
        text = path.read_text()
        if path.suffix.lower() == ".csv":
            captions = {row["id"]: row["caption"] for row in csv.DictReader(text.splitlines())}
        else:
            captions = json.loads(text)
    except OSError as error:
        raise InputError(f"captions {path} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise InputError(f"captions {path} must have the columns id and caption") from error
    except ValueError as error:
        raise InputError(f"captions {path} are not valid JSON ({error})") from error
    if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
        raise InputError(f"captions {path} must be {{id: caption}}")
    for clip, caption in captions.items():
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"captions {path}: that of {clip} holds half a character ({caption!r})") from error
    return captions


def _require_size(clip: FrameFolder | VideoFile, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raise InputError when frames would have to be enlarged."""
    if found[0] < wanted[0] or found[1] < wanted[1]:
        raise InputError(
            f"clip {clip.id} is {found[0]}x{found[1]}, smaller than the model's {wanted[0]}x{wanted[1]}: "
            "frames are never enlarged"
        )


def crop_to_aspect(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest centre crop of uint8 [H, W, 3] with the aspect of `size` (width, height)."""
    height, width = frame.shape[:2]
    scale = min(width / size[0], height / size[1])
    w, h = round(size[0] * scale), round(size[1] * scale)
    x, y = (width - w) // 2, (height - h) // 2
    return frame[y : y + h, x : x + w]


# --- correspondences from optical flow ---


def clip_noise(frames: Sequence[np.ndarray], flow: Flow, seed: Sequence[int]) -> np.ndarray:
    """Noise that follows the flow between latent frames, float32 [13, H/8, W/8, 16]. frames: 46 of [H, W, 3]."""
    height, width = frames[0].shape[:2]
    latent_frames = [frames[n] for n in latent_frame_numbers(*ENDS)]
    pairs = zip(latent_frames[1:], latent_frames[:-1], strict=True)
    correspondences = [flow_correspondence(target, source, flow) for target, source in pairs]
    return warp_noise(correspondences, (width // LATENT_SCALE, height // LATENT_SCALE), seed)
