"""Preprocessing: correspondences, lines and scene folders, against analytic answers and Blender's ground truth."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

import preprocess
import tests.town
from benchmarks import preprocess as benchmark
from benchmarks.preprocess import subdivide
from tests.helpers import DATA, ROOT, exit_code
from utils.cameras.read import read_cameras
from utils.correspondence import VISIBLE, encode_map, read_map, source_positions, write_map
from utils.images import read_image
from utils.layout import CAMERAS_FILE, SCENE_FILE, load_scene
from utils.noise import read_noise
from utils.scene.lines import find_lines, make_line_scene, soften
from utils.scene.load import load_geometry
from utils.scene.mesh import Geometry, turn
from utils.scene.raycast import RayCaster
from utils.scene.survey import survey
from utils.scene.views import View, correspondence, make_views

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


@pytest.mark.parametrize("kind", ["soup", "boxes"])
@pytest.mark.parametrize("seed", range(4))
def test_random_scenes_agree_with_brute_force(tmp_path, seed, kind):
    """Every visible pair shows one side of one point to both eyes; every hidden one is blocked, outside, or behind."""
    rng = np.random.default_rng(seed)
    _random_mesh(rng, kind).export(tmp_path / "scene.stl")
    geometry = load_geometry(tmp_path / "scene.stl", "+z")
    a, b = (_random_view(rng) for _ in range(2))
    found = correspondence(RayCaster(geometry), a, b)
    rays = b.rays().reshape(-1, 3)
    depth, normal = _first_crossing(geometry, b.eye, rays)
    hit = np.isfinite(depth)
    offsets = np.where(hit[:, None], b.eye + np.where(hit, depth, 0)[:, None] * rays - a.eye, rays)
    place, inside = a.project(offsets)
    blocked, _ = _first_crossing(geometry, a.eye, offsets)
    same_side = (normal * rays).sum(1) * (normal * offsets).sum(1) > 0
    seen = inside & np.where(hit, (blocked >= 1 - 1e-4) & same_side, np.isinf(blocked))
    visible = found.visible.ravel()
    assert (visible != seen).mean() < 5e-3 and (found.hit.ravel() != hit).mean() < 5e-3  # rays along an edge
    both = visible & seen & (found.hit.ravel() == hit)
    assert both.sum() > 100 and (hit & inside & ~seen).any() and 0.1 < hit.mean() < 0.95
    error = np.abs(found.position.reshape(-1, 2) - place)[both].max(1)
    assert (error < 1e-6).mean() > 0.995


def _random_mesh(rng: np.random.Generator, kind: str) -> trimesh.Trimesh:
    """About 40 triangles of any size and direction within 4 m of the origin, or 20 turned boxes there."""
    if kind == "soup":
        corners = rng.uniform(-3, 3, (40, 1, 3)) + rng.normal(0, 1.2, (40, 3, 3))
        return trimesh.Trimesh(corners.reshape(-1, 3), np.arange(120).reshape(-1, 3), process=False)
    boxes = [trimesh.creation.box(extents=rng.uniform(0.5, 2.5, 3)) for _ in range(20)]
    for box in boxes:
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = Rotation.random(random_state=rng).as_matrix(), rng.uniform(-3, 3, 3)
        box.apply_transform(pose)
    return trimesh.util.concatenate(boxes)


def _random_view(rng: np.random.Generator) -> View:
    """A small view of the origin from some metres away, turned and rolled a little."""
    view = view_at(*rng.uniform((-3, -10, -2), (3, -7, 2)), size=(36, 24))
    c2w = view.c2w.copy()
    c2w[:3, :3] = Rotation.from_rotvec(rng.normal(0, 0.15, 3)).as_matrix() @ c2w[:3, :3]
    return replace(view, c2w=c2w)


def _first_crossing(geometry: Geometry, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """t [N] and unscaled normal [N, 3] of the first triangle on each ray by testing all of them; inf without one."""
    a, b, c = geometry.vertices[geometry.faces].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    first, normal = np.full(len(rays), np.inf), np.zeros((len(rays), 3))
    for i, ray in enumerate(rays):
        system = np.stack([b - a, c - a, np.broadcast_to(-ray, a.shape)], axis=-1)
        good = np.flatnonzero(np.abs(np.linalg.det(system)) > 1e-12)
        u, v, t = np.linalg.solve(system[good], (origin - a[good])[..., None])[..., 0].T
        t[(u < 0) | (v < 0) | (u + v > 1) | (t <= 1e-9)] = np.inf
        if np.isfinite(t).any():
            first[i], normal[i] = t.min(), normals[good[t.argmin()]]
    return first, normal


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
    """An icosahedron, whose sides meet at 41.8 degrees, has lines inside when it is flat, and none when smooth."""
    trimesh.creation.icosphere(subdivisions=0, radius=1.5).export(tmp_path / "flat.stl")
    geometry = load_geometry(tmp_path / "flat.stl", "+z")
    caster = RayCaster(geometry)
    view = view_at(0, -5, 0, size=(360, 240))
    shapes = [replace(geometry, smooth=np.full(len(geometry.faces), flag)) for flag in (False, True)]
    flat, smooth = (find_lines(make_line_scene(shape, caster), view).brightness > 0 for shape in shapes)
    body = caster.cast(view.eye, view.rays().reshape(-1, 3)).reshape(flat.shape) >= 0
    inside = cv2.distanceTransform(body.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > 2.5
    assert (flat & inside).sum() > 500 and not (smooth & inside).any()
    # 4-connected regions beside the line: the background, outside and inside, so that the outline is closed.
    assert cv2.connectedComponents((~smooth).astype(np.uint8), connectivity=4)[0] == 3


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
    return exit_code(preprocess.main)


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
    """GLB (Y-up), OBJ, PLY (Z-up) and OFF declared Y-up of one mesh give equal maps and edges."""
    boxes = [(np.divide(centre, 3.1), np.divide(extent, 3.1)) for centre, extent in BOXES]  # on no pixel boundary
    cameras = write_path(tmp_path / "cameras.json", move=1.7)
    path = read_cameras(cameras)
    views, large = make_views(path, (360, 240)), make_views(path, (1080, 720))[9]
    results = []
    for suffix, up, declared in (("glb", "y", None), ("obj", "z", None), ("ply", "z", "z"), ("off", "y", "y")):
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


# --- against Blender, and the committed sample ---


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
    """What Blender would have recorded of a frame, in `name`, for example position/0001; infinite where it saw sky."""
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
    """A map that is black, or says that every pixel stays where it is."""
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
    """A map that claims everything where nothing is shared is short, though there is no error to measure."""
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
    """Its manifest has today's form: the commands that made it find nothing left to do."""
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


# --- the benchmark ---


def test_the_benchmark_has_its_figures(monkeypatch, inputs):
    """At small sizes: every figure is there, and what two sizes of the mesh have in common."""
    for name, value in {"EDGE_SIZE": (108, 72), "MAP_SIZE": (72, 48), "LATENT_SIZE": (18, 12), "REPEATS": 1}.items():
        monkeypatch.setattr(benchmark, name, value)
    cameras = write_path(inputs[1], poses=49)
    first, fine = (benchmark.measure(inputs[0], cameras, splits) for splits in (0, 1))
    assert first["faces"] == 12 * len(BOXES) and fine["faces"] == 4 * first["faces"]
    assert all(value > 0 for value in fine.values())
    shown, after = (benchmark.columns(row, first) for row in (first, fine))
    assert shown["map : first"] == shown["frame : first"] == "1.00" and shown.keys() == after.keys()
