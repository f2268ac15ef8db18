"""Pictures and videos on disk: PNG in and out, H.264, contact sheets, curves. Arrays are uint8 RGB [H, W, 3]."""

import errno
import functools
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from utils.cli import InputError
from utils.files import atomic_path

LABEL_HEIGHT = 18  # pixels above each row of a contact sheet
MOST_ASPECT = 16  # long side / short side of a picture
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF


def read_image(path: Path) -> np.ndarray:
    """Read a picture as uint8 RGB [H, W, 3]: upright, its transparent parts on white, 16 bits reduced to 8.

    Raises InputError when it is missing or unreadable, larger than Pillow opens without a warning, longer than
    `MOST_ASPECT`, or holds no 8 or 16 bits per channel. What is left out is noted on stderr, once per folder.
    """
    with open_picture(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(_to_rgb(image, path))


def unreadable_size(size: tuple[int, int]) -> str:
    """Why `read_image` would refuse a picture of (width, height) pixels; empty if it would not."""
    if max(size) > MOST_ASPECT * min(size):
        return f"sides of more than {MOST_ASPECT} to 1"
    limit = Image.MAX_IMAGE_PIXELS
    return f"more than {limit // 10**6} million pixels" if size[0] * size[1] > limit else ""


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of what `read_image` returns, in pixels; reads no more than the header. Raises InputError."""
    with open_picture(path) as image:
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in range(5, 9)  # Pillow turns a TIFF's
        return image.size[::-1] if turned else image.size


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture file. Any error in the block becomes an InputError that names the file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a picture")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if max(image.size) > MOST_ASPECT * min(image.size):
                    raise InputError(
                        f"{path} is {image.width}x{image.height}: sides of more than {MOST_ASPECT} to 1 are no picture"
                    )
                yield image
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS // 10**6
        raise InputError(f"{path} has more than {limit} million pixels: make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path} cannot be read as an image ({_describe(path)}): save it as PNG or JPEG") from error
    except Exception as error:  # decoders raise anything for a damaged file
        raise InputError(f"{path} cannot be read as an image ({error})") from error


def _describe(path: Path) -> str:
    """Describe a file that Pillow does not recognise."""
    with path.open("rb") as file:
        head = file.read(16)
    kinds = {
        b"v/1\x01": "OpenEXR: high dynamic range, to be tone-mapped to 8 bits",
        b"#?": "Radiance HDR: high dynamic range, to be tone-mapped to 8 bits",
        b"II*\0": "TIFF with floating-point or otherwise unusual pixels",
        b"MM\0*": "TIFF with floating-point or otherwise unusual pixels",
        b"": "unknown format" if head else "empty file",
    }
    return next(kind for magic, kind in kinds.items() if head.startswith(magic))


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """An upright picture as 8-bit RGB. Raises InputError for pixels without a known white."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # cameras put a preview beside the picture
        _note(path.parent, "of files with several pictures, the first is used")
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise InputError(f"{path} holds {kind}, which have no known white: tone-map it, and save it with 8 or 16 bits")
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"), path)
    return image.convert("RGB")


def _on_white(image: Image.Image, path: Path) -> Image.Image:
    """Composite RGBA on white."""
    if image.getextrema()[3][0] == 255:
        return image.convert("RGB")
    _note(path.parent, "transparent parts of pictures are white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey values of up to 16 bits as RGB. A TIFF says how many bits there are, and whether 0 is white."""
    tags = getattr(image, "tag_v2", {})
    full = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    values = np.asarray(image).astype(np.float32)
    if (clear := image.info.get("transparency")) is not None:
        values[values == clear] = full
    if tags.get(PHOTOMETRIC) == 0:
        values = full - values
    return Image.fromarray(np.rint(255 / full * values).clip(0, 255).astype(np.uint8)).convert("RGB")


@functools.cache
def _note(folder: Path, about: str) -> None:
    """Print on stderr, once per folder, what was done to its pictures."""
    print(f"note: {folder}: {about}", file=sys.stderr, flush=True)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] or [H, W] in the format of the file's suffix, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary)


def write_png(path: Path, image: np.ndarray, *options: int) -> None:
    """Write a PNG of 8 or 16 bits by OpenCV, atomically. image: [H, W, 3], or [H, W] in grey. options: of OpenCV."""
    ordered = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".png", ordered, options)
    if not done:
        raise ValueError(f"{path}: an image of {image.dtype} {image.shape} cannot be written as PNG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())  # unlike imwrite, this raises when the disk is full


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
