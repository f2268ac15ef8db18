"""Fixtures that several test files of this folder share."""

from typing import ClassVar

import pytest

from synthetic.clips import MAP_SIZE
from synthetic.measuring.scenes import CheckScene
from tests.support.small import session_folder


class QuickScene(CheckScene):
    """Its edges are drawn nine times faster, and thicker; the commands take them from its cache."""

    edge_size: ClassVar[tuple[int, int]] = MAP_SIZE


@pytest.fixture(scope="session")
def scene() -> QuickScene:
    """A test scene of the benchmarks; all workers share its cache."""
    return QuickScene(200_000, 0, (144, 96), session_folder() / "scenes")
