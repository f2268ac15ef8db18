"""Read OBJ, PLY, STL and OFF files as streams of numbers: any white space, any line end, any text encoding.

A file that holds less than it promises is refused with both numbers; bytes after what it promises are ignored.
"""

import codecs
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.cli import InputError
from utils.meshes.mesh import Part
from utils.meshes.obj import read_obj
from utils.meshes.ply import read_ply
from utils.meshes.polygons import Polygons, make_parts

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
STL_START = 84  # bytes before the first triangle of a binary STL
STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
SOLID = re.compile(rb"(?im)^[ \t]*solid\b([^\n]*?)(?=\bfacet\b|\n|\Z)")
VERTEX = re.compile(rb"(?i)\bvertex\s+(\S+)\s+(\S+)\s+(\S+)")
END = re.compile(rb"(?i)\bend\s*solid\b")
LOOP = re.compile(rb"(?i)\bouter\s+loop\b")
OFF_NAME = re.compile(r"(?:ST)?C?(N?)(4?n?)(?:OFF|off)")


def read_plain(path: Path) -> tuple[list[Part], list[str]]:
    """The objects of an OBJ, PLY, STL or OFF file, and notes on what was guessed. Raises InputError."""
    kind, data = path.suffix.lower()[1:], path.read_bytes()
    readers = {"obj": read_obj, "ply": read_ply, "stl": _read_stl, "off": _read_off}
    try:
        return make_parts(path, readers[kind](path, data if kind in ("ply", "stl") else _to_text(data)))
    except InputError:
        raise
    except (ValueError, OverflowError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(f"{path} cannot be read as {kind.upper()} ({reason}); export the scene again") from error


def _to_text(data: bytes) -> bytes:
    """Without a byte-order mark, as UTF-8 or an extension of ASCII, with line feeds as line ends."""
    if data[:2] in UTF_16:
        data = data.decode("utf-16", errors="replace").encode()
    return data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


# --- STL ---


def _read_stl(path: Path, data: bytes) -> list[Polygons]:
    """The solids of an ASCII file, or the one of a binary file, which may begin with 'solid' as well."""
    count = struct.unpack_from("<I", data, 80)[0] if len(data) >= STL_START else 0
    there = (len(data) - STL_START) // STL_TRIANGLE.itemsize
    text = _to_text(data[:1024]).lstrip().lower()
    is_text = text.startswith(b"solid") and b"\0" not in text
    if is_text and (len(data) < STL_START or len(data) != STL_START + count * STL_TRIANGLE.itemsize):
        return _read_ascii_stl(path, _to_text(data))
    if len(data) < STL_START:
        raise InputError(f"{path} cannot be read as STL: it is neither ASCII nor as long as a header; export it again")
    if count > there:
        raise InputError(
            f"{path} is cut short: its header promises {count} triangles, but there are {there}; export it again"
        )
    corners = np.frombuffer(data, STL_TRIANGLE, count, STL_START)["corners"].reshape(-1, 3)
    return [_triangle_soup(path.stem, corners.astype(np.float64))]


def _triangle_soup(name: str, corners: np.ndarray) -> Polygons:
    """Triangles that share no vertices. corners: [3 T, 3]."""
    return Polygons(name, corners, np.arange(len(corners)), np.full(len(corners) // 3, 3))


def _read_ascii_stl(path: Path, text: bytes) -> list[Polygons]:
    """Solids with their names. Their ends may be missing, but a triangle must have three corners."""
    heads = [*SOLID.finditer(text)]
    ends = [head.start() for head in heads[1:]] + [len(text)]
    solids: dict[str, list[np.ndarray]] = {}
    for head, end in zip(heads, ends, strict=True):
        body = text[head.end() : end]
        corners = VERTEX.findall(body)
        loops = len(LOOP.findall(body)) or len(corners) // 3
        if len(corners) != 3 * loops:
            raise InputError(
                f"{path}: {loops} triangles need {3 * loops} corners, but there are {len(corners)}: it is cut short, "
                "or has faces that are no triangles; export it again"
            )
        if corners:
            name = head[1].strip().decode(errors="replace") or path.stem
            solids.setdefault(name, []).append(np.array(corners).astype(np.float64))
    soups = [_triangle_soup(name, np.concatenate(corners)) for name, corners in solids.items()]
    return [replace(soup, ended=END.search(text, heads[-1].end()) is not None) for soup in soups]


# --- OFF ---


def _read_off(path: Path, data: bytes) -> list[Polygons]:
    """The one object of a file. Colours and texture coordinates are ignored."""
    lines = [line.split() for line in re.sub(rb"#[^\n]*", b"", data).split(b"\n")]
    lines, width = [line for line in lines if line], 3
    if lines and (head := OFF_NAME.fullmatch(lines[0][0].decode("latin-1"))):
        if head[2] or b"BINARY" in lines[0]:
            raise InputError(
                f"{path}: OFF files that are binary or not three-dimensional are not read; save it as PLY"
            )
        width = 6 if head[1] else 3
        lines = [lines[0][1:], *lines[1:]] if lines[0][1:] else lines[1:]
    counts = _off_counts(path, lines)
    used = len(counts)
    while used:  # what follows the counts on their line
        used, lines = (
            (used - len(lines[0]), lines[1:]) if used >= len(lines[0]) else (0, [lines[0][used:], *lines[1:]])
        )
    # Values that are not read, such as colours, reach to the end of a line: then every vertex and face is a line.
    numbers, corners, sizes = _off_stream(lines, *counts[:2], width) or _off_lines(path, lines, *counts[:2], width)
    normals = numbers[:, 3:] if width == 6 else None
    return [Polygons(path.stem, numbers[:, :3], corners, sizes, normals)]


def _off_counts(path: Path, lines: list[list[bytes]]) -> list[int]:
    """Vertices, faces and, unless they are left out, edges."""
    tokens = [token for line in lines[:3] for token in line][: 2 if lines and len(lines[0]) == 2 else 3]
    if len(tokens) < 2 or not all(token.isdigit() for token in tokens):
        raise InputError(f"{path} cannot be read as OFF (it does not begin with its counts); export it again")
    return [int(token) for token in tokens]


def _off_size(token: bytes) -> int:
    """The number of a face's corners."""
    if not token.isdigit():
        raise ValueError(f"{token[:20]!r} is no number of corners")
    return int(token)


def _off_stream(lines: list[list[bytes]], vertices: int, faces: int, width: int) -> tuple | None:
    """(values [V, width], corners [N], counts [F]) if nothing but these numbers follows, in any lines."""
    tokens = [token for line in lines for token in line]
    position, starts = vertices * width, []
    if len(tokens) < position + faces:
        return None
    try:
        for _ in range(faces):
            starts.append(position)
            position += 1 + _off_size(tokens[position])
        if position != len(tokens):
            return None
        numbers = np.array(tokens[: vertices * width]).astype(np.float64).reshape(-1, width)
        indices = np.array(tokens[vertices * width :]).astype(np.int64)
    except (ValueError, IndexError):
        return None
    starts = np.array(starts, int) - vertices * width
    return numbers, np.delete(indices, starts), indices[starts]


def _off_lines(path: Path, lines: list[list[bytes]], vertices: int, faces: int, width: int) -> tuple:
    """The same where each vertex and face begins a line, may go on in the next, and may have more at its end."""
    rest, numbers, corners, sizes = iter(lines), [], [], []
    try:
        for what, count in (("vertices", vertices), ("faces", faces)):
            for _ in range(count):
                record = list(next(rest))
                need = width if what == "vertices" else 1 + _off_size(record[0])
                while len(record) < need:
                    record += next(rest)
                if what == "vertices":
                    numbers.append([float(token) for token in record[:width]])
                else:
                    corners += [int(token) for token in record[1:need]]
                    sizes.append(need - 1)
    except StopIteration as error:
        there = len(sizes if what == "faces" else numbers)
        raise InputError(
            f"{path} is cut short: it promises {count} {what}, but there are {there}; copy or export it again"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: {error}, in {what}; export it again"[:300]) from error
    return np.array(numbers).reshape(-1, width), np.array(corners, np.int64), np.array(sizes, np.int64)
