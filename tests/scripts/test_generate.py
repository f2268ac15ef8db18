"""The whole chain in one command: what it refuses before it begins, what it tells, how it goes on after a kill."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate
from models.runtime.chain import Stage, describe, split_flags
from tests.scene.preprocess_common import BOXES, write_boxes, write_path
from tests.support import warm
from tests.support.helpers import ROOT, SECONDS, assert_same, call, contents, end, forbid_models, write_picture
from tests.support.stages import STATE, new_scene
from tests.support.wan import wan_folder
from utils.cli import InputError
from utils.files import read_json
from utils.layout import find_checkpoints

QUICK = """--preprocess.edge_size 144x96 --preprocess.map_size 72x48 --preprocess.latent_size 18x12
    --alignment.max_train_steps 4 --alignment.checkpointing_steps 2 --anchors.num_steps 4 --anchors.num_replacement 2
    --ggi.num_inference_steps 2"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """--scene, --cameras and --reference of one arc, their files with a space in their names."""
    folder = tmp_path_factory.mktemp("my files")
    mesh, cameras = write_boxes(folder / "boxes.glb", *BOXES, up="y"), write_path(folder / "path.json", 46)
    return ("--scene", mesh, "--cameras", cameras, "--reference", write_picture(folder / "a style.png", 160, 120))


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (("--scene", "missing.glb"), "missing.glb"),
        (("--scene", "tests"), "tests is a folder: --cameras and --path go with a mesh"),
        (("--cameras", "missing.json"), "missing.json"),
        (("--path", "orbit"), "either --cameras FILE or --path"),
        (("--reference", "missing.png"), "missing.png does not exist"),
        (("--name", "a/b"), "'a/b' is not one plain folder name"),
        (("--backbone", "wan_vace", "--weights", "tiny"), "--weights tiny has no Wan VACE"),
        (("--", "--ggi.width", 40), "40x32"),
        (("--", "--ggi.speed", 2), "ggi.py: unrecognized arguments: --speed 2"),
        (("--", "--anchors.height", 3), "--height 3: these weights need a multiple"),
        (("--", "--anchors.seed", -1), "a video needs one of each"),
        (("--", "--anchors.pfix", "a", "b"), "a video needs one of each"),
        (("--", "--ggi.target", "a", "b"), "one video at a time"),
        (("--", "--alignment.resolution", 41), "--resolution 41: these weights need a multiple"),
        (("--", "--ggi.cogvideox", "missing/folder/here"), "missing/folder/here"),
        (("--", "--ggi.model_path", "missing"), "missing"),
        (("--", "--video.width", 48), "--width: after -- come flags such as"),
    ],
)
def test_what_a_stage_would_refuse_is_refused_at_once(
    tmp_path: Path, inputs: tuple, capsys, flags: tuple, telling: str
):
    assert call("generate", *inputs, "--output", tmp_path / "out", *flags) == 2
    printed = capsys.readouterr()
    assert telling in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--ggi.composite", "--ggi.colour_match"])
def test_a_scene_without_geometry_carries_nothing(tmp_path: Path, inputs: tuple, capsys, flag: str):
    scene = new_scene(tmp_path / "scene")
    assert call("generate", "--scene", scene, *inputs[-2:], "--output", tmp_path / "out", "--", flag) == 2
    assert f"carrying the anchors needs {scene / 'scene.glb'}" in capsys.readouterr().err


@pytest.mark.slow
def test_another_lora_of_the_name_is_refused_at_once(tmp_path: Path, inputs: tuple, loras: Path, capsys):
    shutil.copytree(loras, tmp_path / "out" / "loras")
    assert call("generate", *inputs, "--output", tmp_path / "out", "--name", "town") == 2
    assert "holds a run with other arguments" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scene").exists()


def test_the_last_stage_may_be_wan_vace(tmp_path: Path, inputs: tuple, monkeypatch: pytest.MonkeyPatch):
    forbid_models(monkeypatch)
    words = (*inputs, "--output", tmp_path, "--weights", "tiny", "--backbone", "wan_vace", "--", *shlex.split(QUICK))
    own = ("--ggi.weights", "full", "--ggi.wan", wan_folder())

    def plan(*flags: object) -> Stage:
        args = generate.parse_args([*map(str, (*words, *own, *flags))])
        (prepare,), scene = generate.plan_scene(args)
        draw = generate.plan_anchors(args, scene, tmp_path / "loras" / "a style", 4)
        return generate.plan_video(args, scene, draw, prepare.args.passes)

    stage = plan()
    assert (stage.result.name, stage.pixels, stage.steps) == ("wan_vace_edges_d1.0_n2", 720 * 480, 2)  # nearest to 3:2
    assert describe(stage).startswith("ggi            2 steps, memory ")
    with pytest.raises(InputError, match="needs the depth of the scene"):
        plan("--ggi.control", "depth")
    assert plan("--ggi.control", "depth", "--preprocess.passes", "depth").result.name == "wan_vace_depth_d1.0_n2"


def test_flags_go_to_their_stages():
    words = ["--b.x", "1", "2", "--a.no-chain", "--b.y", "--z"]
    assert split_flags(words, ("a", "b")) == {"a": ["--no-chain"], "b": ["--x", "1", "2", "--y", "--z"]}
    with pytest.raises(InputError, match="after -- come flags"):
        split_flags(["1"], ("a",))


def words_of(inputs: tuple, output: Path, *flags: object) -> tuple:
    return (*inputs, "--output", output, "--weights", "tiny", "--device", "cpu", *flags, "--", *shlex.split(QUICK))


def begin(cache: Path, *words: object) -> warm.Processes:
    """Start generate.py, which forks its stages; with the tiny weights."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    return warm.fork("generate", words, env=environment, prepare=[warm.fork_stages])


