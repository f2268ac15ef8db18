"""The page of a video: what it shows, that its links lead somewhere wherever it lies, and that texts stay texts."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import evaluate
from tests.support.helpers import GGI, call, exit_code, open_in_chromium
from tests.support.stages import QUICK_VIDEO, RUN, VIDEO
from utils.files import read_json, write_json
from utils.images import read_image
from utils.videos.page import INDEX, write_page

pytestmark = pytest.mark.slow  # they begin with a whole video


class Page(HTMLParser):
    """links: what the page loads. data: the values of its scripts. text: what is read on it."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.links, self.text, self.tags, self.open = path, [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])
        for layer in self.data["layers"]:
            self.links += [layer["src"], *layer.get("frames", [])]

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self.open.append("/" + tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data

    def assert_whole(self) -> None:
        """Every link leads to a file beside the page, or below it."""
        assert self.links
        for link in self.links:
            assert "//" not in link and ".." not in link and not link.startswith("/"), link
            assert (self.path.parent / link).is_file(), link


def folder_of(scene: Path) -> Path:
    return scene / "multiviews" / RUN / VIDEO


def test_a_video_has_a_page(tmp_path: Path, filmed: Path):
    page = Page(folder_of(filmed) / INDEX)
    page.assert_whole()
    assert [layer["name"] for layer in page.data["layers"]] == ["generated", "edges"]
    assert page.data["count"] == len(page.data["layers"][0]["frames"]) == 91
    assert page.data["layers"][0]["frames"][46] == "0047.png"  # of the frame that two arcs share, the earlier
    for kind in ("anchor", "edges", "mask", "reference"):
        assert any(link.startswith(f"page/{kind}_") for link in page.links)
    for told in ("sag_distribution_alignment.py", "sag_generate_anchor_view.py", "ggi.py --weights tiny", "seed"):
        assert told in page.text
    moved = shutil.copytree(folder_of(filmed), tmp_path / "elsewhere #1 % ü")
    Page(moved / INDEX).assert_whole()


def test_texts_of_users_stay_texts(tmp_path: Path, filmed: Path):
    folder = shutil.copytree(folder_of(filmed), tmp_path / "a \"quoted\" & 'odd' name")
    wicked = "<script>alert('1')</script> \"&\" </script>"
    manifest, contents = read_json(folder / "run.json"), read_json(folder / "page" / "page.json")
    manifest["prompt"] = manifest["arguments"]["prompt"] = manifest["command"] = wicked
    contents["title"] = wicked
    contents["runs"]["anchors"]["settings"]["prompt"] = wicked
    write_json(folder / "run.json", manifest)
    write_json(folder / "page" / "page.json", contents)
    before = Page(folder_of(filmed) / INDEX)
    page = Page(write_page(folder))
    assert page.tags == before.tags
    assert page.text.count(wicked) == 5 + before.text.count(wicked)  # title, heading, command, two settings


def test_a_run_made_before_gets_its_page(tmp_path: Path, filmed: Path):
    scene = shutil.copytree(filmed, tmp_path / "scene")
    folder = folder_of(scene)
    wanted = (folder / INDEX).read_bytes()
    (folder / INDEX).unlink()
    shutil.rmtree(folder / "page")
    assert call(GGI, "--target", folder.parent, *QUICK_VIDEO) == 0
    assert (folder / INDEX).read_bytes() == wanted


def test_measuring_adds_metrics_and_truth(tmp_path: Path, filmed: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    scene = shutil.copytree(filmed, tmp_path / "scene")
    folder = folder_of(scene)
    words = ["evaluate.py", "--video", str(folder), "--scene", str(scene), "--ground_truth", str(folder), "--json"]
    monkeypatch.setattr("sys.argv", words)
    assert exit_code(evaluate.main) == 0
    results = json.loads(capsys.readouterr().out)
    page = Page(folder / INDEX)
    page.assert_whole()
    assert [layer["name"] for layer in page.data["layers"]] == ["generated", "edges", "truth"]
    assert "Metrics" in page.text and all(name in page.text for name in results["metrics"])
    assert read_image(folder / "page" / "anchor_00.jpg").shape == (32, 48, 3)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_opens_it_without_an_error(tmp_path: Path, filmed: Path):
    """From a folder of its own: Chromium runs the scripts, loads the videos and prints nothing to its console."""
    folder = shutil.copytree(folder_of(filmed), tmp_path / "moved here")
    shown = open_in_chromium(folder / INDEX)
    assert "frame 1 of 91" in shown and shown.count("<video") == 2
    assert re.search(r'<img src="0000.png"[^>]*visibility: visible', shown)
