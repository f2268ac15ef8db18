"""Set before torch is imported: OpenMP threads that spin while they wait crawl on a machine that is not idle."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory):
    """A test scene of the benchmarks, synthetic.check_scenes.CheckScene; what is drawn of it is kept in its cache."""
    from synthetic.check_scenes import CheckScene

    return CheckScene(200_000, 0, (144, 96), tmp_path_factory.mktemp("scenes"))
