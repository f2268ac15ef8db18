"""The solids that random towns are made of: boxes, lathe shapes, and houses with windows and doors in real openings.

A mesh is a pair: vertices float64 [V, 3] in metres, Z up; faces int64 [F, 3], counter-clockwise from outside. Where
solids meet, one ends inside the other: no two faces are coplanar, so that every ray has one first hit.
"""

import numpy as np

Mesh = tuple[np.ndarray, np.ndarray]

STOREY, PLINTH = 2.9, 0.15  # metres; the ground floor starts a step above the ground, which keeps faces apart
SILL, HEAD = 0.75, 2.35  # window, above its floor; doors have the same head
REVEAL, PANE_DEPTH, PANE_EDGE = 0.2, 0.12, 0.04  # openings go in by REVEAL; panes sit in them and end inside the wall


def loft(rings: np.ndarray) -> Mesh:
    """The closed surface over rings [R, K, 3], each counter-clockwise when the last one is seen from outside.

    The ends are closed with fans around their first point.
    """
    count, sides, _ = rings.shape
    first = np.arange(count - 1)[:, None] * sides
    here, after = first + np.arange(sides), first + (np.arange(sides) + 1) % sides
    skin = quads(here, after, after + sides, here + sides)
    i = np.arange(1, sides - 1)
    fan = np.stack([0 * i, i, i + 1], axis=1)
    return rings.reshape(-1, 3), np.concatenate([skin, fan[:, ::-1], fan + (count - 1) * sides])


def box(low: tuple, high: tuple) -> Mesh:
    """An axis-aligned box between two corners."""
    (x0, y0, z0), (x1, y1, z1) = low, high
    return loft(np.array([[(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)] for z in (z0, z1)], float))


def turned(sides: int, profile: list[tuple], rng: np.random.Generator | None = None, rough: float = 0.0) -> Mesh:
    """A lathe shape around z: profile holds (radius, z) from bottom to top; `rough` varies the radii by that share."""
    radius, z = np.array(profile, float).T[..., None]
    angle = np.arange(sides) * 2 * np.pi / sides
    if rng is not None:
        radius = radius * rng.uniform(1 - rough, 1 + rough, (len(profile), sides))
    z = np.broadcast_to(z, (len(profile), sides))
    return loft(np.stack(np.broadcast_arrays(radius * np.cos(angle), radius * np.sin(angle), z), axis=-1))


def place(mesh: Mesh, at: tuple, yaw: float = 0.0) -> Mesh:
    """Rotate a mesh around z by yaw (radians), then move it to `at`."""
    turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return mesh[0] @ turn.T + at, mesh[1]


def merge(meshes: list[Mesh]) -> Mesh:
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in meshes[:-1]])
    faces = [faces + start for (_, faces), start in zip(meshes, starts, strict=True)]
    return np.concatenate([vertices for vertices, _ in meshes]), np.concatenate(faces)


def weld(mesh: Mesh) -> Mesh:
    """Give equal positions one vertex, and drop vertices that no face uses."""
    used = mesh[0][mesh[1].ravel()]
    vertices, faces = np.unique(used, axis=0, return_inverse=True)
    return vertices, faces.reshape(-1, 3)


