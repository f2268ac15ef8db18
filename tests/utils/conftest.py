"""Fixtures that several test files of this folder share."""

from pathlib import Path

import pytest

from tests.support.scenes import make_scene
from utils.layout import Arc, load_scene


@pytest.fixture
def arc(tmp_path: Path) -> Arc:
    return load_scene(make_scene(tmp_path / "scene")).arcs[0]
