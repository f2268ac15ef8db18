"""Passes of a frame: what their values mean, in scenes where they are known."""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import trimesh

from tests.scene.preprocess_common import BOXES, SMALL, run_main, view_at, write_boxes, write_path
from tests.support.helpers import ROOT, assert_same, contents, probe_video, wait_for
from utils.correspondence import read_map
from utils.files import read_json
from utils.images import read_image
from utils.layout import SCENE_MANIFEST, Arc
from utils.meshes.mesh import Geometry, build_geometry
from utils.scene.lines import find_lines, make_line_scene, shade
from utils.scene.passes.draw import PASSES, PICTURES, Frame, draw_floats, make_stage, object_colours
from utils.scene.passes.write import write_exr
from utils.scene.raycast import RayCaster
from utils.scene.views import View, look

QUAD = np.array([[0, 1, 2], [0, 2, 3]])
Object = tuple[str, np.ndarray, np.ndarray]


def box(name: str, low: tuple, high: tuple) -> Object:
    points = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * np.subtract(high, low) + low
    quads = np.array([(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)])
    return name, points.astype(float), np.concatenate([quads[:, [0, 1, 2]], quads[:, [2, 3, 0]]])


def wall(name: str = "wall", y: float = 2, slope: float = 0, reach: float = 50) -> Object:
    """An upright rectangle that faces the camera, leaning away from it by `slope` metres per metre above z = 2."""
    corners = [
        (x, y + slope * z, 2 + z) for x, z in ((-reach, -reach), (reach, -reach), (reach, reach), (-reach, reach))
    ]
    return name, np.array(corners, float), QUAD


def frame_of(
    geometry: Geometry | list[Object],
    view: View,
    following: View | None = None,
    anchors: tuple | None = None,
    **options,
) -> Frame:
    geometry = geometry if isinstance(geometry, Geometry) else build_geometry(geometry, "+z")
    caster = RayCaster(geometry)
    return Frame(
        make_stage(make_line_scene(geometry, caster), **options),
        look(caster, view),
        following,
        anchors or (view, view),
    )


def pixel_of(x: float, distance: float, height: float = 2, eye: float = 0) -> tuple[int, int]:
    """(row, column) of a point `distance` in front of the camera. Its focal length is 60, its centre (36, 24)."""
    return int(24 - 60 * (height - 2) / distance), int(36 + 60 * (x - eye) / distance)


@pytest.mark.parametrize("turned", [False, True])
def test_a_sloped_plane_has_its_depth_its_normal_and_its_points(turned: bool):
    name, points, faces = wall(slope=0.5)
    frame = frame_of([(name, points, faces[:, ::-1] if turned else faces)], view_at(0))
    floats = draw_floats(frame)
    x, y = np.meshgrid((np.arange(72) + 0.5 - 36) / 60, (24 - np.arange(48) - 0.5) / 60)
    depth = 10 / (1 - 0.5 * y)
    np.testing.assert_allclose(floats["Z"], depth, rtol=1e-6)
    points = np.stack([x * depth, depth - 8, 2 + y * depth])
    np.testing.assert_allclose([floats[f"P.{axis}"] for axis in "XYZ"], points, atol=1e-5)
    normal = np.array([0, 0.5, 1]) / np.sqrt(1.25)  # up, and towards the viewer
    np.testing.assert_allclose([floats[f"N.{axis}"][3, 5] for axis in "XYZ"], normal, atol=1e-6)
    picture = PASSES["normal"].draw(frame)
    assert picture.dtype == np.uint8 and (picture == np.round(127.5 * (normal + 1))).all()


def test_normals_are_in_camera_axes():
    """A wall to the right of a camera that looks along +x: it faces left, whichever way the world's axes point."""
    view = view_at(0)
    ahead = np.array([[0, 0, -1], [-1, 0, 0], [0, 1, 0.0]])  # right is -y, up is +z, backward is -x
    view = replace(view, c2w=np.block([[ahead, np.zeros((3, 1))], [np.zeros((1, 3)), 1]]))
    frame = frame_of([box("right", (-50, -3, -50), (50, -2, 50))], view)
    picture = PASSES["normal"].draw(frame)
    assert picture[24, 60].tolist() == [0, 128, 128]
    assert (picture[:, :36] == 0).all() and (frame.camera_normals.reshape(48, 72, 3)[:, :36] == 0).all()  # the sky


