"""Triangulate the polygons of a mesh file: convex ones as fans, all others by ear clipping in their own plane."""

from dataclasses import dataclass
from pathlib import Path

import mapbox_earcut
import numpy as np

from utils.cli import InputError
from utils.meshes.gltf import MAX_TRIANGLES
from utils.meshes.mesh import Part, make_part, require_finite

BACKWARDS = 1e-6  # share of a polygon's area by which a triangle of its fan may run backwards: rounding
CROSSED = 1e-3  # share of a polygon's area by which its triangles may differ from it


@dataclass
class Polygons:
    """The faces of one object. V vertices, P polygons with N corners in all.

    positions: float64 [V, 3]. corners: int64 [N], indices of vertices. counts: int64 [P], corners of each polygon.
    normals: float64 [V, 3] or None. ended: False where the file lacks the end that its format asks for.
    """

    name: str
    positions: np.ndarray
    corners: np.ndarray
    counts: np.ndarray
    normals: np.ndarray | None = None
    ended: bool = True


def make_parts(path: Path, objects: list[Polygons]) -> tuple[list[Part], list[str]]:
    """The triangulated objects of the file `path`, and notes on what was guessed."""
    # n corners make n - 2 triangles: known before any memory is used for them.
    if sum(int(np.maximum(one.counts - 2, 0).sum()) for one in objects) > MAX_TRIANGLES:
        raise InputError(f"{path} has more than {MAX_TRIANGLES:,} triangles: simplify it")
    parts, crossed = [], 0
    for one in objects:
        outside = one.corners[(one.corners < 0) | (one.corners >= len(one.positions))]
        if len(outside):
            raise InputError(
                f"{path} has a face with vertex number {outside[0]} (counted from 0), but there are "
                f"{len(one.positions)} vertices; export the scene again"
            )
        points = one.positions[one.corners]
        require_finite(path, points)
        triangles, bad = triangulate(points, one.counts)
        parts.append(make_part(path, one.name, one.positions, one.corners[triangles], one.normals))
        crossed += bad
    notes = [f"{crossed} faces of {path} cross themselves: how they are filled is a guess"] if crossed else []
    if not all(one.ended for one in objects):
        notes.append(f"{path} has no end: look whether all of it is there")
    return parts, notes


def triangulate(points: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Triangles of polygons, int64 [T, 3], as indices into `points`, and how many polygons intersect themselves.

    points: float64 [N, 3], the corners of all polygons in turn. counts: int [P]; fewer than three give nothing.
    """
    starts, found, crossed = np.cumsum(counts) - counts, [np.zeros((0, 3), np.int64)], 0
    for count in np.unique(counts[counts >= 3]):
        rings = starts[counts == count][:, None] + np.arange(count)  # [K, count]
        bent = _is_bent(points[rings]) if count > 3 else np.zeros(len(rings), bool)
        found += _fans(rings[~bent])
        for ring in rings[bent]:
            triangles, fits = _cut_ears(points[ring])
            found.append(ring[triangles])
            crossed += not fits
    return np.concatenate(found), crossed


def _is_bent(points: np.ndarray) -> np.ndarray:
    """Polygons that a fan around their first corner would not fill, bool [K]. points: [K, n, 3]."""
    spokes = points - points[:, :1]
    areas = np.cross(spokes[:, 1:-1], spokes[:, 2:])
    whole = areas.sum(1)  # Newell's normal: twice the area of the polygon in its plane
    return (np.einsum("kti,ki->kt", areas, whole) < -BACKWARDS * (whole * whole).sum(1)[:, None]).any(1)


def _fans(rings: np.ndarray) -> list[np.ndarray]:
    """The triangles of fans around each first corner; quads as two halves."""
    count = rings.shape[1]
    if count == 4:
        return [rings[:, [0, 1, 2]], rings[:, [2, 3, 0]]]
    fan = np.stack([np.zeros(count - 2, int), np.arange(1, count - 1), np.arange(2, count)], axis=1)
    return [rings[:, fan].reshape(-1, 3)]


def _cut_ears(points: np.ndarray) -> tuple[np.ndarray, bool]:
    """Triangles of one polygon [n, 3], int [T, 3], wound as it is, and whether they fill it.

    Holes may be part of the ring, joined to it by an edge that is walked along twice.
    """
    flat = _project(points)
    triangles = mapbox_earcut.triangulate_float64(flat, np.array([len(flat)], np.uint32)).reshape(-1, 3).astype(int)
    areas, whole = _area(flat[triangles]), _area(flat[None])[0]
    triangles[areas < 0] = triangles[areas < 0, ::-1]
    return triangles, abs(np.abs(areas).sum() - whole) <= CROSSED * whole


def _project(points: np.ndarray) -> np.ndarray:
    """A polygon [n, 3] in its own plane, [n, 2], counter-clockwise."""
    spokes = points - points[0]
    normal = np.cross(spokes[1:-1], spokes[2:]).sum(0)
    normal /= np.linalg.norm(normal)
    right = np.cross(np.eye(3)[np.abs(normal).argmin()], normal)
    right /= np.linalg.norm(right)
    return np.ascontiguousarray(spokes @ np.stack([right, np.cross(normal, right)], axis=1))


def _area(rings: np.ndarray) -> np.ndarray:
    """Signed area of rings [K, n, 2]."""
    x, y = rings[..., 0], rings[..., 1]
    return (x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(1) / 2
