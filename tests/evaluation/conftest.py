"""Fixtures that several test files of this folder share."""

import pytest

from synthetic.render import make_world
from tests.evaluation.metrics_common import EDGE_SIZE, SAMPLE, SIZE
from utils.cameras.read import read_cameras
from utils.evaluation.covisibility import Covisibility, make_covisibility
from utils.layout import CAMERAS_FILE, SCENE_FILE
from utils.meshes.load import load_geometry
from utils.meshes.mesh import turn
from utils.scene.views import View, make_views, resize_view


@pytest.fixture(scope="module")
def path_views() -> list[View]:
    return [resize_view(view, SIZE) for view in make_views(read_cameras(SAMPLE / CAMERAS_FILE), EDGE_SIZE)]


@pytest.fixture(scope="module")
def town():
    return make_world(turn(load_geometry(SAMPLE / SCENE_FILE), "+z"))


@pytest.fixture(scope="module")
def covisibility(town, path_views) -> Covisibility:
    return make_covisibility(town.caster, path_views)
