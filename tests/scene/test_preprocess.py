"""preprocess.py: whole scene folders."""

import importlib.util
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.scene.preprocess_common import BOXES, SMALL, run_main, view_at, write_boxes, write_path
from utils.cameras.read import read_cameras
from utils.images import read_image
from utils.layout import load_scene
from utils.meshes.load import load_geometry
from utils.meshes.mesh import turn
from utils.noise import read_noise
from utils.scene.lines import find_lines, make_line_scene, soften
from utils.scene.raycast import RayCaster
from utils.scene.survey import survey
from utils.scene.views import correspondence, make_views


def test_a_folder_is_complete(monkeypatch, tmp_path, inputs, capsys):
    scene, cameras = inputs
    out = tmp_path / "out"
    arguments = ("--scene", scene, "--cameras", cameras, "--output", out, *SMALL, "--preview")
    assert run_main(monkeypatch, *arguments) == 0
    found = load_scene(out)
    assert (len(found.arcs), found.edge_size, found.map_size) == (1, (108, 72), (72, 48))
    assert read_noise(found.arcs[0].noise_path((18, 12)), (18, 12)).std() == pytest.approx(1, abs=0.02)
    manifest = json.loads((out / "preprocess.json").read_text())
    statistics = manifest["arcs"]["0"]
    assert manifest["finished"] and manifest["versions"]["numpy"] == np.__version__
    assert 0.5 < statistics["covisible_share"] <= 1 and 0 < statistics["edge_density"] < 0.5
    again = load_geometry(out / "scene.glb")
    assert again.up == "+z" and set(again.names) == {f"box_{i}" for i in range(4)}
    assert np.allclose(again.vertices.min(0), (-20, -20, -1), atol=1e-4)
    path = read_cameras(out / "cameras.json")
    assert path.up == "+z" and path.numbers == tuple(range(1, 47))
    assert {p.name for p in (out / "preview").iterdir()} == {"contact_sheet.png", "edges.mp4", "top.png"}
    assert not [p for p in out.rglob("*") if ".tmp" in p.name]
    # The folder is a valid input, and reproduces itself.
    arguments = (
        "--scene",
        out / "scene.glb",
        "--cameras",
        out / "cameras.json",
        "--output",
        tmp_path / "twin",
        *SMALL,
    )
    assert run_main(monkeypatch, *arguments) == 0
    for name in ("arc0/corres_end.png", "arc0/corres/0023.png", "arc0/hed/0010.png", "arc0/noises_18x12.npy"):
        assert (tmp_path / "twin" / name).read_bytes() == (out / name).read_bytes()


def test_a_run_continues_arc_by_arc(monkeypatch, tmp_path, inputs, capsys):
    scene, _ = inputs
    cameras = write_path(tmp_path / "long.json", poses=91)
    arguments = ("--scene", scene, "--cameras", cameras, *SMALL, "--output")
    assert run_main(monkeypatch, *arguments, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "arc1")
    manifest = json.loads((tmp_path / "cut" / "preprocess.json").read_text())
    del manifest["arcs"]["1"]
    manifest["finished"] = False
    (tmp_path / "cut" / "preprocess.json").write_text(json.dumps(manifest))
    before = (tmp_path / "cut" / "arc0" / "hed" / "0001.png").stat().st_mtime_ns
    assert run_main(monkeypatch, *arguments, tmp_path / "cut") == 0
    assert (tmp_path / "cut" / "arc0" / "hed" / "0001.png").stat().st_mtime_ns == before
    for path in (tmp_path / "whole").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_other_arguments_are_refused_and_results_kept(monkeypatch, tmp_path, inputs, capsys):
    scene, cameras = inputs
    out = tmp_path / "out"
    arguments = ("--scene", scene, "--cameras", cameras, "--output", out, *SMALL)
    assert run_main(monkeypatch, *arguments) == 0
    (out / "multiviews" / "run").mkdir(parents=True)
    assert run_main(monkeypatch, *arguments, "--seed", 1) == 2
    assert "seed was 0 and is now 1" in capsys.readouterr().err
    noise = (out / "arc0" / "noises_18x12.npy").read_bytes()
    assert run_main(monkeypatch, *arguments, "--seed", 1, "--overwrite") == 0
    assert (out / "arc0" / "noises_18x12.npy").read_bytes() != noise
    assert (out / "multiviews" / "run").is_dir()


def test_what_a_finished_scene_lost_is_written_again_or_named(monkeypatch, tmp_path, inputs, capsys):
    scene, cameras = inputs
    out = tmp_path / "out"
    arguments = ("--scene", scene, "--cameras", cameras, "--output", out, *SMALL)
    assert run_main(monkeypatch, *arguments) == 0
    before = {name: (out / name).read_bytes() for name in ("scene.glb", "cameras.json", "arc0/hed/0003.png")}
    for name in ("scene.glb", "cameras.json"):
        (out / name).unlink()
    assert run_main(monkeypatch, *arguments) == 0
    (out / "arc0" / "hed" / "0003.png").unlink()
    assert run_main(monkeypatch, *arguments) == 2
    assert f"0003.png is missing, one of 1: delete {out / 'arc0'}" in capsys.readouterr().err
    shutil.rmtree(out / "arc0")
    assert run_main(monkeypatch, *arguments) == 0
    assert {name: (out / name).read_bytes() for name in before} == before


