"""Which parts of a mesh two neighbouring anchors see: it is cut into small faces, and each is asked for by a ray."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from utils.meshes.mesh import Geometry
from utils.scene.raycast import RayCaster
from utils.scene.views import Sight, View, find_in

NEITHER, FIRST, SECOND, BOTH = range(4)
MOST_FACES = 150_000  # of the mesh in small faces
SMALL = 0.04  # longest side of a small face, as a share of its distance from the nearest anchor


@dataclass(frozen=True)
class SmallFaces:
    """corners: float64 [F, 3, 3], metres. origin: int [F], the scene's face that each is part of."""

    corners: np.ndarray
    origin: np.ndarray


def cut_small(geometry: Geometry, views: Sequence[View]) -> SmallFaces:
    """Cut faces in four until all are small where the views are near, or as many as a browser shows with ease."""
    corners, origin = geometry.vertices[geometry.faces], np.arange(len(geometry.faces))
    while True:
        sides = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1)
        middles = corners.mean(1)
        distance = np.min([np.linalg.norm(middles - view.eye, axis=1) for view in views], axis=0)
        large = np.flatnonzero(sides > SMALL * np.maximum(distance - sides, SMALL * distance))
        room = (MOST_FACES - len(corners)) // 3
        if not len(large) or room <= 0:
            return SmallFaces(corners, origin)
        if len(large) > room:  # those that look largest
            large = large[np.argsort(-sides[large] / distance[large])[:room]]
        corners = np.concatenate([np.delete(corners, large, axis=0), _quarters(corners[large])])
        origin = np.concatenate([np.delete(origin, large), np.repeat(origin[large], 4)])


def _quarters(corners: np.ndarray) -> np.ndarray:
    """Each triangle [F, 3, 3] as four, joined at the middles of its sides: [4 F, 3, 3]."""
    a, b, c = corners.transpose(1, 0, 2)
    ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
    return np.stack([a, ab, ca, ab, b, bc, ca, bc, c, ab, bc, ca], axis=1).reshape(-1, 3, 3)


def seen_by_anchors(caster: RayCaster, small: SmallFaces, first: View, second: View) -> np.ndarray:
    """NEITHER, FIRST, SECOND or BOTH for the middle of each small face, int [F].

    BOTH means that a correspondence between the two views exists there: seen by both, from one side.
    """
    points = small.corners.mean(1)

    def seen(source: View, target: View) -> np.ndarray:
        """Points that `source` sees, from the side on which `target` is."""
        row = replace(target, width=len(points), height=1)  # N points, as if they were the pixels of one row
        sight = Sight(row, points - target.eye, small.origin, np.ones(len(points)))
        return find_in(caster, source, sight).visible[0]

    by_first, by_second = seen(first, first), seen(second, second)
    both = by_second & seen(first, second)
    return np.select([both, by_second, by_first], [BOTH, SECOND, FIRST], NEITHER)