def test_smooth_faces_have_interpolated_normals():
    ball = trimesh.creation.icosphere(subdivisions=2, radius=3.0).apply_translation((0, 2, 2))
    flat = build_geometry([("ball", ball.vertices, ball.faces)], "+z")
    radial = (flat.vertices - (0, 2, 2)) / 3
    corners = radial[flat.faces].astype(np.float32)
    for sign in (1, -1):  # some files turn normals inwards
        smooth = replace(flat, smooth=np.ones(len(flat.faces), bool), corner_normals=sign * corners)
        frame = frame_of(smooth, view_at(0))
        hit, sight = frame.sight.hit, frame.sight
        points = sight.view.eye + sight.depth[:, None] * sight.rays - (0, 2, 2)
        wanted = points[hit] / np.linalg.norm(points[hit], axis=1, keepdims=True)
        np.testing.assert_allclose(frame.normals[hit], wanted, atol=0.01)
    assert np.abs(frame_of(flat, view_at(0)).normals[hit] - wanted).max() > 0.05
    assert np.linalg.norm(frame.normals[hit], axis=1) == pytest.approx(1)


def decode(motion: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 2], NaN where the picture says that nothing is known."""
    assert set(np.unique(motion[..., 2])) <= {0, 1}
    return np.where(motion[..., 2:] == 1, (motion[..., :2].astype(float) - 32768) / 64, np.nan)


def test_motion_of_a_camera_that_moves():
    objects = [box("near", (-1, -3, 1), (1, -2, 3)), box("far", (-30, 4, -40), (30, 5, 2))]
    sideways = decode(PASSES["motion"].draw(frame_of(objects, view_at(0), view_at(0.3, z=2.1))))
    assert sideways[24, 36] == pytest.approx([-60 * 0.3 / 5, 60 * 0.1 / 5], abs=1 / 128)
    far = 60 / 12
    assert sideways[40, 5] == pytest.approx([-0.3 * far, 0.1 * far], abs=1 / 128)
    assert (sideways[2] == 0).all()  # the sky is at infinity
    forwards = decode(PASSES["motion"].draw(frame_of(objects, view_at(0), view_at(0, y=-7.5))))
    assert forwards[40, 5] == pytest.approx([(5.5 - 36) * (12 / 11.5 - 1), (40.5 - 24) * (12 / 11.5 - 1)], abs=1 / 128)
    assert np.isfinite(forwards).all()


def test_motion_that_is_not_known_is_said():
    objects = [wall(y=4), box("near", (-1, -3, 1), (1, -2, 3))]
    through = PASSES["motion"].draw(frame_of(objects, view_at(0), view_at(0, y=-2.9)))
    assert through[24, 36].tolist() == [0, 0, 0] and through[5, 5, 2] == 1  # the box is behind the next camera
    still = PASSES["motion"].draw(frame_of(objects, view_at(0), view_at(0)))
    assert (still == (32768, 32768, 1)).all()
    last = frame_of(objects, view_at(0))
    assert (PASSES["motion"].draw(last) == 0).all() and np.isnan(draw_floats(last)["motion.X"]).all()
    away = PASSES["motion"].draw(frame_of(objects, view_at(0), view_at(50)))  # by 600 pixels, and by 250
    assert away[24, 36].tolist() == [0, 0, 0] and decode(away)[5, 5, 0] == pytest.approx(-60 * 50 / 12, abs=1 / 128)


def test_ids_are_the_colours_of_the_objects():
    objects = [box("left", (-4, 2, 1), (-2, 3, 3)), box("right", (2, 2, 1), (4, 3, 3))]
    picture = PASSES["ids"].draw(frame_of(objects, view_at(0)))
    left, right, sky = object_colours(["left", "right"]).tolist()
    assert picture[pixel_of(-3, 10)].tolist() == left and picture[pixel_of(3, 10)].tolist() == right
    assert picture[24, 36].tolist() == sky == [0, 0, 0]
    assert {tuple(colour) for colour in picture.reshape(-1, 3).tolist()} == {tuple(c) for c in (left, right, sky)}


def test_colours_are_different_and_follow_from_names():
    names = [f"tree.{i:03d}" for i in range(30_000)]
    colours = object_colours(names)
    assert len(np.unique(colours, axis=0)) == len(colours) == len(names) + 1 and colours[:-1].max(1).min() >= 127
    again = object_colours(["house", *names[:50], "ü"])
    np.testing.assert_array_equal(again[1:51], colours[:50])


def test_a_rug_is_seen_on_its_floor_in_every_pass():
    """The two lie in one plane: the smaller one is seen, as in edges and maps."""
    sheets = [
        (name, np.array([(-a, 4 - b, 0), (a, 4 - b, 0), (a, 4 + b, 0), (-a, 4 + b, 0)], float), QUAD)
        for name, a, b in (("floor", 20, 11), ("rug", 2, 1.5))
    ]
    for objects in (sheets, sheets[::-1]):
        frame = frame_of(objects, view_at(0, size=(360, 240)))
        rug = (PASSES["ids"].draw(frame) == object_colours(["rug"])[0]).all(-1)
        rows, columns = np.mgrid[121:240, :360]  # below the horizon
        depth = 300 * 2 / (rows + 0.5 - 120)
        outside = np.maximum(np.abs((columns + 0.5 - 180) / 300 * depth) / 2, np.abs(depth - 12) / 1.5)
        wanted = np.concatenate([np.zeros((121, 360), bool), outside < 1 - 1e-9])
        assert wanted.sum() > 1000 and not (rug != wanted)[121:][np.abs(outside - 1) > 1e-9].any()
        lines = PASSES["lines"].draw(frame) > 0
        ring = cv2.dilate(rug.astype(np.uint8), np.ones((3, 3))) > cv2.erode(rug.astype(np.uint8), np.ones((3, 3)))
        assert lines[ring].mean() > 0.3 and not lines[cv2.erode(rug.astype(np.uint8), np.ones((5, 5))) > 0].any()


def test_clay_is_the_grey_render(boxes: tuple):
    frame = frame_of(boxes[0], view_at(0.3))
    np.testing.assert_array_equal(PASSES["clay"].draw(frame), shade(boxes[1], view_at(0.3))[..., 0])
    facing = PASSES["clay"].draw(frame_of([wall(reach=3)], view_at(0)))
    assert facing[24, 36] == 220 and facing[0, 0] == 255


def test_lines_are_crisp_and_lie_where_the_edges_are(boxes: tuple):
    frame = frame_of(boxes[0], view_at(0.3, size=(360, 240)))
    crisp = PASSES["lines"].draw(frame)
    assert crisp.dtype == np.uint8 and set(np.unique(crisp)) == {0, 255}
    finer = find_lines(frame.stage.scene, frame.sight.view).brightness > 0
    for one, other in ((crisp > 0, finer), (finer, crisp > 0)):
        distance = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        assert distance[one].max() <= 1.5
    assert (crisp > 0).sum() <= finer.sum()


def test_anchors_see_what_no_box_hides():
    """A box in front of a wall. The first anchor stands 3 m to the left, the last one 3 m to the right."""
    objects = [wall(y=12), box("box", (-1, -1, 0), (1, 0, 4))]
    anchors = view_at(-3), view_at(3)
    seen = PASSES["visibility"].draw(frame_of(objects, view_at(0), None, anchors))
    assert (seen[..., 2] == 0).all() and set(np.unique(seen)) == {0, 255}
    x = (np.arange(72) + 0.5 - 36) / 60 * 20  # where row 24 meets the wall, 20 m away
    clear = np.abs(np.arange(72) + 0.5 - 36) > 60 / 7  # of the box itself, whose front is 7 m away
    for channel, eye in enumerate((-3, 3)):
        inside = np.abs((x - eye) / 20 * 60) < 36
        shadow = [eye + (corner - eye) * 20 / distance for corner in (-1, 1) for distance in (7, 8)]
        hidden = (x > min(shadow)) & (x < max(shadow))
        np.testing.assert_array_equal(seen[24, clear, channel] == 255, (inside & ~hidden)[clear])
    assert seen[24, 36].tolist() == [255, 255, 0]  # the box's front


@pytest.mark.parametrize("sky", [True, False])
def test_an_anchor_sees_all_of_its_own_frame(boxes: tuple, sky: bool):
    anchors = view_at(-1), view_at(1)
    for number, view in enumerate(anchors):
        frame = frame_of(boxes[0], view, None, anchors, sky=sky)
        seen = PASSES["visibility"].draw(frame)[..., number]
        np.testing.assert_array_equal(seen.ravel() == 255, frame.sight.hit | sky)


class Counting(RayCaster):
    """Counts the rays that are cast."""

    rays = 0

    def cast(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        self.rays += len(directions)
        return super().cast(origin, directions)


def test_all_passes_share_one_cast(boxes: tuple):
    caster, view = Counting(boxes[0]), view_at(0)
    frame = Frame(
        make_stage(make_line_scene(boxes[0], caster), (1.0, 20.0)),
        look(caster, view),
        view_at(0.1),
        (view_at(-1), view_at(1)),
    )
    for name in PASSES:
        if name != "visibility":
            PASSES[name].draw(frame)
    assert caster.rays == 72 * 48


def test_the_sky_alone():
    frame = frame_of([wall()], view_at(0, y=40))  # looks away from the wall
    drawn = {name: PASSES[name].draw(frame) for name in PICTURES}
    assert {name: np.unique(drawn[name]).tolist() for name in PICTURES} == {
        **{name: [0] for name in ("depth", "normal", "lines", "ids", "motion")},
        "clay": [255],
        "visibility": [0, 255],
    }
    floats = draw_floats(frame)
    assert np.isinf(floats["Z"]).all() and np.isnan(floats["P.X"]).all() and (floats["N.Z"] == 0).all()


def test_floats_are_read_back(tmp_path: Path):
    OpenEXR = pytest.importorskip("OpenEXR")
    floats = draw_floats(frame_of([wall(reach=3, slope=0.2)], view_at(0), view_at(0.1)))
    write_exr(tmp_path / "0001.exr", floats)
    with OpenEXR.File(str(tmp_path / "0001.exr"), separate_channels=True) as file:
        read = {name: channel.pixels for name, channel in file.channels().items()}
    assert {*read} == {"Z", *(f"{name}.{axis}" for name in "NP" for axis in "XYZ"), "motion.X", "motion.Y"}
    for name, values in read.items():
        np.testing.assert_array_equal(values, floats[name])


# --- files ---


def command(folder: Path) -> tuple:
    mesh, cameras = write_boxes(folder / "boxes.glb", *BOXES, up="y"), write_path(folder / "path.json", 46)
    return "--scene", mesh, "--cameras", cameras, *SMALL


@pytest.mark.slow
def test_passes_are_added_and_killed_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given, once, later = command(tmp_path), tmp_path / "once", tmp_path / "later"
    assert run_main(monkeypatch, *given, "--output", once, "--passes", *PICTURES) == 0
    assert run_main(monkeypatch, *given, "--output", later) == 0
    plain, wanted = contents(later, SCENE_MANIFEST), contents(once, SCENE_MANIFEST)
    line = [sys.executable, "preprocess.py", *map(str, given), "--output", str(later), "--passes", *PICTURES[1:]]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(Arc(0, later / "arc0").pass_paths("visibility")[9], process)
    process.kill()
    assert process.wait() < 0
    leftover = later / "arc0" / "ids" / ".0030.1.abcdef.tmp.png"
    leftover.write_bytes(b"half a picture")
    whole = {name: data for name, data in contents(later, SCENE_MANIFEST).items() if ".tmp" not in name}
    assert len(plain) < len(whole) < len(wanted)
    assert_same(whole, {name: data for name, data in wanted.items() if name in whole})
    assert run_main(monkeypatch, *given, "--output", later, "--passes", *PICTURES[1:]) == 0
    assert_same(contents(later, SCENE_MANIFEST, "tmp"), {n: d for n, d in wanted.items() if "depth" not in n})
    assert not leftover.exists()
    assert run_main(monkeypatch, *given, "--output", later, "--passes", "depth", "depth") == 0
    assert_same(contents(later, SCENE_MANIFEST), wanted)
    entries = [read_json(folder / SCENE_MANIFEST)["passes"] for folder in (once, later)]
    assert entries[0] == entries[1] and {*entries[0]} == {*PICTURES}
    _check_files(once, entries[0])


def _check_files(folder: Path, entries: dict) -> None:
    """What the manifest says of bits and size is so of every file; values survive the way into them."""
    for name in PICTURES:
        assert entries[name]["size"] == [108, 72] and entries[name]["range"] and entries[name]["unit"]
        pictures = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in Arc(0, folder / "arc0").pass_paths(name)]
        assert len(pictures) == 46 and {picture.shape[:2] for picture in pictures} == {(72, 108)}
        assert {8 * picture.dtype.itemsize for picture in pictures} == {entries[name]["bits"]}
        video = folder / "passes" / f"{name}.mp4"
        assert video.exists() == (entries[name].get("video") == f"passes/{name}.mp4") == PASSES[name].video
        if video.exists():
            metadata, frames = probe_video(video)
            assert frames == 46 and metadata["size"] == (108, 72) and metadata["fps"] == entries[name]["fps"]
    table = read_json(folder / entries["ids"]["table"])
    assert table["sky"] == [0, 0, 0] and {*table["objects"]} == {f"box_{i}" for i in range(4)}
    arc = Arc(0, folder / "arc0")
    assert read_image(arc.pass_paths("ids")[20])[60, 54].tolist() == table["objects"]["box_0"]  # the ground
    motion = decode(read_map(arc.pass_paths("motion")[20]))
    depth = 90 * 2 / (60.5 - 36)
    assert motion[60, 54] == pytest.approx([-90 * 2 / 45 / depth, 0], abs=1 / 128) and motion[0, 0].tolist() == [0, 0]
    assert np.isnan(decode(read_map(arc.pass_paths("motion")[45]))).all()
    for number, channel in ((0, 0), (45, 1)):
        assert (read_image(arc.pass_paths("visibility")[number])[..., channel] == 255).all()


def test_floats_need_openexr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    if find_spec("OpenEXR"):
        pytest.skip("OpenEXR is installed")
    given = command(tmp_path)
    assert run_main(monkeypatch, *given, "--output", tmp_path / "out", "--exr", "--passes", "depth") == 2
    assert capsys.readouterr().err == "error: --exr needs OpenEXR: pip install -r requirements-exr.txt\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_floats_of_a_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    OpenEXR = pytest.importorskip("OpenEXR")
    out = tmp_path / "out"
    assert run_main(monkeypatch, *command(tmp_path), "--output", out, "--exr", "--passes", "motion") == 0
    arc = Arc(0, out / "arc0")
    assert [path.name for path in sorted((out / "arc0" / "exr").iterdir())] == [f"{n:04d}.exr" for n in range(1, 47)]
    with OpenEXR.File(str(arc.pass_paths("exr")[20]), separate_channels=True) as file:
        ground = {name: channel.pixels[60, 54] for name, channel in file.channels().items()}
    assert ground["Z"] == pytest.approx(90 * 2 / (60.5 - 36), rel=1e-5) and ground["P.Z"] == pytest.approx(0, abs=1e-5)
    assert [ground[f"N.{axis}"] for axis in "XYZ"] == pytest.approx([0, 1, 0], abs=1e-6)
    assert {*read_json(out / SCENE_MANIFEST)["passes"]} == {"motion", "exr"}
