"""Fixtures that several test files of this folder share."""

from pathlib import Path

import pytest

from tests.scripts.bad_input.common import Refuse, write_lora
from tests.support.helpers import call_shipped as call
from tests.support.helpers import forbid_models, write_picture
from tests.support.scenes import make_scene
from utils.layout import anchor_path


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Refuse:
    """Call a script and make sure that it refuses in one line that holds all `telling` words."""
    forbid_models(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    capfd.readouterr()

    def check(script: str, *arguments: object, telling: tuple = ()) -> None:
        code = call(script, *arguments)
        error = capfd.readouterr().err
        assert code == 2, error
        assert error.startswith("error: ") and len(error.splitlines()) == 1, error
        for word in telling:
            assert str(word) in error

    return check


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "town" / "checkpoint-100")
    write_lora(folder / "town" / "checkpoint-400")
    write_lora(folder / "wide" / "checkpoint-400", attention_head_dim=48)
    return folder


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return make_scene(tmp_path / "scene")


@pytest.fixture
def views(tmp_path: Path) -> Path:
    """A folder with the anchors of one arc, outside of the scene."""
    for k in range(2):
        write_picture(anchor_path(tmp_path / "views", k), 144, 96, seed=k)
    return tmp_path / "views"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_picture(tmp_path / "picture.png")
