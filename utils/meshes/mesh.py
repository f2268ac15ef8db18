"""A scene as one mesh of triangles, with objects, connected components and shading normals."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from utils.cli import InputError

UPS = ("+y", "+z")
FAR = 1e15  # metres; beyond, float32 squares overflow
NEAR = 1e-12  # metres; below, products of three float32 lengths vanish
SMOOTH = 1e-3  # least difference between a face's unit corner normals that counts as smooth shading
FLAT_FACE = 1e-6  # height of a triangle over its longest side; below, its normal is float32 rounding


@dataclass(frozen=True)
class Geometry:
    """A triangle mesh in world coordinates; V vertices, all of them in use, F faces."""

    vertices: np.ndarray  # float64 [V, 3], world, metres
    faces: np.ndarray  # int64 [F, 3], counter-clockwise seen from outside where the file says so
    objects: np.ndarray  # int32 [F], index into names
    names: tuple[str, ...]  # object names of the file; repeated ones get .001, .002, …
    components: np.ndarray  # int32 [F]; faces of an object are connected if they share a vertex position
    smooth: np.ndarray  # bool [F], True where the file shades this face smoothly
    corner_normals: np.ndarray | None  # float32 [F, 3, 3] unit shading normals, where the file has them
    up: str  # '+y' or '+z'
    dropped: dict[str, int]  # {'degenerate': n, 'duplicate': n} faces that were removed
    up_stated: bool = True  # False where `up` is only the convention of the file's format
    notes: tuple[str, ...] = ()  # what was assumed about the file, or left out of it
    rounded: float = 0.0  # metres; the vertices are rounded as float32 rounds coordinates of this size


@dataclass
class Part:
    """A piece of an object, as `Geometry` holds it."""

    name: str
    vertices: np.ndarray
    faces: np.ndarray
    smooth: np.ndarray
    normals: np.ndarray | None
    rounded: float = 0.0


def build_geometry(meshes: Iterable[tuple[str, np.ndarray, np.ndarray]], up: str) -> Geometry:
    """A scene from meshes in memory: name, vertices float64 [V, 3] in metres, faces int [F, 3]; all flat shaded."""
    path = Path("the scene")
    return assemble(path, [make_part(path, name, vertices, faces, None) for name, vertices, faces in meshes], up)


def make_part(path: Path, name: str, vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray | None) -> Part:
    """Check a mesh of the file `path` and keep only the vertices that its faces use.

    vertices: [V, 3]; faces: int [F, 3]; normals: [V, 3], of any length, or None for flat shading.
    """
    vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces, np.int64)
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise InputError(f"{path} has faces with vertices that do not exist; export the scene again")
    if normals is not None:
        normals, _ = _without_unused(normals, faces)
    vertices, faces = _without_unused(vertices, faces)
    require_finite(path, vertices)
    part = Part(name, vertices, faces, np.zeros(len(faces), bool), None, _float32_size(vertices))
    return part if normals is None else _add_normals(part, normals)


def _float32_size(vertices: np.ndarray) -> float:
    """The largest coordinate of vertices from float32, also where a text shortened them; 0 for finer ones."""
    size, stored = np.abs(vertices).max(initial=0), vertices.astype(np.float32)
    step = np.spacing(np.float32(size))
    return float(size) if (np.abs(vertices - stored) <= step / 16).all() else 0.0


def require_finite(path: Path, vertices: np.ndarray) -> None:
    if not np.isfinite(vertices).all() or np.abs(vertices).max(initial=0) > FAR:
        raise InputError(f"{path} has vertices that are not finite numbers; repair the mesh and export it again")


def unique_names(names: list[str]) -> list[str]:
    """Make names unique: the first of equal names stays, the others get .001, .002, … as in Blender."""
    taken, seen, unique = set(names), set(), []
    counters: dict[str, int] = {}
    for name in names:
        chosen = name
        while chosen in seen or (chosen != name and chosen in taken):
            counters[name] = counters.get(name, 0) + 1
            chosen = f"{name}.{counters[name]:03d}"
        seen.add(chosen)
        unique.append(chosen)
    return unique


def _add_normals(part: Part, normals: np.ndarray) -> Part:
    """Add corner normals, and which faces they shade smoothly. normals: [V, 3]; bad ones become the face's own.

    A face is smooth when its corner normals differ. Comparing them with the face's plane instead would call triangles
    of a flat-shaded, not quite planar polygon smooth, since they share the polygon's normal.
    """
    normals = np.asarray(normals, np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        length = np.linalg.norm(normals, axis=1, keepdims=True)
        unit = np.where(np.abs(length - 1) < 1e-5, normals, normals / length)  # keeps stored normals bit-identical
    corners = unit.astype(np.float32)[part.faces]  # [F, 3, 3]
    bad = ~np.isfinite(corners).all(2)
    if bad.any():
        corners[bad] = _flat_normals(part.vertices, part.faces)[bad]
    spread = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1)
    return replace(part, smooth=spread > SMOOTH, normals=corners)


def _flat_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """The face normal at each corner: float32 [F, 3, 3]."""
    return np.repeat(face_normals(vertices, faces)[:, None].astype(np.float32), 3, axis=1)


def _shape(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longest side and the height over it of every face, float64 [F] each, in metres."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    longest = np.sqrt(np.max([dot(side, side) for side in (b - a, c - b, a - c)], axis=0))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    return longest, np.divide(area, longest, out=np.zeros_like(area), where=longest > 0)


def place(part: Part, name: str, matrix: np.ndarray) -> Part:
    """Move a part into the world. matrix: float64 [4, 4]; a mirroring one flips the winding, to keep outside out."""
    if np.array_equal(matrix, np.eye(4)):
        return replace(part, name=name)
    linear = matrix[:3, :3]
    vertices = part.vertices @ linear.T + matrix[:3, 3]
    x, y, z = linear.T
    cofactor = np.stack([np.cross(y, z), np.cross(z, x), np.cross(x, y)], 1)  # also right where the scale is 0
    mirrored = x @ np.cross(y, z) < 0
    turn_corners = slice(None, None, -1 if mirrored else 1)
    faces, normals = part.faces[:, turn_corners], part.normals
    if normals is not None:
        normals = normals[:, turn_corners] @ (-cofactor if mirrored else cofactor).T.astype(np.float64)
        length = np.linalg.norm(normals, axis=2, keepdims=True)
        flat = _flat_normals(vertices, faces)
        normals = np.divide(normals, length, out=flat, where=length > 0, casting="same_kind")
    return Part(name, vertices, faces, part.smooth, normals, part.rounded * np.abs(linear).max())


def assemble(path: Path, parts: list[Part], up: str) -> Geometry:
    """Join parts, number their objects and components, and drop degenerate and duplicate faces."""
    names = list(dict.fromkeys(part.name for part in parts))
    number = {name: k for k, name in enumerate(names)}
    vertices = np.concatenate([part.vertices for part in parts])
    if not np.isfinite(vertices).all() or np.abs(vertices).max() > FAR:
        raise InputError(f"{path} has node transforms that move vertices to infinity; export the scene again")
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=True)])
    objects = np.repeat(np.array([number[p.name] for p in parts], np.int32), [len(p.faces) for p in parts])
    smooth, normals = np.concatenate([part.smooth for part in parts]), None
    if any(part.normals is not None for part in parts):
        normals = [_flat_normals(p.vertices, p.faces) if p.normals is None else p.normals for p in parts]
        normals = np.concatenate(normals)
    welded = weld(vertices)
    components = _components(welded[faces], objects)  # before dropping degenerate faces: they may connect pieces
    keep, dropped = _visible_faces(vertices, faces, welded)
    if not len(keep):
        raise InputError(f"{path} holds only triangles without area; export the scene with its meshes")
    if len(keep) < len(faces):
        faces, objects, smooth, components = faces[keep], objects[keep], smooth[keep], components[keep]
        normals = None if normals is None else normals[keep]
        present, objects = np.unique(objects, return_inverse=True)  # an object may have lost all its faces
        names, objects = [names[k] for k in present], objects.astype(np.int32)
        vertices, faces = _without_unused(vertices, faces)
    if np.ptp(vertices, axis=0).max() < NEAR:
        raise InputError(f"{path} is less than {NEAR:g} metres across; scale it to metres and export it again")
    rounded, components = max(part.rounded for part in parts), _renumber(components)
    return Geometry(vertices, faces, objects, tuple(names), components, smooth, normals, up, dropped, rounded=rounded)


def _visible_faces(vertices: np.ndarray, faces: np.ndarray, welded: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Indices of the faces that are neither degenerate nor duplicates of earlier ones, and the counts of the others.

    A second face with the same corners, whatever its winding or object, would only flicker: rays could hit either.
    """
    longest, height = _shape(vertices, faces)
    solid = np.flatnonzero(height > FLAT_FACE * longest)
    keep = solid[_first_of_equals(np.sort(welded[faces[solid]], axis=1))]
    return keep, {"degenerate": len(faces) - len(solid), "duplicate": len(solid) - len(keep)}


