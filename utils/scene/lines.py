"""Soft edges of a scene: its lines as a camera sees them, drawn to look like the output of the HED network.

Lines are found in image space at 2x2 samples per pixel, where neighbouring samples see different faces: silhouettes,
occlusions, contacts of objects, creases. Each is then drawn with a soft pen, wider when near.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from utils.meshes.mesh import Geometry, dot, weld
from utils.scene.raycast import RayCaster
from utils.scene.views import View

SAMPLES = 2  # per pixel and axis
CREASE_COS = np.cos(np.radians(40))  # sharper dihedral angles are lines
OUTLINE, CREASE = 255, 215  # brightness: where depth jumps; where it does not
DENSE_FACES = 50_000  # above it, faces are about as small as samples, and most neighbouring samples differ
BAND = 32  # rows of samples
SMALLEST = 6  # pixels; smaller groups of line pixels are specks
REFERENCE_WIDTH = 1080  # pixels; the image width that pen widths are given for
PEN_WIDTHS = (3, 4, 5, 6, 7, 8)  # pixels
MIDDLE_WIDTH = 6.0  # pixels, at the typical depth of the scene
SOFTNESS = 1.0  # pixels; standard deviation of the blur


@dataclass(frozen=True)
class LineScene:
    """A scene prepared for drawing. patches: int32 [F], faces connected without a crease; None for coarse scenes."""

    geometry: Geometry
    caster: RayCaster
    patches: np.ndarray | None


@dataclass(frozen=True)
class Lines:
    """One-pixel lines. brightness: uint8 [H, W], 0 off the lines. depth: float32 [H, W], planar, inf off the lines."""

    brightness: np.ndarray
    depth: np.ndarray


def make_line_scene(geometry: Geometry, caster: RayCaster) -> LineScene:
    """Prepare a scene: for dense meshes, compute the patches once."""
    dense = len(geometry.faces) > DENSE_FACES
    return LineScene(geometry, caster, crease_patches(geometry, caster.normals) if dense else None)


def crease_patches(geometry: Geometry, normals: np.ndarray) -> np.ndarray:
    """Number of the patch of each face, int32 [F]. Inside a patch only a jump in depth can make a line.

    Two faces of one component are in one patch if they share an edge without a crease.
    """
    corners = weld(geometry.vertices)[geometry.faces]
    ends = np.sort(np.stack([corners, np.roll(corners, -1, axis=1)], axis=-1), axis=-1).reshape(-1, 2).astype(np.int64)
    edge = ends[:, 0] * len(geometry.vertices) + ends[:, 1]
    order = np.argsort(edge, kind="stable")
    shared = np.flatnonzero(np.diff(edge[order]) == 0)
    f, g = order[shared] // 3, order[shared + 1] // 3
    flat = (dot(normals[f], normals[g]) >= CREASE_COS) | (geometry.smooth[f] & geometry.smooth[g])
    joined = flat & (geometry.components[f] == geometry.components[g])
    count = len(geometry.faces)
    graph = coo_matrix((np.ones(joined.sum(), bool), (f[joined], g[joined])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def find_lines(scene: LineScene, view: View) -> Lines:
    """Lines of the scene at one pixel width, before softening."""
    rays = view.rays(SAMPLES, np.float32)
    return lines_between(scene, view, scene.caster.cast(view.eye, rays.reshape(-1, 3)).reshape(rays.shape[:2]), rays)


def lines_between(scene: LineScene, view: View, faces: np.ndarray, rays: np.ndarray) -> Lines:
    """Lines between neighbouring rays. rays: `View.rays(k)`, [k H, k W, 3]; faces: what they hit, int32 [k H, k W]."""
    samples = len(faces) // view.height
    nearness = None if scene.patches is None else _nearness(scene.caster, view, faces, rays)
    brightness = np.zeros((view.height, view.width), np.uint8)
    depth = np.full((view.height, view.width), np.inf, np.float32)
    for step in ((0, 1), (1, 0)):
        y, x = np.nonzero(_may_be_line(scene.patches, faces, nearness, view, step))
        first, second = _sample(faces, view, y, x), _sample(faces, view, y + step[0], x + step[1])
        value, first_depth, second_depth = _classify(scene, view, samples, first, second)
        line = value > 0
        # The line belongs to the surface in front.
        behind = (second_depth < first_depth)[line]
        rows, columns = (y[line] + step[0] * behind) // samples, (x[line] + step[1] * behind) // samples
        np.maximum.at(brightness, (rows, columns), value[line])
        np.minimum.at(depth, (rows, columns), np.minimum(first_depth, second_depth)[line].astype(np.float32))
    speck = _specks(brightness)
    brightness[speck], depth[speck] = 0, np.inf
    return Lines(brightness, depth)


def _may_be_line(
    patches: np.ndarray | None, faces: np.ndarray, nearness: np.ndarray | None, view: View, step: tuple[int, int]
) -> np.ndarray:
    """Pairs of neighbouring samples that need a closer look, bool [h, w]; with patches, few on a dense mesh.

    Inside a patch these are jumps in depth. On a plane 1/depth is linear in the image, so that a jump is a difference
    well above the smaller of the two adjacent ones.
    """
    a, b = (np.s_[: faces.shape[0] - step[0], : faces.shape[1] - step[1]], np.s_[step[0] :, step[1] :])
    if patches is None:
        return faces[a] != faces[b]
    patch = np.where(faces >= 0, patches[faces], -1)
    slope = np.abs(nearness[b] - nearness[a])
    before, after = slope.copy(), slope.copy()
    axis = step.index(1)
    if axis:
        before[:, 1:], after[:, :-1] = slope[:, :-1], slope[:, 1:]
    else:
        before[1:], after[:-1] = slope[:-1], slope[1:]
    samples = len(faces) // view.height
    footprint = np.minimum(nearness[a], nearness[b]) / (2 * samples * min(view.fx, view.fy))
    jump = slope > np.minimum(before, after) + footprint
    return (patch[a] != patch[b]) | (jump & (faces[a] != faces[b]))


def _nearness(caster: RayCaster, view: View, faces: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """1/depth of every sample, float32, 0 where nothing is hit: good enough to choose pairs to check in float64."""
    depth = np.empty(faces.shape, np.float32)
    for row in range(0, len(faces), BAND):  # bands fit in the CPU cache
        band = np.s_[row : row + BAND]
        depth[band].flat = caster.plane_depth(faces[band].ravel(), view.eye, rays[band].reshape(-1, 3))
    return 1 / depth


def _sample(faces: np.ndarray, view: View, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(face [N], direction [N, 3]) of samples."""
    samples = len(faces) // view.height
    return faces[y, x], view.directions((x + 0.5) / samples, (y + 0.5) / samples)


