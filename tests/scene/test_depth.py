"""Pictures of depth: what their values mean, one range for a scene, and what preprocess.py writes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.scene.preprocess_common import BOXES, SMALL, run_main, view_at, write_boxes, write_path
from tests.support.helpers import assert_same, contents, probe_video
from utils.files import read_json
from utils.images import read_image
from utils.layout import SCENE_MANIFEST, load_scene
from utils.meshes.load import load_geometry
from utils.scene.passes.draw import WHITE, depth_range, draw_depth
from utils.scene.raycast import RayCaster
from utils.scene.views import look

WALLS = {10.0: -2.0, 40 / 3: 0.0, 20.0: 4.0}  # distance from the camera at y = -8: where it stands in x
FRONT = {distance: ((x, distance - 8 + 0.5, 2), (1.2, 1, 1.2)) for distance, x in WALLS.items()}


def caster_of(folder: Path, *boxes: tuple) -> RayCaster:
    return RayCaster(load_geometry(write_boxes(folder / "boxes.ply", *boxes), "+z"))


def values_at(picture: np.ndarray, distance: float) -> int:
    """At the middle of a wall. The camera's focal length is 60 pixels, its centre (36, 24)."""
    return int(picture[24, int(36 + 60 * WALLS[distance] / distance)])


def test_near_is_white_half_way_in_inverse_depth_is_grey_and_sky_is_black(tmp_path: Path):
    caster = caster_of(tmp_path, *FRONT.values())
    sight = look(caster, view_at(0))
    picture = draw_depth(sight, (10.0, 20.0))
    assert picture.dtype == np.uint16 and picture.shape == (48, 72)
    assert [values_at(picture, d) for d in WALLS] == [WHITE, 1 + (WHITE - 1) // 2, 1]
    assert (picture.ravel()[~sight.hit] == 0).all() and not sight.hit.all()
    assert values_at(draw_depth(sight, (12.0, 16.0)), 10.0) == WHITE  # nearer than the range
    assert values_at(draw_depth(sight, (12.0, 16.0)), 20.0) == 1


def test_range_is_that_of_all_views_but_for_outliers(tmp_path: Path):
    caster = caster_of(tmp_path, *FRONT.values())
    assert depth_range(caster, [view_at(0)]) == pytest.approx((10, 20))
    assert depth_range(caster, [view_at(0), view_at(0, y=-10)]) == pytest.approx((10, 22))
    assert depth_range(caster, [view_at(500)]) is None
    assert (draw_depth(look(caster, view_at(500)), None) == 0).all()


def test_one_flat_wall_is_white(tmp_path: Path):
    caster = caster_of(tmp_path, FRONT[10.0])
    sight = look(caster, view_at(-2))
    picture = draw_depth(sight, depth_range(caster, [view_at(-2)]))
    assert set(picture.ravel().tolist()) == {0, WHITE}


@pytest.mark.slow
def test_depth_is_added_to_a_finished_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mesh, cameras = write_boxes(tmp_path / "boxes.glb", *BOXES, up="y"), write_path(tmp_path / "path.json", 91)
    command = ("--scene", mesh, "--cameras", cameras, *SMALL, "--output")
    once, later = tmp_path / "once", tmp_path / "later"
    assert run_main(monkeypatch, *command, once, "--passes", "depth") == 0
    assert run_main(monkeypatch, *command, later) == 0
    plain = contents(later)
    assert not [name for name in plain if "depth" in name]
    assert run_main(monkeypatch, *command, later, "--passes", "depth") == 0
    assert_same(contents(later, SCENE_MANIFEST), contents(once, SCENE_MANIFEST))
    assert_same(contents(later, "depth", SCENE_MANIFEST), {n: d for n, d in plain.items() if n != SCENE_MANIFEST})
    limits = read_json(later / SCENE_MANIFEST)["depth"]
    assert read_json(later / SCENE_MANIFEST)["finished"] and 0 < limits["near"] < limits["far"]

    first, second = load_scene(later).arcs
    paths = [*first.control_paths("depth"), *second.control_paths("depth")[1:]]
    pictures = np.array([np.asarray(Image.open(path)) for path in paths])
    assert pictures.dtype == np.uint16 and pictures.shape == (91, 72, 108)
    assert probe_video(later / "passes" / "depth.mp4")[1] == 91
    ground = pictures[:, 60, 54].astype(int)  # the camera slides along a flat ground: its grey stays
    depth = 90 * 2 / (60.5 - 36)
    grey = (1 / depth - 1 / limits["far"]) / (1 / limits["near"] - 1 / limits["far"])
    assert np.abs(ground - 1 - (WHITE - 1) * grey).max() <= 1
    assert (pictures[:, 0] == 0).all()  # the sky
    shown = read_image(paths[0])
    assert shown.dtype == np.uint8 and np.abs(shown[..., 0] - pictures[0] / 257).max() <= 1


def test_other_passes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    command = ("--scene", "a.glb", "--path", "orbit", "--output", tmp_path / "out", "--passes", "normals")
    assert run_main(monkeypatch, *command) == 2
    assert "invalid choice: 'normals'" in capsys.readouterr().err
