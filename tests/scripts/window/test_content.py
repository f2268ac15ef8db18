"""What the window shows, without a browser: results of a run, covisibility, the command for --redo, preprocess.py."""

import importlib.util
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import view
from tests.scene.preprocess_common import view_at
from tests.scripts.window.window_common import AT_WALL, RUN, VIDEO, make_content
from tests.support.helpers import exit_code
from utils.cli import InputError
from utils.files import read_json, write_json
from utils.layout import anchor_path, frame_path
from utils.meshes.mesh import build_geometry
from utils.scene.raycast import RayCaster
from utils.scene.views import correspondence
from window.content import Results, open_content
from window.covisible import BOTH, FIRST, NEITHER, SECOND, cut_small, seen_by_anchors
from window.process import Preprocessing
from window.redo import redo_command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_content(tmp_path_factory.mktemp("content") / "scene")


@pytest.mark.parametrize("which", [RUN, f"{RUN}/{VIDEO}"])
def test_results_of_a_run(made: Path, which: str):
    content = open_content(made, run=made / which)
    assert len(content.views) == 46 and len(content.anchor_views) == 2
    np.testing.assert_allclose(content.anchor_views[1].eye, [1, -8, 2])
    assert content.results.anchors == [anchor_path(made / RUN, k) for k in range(2)]
    assert content.results.videos == {VIDEO: [frame_path(made / RUN / VIDEO, k) for k in range(46)]}


def test_a_mesh_alone(made: Path):
    content = open_content(made / "scene.glb")
    assert (content.views, content.scene, content.results, content.geometry.up) == ((), None, None, "+z")
    with pytest.raises(InputError, match="does not exist"):
        open_content(made / "none.glb")
    with pytest.raises(InputError, match="--scene_up goes with a mesh"):
        open_content(made, "+y")


def change(file: Path, **arguments: object) -> None:
    manifest = read_json(file)
    manifest["finished"] = arguments.pop("finished", True)
    manifest["arguments"] |= arguments
    write_json(file, manifest)


@pytest.mark.parametrize(
    ("spoil", "which", "telling"),
    [
        (lambda run: change(run / "run.json", scene_sha256="0"), "", "made for another scene"),
        (lambda run: change(run / "run.json", finished=False), "", "not finished: run sag_generate_anchor_view.py"),
        (lambda run: (run / "image_01.png").unlink(), "", "image_01.png is missing"),
        (lambda run: (run / "run.json").unlink(), "", "holds no run.json"),
        (lambda run: change(run / VIDEO / "run.json", finished=False), VIDEO, "not finished: run ggi.py"),
        (lambda run: change(run / VIDEO / "run.json", edges_sha256="0"), VIDEO, "made for another scene"),
        (lambda run: (run / VIDEO / "0040.png").unlink(), VIDEO, "0040.png is missing, one of 1"),
        (lambda run: (run / VIDEO / "0000.png").unlink(), VIDEO, "neither anchors (image_00.png) nor frames"),
        (lambda run: shutil.rmtree(run), "", "does not exist"),
    ],
)
def test_results_that_do_not_fit_are_one_line(tmp_path: Path, made: Path, spoil, which: str, telling: str):
    scene = shutil.copytree(made, tmp_path / "scene")
    spoil(scene / RUN)
    with pytest.raises(InputError) as found:
        open_content(scene, run=scene / RUN / which)
    assert telling in str(found.value) and "\n" not in str(found.value)


def test_what_is_only_doubtful_is_noted(tmp_path: Path, made: Path, capsys):
    scene = shutil.copytree(made, tmp_path / "scene")
    change(scene / RUN / VIDEO / "run.json", anchors_sha256="0", weights="full")
    assert VIDEO in open_content(scene, run=scene / RUN).results.videos
    told = capsys.readouterr().err
    assert "before an anchor was replaced" in told and "filled by full weights, its anchors drawn by tiny" in told
    change(scene / RUN / VIDEO / "run.json", finished=False)
    assert open_content(scene, run=scene / RUN).results.videos == {}
    assert f"{VIDEO} is not shown" in capsys.readouterr().err


