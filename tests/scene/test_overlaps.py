"""Overlapping coplanar faces: the same one is seen wherever both are, from every side and in every frame."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.scene.preprocess_common import view_at
from utils.meshes.mesh import Geometry, assemble, build_geometry, make_part, place
from utils.scene.lines import find_lines, make_line_scene
from utils.scene.raycast import RayCaster
from utils.scene.survey import survey
from utils.scene.views import View, correspondence

Object = tuple[str, np.ndarray, np.ndarray]


def sheet(name: str, x: tuple, y: tuple, z: float = 0, flip: bool = False, parts: int = 1) -> Object:
    """A horizontal rectangle, cut into parts x parts squares of two triangles."""
    u, v = np.meshgrid(np.linspace(*x, parts + 1), np.linspace(*y, parts + 1))
    points = np.stack([u.ravel(), v.ravel(), np.full(u.size, float(z))], axis=1)
    first = (np.arange(parts)[:, None] * (parts + 1) + np.arange(parts)).ravel()
    quads = np.stack([first, first + 1, first + parts + 2, first + parts + 1], axis=1)
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [2, 3, 0]]])
    return name, points, faces[:, ::-1] if flip else faces


def box(name: str, low: tuple, high: tuple) -> Object:
    """A closed box with faces turned outwards."""
    points = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * np.subtract(high, low) + low
    quads = np.array([(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)])
    return name, points, np.concatenate([quads[:, [0, 1, 2]], quads[:, [2, 3, 0]]])


def one_object(*parts: Object) -> Object:
    """The same in one object, as in an STL file."""
    starts = np.cumsum([0] + [len(points) for _, points, _ in parts])
    faces = [faces + start for (_, _, faces), start in zip(parts, starts, strict=False)]
    return "all", np.concatenate([points for _, points, _ in parts]), np.concatenate(faces)


def seen_from(geometry: Geometry, height: float = 7.0, spot: tuple = (0.01, 0.02)) -> np.ndarray:
    """Names of the objects below (or above) points of a grid, [21, 21]: x from -5 to 5, y from -5 to 5."""
    x, y = np.meshgrid(np.linspace(-5, 5, 21), np.linspace(-5, 5, 21), indexing="ij")
    eye = np.array([*spot, height])
    rays = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1) - eye
    face = RayCaster(geometry).cast(eye, rays)
    names = np.array([*geometry.names, ""])
    return names[np.where(face >= 0, geometry.objects[face], -1)].reshape(x.shape)


FLOOR, RUG = sheet("floor", (-5.3, 5.3), (-5.2, 5.2)), sheet("rug", (-2.2, 2.2), (-1.7, 1.7))
UNDER = np.zeros((21, 21), bool)
UNDER[6:15, 7:14] = True  # the points of the grid that the rug covers


@pytest.mark.parametrize("hits", ["embree", "numpy"])
@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("place", ["centre", "far and turned"])
def test_a_rug_lies_on_its_floor(monkeypatch, hits, parts, flips, order, place) -> None:
    if hits == "numpy":
        monkeypatch.setattr("utils.scene.raycast._make_embree", lambda *_: None)
    else:
        pytest.importorskip("embreex")
    objects = [sheet("floor", (-5.3, 5.3), (-5.2, 5.2), flip=flips[0], parts=parts)]
    objects += [sheet("rug", (-2.2, 2.2), (-1.7, 1.7), flip=flips[1], parts=parts)]
    geometry = build_geometry(objects[::order], "+z")
    eye, turn, move = np.array([0.1, -3, 4.0]), np.eye(3), np.zeros(3)
    if place != "centre":
        turn, move = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0], np.array([300, -200, 50.0])
        stored = (geometry.vertices @ turn + move).astype(np.float32).astype(float)
        geometry = replace(geometry, vertices=stored)
    x, y = np.meshgrid(np.linspace(-5, 5, 21), np.linspace(-5, 5, 21), indexing="ij")
    caster = RayCaster(geometry)
    for step in (0, 0.3, 2):
        for side in (1, -1):
            at = (eye[0] + step, eye[1], eye[2] * side)
            rays = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1) - at
            face = caster.cast(np.array(at) @ turn + move, rays @ turn)
            rug = geometry.objects[face].reshape(x.shape) == geometry.names.index("rug")
            np.testing.assert_array_equal(rug, UNDER)


def test_only_overlaps_have_a_rule() -> None:
    """Tiles side by side, a wall on a floor, and a rug one millimetre above it are left unchanged."""
    tiles = [sheet(f"{i}{j}", (i, i + 1), (j, j + 1)) for i in range(-3, 3) for j in range(-3, 3)]
    wall = ("wall", np.array([[-3, 0, 0], [3, 0, 0], [3, 0, 2], [-3, 0, 2.0]]), np.array([[0, 1, 2], [2, 3, 0]]))
    lifted = sheet("rug", (-2.2, 2.2), (-1.7, 1.7), 0.001)
    for objects in (tiles, [FLOOR, wall], [FLOOR, lifted], [one_object(*tiles)]):
        assert RayCaster(build_geometry(objects, "+z")).overlaps is None
    turned = build_geometry(tiles, "+z")
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    stored = (turned.vertices @ turn + 50).astype(np.float32).astype(float)
    assert RayCaster(replace(turned, vertices=stored)).overlaps is None


def single(vertices: np.ndarray) -> np.ndarray:
    return vertices.astype(np.float32).astype(float)


@pytest.mark.parametrize("way", ["float32", "float32 as text", "a node turns it"])
@pytest.mark.parametrize("seed", range(4))
def test_float32_is_coarse_far_from_the_origin(way: str, seed: int) -> None:
    """A mesh stored 4 km off, rounded to 0.2 millimetres: the rug is whole, tiles side by side are no overlaps."""
    turn, move = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0], np.array([4000, -3000, 900.0])
    matrix = np.eye(4)
    matrix[:3, :3] = turn.T

    def far(objects: list[tuple]) -> Geometry:
        parts = []
        for name, vertices, faces in objects:
            if way == "a node turns it":
                vertices = single(vertices + move @ turn.T)
            else:
                vertices = single(vertices @ turn + move).round(6 if way == "float32 as text" else 99)
            part = make_part(Path("far"), name, vertices, faces, None)
            parts.append(place(part, name, matrix if way == "a node turns it" else np.eye(4)))
        return assemble(Path("far"), parts, "+z")

    tiles = [sheet(f"{i}{j}", (i, i + 1), (j, j + 1)) for i in range(-3, 3) for j in range(-3, 3)]
    rug, tiled = far([FLOOR, RUG]), far(tiles)
    x, y = np.meshgrid(np.linspace(-5, 5, 21), np.linspace(-5, 5, 21), indexing="ij")
    for eye in ((0.1, -3, 4.0), (2.1, -3, -4.0)):
        rays = np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1) - eye
        face = RayCaster(rug).cast(eye @ turn + move, rays @ turn)
        np.testing.assert_array_equal((rug.objects[face] == rug.names.index("rug")).reshape(x.shape), UNDER)
    assert RayCaster(tiled).overlaps is None


def test_only_stored_rounding_is_coarse() -> None:
    """Far from the origin, in float64 or moved there by a node, a rug one millimetre above its floor is none on it."""
    meshes = [FLOOR, sheet("rug", (-2.2, 2.2), (-1.7, 1.7), 0.001)]
    move = np.array([40000.123456, -30000.123456, 900.123456])
    moved = build_geometry([(name, vertices + move, faces) for name, vertices, faces in meshes], "+z")
    matrix = np.eye(4)
    matrix[:3, 3] = move
    parts = [place(make_part(Path("far"), *mesh, None), mesh[0], matrix) for mesh in meshes]
    for geometry in (moved, assemble(Path("far"), parts, "+z")):
        assert RayCaster(geometry).overlaps is None


def test_smaller_then_later_wins() -> None:
    first, later = sheet("first", (-5.2, 1.2), (-3, 3)), sheet("later", (-1.2, 5.2), (-3, 3))
    assert seen_from(build_geometry([first, later], "+z"))[10, 10] == "later"
    assert seen_from(build_geometry([later, first], "+z"))[10, 10] == "first"
    coin = sheet("coin", (-0.6, 0.6), (-0.6, 0.6))
    for objects in ([FLOOR, RUG, coin], [coin, RUG, FLOOR], [RUG, coin, FLOOR]):
        found = seen_from(build_geometry(objects, "+z"))
        expected = np.where(UNDER, "rug", "floor")
        expected[9:12, 9:12] = "coin"
        np.testing.assert_array_equal(found, expected)


def test_pieces_of_one_object_follow_the_rule() -> None:
    """As in an STL file, also where the rug and the floor share a corner."""
    for rug in (RUG, sheet("rug", (-5.3, -1.2), (-5.2, 0.3))):
        geometry = build_geometry([one_object(rug, FLOOR)], "+z")
        caster, eye = RayCaster(geometry), np.array([-2.0, -1, 6])
        rays = np.random.default_rng(0).uniform(rug[1].min(0), rug[1].max(0), (400, 3)) - eye
        assert (caster.cast(eye, rays) < 2).all()  # the rug's two faces


def test_a_box_on_the_ground_hides_what_it_stands_on() -> None:
    """From outside its bottom is never visible; from inside, every ray sees the ground."""
    geometry = build_geometry([FLOOR, box("house", (-2.2, -1.7, 0), (2.2, 1.7, 3))], "+z")
    view = view_at(0.3, size=(180, 120))
    caster = RayCaster(geometry)
    face = caster.cast(view.eye, view.rays().reshape(-1, 3))
    sides = caster.overlaps.side(face, view.rays().reshape(-1, 3))
    assert not caster.overlaps.beaten[face, sides].any()
    assert not survey(caster, [view]).warnings
    rays = np.random.default_rng(0).uniform((-2, -1.5, 0), (2, 1.5, 0), (400, 3)) - (0, 0, 2)
    assert (geometry.objects[caster.cast(np.array([0, 0, 2.0]), rays)] == 0).all()
    below = seen_from(geometry, height=-7.0)
    np.testing.assert_array_equal(below, np.where(UNDER, "house", "floor"))


def test_flush_fronts() -> None:
    """Two closed houses whose fronts are flush and overlap: the smaller is seen."""
    geometry = build_geometry([box("small", (-1, 0, 0), (2, 3, 2)), box("large", (-4, 0, 0), (1, 4, 4))], "+z")
    caster = RayCaster(geometry)
    rays = np.random.default_rng(0).uniform((-1, 0, 0), (1, 0, 2), (400, 3)) - (0.2, -8, 1)
    assert (geometry.objects[caster.cast(np.array([0.2, -8, 1]), rays)] == 0).all()
    (warning,) = survey(caster, [view_at(0.3)]).warnings
    assert "'small' over 'large'" in warning and "\n" not in warning


def down(move: float, size: tuple[int, int] = (360, 240)) -> View:
    """A view from obliquely above, moved along x."""
    backward = np.array([0, -0.6, 0.8])
    c2w = np.eye(4)
    c2w[:3, :3] = np.stack([[1, 0, 0], np.cross(backward, [1, 0, 0]), backward], axis=1)
    c2w[:3, 3] = (move, -7.1, 8)
    return View(c2w, 1.2 * size[1], 1.2 * size[1], size[0] / 2, size[1] / 2, *size)


def test_edges_and_maps_are_those_of_a_lifted_rug() -> None:
    flat, lifted = (build_geometry([FLOOR, sheet("rug", (-2.2, 2.2), (-1.7, 1.7), z)], "+z") for z in (0, 0.001))
    casters = RayCaster(flat), RayCaster(lifted)
    for move in (0, 0.4):
        flat_lines, lifted_lines = (
            find_lines(make_line_scene(g, c), down(move)).brightness > 0
            for g, c in zip((flat, lifted), casters, strict=True)
        )
        assert flat_lines.any()
        for one, other in ((flat_lines, lifted_lines), (lifted_lines, flat_lines)):
            distance = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            assert distance[one].max() <= 1
    maps = [correspondence(caster, down(0), down(0.4)) for caster in casters]
    assert (maps[0].visible == maps[1].visible).mean() > 0.998 and not maps[0].occluded.any()
