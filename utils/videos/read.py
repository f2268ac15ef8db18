"""Reading a finished video of a scene: a run folder, a folder of frames, or a video file.

    frames = read_frames(Path("RUN/d0.5_e1350_n30"), num_arcs=2)      # uint8 [91, H, W, 3]

Videos come in two lengths. With 46 N frames every arc has both of its ends, as ggi.py numbers them; with 45 N + 1 the
frame that two arcs share occurs once, as in ggi.py's video.mp4. Both are reduced to 45 N + 1 as in ggi.py's video: of
a shared frame, the version of the earlier arc is kept.
"""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from utils.cli import InputError
from utils.files import read_json
from utils.images import find_ffmpeg, read_image
from utils.layout import ARC_FRAMES, ARC_STEPS
from utils.runs import MANIFEST

PICTURES = (".png", ".jpg", ".jpeg")
# Damage is an error, not concealed; no frame is rotated, repeated or dropped.
STRICT, AS_STORED = ("-xerror", "-err_detect", "explode", "-noautorotate"), ("-fps_mode", "passthrough")


def read_frames(path: Path, num_arcs: int) -> np.ndarray:
    """The frames along the whole path: uint8 [45 N + 1, H, W, 3], RGB, for a path of N = num_arcs arcs.

    path: a folder of numbered pictures (0000.png …, from any number on; other file names are ignored), or a video
    file. A folder with a run.json is a run of ggi.py: it must be finished, and hold 46 N frames. Raises InputError
    when frames are missing, unreadable or of different sizes, when there are neither 45 N + 1 nor 46 N of them, and
    when the file does not decode to its end.
    """
    if path.is_dir():
        return _read_folder(path, num_arcs)
    if path.is_file():
        frames = _decode(path)
        return frames[kept_frames(path, len(frames), num_arcs)]
    raise InputError(f"video {path} does not exist: give a run folder of ggi.py, a folder of frames, or a video file")


def kept_frames(path: Path, count: int, num_arcs: int) -> list[int]:
    """Which of `count` frames are the 45 N + 1 along the path. path: for the message of the InputError."""
    if count == ARC_STEPS * num_arcs + 1:
        return list(range(count))
    if count == ARC_FRAMES * num_arcs:
        return [arc * ARC_FRAMES + k for arc in range(num_arcs) for k in range(bool(arc), ARC_FRAMES)]
    wanted = f"{ARC_STEPS * num_arcs + 1} or {ARC_FRAMES * num_arcs}"
    raise InputError(f"{path} has {count} frames, but a video of the scene's {num_arcs} arc(s) has {wanted}")


def _read_folder(folder: Path, num_arcs: int) -> np.ndarray:
    numbered = _numbered_pictures(folder)
    if not numbered:
        raise InputError(f"{folder} holds no numbered frames (0000.png, …): give the folder that ggi.py wrote")
    numbers = list(numbered)
    if missing := sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers)):
        name = numbered[numbers[0]]
        path = folder / f"{missing[0]:0{len(name.stem)}d}{name.suffix}"
        raise InputError(f"{path} is missing, one of {len(missing)}: frames are numbered without gaps")
    if (folder / MANIFEST).is_file():
        _require_whole_run(folder, len(numbered), num_arcs)
    paths = list(numbered.values())
    paths = [paths[k] for k in kept_frames(folder, len(paths), num_arcs)]
    frames = []
    for path in paths:
        frames.append(read_image(path))
        if frames[-1].shape != frames[0].shape:
            (height, width), (first_height, first_width) = frames[-1].shape[:2], frames[0].shape[:2]
            raise InputError(
                f"{path} is {width}x{height}, but {paths[0]} is {first_width}x{first_height}: frames have one size"
            )
    return np.stack(frames)


def _require_whole_run(run: Path, count: int, num_arcs: int) -> None:
    """Refuse an incomplete run: two arcs without their last frame would pass for 45 N + 1."""
    if not read_json(run / MANIFEST).get("finished"):
        raise InputError(f"{run} is not finished: run ggi.py again")
    if count != ARC_FRAMES * num_arcs:
        raise InputError(f"{run} has {count} frames, but a run of {num_arcs} arc(s) has {ARC_FRAMES * num_arcs}")


def _numbered_pictures(folder: Path) -> dict[int, Path]:
    """{number: path} in order."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES and path.stem.isascii() and path.stem.isdigit():
            number = int(path.stem)
            if number in found:
                raise InputError(f"{path} and {found[number].name} have the same number: leave one of the two")
            found[number] = path
    return dict(sorted(found.items()))


def _decode(path: Path) -> np.ndarray:
    """All frames of a video file: uint8 [F, H, W, 3]."""
    width, height = _video_size(path)
    command = [find_ffmpeg(), "-v", "error", *STRICT, "-i", str(path), "-map", "0:v:0"]
    command += [*AS_STORED, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    size = width * height * 3
    if done.returncode or not done.stdout or len(done.stdout) % size:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise InputError(f"{path} does not decode to its end ({lines[-1] if lines else 'cut short'}): make it again")
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def _video_size(path: Path) -> tuple[int, int]:
    """(width, height) of a video file. Raises InputError if it is not a video."""
    try:
        with Image.open(path) as picture:
            raise InputError(f"{path} is a picture ({picture.format}): give a folder of frames or a video file")
    except OSError:  # expected for a video, which Pillow cannot open
        pass
    find_ffmpeg()
    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        return next(reader)["source_size"]
    except (OSError, RuntimeError, StopIteration, KeyError) as error:
        raise InputError(f"{path} cannot be read as a video: make it again") from error
    finally:
        reader.close()