def begin_cold(cache: Path, *words: object) -> subprocess.Popen:
    """Start generate.py as a user does."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "generate.py"), *map(str, words)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(cache: Path, *words: object) -> list[str]:
    """Run to the end; returns the lines of standard output."""
    done = end(begin(cache, *words))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def kill_when_there(process: warm.Processes | subprocess.Popen, folder: Path, pattern: str) -> None:
    """Kill generate.py alone as soon as a file is there: the stage must not go on without it."""
    deadline = time.monotonic() + SECONDS
    while not any(folder.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    printed = process.communicate(timeout=60)  # ends when the stage has let go of the pipe too
    assert process.returncode == -signal.SIGKILL, printed


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_with_the_same_files(tmp_path: Path, inputs: tuple):
    whole, killed, cache = tmp_path / "whole", tmp_path / "killed", tmp_path / "cache"
    printed = run(cache, *words_of(inputs, whole))
    video, page = map(Path, printed[-2:])
    assert (video.name, page.name) == ("video.mp4", "index.html") and video.is_file() and page.is_file()
    told = [line.split() for line in printed[:4]]
    assert [words[:3] for words in told] == [
        ["preprocess", "59", "files,"],
        ["alignment", "4", "steps,"],
        ["anchors", "8", "steps,"],
        ["ggi", "2", "steps,"],
    ]
    assert not any("about" in words for words in told) and len(read_json(*cache.rglob("*.json"))) == 4
    assert "preprocess.py --scene" in page.read_text() and "ggi.py --target" in page.read_text()

    printed = run(cache, *words_of(inputs, killed, "--preview"))
    assert all(", about " in line for line in printed[:2])
    picture = Path(printed[-1])
    assert picture.parent.parent == killed / "preview"
    assert [path.name for path in picture.parent.glob("*.png")] == ["image_00.png"]
    assert list(find_checkpoints(killed / "loras" / "a style")) == [2]
    shutil.rmtree(killed / "scene")
    command, other_cache = words_of(inputs, killed), tmp_path / "other cache"
    kill_when_there(begin_cold(other_cache, *command), killed, "scene/scene.glb")
    for pattern in ("loras/*/checkpoint-4", "*_e004_*/image_00.png", "*_e004_*/d0.5*/0000.png"):
        kill_when_there(begin(other_cache, *command), killed, pattern)
    run(cache, *command)
    found, wanted = (contents(folder, "preview/", "preprocess.json", STATE) for folder in (killed, whole))
    assert_same(found, wanted)
