"""Pictures and videos on disk: PNG in and out, H.264, contact sheets, curves. Arrays are uint8 RGB [H, W, 3]."""

import errno
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw

from utils.cli import InputError
from utils.files import atomic_path

LABEL_HEIGHT = 18  # pixels above each row of a contact sheet


def read_image(path: Path) -> np.ndarray:
    """Read a picture as uint8 RGB [H, W, 3]. Raises InputError when it is missing or unreadable."""
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error})") from error


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] or [H, W] in the format of the file's suffix, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary)


def resize_image(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """PIL's default bicubic resize, the one resampling that all stages use."""
    return np.asarray(Image.fromarray(image).resize((width, height)))


def find_ffmpeg() -> str:
    """Path of the ffmpeg binary that videos are read and written with. Raises InputError when there is none."""
    try:
        path = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        path = "on this machine"
    if shutil.which(path) is None:
        raise InputError(
            f"there is no ffmpeg {path}: pip install --force-reinstall imageio-ffmpeg brings one, or let "
            "IMAGEIO_FFMPEG_EXE name it"
        )
    return path


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames as H.264, yuv420p, ready for streaming in a browser; atomic, and the same bytes every time.

    frames: uint8 [H, W, 3] of one size with even sides. fps: frames per second.
    """
    find_ffmpeg()
    # One thread: with several, x264's output sometimes differs, for example 1 time in 120 on a busy machine.
    flags = ["-crf", "16", "-threads", "1", "-movflags", "+faststart", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
    with atomic_path(path) as temporary:
        try:
            count = _encode(temporary, frames, fps, flags)
        except OSError:  # the pipe to ffmpeg broke
            count = -1
        # imageio drops ffmpeg's exit code, so the file is read back before it is renamed.
        if not temporary.exists() or _count_frames(temporary) != count:
            raise OSError(errno.EIO, "cannot write the whole video (disk full?)", str(path))


def _encode(path: Path, frames: Iterable[np.ndarray], fps: float, flags: list[str]) -> int:
    """Encode and return the number of frames."""
    count = 0
    writer = imageio.get_writer(
        path, fps=fps, codec="libx264", quality=None, pixelformat="yuv420p", macro_block_size=2,
        ffmpeg_log_level="quiet", output_params=flags,
    )  # fmt: skip
    with writer:
        for frame in frames:
            if frame.shape[0] % 2 or frame.shape[1] % 2:
                raise ValueError(f"frames of {frame.shape[1]}x{frame.shape[0]} have an odd side; H.264 needs even")
            writer.append_data(frame)
            count += 1
    return count


def _count_frames(path: Path) -> int:
    """Number of frames that decode; 0 for a damaged file."""
    try:
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    except RuntimeError:
        return 0


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], cell_width: int = 180) -> np.ndarray:
    """Rows of pictures under their labels, uint8 [H, W, 3]. Every picture is scaled to `cell_width` pixels."""
    columns = max(len(pictures) for _, pictures in rows)
    strips = [_strip(label, pictures, columns, cell_width) for label, pictures in rows]
    return np.concatenate(strips)


def _strip(label: str, pictures: Sequence[np.ndarray], columns: int, cell_width: int) -> np.ndarray:
    cells = [_as_cell(picture, cell_width) for picture in pictures]
    height = max(cell.shape[0] for cell in cells)
    strip = Image.new("RGB", (columns * cell_width, LABEL_HEIGHT + height), "white")
    ImageDraw.Draw(strip).text((4, 3), label, fill="black")
    for i, cell in enumerate(cells):
        strip.paste(Image.fromarray(cell), (i * cell_width, LABEL_HEIGHT))
    return np.asarray(strip)


def _as_cell(picture: np.ndarray, width: int) -> np.ndarray:
    rgb = picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
    return resize_image(rgb, width, max(1, round(rgb.shape[0] * width / rgb.shape[1])))


def plot_curve(values: Sequence[float], title: str, size: tuple[int, int] = (640, 360)) -> np.ndarray:
    """A line plot of values against their index, and their running mean; uint8 [H, W, 3]."""
    width, height, margin = *size, 40
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    values = np.asarray(values, dtype=float)
    low, high = float(values.min()), float(values.max())
    x = margin + (width - 2 * margin) * np.linspace(0, 1, max(len(values), 2))[: len(values)]

    def line(y: np.ndarray, colour: str, thickness: int) -> None:
        scaled = height - margin - (height - 2 * margin) * (y - low) / max(high - low, 1e-12)
        draw.line(list(zip(x.tolist(), scaled.tolist(), strict=True)), fill=colour, width=thickness)

    window = max(1, len(values) // 20)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    line(values, "lightgray", 1)
    line((sums[1:] - sums[first]) / (np.arange(1, len(values) + 1) - first), "black", 2)
    draw.rectangle((margin, margin, width - margin, height - margin), outline="gray")
    draw.text(
        (margin, 12), f"{title}: {len(values)} steps, {low:.4g} to {high:.4g}, last {values[-1]:.4g}", fill="black"
    )
    return np.asarray(image)
