"""Overlapping coplanar faces, such as a rug on a floor: one of them is seen wherever both are.

Rays meet such faces at depths that differ by rounding alone, so that either could be found. The rule, for each side of
the plane: a face whose object turns its inside to the viewer gives way; else the smaller object wins, then the smaller
piece of it, then the later one.

A patch is a set of faces of one component in one plane that are connected by edges; those never overlap each other.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from utils.meshes.mesh import Geometry, dot, weld

ROUNDING = 1e-6  # share of the scene's radius: closer planes are one, and overlaps as narrow are none
LIFT = 4e-6  # share of the scene's radius that rays surely tell apart
NORMAL_CELLS = 1000  # per unit; faces of one plane have normals in one cell
STORED = 0.5  # of the size of rounded coordinates: a mesh is as coarse as one of this radius, wherever it lies
PLANE_GAP = 1e-4  # share of the scene's radius between planes that are told apart before any exact test
OBLIQUE = np.array([0.618, 0.4142, 0.7321])  # normals at right angles to it are rare: it tells n from -n
SHIFT = 0.37  # of cells, so that no common value lies on the border of two
DIGITS = 6  # of areas that are compared


@dataclass(frozen=True)
class Overlaps:
    """The overlaps of a scene. P patches; sides: 0 where the plane's normal points to the viewer, else 1.

    upright: float64 [F + 1, 3] normals of the planes, equal for equal planes. beaten: bool [F + 1, 2], faces that
    others cover on a side. covers: per side the faces that cover others, int [N], and their corners,
    float64 [N, 3, 3], each moved towards the viewer by LIFT for every face below it.
    tolerance: distance of planes that count as one. patches: int [F + 1], -1 for faces without overlaps. visible:
    (side, winner's patch, loser's patch, winner's object, loser's object) of overlaps that can be seen, int [N, 5].
    names: of the objects.
    The last entry of all arrays of faces is for rays that hit nothing.
    """

    upright: np.ndarray
    beaten: np.ndarray
    covers: list[tuple[np.ndarray, np.ndarray]]
    tolerance: float
    patches: np.ndarray
    visible: np.ndarray
    names: tuple[str, ...]

    def side(self, face: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """From which side rays [N, 3] meet their faces, int [N]."""
        return (dot(self.upright[face], directions) > 0).astype(int)

    def seen(self, face: np.ndarray, directions: np.ndarray) -> set[tuple[str, str]]:
        """(object that is drawn, object that it covers) of the overlaps of what rays hit, by name."""
        hit = np.flatnonzero(self.patches[face] >= 0)
        seen = np.unique(self.patches[face[hit]] * 2 + self.side(face[hit], directions[hit]))
        side, winner, loser, *objects = self.visible.T
        shown = np.isin(winner * 2 + side, seen) | np.isin(loser * 2 + side, seen)
        return {tuple(self.names[one] for one in pair) for pair in np.stack(objects, axis=1)[shown].tolist()}


def find_overlaps(
    geometry: Geometry, vertices: np.ndarray, normals: np.ndarray, offsets: np.ndarray
) -> Overlaps | None:
    """The overlaps of a scene, None if it has none.

    vertices: float64 [V, 3], around the origin. normals, offsets: the faces' planes, float64 [F, 3] and [F].
    """
    radius = max(np.abs(vertices).max(), STORED * geometry.rounded)
    flipped = np.where(normals @ OBLIQUE < 0, -1, 1)
    upright, heights = normals * flipped[:, None], offsets * flipped
    chosen, plane = _shared_planes(upright, heights, PLANE_GAP * radius)
    if not len(chosen):
        return None
    welded = weld(vertices)
    chosen, plane, patch = _find_patches(geometry, welded, flipped, chosen, plane)
    if not len(chosen):
        return None
    corners = vertices[geometry.faces[chosen]]
    f, g = _overlapping(corners, upright[chosen], heights[chosen], plane, patch, ROUNDING * radius)
    if not len(f):
        return None
    met = np.isin(patch, patch[np.concatenate([f, g])])
    place = np.cumsum(met) - 1
    chosen, patch, pairs = chosen[met], np.unique(patch[met], return_inverse=True)[1], (place[f], place[g])
    rank, away = _ranks(geometry, vertices, welded, flipped, chosen, patch)
    return _decide(geometry, vertices, upright, radius, chosen, patch, pairs, rank, away)


def _shared_planes(upright: np.ndarray, heights: np.ndarray, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """(faces [N] whose plane, or one very close, holds other faces too; number of their plane [N], ascending)."""
    cells = np.floor(upright * NORMAL_CELLS + SHIFT).astype(np.int64) + NORMAL_CELLS + 1
    key = (cells[:, 0] * 4096 + cells[:, 1]) * 4096 + cells[:, 2]
    order = np.lexsort((heights, key))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(key[order]) != 0) | (np.diff(heights[order]) > gap)
    plane = np.cumsum(new) - 1
    shared = np.bincount(plane)[plane] > 1
    return order[shared], plane[shared]


def _find_patches(
    geometry: Geometry, welded: np.ndarray, flipped: np.ndarray, chosen: np.ndarray, plane: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Faces in planes that hold several patches, with the numbers of their planes and patches."""
    count, corners = len(chosen), welded[geometry.faces[chosen]]
    start, end = corners.ravel(), np.roll(corners, -1, axis=1).ravel()
    owner = np.repeat(np.arange(count), 3)
    low, high = np.minimum(start, end), np.maximum(start, end)
    key = _mix(low * len(welded) + high, plane[owner], geometry.components[chosen][owner])
    order = np.argsort(key)
    same = np.flatnonzero(np.diff(key[order]) == 0)
    alone = np.ones(len(same), bool)  # an edge of three faces joins none
    alone[1:] &= np.diff(same) > 1
    alone[:-1] &= np.diff(same) > 1
    a, b = order[same[alone]], order[same[alone] + 1]
    # The face lies to the left of its edge as seen against its own normal.
    left = (start < end) == (flipped[chosen][owner] > 0)
    a, b = a[left[a] != left[b]], b[left[a] != left[b]]
    graph = coo_array((np.ones(len(a), bool), (owner[a], owner[b])), (count, count))
    patch = connected_components(graph, directed=False)[1]
    _, first = np.unique(patch, return_index=True)
    several = (np.bincount(plane[first], minlength=plane[-1] + 1) > 1)[plane]
    return chosen[several], plane[several], patch[several]


