"""Read PLY files, ASCII or binary: vertices with their normals, faces of any size, and triangle strips.

The file is a header and then a stream of numbers; what follows the last element that is needed is not read.
"""

import codecs
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.cli import InputError
from utils.meshes.polygons import Polygons

TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "float32": "f4", "double": "f8", "float64": "f8"},
}  # to numpy's names
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
FACES = ("face", "faces", "tristrips")
SPLATS = {"f_dc_0", "rot_0", "packed_position"}  # properties that only Gaussian splats have


@dataclass
class _Element:
    """An element of the header. properties: name, type of the value, and, for lists, type of the count, else ''."""

    name: str
    count: int
    properties: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class _List:
    """The values [N] of a list property of all rows in turn, and how many each row has, int64 [P]."""

    values: np.ndarray
    counts: np.ndarray


def read_ply(path: Path, data: bytes) -> list[Polygons]:
    """The one object of a file. Raises InputError for splats, points, and files shorter than their header promises."""
    data = data.removeprefix(codecs.BOM_UTF8)
    order, elements, start = _read_header(path, data)
    faces = [one for one in elements if one.name in FACES and one.count]
    if not faces:
        splats = SPLATS & {name for one in elements for name, _, _ in one.properties}
        kind, way = ("Gaussian splats", "SuGaR or 2DGS") if splats else ("a point cloud", "MeshLab's Poisson filter")
        raise InputError(f"{path} holds no triangles: it is {kind}; make a mesh of it first, such as with {way}")
    body = _Ascii(path, data[start:].split()) if order == "" else _Binary(path, data, start, order)
    wanted, found = {"vertex"} | {one.name for one in faces}, {}
    for one in elements:
        if wanted <= set(found):
            break
        found[one.name] = body.read(one)
    return [_assemble(path, found)]


def _assemble(path: Path, found: dict[str, dict]) -> Polygons:
    vertex = found.get("vertex", {})
    if not {"x", "y", "z"} <= set(vertex):
        raise InputError(f"{path} has vertices that are not x, y, z; export it again")
    positions, normals = (
        np.stack([vertex[name].astype(np.float64) for name in names], axis=1) if set(names) <= set(vertex) else None
        for names in (("x", "y", "z"), ("nx", "ny", "nz"))
    )
    corners, counts = [], []
    for name in FACES:
        lists = {key: value for key, value in found.get(name, {}).items() if isinstance(value, _List)}
        if not lists:
            continue
        named = [key for key in ("vertex_indices", "vertex_index") if key in lists]
        one = lists[(named or list(lists))[0]]
        if not (np.abs(one.values) < 2**53).all() or (one.values != np.floor(one.values)).any():
            raise InputError(f"{path} has faces of vertices that are no whole numbers; export it again")
        if name == "tristrips":
            one = _cut_strips(one)
        corners.append(one.values.astype(np.int64))
        counts.append(one.counts)
    if not corners:
        raise InputError(f"{path} has faces without vertices; export it again")
    return Polygons(path.stem, positions, np.concatenate(corners), np.concatenate(counts), normals)


def _cut_strips(strips: _List) -> _List:
    """The triangles of strips: each is a row of vertices, or several, with -1 between them."""
    triangles = [np.zeros((0, 3), np.int64)]
    for row in np.split(strips.values.astype(np.int64), np.cumsum(strips.counts)[:-1]):
        for strip in np.split(row, np.flatnonzero(row < 0)):
            strip = strip[strip >= 0]
            if len(strip) >= 3:
                faces = np.stack([strip[:-2], strip[1:-1], strip[2:]], axis=1)
                faces[1::2] = faces[1::2, ::-1]  # every other triangle runs backwards
                triangles.append(faces)
    faces = np.concatenate(triangles)
    return _List(faces.ravel(), np.full(len(faces), 3))


# --- header ---


def _read_header(path: Path, data: bytes) -> tuple[str, list[_Element], int]:
    """(byte order, '' for ASCII; elements; where the numbers begin)."""
    feed = b"\r\n" if data[3:5] == b"\r\n" else data[3:4]  # binary data may begin with a byte that looks like one
    end = data.find(feed + b"end_header")
    if data[:3] != b"ply" or feed not in (b"\r\n", b"\r", b"\n") or end < 0:
        raise InputError(
            f"{path} cannot be read as PLY (it has no header from 'ply' to 'end_header'); export it again"
        )
    end += len(feed)
    order, elements, line = None, [], ""
    try:
        for line in data[:end].decode("latin-1").split(feed.decode())[1:]:
            match line.split():
                case ["format", kind, *_]:
                    order = ORDERS[kind]
                case ["element", name, count, *_]:
                    elements.append(_Element(name, int(count)))
                case ["property", "list", count, value, name, *_]:
                    elements[-1].properties.append((name, TYPES[value], TYPES[count]))
                case ["property", value, name, *_]:
                    elements[-1].properties.append((name, TYPES[value], ""))
                case ["comment" | "obj_info", *_] | []:
                    pass
                case _:
                    raise ValueError
        if order is None or any(one.count < 0 for one in elements):
            raise ValueError
    except (ValueError, LookupError) as error:
        raise InputError(f"{path}: {line[:60]!r} in its header is not understood; export it again") from error
    after = data.find(feed, end)
    return order, elements, len(data) if after < 0 else after + len(feed)


