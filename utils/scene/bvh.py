"""First hits of rays without Embree: a bounding-volume hierarchy in numpy, exact but slow."""

import numpy as np

from utils.meshes.mesh import dot

LEAF = 4  # faces in a leaf of the hierarchy
CHUNK = 8192  # rays that descend together; limits the memory


class NumpyHits:
    """First hits through a bounding-volume hierarchy over faces in Morton order, in float64.

    The hierarchy is a complete binary tree: `_low[d]`, `_high[d]` hold the 2^d boxes of level d. All rays of a chunk
    descend together, level by level, as (ray, box) pairs.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        order = np.argsort(_morton(vertices[faces].mean(1)))
        levels = max(0, int(np.ceil(np.log2(len(faces) / LEAF))))
        self._faces = np.full(LEAF << levels, -1)
        self._faces[: len(faces)] = order
        self._corners = vertices[faces]  # [F, 3, 3]
        low = np.where(self._faces[:, None] < 0, np.inf, self._corners.min(1)[self._faces])
        high = np.where(self._faces[:, None] < 0, -np.inf, self._corners.max(1)[self._faces])
        margin = 1e-9 * np.abs(vertices).max()  # a flat box would miss the rays in its own plane
        self._low, self._high = [low.reshape(-1, LEAF, 3).min(1) - margin], [high.reshape(-1, LEAF, 3).max(1) + margin]
        for _ in range(levels):
            self._low.insert(0, self._low[0].reshape(-1, 2, 3).min(1))
            self._high.insert(0, self._high[0].reshape(-1, 2, 3).max(1))

    def __call__(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        directions = np.asarray(directions, np.float64)
        chunks = (slice(k, k + CHUNK) for k in range(0, len(directions), CHUNK))
        hits = [self._cast(origins[part], directions[part]) for part in chunks]
        return np.concatenate(hits) if hits else np.empty(0, np.int32)

    def _cast(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        ray, box = np.arange(len(origins)), np.zeros(len(origins), int)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / directions
            for level, (low, high) in enumerate(zip(self._low, self._high, strict=True)):
                if level:
                    ray, box = np.repeat(ray, 2), np.repeat(2 * box, 2)
                    box[1::2] += 1
                near, far = (low[box] - origins[ray]) * inverse[ray], (high[box] - origins[ray]) * inverse[ray]
                # fmin and fmax ignore the NaN of 0·inf: a ray that lies in a side of the box.
                enter, leave = np.fmin(near, far).max(1), np.fmax(near, far).min(1)
                met = ~(enter > leave) & ~(leave < 0)
                ray, box = ray[met], box[met]
        ray, face = np.repeat(ray, LEAF), self._faces.reshape(-1, LEAF)[box].ravel()
        ray, face = ray[face >= 0], face[face >= 0]
        t = _distance(self._corners[face], origins[ray], directions[ray])
        order = np.lexsort((face, t, ray))
        order = order[np.isfinite(t[order])]
        rays, first = np.unique(ray[order], return_index=True)
        found = np.full(len(origins), -1, np.int32)
        found[rays] = face[order][first]
        return found


def _distance(corners: np.ndarray, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """t where each ray crosses its own triangle (Möller and Trumbore), inf where it does not.

    corners: [N, 3, 3]; origins, directions: [N, 3].
    """
    edge1, edge2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    across = np.cross(directions, edge2)
    from_corner = origins - corners[:, 0]
    around = np.cross(from_corner, edge1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 1 / dot(edge1, across)
        u, v, t = (dot(a, b) * scale for a, b in ((from_corner, across), (directions, around), (edge2, around)))
        inside = (u >= -1e-12) & (v >= -1e-12) & (u + v <= 1 + 1e-12) & (t >= 0)
    return np.where(inside, t, np.inf)


def _morton(points: np.ndarray) -> np.ndarray:
    """Morton codes, uint64 [N], of points [N, 3]: 21 bits an axis over their bounding box."""
    low = points.min(0)
    cells = ((points - low) / max(np.ptp(points, axis=0).max(), 1e-300) * (2**21 - 1)).astype(np.uint64)
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        cells = (cells | cells << np.uint64(shift)) & np.uint64(mask)
    return cells[:, 0] | cells[:, 1] << np.uint64(1) | cells[:, 2] << np.uint64(2)