def test_other_names_of_objects_are_another_scene(monkeypatch, tmp_path, inputs, capsys):
    scene, cameras = inputs
    arguments = ("--scene", scene, "--cameras", cameras, "--output", tmp_path / "out", *SMALL, "--passes", "ids")
    assert run_main(monkeypatch, *arguments) == 0
    scene.write_bytes(scene.read_bytes().replace(b"box_1", b"barn1"))
    assert run_main(monkeypatch, *arguments) == 2
    assert "has other names or normals than when" in capsys.readouterr().err
    assert run_main(monkeypatch, *arguments, "--overwrite") == 0
    assert "barn1" in json.loads((tmp_path / "out" / "passes" / "ids.json").read_text())["objects"]


def test_the_written_path_never_takes_the_place_of_a_result(monkeypatch, tmp_path, inputs, capsys):
    scene, cameras = inputs
    out = tmp_path / "out"
    for name in ("preprocess.json", "scene.glb", "preview/path.json", "arc12/path.json", "arc1234/path.json"):
        arguments = (
            "--scene",
            scene,
            "--cameras",
            cameras,
            "--output",
            out,
            *SMALL,
            "--write_camera_path",
            out / name,
        )
        assert run_main(monkeypatch, *arguments) == 2, name
        assert "name another file" in capsys.readouterr().err


@pytest.mark.slow
def test_formats_and_up_axes_agree(monkeypatch, tmp_path):
    """GLB and OBJ (Y-up), PLY (Z-up) and OFF declared Y-up of one mesh give equal maps and edges."""
    boxes = [(np.divide(centre, 3.1), np.divide(extent, 3.1)) for centre, extent in BOXES]  # off all pixel boundaries
    cameras = write_path(tmp_path / "cameras.json", move=1.7)
    path = read_cameras(cameras)
    views, large = make_views(path, (360, 240)), make_views(path, (1080, 720))[9]
    results = []
    for suffix, up, declared in (("glb", "y", None), ("obj", "y", None), ("ply", "z", "z"), ("off", "y", "y")):
        scene = write_boxes(tmp_path / f"boxes_{suffix}.{suffix}", *boxes, up=up)
        flags = ("--scene_up", declared) if declared else ()
        out = tmp_path / suffix
        assert run_main(monkeypatch, "--scene", scene, "--cameras", cameras, "--output", out, *SMALL, *flags) == 0
        geometry = turn(load_geometry(scene, declared and f"+{declared}"), "+z")
        caster = RayCaster(geometry)
        maps = [correspondence(caster, views[a], views[b]) for a, b in ((19, 22), (0, 45))]
        drawn = soften(find_lines(make_line_scene(geometry, caster), large), 13.0)
        results.append((maps, (drawn, read_image(out / "arc0" / "hed" / "0010.png"))))
    (maps, edges), *others = results
    for other_maps, other_edges in others:
        for a, b in zip(maps, other_maps, strict=True):
            assert (a.visible == b.visible).mean() > 0.999 and a.visible.mean() > 0.5
            assert np.abs(a.position - b.position)[a.visible & b.visible].max() < 1e-3
        for a, b in zip(edges, other_edges, strict=True):
            assert a.any() and (a == b).all(-1).mean() > 0.999


