"""Check a camera path before rendering: the scene's typical depth, and warnings about likely mistakes."""

from dataclasses import dataclass

import numpy as np

from utils.meshes.mesh import dot
from utils.scene.raycast import RayCaster
from utils.scene.views import View

GRID = (45, 30)  # rays per frame, across and down
ALMOST_NOTHING = 0.02  # share of rays that hit the scene
LONGEST_LIST = 3  # overlaps that a warning names
INSIDE = 0.5  # share of hits on the back of faces


@dataclass(frozen=True)
class Survey:
    """typical_depth: median planar depth of all surfaces seen, in the scene's unit. warnings: one line each."""

    typical_depth: float
    warnings: list[str]


def survey(caster: RayCaster, views: list[View]) -> Survey:
    """Cast a coarse grid of rays for every frame. Frames are numbered from 1, as in the scene folder."""
    looks = [_look(caster, view) for view in views]
    depths = np.concatenate([look.depths for look in looks])
    hit, back = (np.array([getattr(look, name) for look in looks]) for name in ("hit", "back"))
    warnings = []
    if hit.mean() < ALMOST_NOTHING:
        warnings.append(
            f"the path sees almost nothing of the scene ({hit.mean():.1%} of its rays hit): do mesh and cameras have "
            "the same up axis? See --scene_up and --cameras_up"
        )
    if (hit == 0).any():
        warnings.append(f"the camera sees nothing in frames {_ranges(hit == 0)}")
    if (back > INSIDE).any():
        warnings.append(
            f"the camera sees mostly back faces in frames {_ranges(back > INSIDE)}: it is inside an object, or the "
            "mesh is wound inside out, or the up axis is wrong"
        )
    if covered := sorted(set().union(*(look.covered for look in looks))):
        shown = ", ".join(f"{a!r} over {b!r}" if a != b else f"{a!r} over itself" for a, b in covered[:LONGEST_LIST])
        more = f" and {len(covered) - LONGEST_LIST} more" if len(covered) > LONGEST_LIST else ""
        warnings.append(f"faces lie in one plane and overlap, one of them is drawn: {shown}{more}; move them apart")
    return Survey(float(np.median(depths)) if len(depths) else 1.0, warnings)


@dataclass(frozen=True)
class _Look:
    """depths: of the hits. hit, back: share of rays that hit, of hits on back faces. covered: names of overlaps."""

    depths: np.ndarray
    hit: float
    back: float
    covered: set[tuple[str, str]]


def _look(caster: RayCaster, view: View) -> _Look:
    """Cast the grid of rays of one view."""
    x, y = np.meshgrid(
        (np.arange(GRID[0]) + 0.5) / GRID[0] * view.width, (np.arange(GRID[1]) + 0.5) / GRID[1] * view.height
    )
    rays = view.directions(x.ravel(), y.ravel())
    face = caster.cast(view.eye, rays)
    hit = face >= 0
    depth = caster.plane_depth(face[hit], view.eye, rays[hit])
    back = dot(caster.normals[face[hit]], rays[hit]) > 0
    covered = set() if caster.overlaps is None else caster.overlaps.seen(face[hit], rays[hit])
    return _Look(depth, float(hit.mean()), float(back.mean()) if len(back) else 0.0, covered)


def _ranges(flags: np.ndarray) -> str:
    """Numbers of the frames that are flagged, counted from 1: '3-7, 12'."""
    numbers = np.flatnonzero(flags) + 1
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