def quads(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Two triangles for each quadrilateral of vertex numbers a, b, c, d."""
    return np.stack([a, b, c, a, c, d], axis=-1).reshape(-1, 3)


# --- Houses: in their own frame the ridge runs along x and the ground is z = 0 ---------------------------------------


def facade(width: float, z: np.ndarray, openings: np.ndarray) -> Mesh:
    """A wall in the plane y = 0 seen from -y, with openings [N, 4] (x0, x1, z0, z1) that go in by REVEAL.

    Its height is cut at every z [Z], so that neighbouring walls share the vertices of their corner.
    """
    x = np.unique(np.concatenate([[-width / 2, width / 2], openings[:, :2].ravel()]))
    grid = np.stack(np.meshgrid(x, (0, REVEAL), z, indexing="ij"), axis=-1).transpose(1, 0, 2, 3)
    front, back = np.arange(2 * len(x) * len(z)).reshape(2, len(x), len(z))
    center_x, center_z = (x[1:] + x[:-1])[:, None, None] / 2, (z[1:] + z[:-1])[None, :, None] / 2
    x0, x1, z0, z1 = openings.T
    hole = ((center_x > x0) & (center_x < x1) & (center_z > z0) & (center_z < z1)).any(axis=-1)
    faces = [quads(*(corner[~hole] for corner in _corners(front)))]
    around = np.pad(hole, 1)
    f, b = _corners(front), _corners(back)  # corners 0 bottom left, 1 bottom right, 2 top right, 3 top left
    sides = ((around[1:-1, :-2], 0, 1), (around[2:, 1:-1], 1, 2), (around[1:-1, 2:], 2, 3), (around[:-2, 1:-1], 3, 0))
    for neighbour, i, j in sides:
        edge = hole & ~neighbour
        faces.append(quads(f[i][edge], f[j][edge], b[j][edge], b[i][edge]))
    return grid.reshape(-1, 3), np.concatenate(faces)


def _corners(grid: np.ndarray) -> tuple[np.ndarray, ...]:
    return grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]


def pane(opening: np.ndarray) -> Mesh:
    """A pane in an opening (x0, x1, z0, z1) of a facade; its border ends inside the wall."""
    x0, x1, z0, z1 = opening + PANE_EDGE * np.array([-1, 1, -1, 1])
    corners = [(x0, PANE_DEPTH, z0), (x1, PANE_DEPTH, z0), (x1, PANE_DEPTH, z1), (x0, PANE_DEPTH, z1)]
    return np.array(corners), np.array([(0, 1, 2), (0, 2, 3)])


def gable_roof(half: np.ndarray, eaves: float, slope: float) -> Mesh:
    """Two slabs over a house of half size [2]; its walls end inside them."""
    x, y, thick, sunk = half[0] + 0.45, half[1] + 0.5, 0.3, 0.12
    edge, ridge = eaves - sunk - 0.5 * slope, eaves - sunk + half[1] * slope
    outline = [(0, ridge + thick), (-y, edge + thick), (-y, edge), (0, ridge), (y, edge), (y, edge + thick)]
    return loft(np.array([[(side * x, *point) for point in outline] for side in (-1, 1)]))


def hip_roof(half: np.ndarray, eaves: float, slope: float) -> Mesh:
    """Four slopes over a house of half size [2]; slope 0 gives a flat roof. Its walls end inside it."""
    x, y = half + 0.45
    levels = [(x, y, eaves - 0.12), (x, y, eaves + 0.2)]
    if slope:
        levels.append((x - y + 0.06, 0.06, eaves + 0.2 + slope * y))
    return loft(np.array([[(-a, -b, z), (a, -b, z), (a, b, z), (-a, b, z)] for a, b, z in levels]))


def balcony(x: float, y: float, z: float) -> Mesh:
    """A slab and three parapets in front of the wall at y, around x; no two of their faces are coplanar."""
    return merge(
        [
            box((x - 1.25, y - 1.1, z - 0.15), (x + 1.25, y + 0.05, z)),
            box((x - 1.35, y - 1.2, z - 0.22), (x + 1.35, y - 1.05, z + 0.8)),
            *(box((s - 0.08, y - 1.1, z - 0.19), (s + 0.08, y + 0.05, z + 0.74)) for s in (x - 1.22, x + 1.22)),
        ]
    )


def make_house(rng: np.random.Generator) -> tuple[list[tuple[str, Mesh]], int, np.ndarray]:
    """A house: its meshes with their classes, the side of its door (0: -y, 1: +x), and its half size [2]."""
    half, floors = rng.uniform((3.4, 2.7), (4.4, 3.5)), int(rng.choice((1, 1, 2, 2, 2, 3)))
    roof, slope = rng.choice(("gable", "gable", "hip", "flat")), rng.uniform(0.6, 0.9)
    door_side, door_column = int(rng.integers(2)), int(rng.integers(2))
    width, eaves = rng.uniform(1.6, 2.0), floors * STOREY + 0.35
    bases = PLINTH + STOREY * np.arange(floors)
    z = np.concatenate([[-0.6, PLINTH], np.stack([bases + SILL, bases + HEAD], axis=1).ravel(), [eaves]])
    walls, windows, meshes = [], [], []
    for side in range(4):
        length, distance = 2 * half[side % 2], half[1 - side % 2]
        count = 2 if side % 2 == 0 or side == door_side else 1
        columns = (np.arange(count) - (count - 1) / 2) * length / 2
        openings = np.array([(c - width / 2, c + width / 2, b + SILL, b + HEAD) for b in bases for c in columns])
        if side == door_side:
            openings[door_column, 2] = PLINTH
            door, openings_left = openings[door_column], np.delete(openings, door_column, axis=0)
            meshes.append(("door", _to_side(pane(door), side, distance)))
            if floors > 1 and rng.random() < 0.6:
                slab = balcony(columns[door_column], 0.0, PLINTH + STOREY)
                meshes.append(("balcony", _to_side(slab, side, distance)))
        else:
            openings_left = openings
        walls.append(_to_side(facade(length, z, openings), side, distance))
        windows += [_to_side(pane(opening), side, distance) for opening in openings_left]
        if roof == "gable" and side % 2:
            walls.append(_to_side(_gable(openings, length, eaves, slope), side, distance))
    meshes += [("wall", weld(merge(walls))), ("window", merge(windows))]
    shape = gable_roof(half, eaves, slope) if roof == "gable" else hip_roof(half, eaves, slope * (roof == "hip"))
    meshes.append(("roof", shape))
    if rng.random() < 0.75:
        x, y, top = *rng.uniform(-0.35, 0.35, 2) * half, shape[0][:, 2].max() + rng.uniform(0.5, 1.0)
        meshes.append(("chimney", box((x - 0.35, y - 0.35, eaves - 0.05), (x + 0.35, y + 0.35, top))))
    return meshes, door_side, half


def _gable(openings: np.ndarray, length: float, eaves: float, slope: float) -> Mesh:
    """The triangle over a facade, cut where the facade is."""
    x = np.unique(np.concatenate([[-length / 2, length / 2], openings[:, :2].ravel()]))
    points = [(0, 0, eaves + slope * length / 2), *((value, 0, eaves) for value in x)]
    i = np.arange(1, len(x))
    return np.array(points), np.stack([0 * i, i, i + 1], axis=1)


def _to_side(mesh: Mesh, side: int, distance: float) -> Mesh:
    """Move a mesh from a facade's frame to that side of the house, exactly: side 0 faces -y, 1 +x, 2 +y, 3 -x."""
    x, y, z = (mesh[0] - (0, distance, 0)).T
    x, y = ((x, y), (-y, x), (-x, -y), (y, -x))[side]
    return np.stack([x, y, z], axis=1), mesh[1]