@pytest.mark.parametrize("kind", ["orbit", "dolly", "flythrough"])
def test_built_in_paths_see_the_scene(monkeypatch, tmp_path, inputs, capsys, kind):
    assert run_main(monkeypatch, "--scene", inputs[0], "--path", kind, "--output", tmp_path / kind, *SMALL) == 0
    assert "warning" not in capsys.readouterr().out
    path = read_cameras(tmp_path / kind / "cameras.json")
    geometry = turn(load_geometry(inputs[0]), path.up)
    assert not survey(RayCaster(geometry), make_views(path, (72, 48))).warnings


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (("--scene", "nowhere.glb"), "nowhere.glb"),
        (("--cameras", "nowhere.json"), "nowhere.json"),
        (("--latent_size", "17x12"), "17x12"),
        (("--edge_size", "big"), "WIDTHxHEIGHT"),
        (("--frames", "9:3"), "9:3"),
        (("--frames", "100:200"), "100"),
        (("--path", "orbit"), "either --cameras"),
        (("--edges", "hed"), "controlnet_aux"),
        (("--num_arcs", "0"), "positive"),
        (("--edge_size", "288x17"), "16 to 1"),
        (("--edge_size", "16384x16384"), "million pixels"),
        (("--min_covisible", "0.7"), "--num_arcs auto"),
        (("--num_arcs", "2", "--max_arcs", "9"), "--num_arcs auto"),
    ],
)
def test_bad_input(monkeypatch, tmp_path, inputs, capsys, change, telling):
    if change == ("--edges", "hed") and importlib.util.find_spec("controlnet_aux"):
        pytest.skip("controlnet_aux is installed")
    arguments = ("--scene", inputs[0], "--cameras", inputs[1], "--output", tmp_path / "out", *SMALL, *change)
    assert run_main(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and telling in error
    assert not (tmp_path / "out").exists()


def test_warnings_name_the_cause(monkeypatch, tmp_path, inputs, capsys):
    scene, cameras = inputs
    data = json.loads(cameras.read_text())
    for frame in data["frames"][10:20]:
        frame["transform_matrix"][2][3] += 1000.0  # far above, looking horizontally: no surface in view
    cameras.write_text(json.dumps(data))
    assert run_main(monkeypatch, "--scene", scene, "--cameras", cameras, "--output", tmp_path / "a", *SMALL) == 0
    assert "the camera sees nothing in frames 11-20" in capsys.readouterr().out
    for frame in data["frames"]:
        frame["transform_matrix"][2][3] = 1000.0
    cameras.write_text(json.dumps(data))
    assert run_main(monkeypatch, "--scene", scene, "--cameras", cameras, "--output", tmp_path / "b", *SMALL) == 0
    assert "same up axis" in capsys.readouterr().out
    for frame in data["frames"]:
        frame["transform_matrix"][0][3], frame["transform_matrix"][1][3], frame["transform_matrix"][2][3] = 0, 6, 1.5
    cameras.write_text(json.dumps(data))
    assert run_main(monkeypatch, "--scene", scene, "--cameras", cameras, "--output", tmp_path / "c", *SMALL) == 0
    assert "mostly back faces in frames 1-46" in capsys.readouterr().out


def test_inconsistent_winding_changes_nothing(tmp_path, boxes):
    geometry, caster = boxes
    flipped = geometry.faces.copy()
    flipped[::2] = flipped[::2, ::-1]
    other = replace(geometry, faces=flipped)
    a, b = view_at(-1), view_at(1)
    first, second = correspondence(caster, a, b), correspondence(RayCaster(other), a, b)
    assert np.array_equal(first.visible, second.visible)
    lines = [
        find_lines(make_line_scene(g, RayCaster(g)), view_at(0, size=(180, 120))).brightness for g in (geometry, other)
    ]
    assert np.array_equal(*lines)


def test_what_is_assumed_of_the_up_axis_is_said(monkeypatch, tmp_path, capsys):
    """A Y-up OBJ stands upright; a mesh in the world of its keyframes is rotated with them or not at all."""
    post = write_boxes(tmp_path / "post.obj", ((0, 0, 2), (0.2, 0.2, 4)), ((0, 0, -0.5), (4, 4, 1)), up="y")
    keyframes = {
        "w": 108,
        "h": 72,
        "fov": 50,
        "keyframes": [{"position": [x, -8, 2], "look_at": [0, 0, 2]} for x in (0, 2)],
    }
    found = {}
    for name, up, flags in (("path", "+y", ()), ("one", "+z", ()), ("said", "+z", ("--scene_up", "y"))):
        out, cameras = tmp_path / name, tmp_path / f"{name}.json"
        cameras.write_text(json.dumps({"world_up": up, **keyframes}))
        source = ("--path", "orbit") if name == "path" else ("--cameras", cameras)
        assert run_main(monkeypatch, "--scene", post, *source, "--output", out, *SMALL, *flags) == 0
        found[name] = load_geometry(out / "scene.glb"), capsys.readouterr().err
    geometry, said = found["path"]
    assert geometry.up == "+y" and np.ptp(geometry.vertices, axis=0)[1] == pytest.approx(5)
    assert "post.obj is taken as +y up" in said and "--scene_up" in said
    geometry, said = found["one"]
    assert geometry.up == "+z" and np.ptp(geometry.vertices, axis=0)[1] == pytest.approx(5)
    assert "taken as one world, +z up" in said
    geometry, said = found["said"]
    assert geometry.up == "+z" and np.ptp(geometry.vertices, axis=0)[2] == pytest.approx(5)
    assert "up" not in said


def test_overlaps_are_named(monkeypatch, tmp_path, capsys):
    rows = [(-4, -4), (4, -4), (4, 4), (-4, 4), (-1, -1), (1, -1), (1, 1), (-1, 1)]
    vertices = [f"v {x} 0 {z}\n" for x, z in rows]
    (tmp_path / "a.obj").write_text(f"o floor\n{''.join(vertices)}f 1 4 3 2\no rug\nf 5 8 7 6\n")
    arguments = ("--scene", tmp_path / "a.obj", "--path", "orbit", "--output", tmp_path / "out", *SMALL)
    assert run_main(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.count("'rug' over 'floor'") == 1