def _cut_short(path: Path, element: _Element, there: int) -> InputError:
    return InputError(
        f"{path} is cut short: its header promises {element.count} of element {element.name}, but there are {there}; "
        "copy or export it again"
    )


# --- numbers ---


@dataclass
class _Ascii:
    """The numbers of an ASCII file."""

    path: Path
    tokens: list[bytes]
    position: int = 0

    def read(self, element: _Element) -> dict[str, np.ndarray | _List]:
        """The columns of the next element by name."""
        if not any(count for _, _, count in element.properties):
            width = len(element.properties)
            taken = self._take(element.count * width, element, width)
            table = self._numbers(taken, element).reshape(element.count, width)
            # What is declared as float32 has no more digits than that.
            single = {k for k, (_, value, _) in enumerate(element.properties) if value == "f4"}
            columns = (table[:, k].astype("f4") if k in single else table[:, k] for k in range(width))
            return dict(zip((name for name, _, _ in element.properties), columns, strict=True))
        columns = {name: ([], []) for name, _, _ in element.properties}
        for row in range(element.count):
            for name, _, count in element.properties:
                values, counts = columns[name]
                length = self._take_count(element, row) if count else 1
                if length > len(self.tokens) - self.position:
                    raise _cut_short(self.path, element, row)
                values += self.tokens[self.position : self.position + length]
                counts.append(length)
                self.position += length
        return {
            name: _List(self._numbers(columns[name][0], element), np.array(columns[name][1], np.int64))
            if count
            else self._numbers(columns[name][0], element)
            for name, _, count in element.properties
        }

    def _take(self, number: int, element: _Element, width: int) -> list[bytes]:
        taken = self.tokens[self.position : self.position + number]
        if len(taken) < number:
            raise _cut_short(self.path, element, len(taken) // max(width, 1))
        self.position += number
        return taken

    def _take_count(self, element: _Element, row: int) -> int:
        if self.position >= len(self.tokens):
            raise _cut_short(self.path, element, row)
        token = self.tokens[self.position]
        if not token.isdigit():
            raise InputError(
                f"{self.path}: {token[:20]!r} is no number of corners, in {element.name} {row}; export it again"
            )
        self.position += 1
        return int(token)

    def _numbers(self, tokens: list[bytes], element: _Element) -> np.ndarray:
        try:
            return np.array(tokens or np.zeros(0)).astype(np.float64)
        except ValueError as error:
            raise InputError(f"{self.path}: {error}, in element {element.name}; export it again"[:300]) from error


@dataclass
class _Binary:
    """The numbers of a binary file from `position` on. order: '<' or '>'."""

    path: Path
    data: bytes
    position: int
    order: str

    def read(self, element: _Element) -> dict[str, np.ndarray | _List]:
        """The columns of the next element by name."""
        if not element.count or not element.properties:
            return {name: np.zeros(0) for name, _, _ in element.properties}
        first = self._lengths(element, self.position)
        row = self._row(element, first or {})
        room = (len(self.data) - self.position) // row.itemsize
        lists = [name for name, _, count in element.properties if count]
        if not lists and room < element.count:
            raise _cut_short(self.path, element, room)
        if first is not None and room >= element.count:
            table = np.frombuffer(self.data, row, element.count, self.position)
            if all((table[f"count {name}"] == first[name]).all() for name in lists):
                self.position += table.nbytes
                return {
                    name: _List(table[name].ravel(), np.full(element.count, first[name])) if count else table[name]
                    for name, _, count in element.properties
                }
        return self._read_rows(element)

    def _read_rows(self, element: _Element) -> dict[str, np.ndarray | _List]:
        """Rows whose lists differ in length."""
        columns = {name: ([], []) for name, _, _ in element.properties}
        types = {}
        for number in range(element.count):
            lengths = self._lengths(element, self.position)
            key = tuple(lengths.values()) if lengths is not None else None
            if key not in types:
                types[key] = self._row(element, lengths or {})
            if key is None or self.position + types[key].itemsize > len(self.data):
                raise _cut_short(self.path, element, number)
            row = np.frombuffer(self.data, types[key], 1, self.position)
            for name, _, count in element.properties:
                columns[name][0].append(row[name].ravel())
                columns[name][1].append(lengths[name] if count else 1)
            self.position += types[key].itemsize
        return {
            name: _List(np.concatenate(columns[name][0]), np.array(columns[name][1], np.int64))
            if count
            else np.concatenate(columns[name][0])
            for name, _, count in element.properties
        }

    def _lengths(self, element: _Element, position: int) -> dict[str, int] | None:
        """The lengths of the lists of the row at `position`, by name; None where the file ends before them."""
        lengths = {}
        for name, value, count in element.properties:
            length = 1
            if count:
                size = np.dtype(count).itemsize
                if position + size > len(self.data):
                    return None
                length = lengths[name] = int(np.frombuffer(self.data, self.order + count, 1, position)[0])
                position += size
                if length < 0:
                    raise InputError(f"{self.path}: a list of {element.name} has length {length}; export it again")
            position += length * np.dtype(value).itemsize
        return lengths

    def _row(self, element: _Element, lengths: dict[str, int]) -> np.dtype:
        """The type of a row whose lists have these lengths."""
        columns = []
        for name, value, count in element.properties:
            if count:
                columns.append((f"count {name}", self.order + count))
            columns.append(
                (name, self.order + value, (lengths.get(name, 0),)) if count else (name, self.order + value)
            )
        return np.dtype(columns)