def _mix(*numbers: np.ndarray) -> np.ndarray:
    """A hash, uint64 [N], of rows of numbers."""
    key = np.zeros(len(numbers[0]), np.uint64)
    for column in numbers:
        key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


# --- which faces overlap ---


def _overlapping(
    corners: np.ndarray,
    upright: np.ndarray,
    heights: np.ndarray,
    plane: np.ndarray,
    patch: np.ndarray,
    rounding: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of faces of different patches that overlap in one plane, [N] each. corners: [F, 3, 3]."""
    order = np.argsort(patch, kind="stable")
    _, first, patch = np.unique(patch[order], return_index=True, return_inverse=True)
    patch = patch[np.argsort(order)]  # numbered without gaps
    low, high = corners.min(1), corners.max(1)
    boxes = np.minimum.reduceat(low[order], first), np.maximum.reduceat(high[order], first), plane[order][first]
    a, b = _meeting_boxes(boxes, boxes, rounding)
    larger = np.ptp(boxes[1][a] - boxes[0][a], axis=1) >= np.ptp(boxes[1][b] - boxes[0][b], axis=1)
    a, b = a[larger & (a != b)], b[larger & (a != b)]
    above, below = (np.flatnonzero(np.isin(patch, part)) for part in (a, b))
    f, g = _meeting_boxes(*((low[part], high[part], plane[part]) for part in (above, below)), rounding)
    f, g = above[f], below[g]
    wanted = np.isin(patch[f] * len(first) + patch[g], a * len(first) + b)
    f, g = f[wanted], g[wanted]
    apart = [
        np.abs(np.einsum("nki,ni->nk", corners[q], upright[p]) - heights[p][:, None]).max(1)
        for p, q in ((f, g), (g, f))
    ]
    close = np.minimum(*apart) <= rounding
    f, g = f[close], g[close]
    meet = _depth(corners[f], corners[g], upright[f]) > rounding
    return f[meet], g[meet]


Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]  # low, high: float64 [N, 3]; key: int [N]


def _meeting_boxes(first: Boxes, second: Boxes, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a box of `first` and one of `second` with the same key that meet in more than an edge, [M] each.

    Boxes are looked up in grids whose cells are as large as the larger of the two, so that each is in eight at most.
    """
    levels = [
        np.ceil(np.log2(np.maximum((high - low).max(1), margin) / margin)).astype(int)
        for low, high, _ in (first, second)
    ]
    found = [np.zeros(0, np.int64)]
    for level in np.unique(np.concatenate(levels)):
        cell = margin * 2.0**level
        for owners, guests in (
            (_cells(first, levels[0] == level, cell), _cells(second, levels[1] <= level, cell)),
            (_cells(first, levels[0] < level, cell), _cells(second, levels[1] == level, cell)),
        ):
            i, j = _equal_pairs(*owners, *guests)
            shared = np.minimum(first[1][i], second[1][j]) - np.maximum(first[0][i], second[0][j])
            meet = ((shared > margin).sum(1) >= 2) & (shared > -margin).all(1) & (first[2][i] == second[2][j])
            found.append(i[meet] * len(second[0]) + j[meet])
    pairs = np.unique(np.concatenate(found))
    return pairs // max(len(second[0]), 1), pairs % max(len(second[0]), 1)


def _equal_pairs(a_keys: np.ndarray, a: np.ndarray, b_keys: np.ndarray, b: np.ndarray) -> tuple:
    """All pairs of an entry of `a` and one of `b` with equal keys, [M] each. The keys ascend."""
    begin, end = (np.searchsorted(a_keys, b_keys, side=side) for side in ("left", "right"))
    hits = end - begin
    return a[np.repeat(begin - np.cumsum(hits) + hits, hits) + np.arange(hits.sum())], np.repeat(b, hits)


def _cells(boxes: Boxes, taken: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """(hash of key and cell, ascending; box) for all cells of size `cell` that the taken boxes, no larger, touch."""
    chosen = np.flatnonzero(taken)
    low, high, key = (one[chosen] for one in boxes)
    first, last = (np.floor(bound / cell + SHIFT).astype(np.int64) for bound in (low, high))
    hashes, found = [], []
    for step in np.ndindex(2, 2, 2):
        box = np.flatnonzero((first + step <= last).all(1))
        hashes.append(_mix(key[box], *(first[box] + step).T))
        found.append(chosen[box])
    hashes, found = np.concatenate(hashes), np.concatenate(found)
    order = np.argsort(hashes)  # searching is many times faster in order
    return hashes[order], found[order]


def _depth(a: np.ndarray, b: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """How deep triangles overlap in their plane, float64 [N]; not above zero where they do not. a, b: [N, 3, 3]."""
    depth = np.full(len(a), np.inf)
    for triangle in (a, b):
        for k in range(3):
            axis = np.cross(triangle[:, (k + 1) % 3] - triangle[:, k], normal)
            axis /= np.linalg.norm(axis, axis=1, keepdims=True)
            spans = [np.einsum("nki,ni->nk", one, axis) for one in (a, b)]
            shared = np.minimum(*(span.max(1) for span in spans)) - np.maximum(*(span.min(1) for span in spans))
            depth = np.minimum(depth, shared)
    return depth


# --- which of them wins ---


def _ranks(
    geometry: Geometry,
    vertices: np.ndarray,
    welded: np.ndarray,
    flipped: np.ndarray,
    chosen: np.ndarray,
    patch: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of every patch (the higher wins), int [P], and whether it shows its inside on each side, bool [P, 2]."""
    a, b, c = vertices[geometry.faces].transpose(1, 0, 2)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    by_object, by_component = (np.bincount(of, area)[of] for of in (geometry.objects, geometry.components))
    count = patch.max() + 1
    own = np.bincount(patch, area[chosen], count)
    face = np.zeros(count, np.int64)
    face[patch] = chosen  # any face of the patch
    areas = (_rounded(one) for one in (own, by_component[face], by_object[face]))
    order = np.lexsort((geometry.components[face], *(-one for one in areas)))
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    outside = _outsides(geometry, vertices, welded, np.unique(geometry.components[chosen]))
    outside = outside[geometry.components[face]] * flipped[face]
    return rank, np.stack([outside < 0, outside > 0], axis=1)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To DIGITS significant digits: areas of equal things differ by rounding."""
    scale = 10.0 ** (DIGITS - np.ceil(np.log10(np.maximum(values, 1e-300))))
    return np.round(values * scale) / scale


def _outsides(geometry: Geometry, vertices: np.ndarray, welded: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For every component: 1 if its normals point out of it, -1 if into it, 0 if it is not closed; int [C].

    Only those in `wanted` are looked at; a closed component has each edge once in each direction.
    """
    count = int(geometry.components.max()) + 1
    looked = np.isin(geometry.components, wanted)
    faces, component = geometry.faces[looked], geometry.components[looked]
    corners = welded[faces]
    start, end, owner = corners.ravel(), np.roll(corners, -1, axis=1).ravel(), np.repeat(component, 3)
    there, back = _mix(start, end, owner), _mix(end, start, owner)
    unique, times = np.unique(there, return_counts=True)
    place = np.minimum(np.searchsorted(unique, back), len(unique) - 1)
    single = (unique[place] == back) & (times[place] == 1) & (times[np.searchsorted(unique, there)] == 1)
    a, b, c = vertices[faces].transpose(1, 0, 2)
    volume = np.bincount(component, dot(a, np.cross(b, c)), count)
    return np.where(np.bincount(owner, ~single, count) == 0, np.sign(volume), 0).astype(int)


def _decide(
    geometry: Geometry,
    vertices: np.ndarray,
    upright: np.ndarray,
    radius: float,
    chosen: np.ndarray,
    patch: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    rank: np.ndarray,
    away: np.ndarray,
) -> Overlaps:
    beaten, covers, visible = np.zeros((len(upright) + 1, 2), bool), [], []
    object_of, component_of = np.zeros((2, len(rank)), np.int64)
    object_of[patch], component_of[patch] = geometry.objects[chosen], geometry.components[chosen]
    for side in (0, 1):
        order = rank + len(rank) * ~away[:, side]
        f, g = pairs
        swap = order[patch[f]] > order[patch[g]]
        f, g = np.where(swap, g, f), np.where(swap, f, g)  # g wins
        beaten[chosen[f], side] = True
        covered = np.unique(patch[f] * len(rank) + patch[g])
        loser, winner = covered // len(rank), covered % len(rank)
        level = np.zeros(len(rank), int)
        for k in np.argsort(order[loser]):  # all that a loser itself covers comes before it
            level[winner[k]] = max(level[winner[k]], level[loser[k]] + 1)
        over = chosen[level[patch] > 0]
        lift = LIFT * radius * level[patch][level[patch] > 0] * (1 - 2 * side)
        covers.append((over, vertices[geometry.faces[over]] + (upright[over] * lift[:, None])[:, None]))
        # Within one component nothing shows that faces overlap: they lie in one plane, and no line parts them.
        plain = ~away[loser, side] & ~away[winner, side] & (component_of[loser] != component_of[winner])
        rows = (np.full(len(loser), side), winner, loser, object_of[winner], object_of[loser])
        visible.append(np.stack(rows, axis=1)[plain])
    patches = np.full(len(upright) + 1, -1)
    patches[chosen] = patch
    upright = np.concatenate([upright, np.zeros((1, 3))])
    return Overlaps(upright, beaten, covers, ROUNDING * radius, patches, np.concatenate(visible), geometry.names)