def _classify(
    scene: LineScene, view: View, samples: int, first: tuple, second: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brightness of the line between pairs of neighbouring samples (0: none), and the depth of both samples."""
    geometry, caster = scene.geometry, scene.caster
    (f, f_ray), (g, g_ray) = first, second
    f_depth, g_depth = (caster.plane_depth(a, view.eye, ray) for a, ray in (first, second))
    value = np.where((f < 0) != (g < 0), OUTLINE, 0).astype(np.uint8)
    both = np.flatnonzero((f >= 0) & (g >= 0))
    f, g, f_ray, g_ray = f[both], g[both], f_ray[both], g_ray[both]
    # Distance of the second plane behind the first, on both rays. The sign changes if the planes meet in between.
    at_first = caster.plane_depth(g, view.eye, f_ray) - f_depth[both]
    at_second = g_depth[both] - caster.plane_depth(f, view.eye, g_ray)
    gap = np.minimum(np.abs(at_first), np.abs(at_second))
    footprint = np.minimum(f_depth[both], g_depth[both]) / (samples * min(view.fx, view.fy))
    jump = (np.sign(at_first) == np.sign(at_second)) & (gap > footprint)
    contact = geometry.components[f] != geometry.components[g]
    facing = [
        caster.normals[a] * -np.sign(dot(caster.normals[a], ray))[:, None] for a, ray in ((f, f_ray), (g, g_ray))
    ]
    crease = (dot(*facing) < CREASE_COS) & ~(geometry.smooth[f] & geometry.smooth[g])
    value[both] = np.where(jump, OUTLINE, np.where(contact | crease, CREASE, 0))
    return value, f_depth, g_depth


def _specks(brightness: np.ndarray) -> np.ndarray:
    """Line pixels whose connected group is smaller than SMALLEST, bool [H, W]."""
    _, label, stats, _ = cv2.connectedComponentsWithStats((brightness > 0).astype(np.uint8), connectivity=8)
    small = stats[:, cv2.CC_STAT_AREA] < SMALLEST
    small[0] = False  # the background
    return np.take(small, label)


def soften(lines: Lines, typical_depth: float) -> np.ndarray:
    """Draw lines with a soft pen: uint8 [H, W, 3], white on black.

    typical_depth: planar depth, in the scene's unit, at which a line gets MIDDLE_WIDTH; one value per scene, so
    that widths do not flicker.
    """
    height, width = lines.brightness.shape
    scale = width / REFERENCE_WIDTH
    nearness = np.sqrt(typical_depth / np.maximum(lines.depth, 1e-9))
    pen = np.clip(np.round(MIDDLE_WIDTH * nearness), PEN_WIDTHS[0], PEN_WIDTHS[-1])
    drawn = np.zeros((height, width), np.uint8)
    for pen_width in PEN_WIDTHS:
        layer = np.where(pen == pen_width, lines.brightness, 0).astype(np.uint8)
        drawn = np.maximum(drawn, cv2.dilate(layer, _disc(pen_width * scale)))
    drawn = cv2.GaussianBlur(drawn, (0, 0), max(0.5, SOFTNESS * scale))
    return np.repeat(drawn[..., None], 3, axis=2)


def _disc(diameter: float) -> np.ndarray:
    """A round brush, uint8 [n, n], n odd."""
    radius = max(diameter / 2, 0.5)
    reach = int(np.ceil(radius - 0.5))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return (np.hypot(x, y) <= radius).astype(np.uint8)


def shade(caster: RayCaster, view: View) -> np.ndarray:
    """A grey render lit from the camera, uint8 [H, W, 3], white where nothing is hit: the input for HED."""
    rays = view.rays().reshape(-1, 3)
    face = caster.cast(view.eye, rays)
    grey = lit_from_camera(caster.normals[face], rays, face >= 0).reshape(view.height, view.width)
    return np.repeat(grey[..., None], 3, axis=2)


def lit_from_camera(normals: np.ndarray, rays: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Grey of surfaces, uint8 [N]: 220 faced squarely, 60 edge on, 255 where nothing is hit. normals, rays: [N, 3]."""
    facing = np.abs(dot(normals, rays)) / np.sqrt(dot(rays, rays))
    return np.where(hit, 60 + 160 * facing, 255).round().astype(np.uint8)
