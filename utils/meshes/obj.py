"""Read OBJ files: vertices, normals and faces; materials, textures, lines and curves are ignored."""

import re
from array import array
from pathlib import Path

import numpy as np

from utils.cli import InputError
from utils.meshes.polygons import Polygons

NO_NORMAL = -1
COMMENT, CONTINUED = re.compile(rb"^[ \t]*#.*", re.MULTILINE), re.compile(rb"\\[ \t]*(\n|\Z)")


def read_obj(path: Path, data: bytes) -> list[Polygons]:
    """The objects (`o`) of a file or, if it has none, its groups (`g`); vertices shared by objects are repeated.

    data: with line feeds as line ends. Raises InputError for a line that is not understood, with its number.
    """
    if b"\\" in data:  # at the end, blanks aside, it continues the line; in a comment it is one of a path
        data = CONTINUED.sub(b" ", COMMENT.sub(b"", data))
    lines = data.split(b"\n")
    begins = b"o" if any(line.split(None, 1)[:1] == [b"o"] for line in lines if b"o" in line[:9]) else b"g"
    positions, normals = array("d"), array("d")
    faces = {path.stem: _Faces()}  # a repeated name continues its object
    current, number = faces[path.stem], 0
    try:
        for line in lines:
            number += 1
            words = line.split()
            if not words:
                continue
            key = words[0]
            if key in (b"v", b"vn", b"f", b"fo"):
                if b"#" in line:
                    words = line.partition(b"#")[0].split()
                if key == b"v":
                    x, y, z = words[1:4]
                    positions.extend((float(x), float(y), float(z)))
                elif key == b"vn":
                    x, y, z = words[1:4]
                    normals.extend((float(x), float(y), float(z)))
                else:
                    current.add(words[1:], len(positions) // 3, len(normals) // 3)
            elif key == begins:
                current = faces.setdefault(_name(line, path.stem), _Faces())
    except ValueError as error:
        reason = str(error) if isinstance(error, _BadIndex) else "it is not understood"
        text = line.strip()[:60].decode(errors="replace")
        raise InputError(f"{path}: line {number} ({text!r}): {reason}; export the scene again") from error
    return _objects(path, faces, np.array(positions).reshape(-1, 3), np.array(normals).reshape(-1, 3))


class _BadIndex(ValueError):
    """A reference to an element that does not exist."""


class _Faces:
    """Corners of the faces of one object: indices of positions and normals, from 0."""

    def __init__(self) -> None:
        self.corners, self.normals, self.counts = array("q"), array("q"), array("q")

    def add(self, words: list[bytes], positions: int, normals: int) -> None:
        """words: `7`, `7/1`, `7//3` or `7/1/3` for each corner. positions, normals: how many there are so far."""
        for word in words:
            position, *others = word.split(b"/")
            normal = others[1] if len(others) > 1 else b""
            self.corners.append(_from_start(int(position), positions, "vertex"))
            # Some exporters write 0 for a normal that is not there.
            self.normals.append(_from_start(int(normal), normals, "normal") if int(normal or 0) else NO_NORMAL)
        self.counts.append(len(words))


def _from_start(index: int, count: int, what: str) -> int:
    """The index counted from 0; in the file it is counted from 1, or, if negative, back from the last one so far."""
    if index > 0:
        return index - 1
    if not index:
        raise _BadIndex(f"{what} 0 does not exist: OBJ counts from 1")
    if count + index < 0:
        raise _BadIndex(f"{what} {index} does not exist: {count} have been listed so far")
    return count + index


def _name(line: bytes, default: str) -> str:
    name = line.split(None, 1)[1:]
    if not name:
        return default
    try:
        return name[0].strip().decode()
    except UnicodeDecodeError:
        return name[0].strip().decode("latin-1")


def _objects(path: Path, faces: dict[str, _Faces], positions: np.ndarray, normals: np.ndarray) -> list[Polygons]:
    """Give each object the vertices that it uses: one for each pair of position and normal."""
    found = []
    for name, one in faces.items():
        corners, shading = np.array(one.corners, np.int64), np.array(one.normals, np.int64)
        for used, have, what in ((corners, positions, "vertices"), (shading, normals, "normals")):
            if used.max(initial=-1) >= len(have):
                raise InputError(
                    f"{path} has a face with number {used.max() + 1} of its {what}, but there are {len(have)}; "
                    "export the scene again"
                )
        if not len(corners):
            continue
        if (shading != NO_NORMAL).any():
            pairs = corners * (len(normals) + 1) + shading + 1
            pairs, corners = np.unique(pairs, return_inverse=True)
            known = np.concatenate([np.full((1, 3), np.nan), normals])  # NaN: the face's own is taken
            one_normals = known[pairs % (len(normals) + 1)]
            used = pairs // (len(normals) + 1)
        else:
            (used, corners), one_normals = np.unique(corners, return_inverse=True), None
        found.append(Polygons(name, positions[used], corners, np.array(one.counts, np.int64), one_normals))
    return found
