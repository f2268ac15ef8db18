"""Comparisons with Blender's ground truth and with the committed sample; the speed benchmark."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tests.town
from benchmarks import preprocess as benchmark
from tests.scene.preprocess_common import BOXES, SMALL, run_main, view_at, write_boxes, write_path
from tests.support.helpers import DATA, ROOT, exit_code
from utils.cameras.read import read_cameras
from utils.correspondence import VISIBLE, encode_map, read_map, write_map
from utils.images import read_image
from utils.layout import CAMERAS_FILE, SCENE_FILE, load_scene
from utils.meshes.load import load_geometry
from utils.meshes.mesh import turn
from utils.scene.lines import find_lines, make_line_scene, soften
from utils.scene.raycast import RayCaster
from utils.scene.survey import survey
from utils.scene.views import correspondence, make_views

TOWN = DATA / "town"


needs_town = pytest.mark.skipif(not TOWN.is_dir(), reason="the recorded town is not at hand")


@needs_town
@pytest.mark.slow
def test_town_agrees_with_blender():
    line = [sys.executable, "-m", "tests.town", str(TOWN)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") == 10 and "skip" not in done.stdout


@needs_town
def test_town_figures_fall_short_of_a_wrong_camera(monkeypatch, capsys, tmp_path):
    """The comparison can fail: a camera path that is 1 % off does not pass."""
    for name in ("town.glb", "cameras.json"):
        shutil.copy(TOWN / name, tmp_path / name)
    (tmp_path / "passes720").mkdir()
    shutil.copy(TOWN / "passes720" / "0001.npz", tmp_path / "passes720")
    data = json.loads((tmp_path / "cameras.json").read_text())
    data["fl_x"] *= 1.01
    (tmp_path / "cameras.json").write_text(json.dumps(data))
    code, verdicts, _ = compare(monkeypatch, capsys, tmp_path)
    assert code == 1 and {"short", "skip"} <= set(verdicts.values())


@pytest.fixture
def small_town(tmp_path) -> tests.town.Town:
    """A folder for tests.town: the boxes from frame 1, and 5 beside it; frame 23 sees the sky, 46 is turned around."""
    write_boxes(tmp_path / "town.glb", *BOXES, up="y")
    forward = view_at(0).c2w
    upward, backward = forward.copy(), forward.copy()
    upward[:3, :3] = np.diag([1, -1, -1])
    backward[:3, :3] = forward[:3, :3] @ np.diag([-1, 1, -1])
    poses = {1: forward, 5: view_at(0.2).c2w, 23: upward, 46: backward}
    frames = [{"frame": number, "transform_matrix": c2w.tolist()} for number, c2w in poses.items()]
    data = {"fl_x": 60.0, "fl_y": 60.0, "cx": 36.0, "cy": 24.0, "w": 72, "h": 48, "world_up": "+z", "frames": frames}
    (tmp_path / "cameras.json").write_text(json.dumps(data))
    return tests.town.load_town(tmp_path)


def record_passes(town: tests.town.Town, name: str, *left_out: str) -> None:
    """Write what Blender would record of a frame to `name`, for example position/0001; infinite in the sky."""
    view = town.view(int(name[-4:]), 72, 48)
    rays = view.rays().reshape(-1, 3)
    face = town.caster.cast(view.eye, rays)
    depth = town.caster.plane_depth(face, view.eye, rays)
    arrays = {
        "object_index": np.where(face >= 0, town.geometry.objects[face] + 1, 0).astype(np.uint8).reshape(48, 72),
        "depth": depth.astype(np.float32).reshape(48, 72),
        "position": (view.eye + depth[:, None] * rays).astype(np.float32).reshape(48, 72, 3),
    }
    path = town.folder / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{key: array for key, array in arrays.items() if key not in left_out})


def record_map(town: tests.town.Town, name: str, visible: bool = False) -> None:
    """Write a map that is black, or the identity."""
    path = town.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.indices((48, 72)) + 0.5
    write_map(path, encode_map(np.stack([x, y], axis=-1), np.full((48, 72), visible)))


def compare(monkeypatch, capsys, folder: Path) -> tuple[int, dict[str, str], str]:
    """Exit code of tests.town, its verdicts by name, and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["tests.town", str(folder)])
    code = exit_code(tests.town.main)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert all(len(line) == 4 and (line[1] == "-") == (line[3] == "skip") for line in lines)
    return code, {line[0]: line[3] for line in lines}, err


PASSES = {"passes_depth_p99_m", "passes_position_p99_m", "passes_hit_iou"}


POSITIONS = {"position_p50_px", "position_p99_px", "position_visible_iou"}


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(
    ("recorded", "maps", "measured"),
    [
        ((), (), set()),
        ((), ("arc0/corres_end.png",), set()),  # black, and 46 shares nothing with 1
        ((), ("arc0_old/corres_end.png", "arcade/corres_end.png", "arc7/corres_end.png"), set()),
        (("position/0001",), (), set()),
        (("position/0001", "position/0046"), (), set()),
        (("position/0001", "position/0023"), (), set()),
        (("position/0001", "position/0005"), (), POSITIONS),
        (("position/0001", "position/0005", "position/0046"), (), POSITIONS),
        (("position/0001", "position/0005", "position/0099"), (), POSITIONS),  # frame 99 has no camera
        (("passes720/0023",), (), set()),
        (("passes720/0001",), ("arc0/corres_end.png",), PASSES),
        (("passes720/0001", "passes720/0023"), (), PASSES),
    ],
)
def test_town_runs_what_is_there(monkeypatch, capsys, small_town, recorded, maps, measured):
    """One line per figure, whatever is present; without a pixel to measure it is `skip`, and nothing at all is 2."""
    for name in recorded:
        if name.endswith("0099"):
            shutil.copy(small_town.folder / "position" / "0001.npz", small_town.folder / f"{name}.npz")
        else:
            record_passes(small_town, name)
    for name in maps:
        record_map(small_town, f"projector/{name}")
    code, verdicts, err = compare(monkeypatch, capsys, small_town.folder)
    assert len(verdicts) == 10 and {name for name, verdict in verdicts.items() if verdict != "skip"} == measured
    assert set(verdicts.values()) <= {"ok", "skip"} and code == (0 if measured else 2)
    assert ("nothing to compare" in err) == (code == 2)