def _without_unused(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return vertices[used], (np.cumsum(used) - 1)[faces]


def weld(vertices: np.ndarray) -> np.ndarray:
    """A number for every different position: int64 [V], equal where the float64 [V, 3] rows are exactly equal."""
    bits = np.ascontiguousarray(vertices + 0.0).view(np.uint64)  # + 0.0 turns -0.0 into 0.0
    key = np.zeros(len(bits), np.uint64)
    for column in bits.T:  # hash three columns into one: sorting rows is ten times slower
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
        key *= np.uint64(0xBF58476D1CE4E5B9)
        key ^= key >> np.uint64(32)
    _, first, welded = np.unique(key, return_index=True, return_inverse=True)
    if not np.array_equal(vertices[first][welded], vertices):  # two positions share a hash
        welded = np.unique(vertices + 0.0, axis=0, return_inverse=True)[1]
    return welded


def _first_of_equals(corners: np.ndarray) -> np.ndarray:
    """Indices, in order, of rows of int64 [N, 3] that no earlier row equals."""
    order = np.lexsort(corners.T)  # stable: equal rows stay in their order
    ordered = corners[order]
    new = np.ones(len(corners), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return np.sort(order[new])


def _components(corners: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """A label for every connected component, int32 [F]. corners: welded vertices int64 [F, 3]; objects: int32 [F]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if objects.any():  # keep touching objects apart
        keys = corners * (int(objects.max()) + 1) + objects[:, None]
        corners = np.unique(keys, return_inverse=True)[1].reshape(-1, 3)
    start, end = corners[:, :2].ravel(), corners[:, 1:].ravel()
    size = int(corners.max()) + 1
    graph = coo_array((np.ones(len(start), np.int8), (start.astype(np.int32), end.astype(np.int32))), (size, size))
    return connected_components(graph, directed=False)[1][corners[:, 0]]


def _renumber(labels: np.ndarray) -> np.ndarray:
    """int32: 0, 1, … in the order in which the labels first appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def turn(geometry: Geometry, up: str) -> Geometry:
    """Rotate the scene into a world whose up axis is `up`: y-up (x, y, z) is z-up (x, −z, y)."""
    if up not in UPS:
        raise ValueError(f"up is {up!r}, expected one of {UPS}")
    if up == geometry.up:
        return geometry
    columns, signs = ([0, 2, 1], [1, -1, 1]) if up == "+z" else ([0, 2, 1], [1, 1, -1])
    signs = np.array(signs, np.float32)
    normals = geometry.corner_normals
    return replace(
        geometry,
        vertices=geometry.vertices[:, columns] * signs,
        corner_normals=None if normals is None else normals[..., columns] * signs,
        up=up,
    )


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product of each row of a, [N, 3], with the same row of b, [N, 3], or with b, [3]: [N]."""
    (ax, ay, az), (bx, by, bz) = a.T, b.T  # by columns: twice as fast as einsum
    return ax * bx + ay * by + az * bz


def face_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Unit geometric normals, float64 [F, 3]; zero where a face has no area. vertices: [V, 3], faces: int [F, 3]."""
    origin = vertices[faces[:, 0]]
    normal = np.cross(vertices[faces[:, 1]] - origin, vertices[faces[:, 2]] - origin)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    return np.divide(normal, length, out=np.zeros_like(normal), where=length > 0)
