"""First hits of rays: Embree finds the face in float32; depths come from the face planes in float64.

Where embreex has no wheel (linux-aarch64), `bvh` gives the same answers, slowly.
"""

import sys
from collections.abc import Callable
from functools import cache

import numpy as np

from utils.meshes.mesh import Geometry, dot, face_normals
from utils.scene.bvh import NumpyHits
from utils.scene.overlaps import find_overlaps


class RayCaster:
    """First hits against one scene, seen from both sides of every face. Threads may share a caster.

    The scene is moved to its centre first, so that a scene far from the origin loses no precision in float32. Of faces
    that overlap in one plane, always the same is hit, see `overlaps`.

    normals: float64 [F, 3] unit geometric normals. overlaps: None in most scenes.
    """

    def __init__(self, geometry: Geometry) -> None:
        vertices = geometry.vertices
        self._centre = (vertices.min(0) + vertices.max(0)) / 2
        vertices = vertices - self._centre
        self.normals = face_normals(vertices, geometry.faces)
        self._offsets = dot(self.normals, vertices[geometry.faces[:, 0]])
        self._first_hit = _make_hits(vertices, geometry.faces)
        self.overlaps = find_overlaps(geometry, vertices, self.normals, self._offsets)
        if self.overlaps is not None:
            self._contested = self.overlaps.beaten.any(1)
            self._covers = [_make_hits(c.reshape(-1, 3), _rows_of_three(len(c))) for _, c in self.overlaps.covers]

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """First face that each ray hits: int32 [N], -1 where there is none.

        origin: float64 [3] for all rays, or [N, 3], metres. directions: [N, 3], any length but zero.
        """
        directions = np.asarray(directions)
        origins = np.broadcast_to(np.asarray(origin, np.float64) - self._centre, directions.shape)
        face = self._first_hit(origins, directions)
        return face if self.overlaps is None else self._settle(face, origins, directions)

    def _settle(self, face: np.ndarray, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """The face that is seen where others overlap `face` [N] in its plane."""
        overlaps = self.overlaps
        contested = np.flatnonzero(np.take(self._contested, face))
        if not len(contested):
            return face
        settled = face.copy()
        sides = overlaps.side(face[contested], directions[contested])
        for side, (faces, _) in enumerate(overlaps.covers):
            ray = contested[(sides == side) & overlaps.beaten[face[contested], side]]
            if not len(ray):
                continue
            over = self._covers[side](origins[ray], directions[ray])
            ray, over = ray[over >= 0], faces[over[over >= 0]]
            depth = self.plane_depth(face[ray], origins[ray] + self._centre, directions[ray])
            points = origins[ray] + depth[:, None] * directions[ray]
            near = np.abs(dot(self.normals[over], points) - self._offsets[over]) <= 2 * overlaps.tolerance
            settled[ray[near]] = over[near]
        return settled

    def normals_of(self, face: np.ndarray) -> np.ndarray:
        """Normals of the faces `face`, int [N]: float32 [N, 3], every axis in memory by itself, as those of rays."""
        return np.take(np.ascontiguousarray(self.normals.T, np.float32), face, axis=1).T

    def plane_depth(self, face: np.ndarray, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """t of origin + t·direction on the plane of `face`: float64 [N], inf for face -1 and for parallel rays.

        face: int [N]. origin: float64 [3] or [N, 3]. directions: [N, 3], not normalised: with directions whose view
        component is 1, t is the planar depth in metres. t is negative where the plane lies behind the origin.
        """
        slope = dot(np.take(self.normals, face, axis=0), np.asarray(directions, np.float64))  # faster than indexing
        met = (np.asarray(face) >= 0) & (slope != 0)
        return np.divide(self._distance(face, origin), slope, out=np.full(len(slope), np.inf), where=met)

    def same_side(self, face: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether two points, float64 [3], lie on the same side of the planes of `face`: bool [N]."""
        if len(face) > len(self.normals):  # once for every face
            return np.take(self.same_side(np.arange(len(self.normals)), first, second), face)
        return self._distance(face, first) * self._distance(face, second) > 0

    def _distance(self, face: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """From `origin`, [3] or [N, 3], along the normals of `face` to their planes: float64 [N], with sign."""
        origins = np.asarray(origin, np.float64) - self._centre
        if origins.ndim == 1 and len(face) > len(self.normals):
            return np.take(self._offsets - dot(self.normals, origins), face)
        return np.take(self._offsets, face) - dot(np.take(self.normals, face, axis=0), origins)


def _rows_of_three(count: int) -> np.ndarray:
    """Faces of triangles that share no corners, int [count, 3]."""
    return np.arange(3 * count).reshape(-1, 3)


def _make_hits(vertices: np.ndarray, faces: np.ndarray) -> Callable:
    """A function of (origins, directions) that finds the first faces, int32 [N], -1 where there is none."""
    return _make_embree(vertices, faces) or NumpyHits(vertices, faces)


def _make_embree(vertices: np.ndarray, faces: np.ndarray) -> Callable | None:
    """A function of (origins, directions) that queries Embree, or None if it is not installed."""
    try:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene
    except ImportError:
        _say_slow()
        return None
    scene = EmbreeScene()
    TriangleMesh(scene, vertices.astype(np.float32), faces.astype(np.int32))
    # The first query builds the scene: run it now, before threads can do so at the same time.
    scene.run(np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32))
    return lambda origins, directions: scene.run(origins.astype(np.float32), directions.astype(np.float32))


@cache
def _say_slow() -> None:
    print("note: embreex is not installed: rays are cast in numpy, which is many times slower", file=sys.stderr)
