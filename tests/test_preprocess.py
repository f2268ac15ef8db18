"""Preprocessing: correspondences, lines and scene folders, against analytic answers and Blender's ground truth."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import trimesh

import preprocess
from benchmarks.preprocess import subdivide
from tests.helpers import DATA, ROOT
from utils.arcs import load_scene
from utils.cameras import read_cameras
from utils.cli import run_script
from utils.correspondence import VISIBLE, encode_map, read_map, source_positions
from utils.geometry import Geometry, RayCaster, load_geometry, turn
from utils.images import read_image
from utils.line_art import find_lines, make_line_scene, soften
from utils.noise import read_noise
from utils.survey import survey
from utils.views import View, correspondence, make_views

TOWN = DATA / "town"
needs_town = pytest.mark.skipif(not TOWN.is_dir(), reason="the recorded town is not at hand")
SMALL = ("--edge_size", "108x72", "--map_size", "72x48", "--latent_size", "18x12")


def write_boxes(path: Path, *boxes: tuple, up: str = "z") -> Path:
    """Axis-aligned boxes (centre, size) in a Z-up world, as a mesh file."""
    scene = trimesh.Scene()
    for i, (centre, extent) in enumerate(boxes):
        mesh = trimesh.creation.box(extents=extent)
        mesh.apply_translation(centre)
        if up == "y":
            mesh.apply_transform(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]))
        scene.add_geometry(mesh, node_name=f"box_{i}", geom_name=f"box_{i}")
    joined = scene if path.suffix in (".glb", ".gltf") else scene.to_mesh()
    joined.export(path)
    return path


BOXES = (((0, 0, -0.5), (40, 40, 1)), ((0, 6, 1.5), (4, 3, 3)), ((-4, 9, 1), (3, 3, 2)), ((5, 12, 2), (3, 3, 4)))


def write_path(path: Path, poses: int = 46, move: float = 2.0) -> Path:
    """A camera that slides sideways past the boxes, looking along +y; Z-up."""
    eyes = np.stack([np.linspace(-move / 2, move / 2, poses), np.full(poses, -8.0), np.full(poses, 2.0)], axis=1)
    c2w = np.tile(np.eye(4), (poses, 1, 1))
    c2w[:, :3, :3] = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    c2w[:, :3, 3] = eyes
    frames = [{"frame": i + 1, "transform_matrix": matrix.tolist()} for i, matrix in enumerate(c2w)]
    data = {"fl_x": 90.0, "fl_y": 90.0, "cx": 54.0, "cy": 36.0, "w": 108, "h": 72, "world_up": "+z", "frames": frames}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def boxes(tmp_path_factory) -> tuple[Geometry, RayCaster]:
    geometry = turn(load_geometry(write_boxes(tmp_path_factory.mktemp("mesh") / "boxes.glb", *BOXES, up="y")), "+z")
    return geometry, RayCaster(geometry)


def view_at(x: float, y: float = -8.0, z: float = 2.0, size: tuple[int, int] = (72, 48)) -> View:
    rotation = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = rotation, (x, y, z)
    return View(c2w, 60.0 * size[0] / 72, 60.0 * size[0] / 72, size[0] / 2, size[1] / 2, *size)


# --- correspondences ---


def test_a_static_camera_gives_the_identity(boxes):
    view = view_at(0)
    found = correspondence(boxes[1], view, view)
    x, y = np.meshgrid(np.arange(72) + 0.5, np.arange(48) + 0.5)
    assert found.visible.all()
    assert np.abs(found.position - np.stack([x, y], axis=-1)).max() < 1e-9


def test_there_and_back_returns(boxes):
    a, b = view_at(-1), view_at(1)
    there, back = correspondence(boxes[1], b, a), correspondence(boxes[1], a, b)
    y, x = np.nonzero(there.visible & there.hit)
    place = there.position[y, x]
    # From the exact place in b, the surface point seen there is followed back to a.
    rays = b.directions(*place.T)
    face = boxes[1].cast(b.eye, rays)
    points = b.eye + boxes[1].plane_depth(face, b.eye, rays)[:, None] * rays
    returned, _ = a.project(points - a.eye)
    error = np.abs(returned - np.stack([x, y], axis=1) - 0.5).max(1)
    assert np.median(error) < 1e-6 and (error < 0.01).mean() > 0.99
    assert 0.5 < back.visible.mean() < 1


def test_random_scenes_agree_with_brute_force(boxes):
    """Every visible pair shows one point from both eyes; every hidden one is blocked, outside, or seen from behind."""
    geometry, caster = boxes
    rng = np.random.default_rng(0)
    differing = 0
    for _ in range(4):
        eyes = [(*rng.uniform(-2, 2, 1), *rng.uniform(-10, -6, 1), *rng.uniform(1, 3, 1)) for _ in range(2)]
        a, b = (view_at(*eye, size=(36, 24)) for eye in eyes)
        found = correspondence(caster, a, b)
        rays = b.rays().reshape(-1, 3)
        depth = _first_crossing(geometry, b.eye, rays)
        for i in rng.choice(len(rays), 150, replace=False):
            offset = rays[i] if np.isinf(depth[i]) else b.eye + depth[i] * rays[i] - a.eye
            (place,), (inside,) = a.project(offset[None])
            blocked = _first_crossing(geometry, a.eye, offset[None])[0]
            seen = bool(inside) and (np.isinf(blocked) if np.isinf(depth[i]) else blocked >= 1 - 1e-4)
            differing += found.visible.flat[i] != seen
            if found.visible.flat[i]:
                assert np.abs(found.position.reshape(-1, 2)[i] - place).max() < 1e-6
    assert differing <= 3  # of 600: rays along an edge


def _first_crossing(geometry: Geometry, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """t of the first triangle on each ray by testing all of them, inf where there is none."""
    a, b, c = geometry.vertices[geometry.faces].transpose(1, 0, 2)
    first = np.full(len(rays), np.inf)
    for i, ray in enumerate(rays):
        system = np.stack([b - a, c - a, np.broadcast_to(-ray, a.shape)], axis=-1)
        good = np.abs(np.linalg.det(system)) > 1e-12
        u, v, t = np.linalg.solve(system[good], (origin - a[good])[..., None])[..., 0].T
        hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 1e-9)
        first[i] = t[hit].min() if hit.any() else np.inf
    return first


def test_sky_moves_with_rotation_only(boxes):
    a, b = view_at(-1, z=6), view_at(1, z=6)
    found = correspondence(boxes[1], a, b)
    sky = ~found.hit
    assert sky.any() and found.visible[sky].mean() > 0.9
    y, x = np.nonzero(sky & found.visible)
    assert np.abs(found.position[y, x] - np.stack([x, y], axis=1) - 0.5).max() < 1e-9
    without = correspondence(boxes[1], a, b, sky=False)
    assert not without.visible[sky].any() and np.array_equal(without.visible[~sky], found.visible[~sky])


def test_codec_is_exact_to_its_step():
    rng = np.random.default_rng(1)
    position = rng.uniform(0, 1, (48, 72, 2)) * (72, 48)
    visible = rng.random((48, 72)) < 0.7
    code = encode_map(position, visible)
    assert (code[~visible] == 0).all() and (code[visible, 2] == VISIBLE).all()
    decoded, valid = source_positions(code)
    assert np.array_equal(valid, visible)
    assert np.abs(decoded - position)[visible].max() <= 0.5 / 65536 * 72 + 1e-9
    edge = encode_map(np.full((1, 1, 2), (1.0, 1.0)), np.ones((1, 1), bool))
    assert edge.tolist() == [[[65535, 0, 65535]]]
    with pytest.raises(ValueError, match="inside the frame"):
        encode_map(np.full((1, 1, 2), 1.5), np.ones((1, 1), bool))


# --- lines ---


def test_lines_lie_where_edges_project(boxes):
    """Edges of the box in front, projected, are covered by lines; flat faces are empty."""
    view = view_at(0.3, size=(360, 240))
    lines = find_lines(make_line_scene(*boxes), view).brightness > 0
    front = np.array([[x, 4.5, z] for x, z in ((-2, 0), (2, 0), (2, 3), (-2, 3))], float)
    corners, inside = view.project(front - view.eye)
    assert inside.all()
    wanted = np.zeros(lines.shape, np.uint8)
    cv2.polylines(wanted, [np.round(corners - 0.5).astype(np.int32)], True, 1)
    near = cv2.distanceTransform((~lines).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= 1.5
    assert near[wanted > 0].all()
    x, y = corners.min(0), corners.max(0)
    assert not lines[int(x[1]) + 4 : int(y[1]) - 4, int(x[0]) + 4 : int(y[0]) - 4].any()


def test_smooth_surfaces_have_no_creases(tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=1, radius=1.5)
    ball.export(tmp_path / "flat.stl")
    geometry = load_geometry(tmp_path / "flat.stl", "+z")
    caster = RayCaster(geometry)
    view = view_at(0, -5, 0, size=(360, 240))
    shapes = [replace(geometry, smooth=np.full(len(geometry.faces), flag)) for flag in (False, True)]
    flat, smooth = (find_lines(make_line_scene(shape, caster), view).brightness > 0 for shape in shapes)
    assert smooth.sum() < 0.7 * flat.sum() or (flat == smooth).all()
    outline = cv2.morphologyEx(smooth.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3)))
    assert cv2.connectedComponents(1 - outline, connectivity=4)[0] == 3  # background, outside, inside: one closed line


def test_pens_are_soft_and_as_wide_as_promised(boxes):
    view = view_at(0.3, size=(1080, 720))
    drawn = soften(find_lines(make_line_scene(*boxes), view), typical_depth=13.0)[..., 0]
    assert drawn.max() == 255 and 0.01 < (drawn > 127).mean() < 0.15
    inside = cv2.distanceTransform((drawn > 127).astype(np.uint8), cv2.DIST_L2, 5)
    ridge = inside[inside == cv2.dilate(inside, np.ones((3, 3)))]
    widths = 2 * ridge[ridge > 0.9]
    assert np.percentile(widths, 10) > 2.5 and np.percentile(widths, 90) < 10


def test_dense_meshes_draw_the_same_lines(boxes):
    geometry, caster = boxes
    view = view_at(0.3, size=(540, 360))
    coarse = find_lines(make_line_scene(geometry, caster), view).brightness
    for _ in range(6):
        geometry = subdivide(geometry)
    scene = make_line_scene(geometry, RayCaster(geometry))
    assert scene.patches is not None and len(np.unique(scene.patches)) == 6 * len(BOXES)
    dense = find_lines(scene, view).brightness
    assert ((coarse > 0) != (dense > 0)).mean() < 2e-4


# --- whole folders ---


def run_main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *map(str, arguments)])
    try:
        run_script(preprocess.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def inputs(tmp_path) -> tuple[Path, Path]:
    return write_boxes(tmp_path / "boxes.glb", *BOXES, up="y"), write_path(tmp_path / "cameras.json")


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
    # The folder is an input of its own, and gives itself again.
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


def test_formats_and_up_axes_agree(monkeypatch, tmp_path):
    """GLB (Y-up), OBJ, PLY (Z-up) and OBJ declared Y-up of one mesh give equal maps and edges."""
    cameras = write_path(tmp_path / "cameras.json")
    variants = {
        "glb": ("y", ()),
        "obj": ("z", ()),
        "ply": ("z", ("--scene_up", "z")),
        "off": ("y", ("--scene_up", "y")),
    }
    folders = []
    for suffix, (up, flags) in variants.items():
        scene = write_boxes(tmp_path / f"boxes_{suffix}.{suffix}", *BOXES, up=up)
        folders.append(tmp_path / suffix)
        assert (
            run_main(monkeypatch, "--scene", scene, "--cameras", cameras, "--output", folders[-1], *SMALL, *flags) == 0
        )
    for folder in folders[1:]:
        for name in ("corres/0023.png", "corres_end.png"):
            (a, a_ok), (b, b_ok) = (source_positions(read_map(f / "arc0" / name)) for f in (folders[0], folder))
            assert (a_ok == b_ok).mean() > 0.999 and np.abs(a - b)[a_ok & b_ok].max() < 2e-3
        a, b = (read_image(f / "arc0" / "hed" / "0010.png") for f in (folders[0], folder))
        assert (np.abs(a.astype(int) - b) <= 1).mean() > 0.99


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
        frame["transform_matrix"][2][3] += 1000.0  # far above, looking level: nothing to see
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
    assert "inside an object in frames 1-46" in capsys.readouterr().out


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


# --- against Blender, and speed ---


@needs_town
@pytest.mark.slow
def test_town_agrees_with_blender():
    line = [sys.executable, "-m", "tests.town", str(TOWN)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") == 10 and "skip" not in done.stdout


@needs_town
def test_town_figures_fall_short_of_a_wrong_camera(tmp_path):
    """The comparison can fail: a camera path that is 1 % off does not pass."""
    for name in ("town.glb", "cameras.json"):
        shutil.copy(TOWN / name, tmp_path / name)
    (tmp_path / "passes720").mkdir()
    shutil.copy(TOWN / "passes720" / "0001.npz", tmp_path / "passes720")
    data = json.loads((tmp_path / "cameras.json").read_text())
    data["fl_x"] *= 1.01
    (tmp_path / "cameras.json").write_text(json.dumps(data))
    line = [sys.executable, "-m", "tests.town", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "short" in done.stdout and "skip" in done.stdout


@needs_town
def test_animated_camera_is_the_recorded_one(monkeypatch, tmp_path, capsys):
    flags = ("--frames", "1:91", "--output", tmp_path / "out", *SMALL)
    scene = TOWN / "town_animcam.glb"
    assert run_main(monkeypatch, "--scene", scene, "--cameras", scene, *flags) == 0
    path, recorded = read_cameras(tmp_path / "out" / "cameras.json"), read_cameras(TOWN / "cameras_yup.json")
    assert np.abs(path.c2w - recorded.c2w).max() < 1e-4


@pytest.mark.slow
def test_speed(boxes):
    """A third of the bars: 20 maps and 1.5 edge frames per CPU second."""
    scene = make_line_scene(*boxes)
    small, large = [view_at(0.1 * i, size=(360, 240)) for i in range(6)], view_at(0.1, size=(1080, 720))
    start = time.process_time()
    for a, b in itertools.pairwise(small):
        correspondence(boxes[1], a, b)
    assert 5 / (time.process_time() - start) > 20 / 3
    start = time.process_time()
    soften(find_lines(scene, large), 13.0)
    assert 1 / (time.process_time() - start) > 1.5 / 3


def test_the_committed_sample_is_what_the_code_makes():
    """One map and one edge frame, from the committed mesh and path; a few pixels may differ between processors."""
    scene = load_scene(ROOT / "assets" / "sampleA")
    path = read_cameras(scene.folder / "cameras.json")
    geometry = turn(load_geometry(scene.folder / "scene.glb"), path.up)
    caster = RayCaster(geometry)
    maps = make_views(path, scene.map_size)
    found = correspondence(caster, maps[0], maps[3])
    stored = read_map(scene.arcs[0].corres_paths[0])
    assert (encode_map(found.position, found.visible).astype(int) - stored != 0).any(-1).mean() < 1e-3
    end = [(read_map(arc.corres_end_path)[..., 2] == VISIBLE).mean() for arc in scene.arcs]
    assert all(0.3 < share <= 0.6 for share in end)
    lines = find_lines(make_line_scene(geometry, caster), make_views(path, scene.edge_size)[10])
    drawn = soften(lines, survey(caster, maps).typical_depth)
    assert (np.abs(drawn.astype(int) - read_image(scene.arcs[0].edge_paths[10])) > 1).mean() < 1e-3
