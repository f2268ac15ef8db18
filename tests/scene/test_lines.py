"""Soft edges of a scene."""

from dataclasses import replace

import cv2
import numpy as np
import trimesh

from benchmarks.preprocess import subdivide
from tests.scene.preprocess_common import BOXES, view_at
from utils.meshes.load import load_geometry
from utils.scene.lines import find_lines, make_line_scene, soften
from utils.scene.raycast import RayCaster


def test_lines_lie_where_edges_project(boxes):
    """Lines cover the projected edges of the box in front; flat faces are empty."""
    view = view_at(0.3, size=(360, 240))
    lines = find_lines(make_line_scene(*boxes), view).brightness > 0
    front = np.array([[x, 4.5, z] for x, z in ((-2, 0), (2, 0), (2, 3), (-2, 3))], float)
    corners, inside = view.project(front - view.eye)
    assert inside.all()
    wanted = np.zeros(lines.shape, np.uint8)
    cv2.polylines(wanted, [np.round(corners - 0.5).astype(np.int32)], True, 1)
    near = cv2.distanceTransform((~lines).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= 1.5
    assert near[wanted > 0].all()
    x, y = corners.min(0), corners.max(0)
    assert not lines[int(x[1]) + 4 : int(y[1]) - 4, int(x[0]) + 4 : int(y[0]) - 4].any()


def test_smooth_surfaces_have_no_creases(tmp_path):
    """An icosahedron, whose sides meet at 41.8 degrees, has lines inside when it is flat, and none when smooth."""
    trimesh.creation.icosphere(subdivisions=0, radius=1.5).export(tmp_path / "flat.stl")
    geometry = load_geometry(tmp_path / "flat.stl", "+z")
    caster = RayCaster(geometry)
    view = view_at(0, -5, 0, size=(360, 240))
    shapes = [replace(geometry, smooth=np.full(len(geometry.faces), flag)) for flag in (False, True)]
    flat, smooth = (find_lines(make_line_scene(shape, caster), view).brightness > 0 for shape in shapes)
    body = caster.cast(view.eye, view.rays().reshape(-1, 3)).reshape(flat.shape) >= 0
    inside = cv2.distanceTransform(body.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > 2.5
    assert (flat & inside).sum() > 500 and not (smooth & inside).any()
    # 4-connected regions beside the line: the background, outside and inside, so that the outline is closed.
    assert cv2.connectedComponents((~smooth).astype(np.uint8), connectivity=4)[0] == 3


def test_pens_are_soft_and_as_wide_as_promised(boxes):
    view = view_at(0.3, size=(1080, 720))
    drawn = soften(find_lines(make_line_scene(*boxes), view), typical_depth=13.0)[..., 0]
    assert drawn.max() == 255 and 0.01 < (drawn > 127).mean() < 0.15
    inside = cv2.distanceTransform((drawn > 127).astype(np.uint8), cv2.DIST_L2, 5)
    ridge = inside[inside == cv2.dilate(inside, np.ones((3, 3)))]
    widths = 2 * ridge[ridge > 0.9]
    assert np.percentile(widths, 10) > 2.5 and np.percentile(widths, 90) < 10


def test_dense_meshes_draw_the_same_lines(boxes):
    geometry, caster = boxes
    view = view_at(0.3, size=(540, 360))
    coarse = find_lines(make_line_scene(geometry, caster), view).brightness
    for _ in range(6):
        geometry = subdivide(geometry)
    scene = make_line_scene(geometry, RayCaster(geometry))
    assert scene.patches is not None and len(np.unique(scene.patches)) == 6 * len(BOXES)
    dense = find_lines(scene, view).brightness
    assert ((coarse > 0) != (dense > 0)).mean() < 2e-4
