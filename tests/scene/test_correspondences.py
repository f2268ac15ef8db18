"""Exact correspondences of a scene."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from tests.scene.preprocess_common import view_at
from utils.correspondence import VISIBLE, encode_map, source_positions
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry
from utils.scene.raycast import RayCaster
from utils.scene.views import View, correspondence


def test_a_static_camera_gives_the_identity(boxes):
    view = view_at(0)
    found = correspondence(boxes[1], view, view)
    x, y = np.meshgrid(np.arange(72) + 0.5, np.arange(48) + 0.5)
    assert found.visible.all()
    assert np.abs(found.position - np.stack([x, y], axis=-1)).max() < 1e-9


def test_there_and_back_returns(boxes):
    a, b = view_at(-1), view_at(1)
    there, back = correspondence(boxes[1], b, a), correspondence(boxes[1], a, b)
    y, x = np.nonzero(there.visible & there.hit)
    place = there.position[y, x]
    # From the exact position in b, the surface point seen there is projected back to a.
    rays = b.directions(*place.T)
    face = boxes[1].cast(b.eye, rays)
    points = b.eye + boxes[1].plane_depth(face, b.eye, rays)[:, None] * rays
    returned, _ = a.project(points - a.eye)
    error = np.abs(returned - np.stack([x, y], axis=1) - 0.5).max(1)
    assert np.median(error) < 1e-6 and (error < 0.01).mean() > 0.99
    assert 0.5 < back.visible.mean() < 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soup", "boxes"])
@pytest.mark.parametrize("seed", range(4))
def test_random_scenes_agree_with_brute_force(tmp_path, seed, kind):
    """Every visible pair shows one side of one point to both eyes; every hidden one is blocked, outside, or behind."""
    rng = np.random.default_rng(seed)
    _random_mesh(rng, kind).export(tmp_path / "scene.stl")
    geometry = load_geometry(tmp_path / "scene.stl", "+z")
    a, b = (_random_view(rng) for _ in range(2))
    found = correspondence(RayCaster(geometry), a, b)
    rays = b.rays().reshape(-1, 3)
    depth, normal = _first_crossing(geometry, b.eye, rays)
    hit = np.isfinite(depth)
    offsets = np.where(hit[:, None], b.eye + np.where(hit, depth, 0)[:, None] * rays - a.eye, rays)
    place, inside = a.project(offsets)
    blocked, _ = _first_crossing(geometry, a.eye, offsets)
    same_side = (normal * rays).sum(1) * (normal * offsets).sum(1) > 0
    seen = inside & np.where(hit, (blocked >= 1 - 1e-4) & same_side, np.isinf(blocked))
    visible = found.visible.ravel()
    assert (visible != seen).mean() < 5e-3 and (found.hit.ravel() != hit).mean() < 5e-3  # rays along an edge
    both = visible & seen & (found.hit.ravel() == hit)
    assert both.sum() > 100 and (hit & inside & ~seen).any() and 0.1 < hit.mean() < 0.95
    error = np.abs(found.position.reshape(-1, 2) - place)[both].max(1)
    assert (error < 1e-6).mean() > 0.995


def _random_mesh(rng: np.random.Generator, kind: str) -> trimesh.Trimesh:
    """About 40 triangles of any size and direction within 4 m of the origin, or 20 turned boxes there."""
    if kind == "soup":
        corners = rng.uniform(-3, 3, (40, 1, 3)) + rng.normal(0, 1.2, (40, 3, 3))
        return trimesh.Trimesh(corners.reshape(-1, 3), np.arange(120).reshape(-1, 3), process=False)
    boxes = [trimesh.creation.box(extents=rng.uniform(0.5, 2.5, 3)) for _ in range(20)]
    for box in boxes:
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = Rotation.random(random_state=rng).as_matrix(), rng.uniform(-3, 3, 3)
        box.apply_transform(pose)
    return trimesh.util.concatenate(boxes)


def _random_view(rng: np.random.Generator) -> View:
    """A small view of the origin from some metres away, slightly rotated and rolled."""
    view = view_at(*rng.uniform((-3, -10, -2), (3, -7, 2)), size=(36, 24))
    c2w = view.c2w.copy()
    c2w[:3, :3] = Rotation.from_rotvec(rng.normal(0, 0.15, 3)).as_matrix() @ c2w[:3, :3]
    return replace(view, c2w=c2w)


def _first_crossing(geometry: Geometry, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """t [N] and unscaled normal [N, 3] of the first triangle on each ray by testing all of them; inf if none."""
    a, b, c = geometry.vertices[geometry.faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    first, normal = np.full(len(rays), np.inf), np.zeros((len(rays), 3))
    for i, ray in enumerate(rays):
        system = np.stack([b - a, c - a, np.broadcast_to(-ray, a.shape)], axis=-1)
        good = np.flatnonzero(np.abs(np.linalg.det(system)) > 1e-12)
        u, v, t = np.linalg.solve(system[good], (origin - a[good])[..., None])[..., 0].T
        t[(u < 0) | (v < 0) | (u + v > 1) | (t <= 1e-9)] = np.inf
        if np.isfinite(t).any():
            first[i], normal[i] = t.min(), normals[good[t.argmin()]]
    return first, normal


def test_sky_moves_with_rotation_only(boxes):
    a, b = view_at(-1, z=6), view_at(1, z=6)
    found = correspondence(boxes[1], a, b)
    sky = ~found.hit
    assert sky.any() and found.visible[sky].mean() > 0.9
    y, x = np.nonzero(sky & found.visible)
    assert np.abs(found.position[y, x] - np.stack([x, y], axis=1) - 0.5).max() < 1e-9
    without = correspondence(boxes[1], a, b, sky=False)
    assert not without.visible[sky].any() and np.array_equal(without.visible[~sky], found.visible[~sky])


def test_codec_is_exact_to_its_step():
    rng = np.random.default_rng(1)
    position = rng.uniform(0, 1, (48, 72, 2)) * (72, 48)
    visible = rng.random((48, 72)) < 0.7
    code = encode_map(position, visible)
    assert (code[~visible] == 0).all() and (code[visible, 2] == VISIBLE).all()
    decoded, valid = source_positions(code)
    assert np.array_equal(valid, visible)
    assert np.abs(decoded - position)[visible].max() <= 0.5 / 65536 * 72 + 1e-9
    edge = encode_map(np.full((1, 1, 2), (1.0, 1.0)), np.ones((1, 1), bool))
    assert edge.tolist() == [[[65535, 0, 65535]]]
    with pytest.raises(ValueError, match="inside the frame"):
        encode_map(np.full((1, 1, 2), 1.5), np.ones((1, 1), bool))
