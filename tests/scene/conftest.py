"""Fixtures that several test files of this folder share."""

from pathlib import Path

import pytest

from tests.scene.preprocess_common import BOXES, write_boxes, write_path
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, turn
from utils.scene.raycast import RayCaster


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> tuple[Geometry, RayCaster]:
    geometry = turn(load_geometry(write_boxes(tmp_path_factory.mktemp("mesh") / "boxes.glb", *BOXES, up="y")), "+z")
    return geometry, RayCaster(geometry)


@pytest.fixture
def inputs(tmp_path) -> tuple[Path, Path]:
    return write_boxes(tmp_path / "boxes.glb", *BOXES, up="y"), write_path(tmp_path / "cameras.json")