def test_town_counts_what_only_one_side_sees(monkeypatch, capsys, small_town):
    """A map that marks everything visible where nothing is shared fails, though there is no error to measure."""
    record_map(small_town, "projector/arc0/corres_end.png", visible=True)
    code, verdicts, _ = compare(monkeypatch, capsys, small_town.folder)
    assert code == 1 and (verdicts["projector_p50_px"], verdicts["projector_iou"]) == ("skip", "short")


@pytest.mark.parametrize("damage", ["text", "half", "key", "shape", "picture", "map"])
def test_town_names_a_damaged_file(monkeypatch, capsys, small_town, damage):
    folder = small_town.folder
    record_passes(small_town, "passes720/0001", "position" if damage == "key" else "")
    path = folder / "passes720" / "0001.npz"
    if damage == "text":
        path.write_text("no archive")
    elif damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "shape":
        np.savez(path, object_index=np.ones((4, 6)), depth=np.ones((4, 5)), position=np.ones((4, 6, 3)))
    elif damage == "picture":
        path = folder / "lineart_1080x720" / "0001.png"
        path.parent.mkdir()
        path.write_bytes(b"no picture")
    elif damage == "map":
        record_map(small_town, "projector/arc0/corres_end.png")
        path = folder / "projector" / "arc0" / "corres_end.png"
        path.write_bytes(path.read_bytes()[:60])
    code, _, err = compare(monkeypatch, capsys, folder)
    assert code == 2 and len(err.splitlines()) == 1 and str(path) in err


@needs_town
def test_animated_camera_is_the_recorded_one(monkeypatch, tmp_path, capsys):
    flags = ("--frames", "1:91", "--output", tmp_path / "out", *SMALL)
    scene = TOWN / "town_animcam.glb"
    assert run_main(monkeypatch, "--scene", scene, "--cameras", scene, *flags) == 0
    path, recorded = read_cameras(tmp_path / "out" / "cameras.json"), read_cameras(TOWN / "cameras_yup.json")
    assert np.abs(path.c2w - recorded.c2w).max() < 1e-4


def test_the_committed_sample_counts_as_finished(monkeypatch, tmp_path, capsys):
    """Its manifest has the current format: the commands that made it find nothing left to do."""
    for name in (SCENE_FILE, CAMERAS_FILE):
        shutil.copy(ROOT / "assets" / "sampleA" / name, tmp_path / name)
    flags = ("--scene", tmp_path / SCENE_FILE, "--cameras", tmp_path / CAMERAS_FILE)
    assert run_main(monkeypatch, *flags, "--output", ROOT / "assets" / "sampleA") == 0
    assert "is finished" in capsys.readouterr().out


def off(found: np.ndarray, stored: np.ndarray) -> float:
    """Share of pixels that differ by more than one level in a channel."""
    return (np.abs(found.astype(int) - stored) > 1).any(-1).mean()


def test_the_committed_sample_is_what_the_code_makes():
    """One map and one edge frame, from the committed mesh and path; a few pixels may differ between processors."""
    scene = load_scene(ROOT / "assets" / "sampleA")
    path = read_cameras(scene.folder / "cameras.json")
    geometry = turn(load_geometry(scene.folder / "scene.glb"), path.up)
    caster = RayCaster(geometry)
    maps = make_views(path, scene.map_size)
    stored = read_map(scene.arcs[0].corres_paths[0])
    right, late = (correspondence(caster, maps[0], maps[k]) for k in (3, 4))
    assert off(encode_map(right.position, right.visible), stored) < 1e-3
    assert off(encode_map(late.position, late.visible), stored) > 0.5
    end = [(read_map(arc.corres_end_path)[..., 2] == VISIBLE).mean() for arc in scene.arcs]
    assert all(0.3 < share <= 0.6 for share in end)
    lines = find_lines(make_line_scene(geometry, caster), make_views(path, scene.edge_size)[10])
    depth, stored = survey(caster, maps).typical_depth, read_image(scene.arcs[0].edge_paths[10])
    drawn = soften(lines, depth)
    assert off(drawn, stored) < 1e-3
    for wrong in (np.roll(drawn, 1, axis=0), np.roll(drawn, 1, axis=1), soften(lines, 1.1 * depth)):
        assert off(wrong, stored) > 0.01


def test_the_benchmark_has_its_figures(monkeypatch, inputs):
    """At small sizes: every figure is reported, and two sizes of the mesh share their keys."""
    sizes = {"EDGE_SIZE": (108, 72), "PASS_SIZE": (108, 72), "MAP_SIZE": (72, 48), "LATENT_SIZE": (18, 12)}
    for name, value in {**sizes, "REPEATS": 1}.items():
        monkeypatch.setattr(benchmark, name, value)
    cameras = write_path(inputs[1], poses=49)
    first, fine = (benchmark.measure(inputs[0], cameras, splits) for splits in (0, 1))
    assert first["faces"] == 12 * len(BOXES) and fine["faces"] == 4 * first["faces"]
    assert all(value > 0 for value in fine.values())
    shown, after = (benchmark.columns(row, first) for row in (first, fine))
    assert shown["map : first"] == shown["frame : first"] == "1.00" and shown.keys() == after.keys()
