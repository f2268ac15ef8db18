"""Views of a scene: rays through pixels, projection, and exact correspondences between two views.

Directions are left unnormalised, one unit long along the view axis, so that a ray's parameter is planar depth.
All results are float64, computed from face planes; the ray caster only decides which face is seen.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from utils.cameras.path import CameraPath
from utils.scene.raycast import RayCaster

REACHED = 1 - 1e-4  # share of the way to a point at which a ray counts as having reached it


@dataclass(frozen=True)
class View:
    """A pinhole camera and its image. c2w: float64 [4, 4], OpenGL axes; focal lengths and centre in pixels."""

    c2w: np.ndarray
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    @property
    def eye(self) -> np.ndarray:
        return self.c2w[:3, 3]

    def rays(self, samples: int = 1, dtype: type = np.float64) -> np.ndarray:
        """Directions [samples * height, samples * width, 3] through the centres of samples² parts of each pixel.

        Every axis lies in memory by itself: sums and products over columns are several times as fast as over rows.
        """
        x = (np.arange(samples * self.width) + 0.5) / samples
        y = (np.arange(samples * self.height) + 0.5) / samples
        right, up, backward = self.c2w[:3, :3].T
        columns = ((x - self.cx) / self.fx)[:, None] * right
        rows = ((self.cy - y) / self.fy)[:, None] * up - backward
        axes = np.ascontiguousarray(rows.T, dtype)[:, :, None] + np.ascontiguousarray(columns.T, dtype)[:, None]
        return np.moveaxis(axes, 0, -1)

    def directions(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Directions [N, 3] through image points, in pixels from the outer corner of the top-left pixel."""
        local = np.stack([(x - self.cx) / self.fx, (self.cy - y) / self.fy, np.full(len(x), -1.0)], axis=1)
        return np.einsum("nj,kj->nk", local, self.c2w[:3, :3])

    def project(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image points [N, 2] (x, y) of points `offsets` [N, 3] away from the eye, and which are in the image [N]."""
        # Not `@`: BLAS would use all cores for each small product; frames already run in parallel threads.
        right, up, backward = np.einsum("jn,jk->kn", np.ascontiguousarray(offsets.T), self.c2w[:3, :3])
        with np.errstate(divide="ignore", invalid="ignore"):
            x = self.cx - self.fx * right / backward
            y = self.cy + self.fy * up / backward
        inside = (backward < 0) & (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
        return np.stack([x, y], axis=1), inside


def make_views(path: CameraPath, size: tuple[int, int]) -> list[View]:
    """One view per pose of a camera path, at the image size (width, height)."""
    return [View(c2w, *map(float, k), *size) for c2w, k in zip(path.c2w, path.intrinsics(*size), strict=True)]


@dataclass(frozen=True)
class Correspondence:
    """Position in a source view of each pixel of a target view.

    position: float64 [H, W, 2], x then y, in pixels of the source; NaN where it is unknown. visible: bool [H, W]. hit:
    bool [H, W], whether the target pixel sees a surface at all. occluded: bool [H, W], surfaces that project into
    the source's image but are hidden there.
    """

    position: np.ndarray
    visible: np.ndarray
    hit: np.ndarray
    occluded: np.ndarray


@dataclass(frozen=True)
class Sight:
    """What a view sees through the centres of its pixels, row by row: N of them.

    rays: float64 [N, 3], not normalised (see above). face: int32 [N], -1 for the sky. depth: float64 [N], planar, in
    metres; 1 for the sky.
    """

    view: View
    rays: np.ndarray
    face: np.ndarray
    depth: np.ndarray

    @property
    def hit(self) -> np.ndarray:
        return self.face >= 0

    @cached_property
    def own_offsets(self) -> np.ndarray:
        """From the view's own eye to what is seen, [N, 3]."""
        return self.depth[:, None] * self.rays

    def offsets(self, eye: np.ndarray) -> np.ndarray:
        """From `eye` to what is seen, [N, 3]. A point at infinity has no parallax: its direction alone counts."""
        return self.own_offsets + np.where(self.hit, (self.view.eye - eye)[:, None], 0).T


def look(caster: RayCaster, view: View) -> Sight:
    rays = view.rays().reshape(-1, 3)
    face = caster.cast(view.eye, rays)
    return Sight(view, rays, face, np.where(face >= 0, caster.plane_depth(face, view.eye, rays), 1))


def correspondence(caster: RayCaster, source: View, target: View, *, sky: bool = True) -> Correspondence:
    """Exact correspondences of the surface points (and, with `sky`, points at infinity) that the target sees."""
    return find_in(caster, source, look(caster, target), sky=sky)


def find_in(
    caster: RayCaster, source: View, sight: Sight, *, sky: bool = True, offsets: np.ndarray | None = None
) -> Correspondence:
    """Positions in the view `source` of everything that another view sees. offsets: `sight.offsets` of its eye.

    A point is visible in the source if it projects into the image and a ray from the source's eye reaches it, from the
    same side of its face. The sky is visible where a ray of the same direction hits nothing.
    """
    hit, target = sight.hit, sight.view
    offsets = sight.offsets(source.eye) if offsets is None else offsets
    position, inside = source.project(offsets)
    faced = np.where(hit, caster.same_side(sight.face, source.eye, target.eye), sky)
    asked = np.flatnonzero(inside & faced)
    visible = np.zeros(len(hit), bool)
    visible[asked] = _reached(caster, source.eye, np.take(offsets.T, asked, axis=1).T, np.take(sight.face, asked))
    shape = (target.height, target.width)
    position[~visible] = np.nan
    occluded = hit & inside & ~visible
    return Correspondence(position.reshape(*shape, 2), *(a.reshape(shape) for a in (visible, hit, occluded)))


def _reached(caster: RayCaster, eye: np.ndarray, offsets: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Whether rays from `eye` reach points at `offsets` [N, 3] that lie on `face` [N], or the sky where face is -1."""
    blocker = caster.cast(eye, offsets)
    reached = (blocker == face) | (blocker < 0)
    other = np.flatnonzero(~reached & (face >= 0))
    reached[other] = caster.plane_depth(np.take(blocker, other), eye, offsets[other]) >= REACHED
    return reached


def resize_view(view: View, size: tuple[int, int]) -> View:
    """The same picture at another size (width, height): stretched where the aspect differs, as edges are."""
    width, height = size
    sx, sy = width / view.width, height / view.height
    return View(view.c2w, view.fx * sx, view.fy * sy, view.cx * sx, view.cy * sy, width, height)