def test_covisibility_of_a_wall():
    """Two cameras 4 m apart see 12 m of a wall each, 8 m of them together; a board hides 1 m of it from the first."""
    x, z = AT_WALL
    wall = np.array([[-x, 0, -z], [x, 0, -z], [x, 0, z], [-x, 0, z]])
    board = np.array([[-2.0, -4, -z], [-1.5, -4, -z], [-1.5, -4, z], [-2, -4, z]])
    quad = np.array([[0, 1, 2], [0, 2, 3]])
    geometry = build_geometry([("wall", wall, quad), ("board", board, quad)], "+z")
    caster, views = RayCaster(geometry), [view_at(x, z=0.0, size=(72, 48)) for x in (-2.0, 2.0)]
    views = [type(v)(v.c2w, 48.0, 48.0, v.cx, v.cy, v.width, v.height) for v in views]
    small = cut_small(geometry, views)
    seen = seen_by_anchors(caster, small, *views)
    middle = small.corners.mean(1)
    on_wall = (small.origin < 2) & (np.abs(middle[:, 2]) < 3.9)
    at = middle[on_wall, 0]
    # From (-2, -8) past the board's ends at y = -4 the first camera's shadow on the wall is -2 to -1.
    hidden = [(at > -2) & (at < -1), (at > -6) & (at < -5)]  # of the second camera: from (2, -8), -6 to -5
    by = [(np.abs(at - eye) < 6) & ~shadow for eye, shadow in zip((-2, 2), hidden, strict=True)]
    wanted = np.select([by[0] & by[1], by[1], by[0]], [BOTH, SECOND, FIRST], NEITHER)
    np.testing.assert_array_equal(seen[on_wall], wanted)
    assert set(wanted) == {NEITHER, FIRST, SECOND, BOTH} and len(at) > 1000
    total = np.linalg.norm(np.cross(*np.diff(small.corners, axis=1).transpose(1, 0, 2)), axis=1).sum() / 2
    assert total == pytest.approx(4 * x * z + 0.5 * 2 * z)
    assert correspondence(caster, *views).visible.mean() == pytest.approx(8 / 12, abs=0.1)


def results(command: str | None, **manifest: object) -> Results:
    arguments = {"pfix": "town", "seed": 7}
    return Results(Path("run"), manifest={"command": command, "arguments": arguments} | manifest)


def test_the_command_for_redo():
    script = "python sag_generate_anchor_view.py"
    plain = f"{script} --epoch 400 --target a b --pfix town other --seed -1 --prompt 'a town' ''"
    wanted = f"{script} --target 'my scene' --pfix town --seed 7 --epoch 400 --prompt 'a town' '' --redo 0 2"
    assert redo_command(results(plain), "my scene", [2, 0]) == wanted
    again = f"{script} --seed=7 --targ a --pfix town --overwrite --redo 1 --redo_seed 9 --use_picture 0=x --lora a.b"
    wanted = f"{script} --target s --pfix town --seed 7 --lora a.b --redo 1 --redo_seed 10"
    assert redo_command(results(again, redone={"1": {"seed": 9}}), "s", [1]) == wanted
    assert redo_command(results(None), "s", [1]) == f"{script} --target s --pfix town --seed 7 … --redo 1"


@pytest.mark.skipif(importlib.util.find_spec("viser") is not None, reason="viser is installed")
def test_without_viser_it_says_how_to_install_it(made: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sys.argv", ["view.py", str(made)])
    assert exit_code(view.main) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "pip install -r requirements-view.txt" in told


def test_preprocess_runs_by_itself(tmp_path: Path, made: Path):
    changes = []
    job = Preprocessing(["--scene", tmp_path / "none.glb", "--path", "orbit", "--output", tmp_path], changes.append)
    assert job.wait() == 2 and not job.running and changes[-1] is job
    assert "none.glb" in job.printed and job.printed.startswith("error:")
    longer = Preprocessing(["--scene", made / "scene.glb", "--path", "orbit", "--output", tmp_path / "scene"], print)
    longer.stop()
    assert longer.code == -signal.SIGTERM and not (tmp_path / "scene").exists()
