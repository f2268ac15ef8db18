"""Fixtures that several test files share, made once by each worker."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests.support.helpers import ALIGN, ANCHORS, GGI, call, run
from tests.support.small import SESSION
from tests.support.stages import QUICK_VIDEO, RUN, VIDEO, draw, last_line, new_scene, train
from utils.cli import set_up_libraries

set_up_libraries()  # before torch is imported
# What a shell starts in the background ignores Ctrl-C, and so would the scripts that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder that all workers of a session, and the processes that they start, share."""
    if SESSION not in os.environ:
        config.session_folder = os.environ[SESSION] = tempfile.mkdtemp(prefix="pytest-session-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "session_folder"):
        shutil.rmtree(config.session_folder)


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA, `town`, with checkpoints 2 and 4; made by the real command."""
    folder = tmp_path_factory.mktemp("stage1") / "loras"
    result = run(ALIGN, *train(folder))
    assert (result.returncode, last_line(result.stdout)) == (0, str(folder / "town" / "checkpoint-4")), result.stderr
    return folder


@pytest.fixture(scope="session")
def anchored(tmp_path_factory: pytest.TempPathFactory, loras: Path) -> Path:
    """A scene of two arcs with its anchors; made by the real command."""
    scene = new_scene(tmp_path_factory.mktemp("stage2") / "scene")
    result = run(ANCHORS, *draw(scene, loras))
    assert (result.returncode, result.stdout.strip()) == (0, str(scene / "multiviews" / RUN)), result.stderr
    return scene


@pytest.fixture(scope="session")
def filmed(tmp_path_factory: pytest.TempPathFactory, anchored: Path) -> Path:
    """The same with its video; made by the real command."""
    scene = shutil.copytree(anchored, tmp_path_factory.mktemp("stage3") / "scene")
    result = run(GGI, "--target", scene / "multiviews" / RUN, *QUICK_VIDEO)
    folder = scene / "multiviews" / RUN / VIDEO
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(folder / "video.mp4"), str(folder / "contact_sheet.png")]
    return scene


@pytest.fixture(scope="session")
def one_arc(tmp_path_factory: pytest.TempPathFactory, loras: Path) -> Path:
    """A scene of one arc with its anchors, for tests that only need something to run on."""
    scene = new_scene(tmp_path_factory.mktemp("one") / "scene", num_arcs=1)
    assert call(ANCHORS, *draw(scene, loras)) == 0
    return scene


@pytest.fixture(scope="session")
def unchained(tmp_path_factory: pytest.TempPathFactory, anchored: Path) -> Path:
    """A folder with the video of arcs that do not depend on each other."""
    folder = tmp_path_factory.mktemp("unchained")
    command = ("--target", anchored / "multiviews" / RUN, *QUICK_VIDEO, "--no-chain", "--output_dir", folder)
    assert call(GGI, *command) == 0
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two training clips; `tests.support.clips.arguments` puts their encodings beside it."""
    from tests.support.clips import make_dataset

    return make_dataset(tmp_path_factory.mktemp("dataset") / "clips")
