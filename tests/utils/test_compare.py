"""Videos side by side on one page, and blind: what is shown, what is hidden, what is refused."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.helpers import exit_code, open_in_chromium
from utils import compare
from utils.files import read_json, write_json
from utils.images import write_video
from utils.layout import MANIFEST, VIDEO_FILE

WICKED = "<script>alert('1')</script> \"&\""


def make_run(folder: Path, shade: int, *, frames: int = 46, **manifest: object) -> Path:
    """A finished video of grey frames that grow brighter from `shade` on."""
    folder.mkdir(parents=True)
    write_video(folder / VIDEO_FILE, (np.full((32, 48, 3), shade + k, np.uint8) for k in range(frames)), 12)
    about = {"arguments": {"seed": shade, "epoch": 1350}, "prompt": WICKED, "weights": {"vae": {"a": str(shade)}}}
    write_json(folder / MANIFEST, {"finished": True, "fps": 12} | about | manifest)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / name / "video", shade) for name, shade in (("<b>A", 10), ("B b", 90), ("C", 150))]


def write(*arguments: object) -> int:
    return exit_code(lambda: compare.main([str(argument) for argument in arguments]))


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_side_by_side(tmp_path: Path, runs: list[Path], capsys):
    page = tmp_path / "out" / "page.html"
    assert write(*runs, "--output", page) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(page)] and "different weights: vae" in printed.err
    videos = data_of(page)["videos"]
    assert [base64.b64decode(video["mp4"]) for video in videos] == [(run / VIDEO_FILE).read_bytes() for run in runs]
    assert [video["name"] for video in videos] == ["<b>A / video", "B b / video", "C / video"]
    text = page.read_text()
    assert "&lt;b&gt;A / video" in text and "<b>A" not in text
    assert "video: seed" in text and "video: epoch" not in text and "video: prompt" not in text  # what differs only
    assert not re.findall(r'(?:src|href)="', text)


def test_blind(tmp_path: Path, runs: list[Path]):
    page = tmp_path / "page.html"
    assert write(*runs, "--output", page, "--blind", "--question", WICKED) == 0
    data, key, text = data_of(page), read_json(tmp_path / "page.key.json"), page.read_text()
    assert {video["id"] for video in data["videos"]} == set(key["videos"]) and len(key["videos"]) == 3
    for video in data["videos"]:
        assert base64.b64decode(video["mp4"]) == (Path(key["videos"][video["id"]]) / VIDEO_FILE).read_bytes()
        assert set(video) == {"id", "fps", "mp4"}
    assert not any(name in text for name in ("B b", "<b>A", "&lt;b&gt;A", "seed", str(tmp_path)))
    assert WICKED not in text and "&lt;script&gt;alert" in text and data["question"] == WICKED


def test_a_folder_of_anchors_stands_for_its_only_video(tmp_path: Path, runs: list[Path], capsys):
    assert write(runs[0].parent, runs[1], "--output", tmp_path / "page.html") == 0
    make_run(runs[0].parent / "other", 30)
    assert write(runs[0].parent, runs[1], "--output", tmp_path / "page.html") == 2
    assert "holds 2 videos: name one of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "telling"),
    [
        ("missing", "missing does not exist"),
        ("empty", "empty holds no video: run ggi.py"),
        ("unfinished", "unfinished is not finished"),
        ("shorter", "has 45 frames"),
        ("damaged", "does not decode"),
        ("copy", "hold the same video"),
        (None, "one video alone"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, runs: list[Path], capsys, second: str, telling: str):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "unfinished", 20, finished=False)
    make_run(tmp_path / "shorter", 20, frames=45)
    (make_run(tmp_path / "damaged", 20) / VIDEO_FILE).write_bytes(b"no video")
    shutil.copytree(runs[0], tmp_path / "copy")
    others = [tmp_path / second] if second else []
    assert write(runs[0], *others, "--output", tmp_path / "page.html") == 2
    error = capsys.readouterr().err
    assert telling in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_the_page_of_a_video_is_not_replaced(runs: list[Path], capsys):
    assert write(*runs, "--output", runs[0] / "index.html") == 2
    assert "is the page of one of the videos" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize(("flags", "shown"), [((), 3), (("--blind",), 2)])
def test_a_browser_opens_it_without_an_error(tmp_path: Path, runs: list[Path], flags: tuple, shown: int):
    assert write(*runs, "--output", tmp_path / "page.html", *flags) == 0
    document = open_in_chromium(tmp_path / "page.html")
    assert document.count("<video") == shown and "frame 1 of 46" in document
    assert ("1 of 3" in document) == bool(flags)
