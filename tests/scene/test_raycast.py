"""First hits of rays."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.scene.geometry_common import make_geometry
from utils.scene import raycast
from utils.scene.bvh import NumpyHits
from utils.scene.raycast import RayCaster


def brute_force(triangles: np.ndarray, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hits by trying every triangle: (face, whether the ray is far from all edges and from a second hit)."""
    edge1, edge2 = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    across = np.cross(directions[:, None], edge2)
    scale = 1 / np.einsum("fx,nfx->nf", edge1, across)
    offset = origin - triangles[:, 0]
    u = np.einsum("fx,nfx->nf", offset, across) * scale
    v = np.einsum("nx,fx->nf", directions, np.cross(offset, edge1)) * scale
    t = np.einsum("fx,fx->f", edge2, np.cross(offset, edge1)) * scale
    margin = np.minimum(np.minimum(u, v), 1 - u - v)
    t = np.where((margin >= 0) & (t > 0), t, np.inf)
    face = np.where(np.isfinite(t.min(1)), t.argmin(1), -1)
    two = np.sort(t, axis=1)[:, :2]
    with np.errstate(invalid="ignore"):
        clear = (np.abs(margin).min(1) > 1e-4) & ~(two[:, 1] - two[:, 0] < 1e-4)
    return face, clear


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("hits", ["embree", "numpy"])
def test_rays_find_the_first_triangle(hits: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if hits == "numpy":
        monkeypatch.setattr("utils.scene.raycast._make_embree", lambda *_: None)
    else:
        pytest.importorskip("embreex")
    rng = np.random.default_rng(3)
    triangles = rng.normal(size=(200, 1, 3)) * 3 + rng.normal(size=(200, 3, 3)) * 0.7
    directions = rng.normal(size=(2000, 3)) * rng.uniform(0.01, 100, (2000, 1))
    eye = np.array([0.3, -0.2, 0.1])
    expected, clear = brute_force(triangles, eye, directions)
    caster = RayCaster(make_geometry(triangles + offset))
    found = caster.cast(eye + offset, directions)
    assert found.dtype == np.int32
    assert clear.mean() > 0.9
    assert 0.3 < (expected >= 0).mean() < 0.99
    np.testing.assert_array_equal(found[clear], expected[clear])
    np.testing.assert_array_equal(caster.cast(np.tile(eye + offset, (2000, 1)), directions), found)
    # Rays hit both sides: reversed triangles give the same hits.
    turned = RayCaster(make_geometry(triangles[:, ::-1] + offset)).cast(eye + offset, directions)
    np.testing.assert_array_equal(turned[clear], expected[clear])


def test_without_embree_it_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "embreex.mesh_construction", None)
    raycast._say_slow.cache_clear()
    triangle = np.array([[[-1, -1, 2], [1, -1, 2], [0, 1, 2]]], float)
    for _ in range(2):
        assert RayCaster(make_geometry(triangle)).cast(np.zeros(3), np.array([[0, 0, 1.0], [0, 0, -1]])).tolist() == [
            0,
            -1,
        ]
    assert capsys.readouterr().err.count("embreex is not installed") == 1


def test_axis_aligned_rays_and_flat_boxes() -> None:
    grid = np.array([[[x, y, 1], [x + 1, y, 1], [x, y + 1, 1]] for x in range(9) for y in range(9)], float)
    rays = np.tile([0, 0, 1.0], (81, 1))
    origins = grid.mean(1) * [1, 1, 0]
    assert NumpyHits(grid.reshape(-1, 3), np.arange(243).reshape(-1, 3))(origins, rays).tolist() == list(range(81))


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_plane_depth_is_exact(offset: float) -> None:
    rng = np.random.default_rng(4)
    triangles = rng.normal((0, 0, -20), size=(50, 3, 3))
    caster = RayCaster(make_geometry(triangles + offset))
    pixels = np.concatenate([rng.uniform(-0.1, 0.1, (500, 2)), -np.ones((500, 1))], 1)
    eye = np.full(3, offset)
    face = caster.cast(eye, pixels)
    depth = caster.plane_depth(face, eye, pixels)
    hit = face >= 0
    assert hit.any()
    assert np.isinf(depth[~hit]).all()
    points = pixels[hit] * depth[hit, None]
    off_plane = np.einsum("ij,ij->i", points - triangles[face[hit], 0], caster.normals[face[hit]])
    assert np.abs(off_plane).max() < (1e-12 if not offset else 1e-8)
    np.testing.assert_allclose(points[:, 2], -depth[hit])  # planar depth: the rays were not normalised
    flat = RayCaster(make_geometry(np.array([[[0, 0, 5], [1, 0, 5], [0, 1, 5]]], float)))
    assert flat.plane_depth(np.array([0]), np.zeros(3), np.array([[1.0, 0, 0]])).tolist() == [np.inf]
    assert flat.plane_depth(np.array([0]), np.zeros(3), np.array([[0.0, 0, -1]])).tolist() == [-5]


@pytest.mark.slow
def test_threads_share_a_caster() -> None:
    rng = np.random.default_rng(5)
    caster = RayCaster(make_geometry(rng.normal(size=(2000, 3, 3))))
    directions = [rng.normal(size=(20_000, 3)) for _ in range(8)]
    alone = [caster.cast(np.zeros(3), rays) for rays in directions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda rays: caster.cast(np.zeros(3), rays), directions))
    np.testing.assert_array_equal(together, alone)
