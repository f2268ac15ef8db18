"""The window itself, by a client that speaks viser's protocol, and in Chromium: needs requirements-view.txt."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

viser = pytest.importorskip("viser")

import view  # noqa: E402
from tests.cameras.cameras_common import assert_same  # noqa: E402
from tests.scene.preprocess_common import BOXES, write_boxes  # noqa: E402
from tests.scripts.window.browser import Browser, until  # noqa: E402
from tests.scripts.window.window_common import RUN, SIZE, VIDEO, make_content  # noqa: E402
from tests.support.helpers import ROOT, exit_code  # noqa: E402
from utils.cameras.path import UP_AXES, look_at  # noqa: E402
from utils.cameras.read import read_cameras  # noqa: E402
from utils.images import read_image  # noqa: E402
from utils.layout import load_scene  # noqa: E402
from window.app import Window  # noqa: E402
from window.content import Content, open_content  # noqa: E402
from window.draft import PathDraft  # noqa: E402
from window.poses import rotation_of  # noqa: E402

Opener = Callable[[Content], tuple[Window, Browser]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_content(tmp_path_factory.mktemp("content") / "scene")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """A function that opens a window on a content, on a free port, and a browser on it; both are closed at the end."""
    running = []

    def open_both(content: Content) -> tuple[Window, Browser]:
        window = Window(content, PathDraft(content.geometry.up, SIZE), tmp_path / "paths", "127.0.0.1", 0)
        running.append(window)
        browser = Browser(window.url)
        running.append(browser)
        browser.look(pose(0))
        until(lambda: window.server.get_clients())
        return window, browser

    yield open_both
    for one in reversed(running):
        one.close() if isinstance(one, Browser) else one.stop()


def pose(k: int) -> np.ndarray:
    """A view of the boxes."""
    eye = np.array([[-2.0 + 2 * k, -8 + k, 2 + 0.5 * k]])
    return look_at(eye, np.array([[0.0, 6, 1]]), UP_AXES["+z"], "test")[0]


def draw(window: Window, browser: Browser, count: int) -> None:
    """Add keyframes at poses 0, 1, …"""
    client = next(iter(window.server.get_clients().values()))
    for k in range(count):
        browser.look(pose(k))
        until(lambda k=k: np.allclose(client.camera.position, pose(k)[:3, 3]))
        browser.set(window.path.action, "add")
        until(lambda k=k: len(window.path.draft.keys) == k + 1 and window.path.chosen.value.startswith(f"{k + 1}:"))


@pytest.mark.slow
def test_a_path_is_drawn_saved_and_preprocessed(tmp_path: Path, opened: Opener):
    mesh = write_boxes(tmp_path / "boxes.stl", *BOXES)
    window, browser = opened(open_content(mesh))
    tab, draft = window.path, window.path.draft
    browser.press(tab.save_button)
    assert "at least two" in browser.wait_for("NotificationShowMessage")["props"]["body"]
    draw(window, browser, 3)
    browser.set(tab.fov, 60.0)
    until(lambda: draft.keys[2].fov == 60)
    browser.set(tab.chosen, tab.chosen.options[0])
    until(lambda: tab.fov.value == 45)
    browser.set(tab.frames, 20)
    until(lambda: draft.keys[0].frames == 20)
    browser.set(tab.tension, 0.25)
    until(lambda: draft.tension == 0.25 and "66 frames, 1 arc (resampled to 46 frames)" in tab.info.content)
    assert tab.picture.image.shape == (240, 360, 3) and tab.picture.image.max() > 200
    before = tab.picture.image
    browser.set(tab.frame, 40)
    until(lambda: (tab.picture.image != before).any())

    browser.set(tab.name, "../walk")
    browser.press(tab.save_button)
    assert "not one plain folder name" in browser.wait_for("NotificationShowMessage")["props"]["body"]
    browser.set(tab.name, "walk")
    browser.press(tab.preprocess_button)
    assert "save it first" in browser.wait_for("NotificationShowMessage")["props"]["body"]
    browser.press(tab.save_button)
    folder = tmp_path / "paths" / "walk"
    until(lambda: "camera_path.json" in tab.told.content)
    for name in ("keyframes.json", "transforms.json", "camera_path.json"):
        path = read_cameras(folder / name)
        assert_same(path, draft.path(), 1e-6)
        for k, number in enumerate((1, 21, 66)):
            np.testing.assert_allclose(path.c2w[number - 1], pose(k), atol=1e-6)
    browser.press(tab.save_button)
    assert "is there already" in browser.wait_for("NotificationShowMessage")["props"]["body"]

    browser.press(tab.preprocess_button)
    until(lambda: tab.job is not None and not tab.job.running)
    assert tab.job.code == 0, tab.job.printed
    until(lambda: f"python view.py {folder / 'scene'}" in tab.told.content)
    assert tab.progress.value == 100
    assert load_scene(folder / "scene").edge_size == SIZE
    used = read_cameras(folder / "scene" / "cameras.json")
    np.testing.assert_allclose(used.c2w[[0, -1]], [pose(0), pose(2)], atol=1e-6)


def test_keyframes_are_chosen_moved_looped_and_deleted(tmp_path: Path, opened: Opener):
    window, browser = opened(open_content(write_boxes(tmp_path / "boxes.stl", *BOXES)))
    tab, draft = window.path, window.path.draft
    client = next(iter(window.server.get_clients().values()))
    draw(window, browser, 3)
    browser.set(tab.chosen, tab.chosen.options[1])
    browser.look(pose(5))
    browser.set(tab.action, "move")
    until(lambda: np.allclose(draft.keys[1].position, pose(5)[:3, 3]))
    np.testing.assert_allclose(draft.keys[1].rotation, pose(5)[:3, :3], atol=1e-12)
    browser.set(tab.loop, True)
    until(lambda: "136 frames, 3 arcs" in tab.info.content)
    np.testing.assert_allclose(draft.path().c2w[0], draft.path().c2w[-1], atol=1e-9)
    browser.set(tab.chosen, tab.chosen.options[0])
    browser.set(tab.action, "look")
    until(lambda: np.allclose(client.camera.position, pose(0)[:3, 3]))
    np.testing.assert_allclose(rotation_of(client.camera.wxyz), pose(0)[:3, :3], atol=1e-9)
    browser.set(tab.size, "many")
    assert "not WIDTHxHEIGHT" in browser.wait_for("NotificationShowMessage")["props"]["body"]
    browser.set(tab.size, "1x9000")
    assert "more than 16 to 1" in browser.wait_for("NotificationShowMessage")["props"]["body"]
    browser.set(tab.size, "96x96")
    until(lambda: draft.size == (96, 96) and tab.picture.image.shape == (360, 360, 3))
    for left in (2, 1, 0):
        browser.set(tab.action, "delete")
        until(lambda left=left: len(draft.keys) == left)
    until(lambda: tab.picture.visible is False)


def test_time_anchors_and_covisibility(made: Path, opened: Opener):
    window, browser = opened(open_content(made, run=made / RUN))
    client = next(iter(window.server.get_clients().values()))
    anchor = window.time.stage.content.anchor_views[1]
    browser.wait_for("SetOrientationMessage", lambda message: message["name"] == "/anchors/1")
    drawn = browser.nodes["/anchors/1"]
    np.testing.assert_allclose(rotation_of(np.array(drawn["wxyz"])), anchor.c2w[:3, :3], atol=1e-9)
    np.testing.assert_allclose(drawn["position"], anchor.eye, atol=1e-9)
    assert window.time.kind.options == ("edges", VIDEO) and window.time.kind.value == VIDEO
    browser.set(window.time.follow, True)
    browser.set(window.time.frame, 31)
    until(lambda: (window.time.picture.image == 5 * 30).all())
    wanted = window.time.stage.content.views[30]
    until(lambda: np.allclose(client.camera.position, wanted.eye))
    np.testing.assert_allclose(rotation_of(client.camera.wxyz), wanted.c2w[:3, :3], atol=1e-9)
    np.testing.assert_allclose(rotation_of(window.time.camera.wxyz), wanted.c2w[:3, :3], atol=1e-9)
    assert client.camera.fov == pytest.approx(2 * np.arctan(36 / 90))
    browser.set(window.time.kind, "edges")
    edges = read_image(made / "arc0" / "hed" / "0031.png")
    until(lambda: window.time.picture.image.shape == edges.shape)
    np.testing.assert_array_equal(window.time.picture.image, edges)

    tab = window.anchors
    browser.set(tab.arc, tab.arc.options[1])
    until(lambda: "seen by both" in tab.legend.content)
    assert len(tab.coloured) == 4 and not tab.stage.mesh.visible
    assert sum(len(mesh.faces) for mesh in tab.coloured) == len(tab.small.corners)
    browser.set(tab.arc, "off")
    until(lambda: tab.coloured == [])
    assert tab.stage.mesh.visible
    browser.set(tab.chosen[1], True)
    until(lambda: f"--target {made} --pfix town --seed 3 --redo 1" in tab.command.content)


def test_mistakes_are_one_line(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def told(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["view.py", *map(str, words)])
        assert exit_code(view.main) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in told(made, "--port", taken.getsockname()[1])
    assert "above 65535" in told(made, "--port", 65536)
    assert "no address" in told(made, "--port", 0, "--host", "nowhere.invalid")
    assert "holds no arcs" in told(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in told(made, "--output", tmp_path / "file" / "paths")
    data = {"world_up": "+y", "fov": 40, "keyframes": [{"position": [k, 0, 9], "look_at": [0, 0, 0]} for k in (0, 1)]}
    (tmp_path / "keyframes.json").write_text(json.dumps(data))
    assert "has +y up, but the scene has +z" in told(made, "--keyframes", tmp_path / "keyframes.json")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_chromium_shows_it(tmp_path: Path, made: Path, opened: Opener):
    """A browser of the real kind takes a camera that it is given, and draws the scene from there."""
    line = ["chromium", "--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
    line += ["--enable-unsafe-swiftshader", "--remote-debugging-port=0", f"--user-data-dir={tmp_path}/profile"]
    window, browser = opened(open_content(made, run=made / RUN))
    browser.close()
    until(lambda: not window.server.get_clients())
    chromium = subprocess.Popen([*line, window.url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        until(lambda: window.server.get_clients())
        client = next(iter(window.server.get_clients().values()))
        looked = window.path.stage.content.views[10]
        window.path.stage.look_through(client, looked)
        before = client.camera.update_timestamp
        until(lambda: client.camera.update_timestamp > before and np.allclose(client.camera.position, looked.eye))
        window.path.add(client)
        key = window.path.draft.keys[0]
        np.testing.assert_allclose(key.position, looked.eye, atol=1e-6)
        np.testing.assert_allclose(key.rotation, looked.c2w[:3, :3], atol=1e-6)
        picture = client.get_render(200, 300, timeout=60)
        assert picture.shape[:2] == (200, 300) and picture[..., :3].std() > 5
    finally:
        chromium.terminate()
        chromium.wait()


def test_the_command_prints_where_it_listens(made: Path):
    line = [sys.executable, "view.py", str(made), "--port", "0"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", process.stdout.readline())
        process.send_signal(2)
        assert process.wait(60) == 130
    finally:
        process.kill()
