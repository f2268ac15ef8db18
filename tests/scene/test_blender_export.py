"""tools/blender_export.py compared with Blender's own numbers. Runs where the `bpy` package can be imported."""

import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

bpy = pytest.importorskip("bpy")
from bpy_extras.object_utils import world_to_camera_view  # noqa: E402
from mathutils import Matrix, Vector  # noqa: E402

from utils.cameras.read import read_cameras  # noqa: E402
from utils.meshes.load import load_geometry  # noqa: E402
from utils.meshes.mesh import Geometry, turn  # noqa: E402

TOOL = Path(__file__).parents[2] / "tools" / "blender_export.py"
FRAMES = 46
LENS = ("fl_x", "fl_y", "cx", "cy")
CUBE = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("blender_export", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cube(name: str, collection: object = None, **settings: tuple) -> object:
    """A 2 m cube with outward faces; settings: attributes of the object."""
    mesh = bpy.data.meshes.new(name)
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    mesh.from_pydata(CUBE.tolist(), [], faces)
    obj = bpy.data.objects.new(name, mesh)
    (collection or bpy.context.scene.collection).objects.link(obj)
    for key, value in settings.items():
        setattr(obj, key, value)
    return obj


@pytest.fixture
def scene() -> object:
    """Modifiers, instances, a curve, mirrored and hidden objects; an animated camera with a scaled, rotated parent."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.frame_start, scene.frame_end = 11, 10 + FRAMES
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = 1080, 720, 50
    row = cube("wall_01", location=(0, 5, 0))
    array = row.modifiers.new("array", "ARRAY")
    array.count, array.relative_offset_displace = 3, (1.5, 0, 0)
    half = cube("roof_01", location=(0, 0, 4))
    half.data.transform(Matrix.Translation((3, 0, 0)))
    half.modifiers.new("mirror", "MIRROR")
    cube("mirrored", location=(-6, 0, 0), scale=(-1, 2, 1))
    collection = bpy.data.collections.new("tree")
    cube("crown", collection, location=(0, 0, 3))
    for i, x in enumerate((20, 30)):
        instance = bpy.data.objects.new(f"tree_{i}", None)
        instance.instance_type, instance.instance_collection = "COLLECTION", collection
        instance.location, instance.rotation_euler = (x, 0, 0), (0, 0, np.pi / 2)
        scene.collection.objects.link(instance)
    curve = bpy.data.curves.new("pipe", "CURVE")
    curve.dimensions, curve.bevel_depth = "3D", 0.2
    curve.splines.new("POLY").points.add(1)
    curve.splines[0].points[1].co = (0, 0, 5, 1)
    scene.collection.objects.link(bpy.data.objects.new("pipe", curve))
    metaball = bpy.data.metaballs.new("rock")
    metaball.elements.new()
    scene.collection.objects.link(bpy.data.objects.new("rock", metaball))
    cube("hidden_render", hide_render=True)
    cube("hidden_viewport", hide_viewport=True)
    disabled = bpy.data.collections.new("disabled")
    disabled.hide_render = True
    scene.collection.children.link(disabled)
    cube("in_disabled", disabled)
    add_camera(scene)
    return scene


def add_camera(scene: object) -> None:
    rig = bpy.data.objects.new("rig", None)
    rig.location, rig.rotation_euler, rig.scale = (1, -18, 2), (0.1, 0.2, 0.3), (2, 2, 2)
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.parent, camera.scale = rig, (0.5, 3, 1.5)
    scene.collection.objects.link(rig)
    scene.collection.objects.link(camera)
    for frame, location, angles in ((11, (0, 0, 0), (1.5, 0, 0)), (56, (2, 1, 0.5), (1.4, 0.1, 0.4))):
        camera.location, camera.rotation_euler = location, angles
        camera.keyframe_insert("location", frame=frame)
        camera.keyframe_insert("rotation_euler", frame=frame)
    scene.camera = camera
    bpy.context.view_layer.update()


def read_glb(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Vertices in Blender's axes and faces, by node name."""
    data = path.read_bytes()
    magic, version, total, length = struct.unpack("<4sIII", data[:16])
    assert (magic, version, total) == (b"glTF", 2, len(data))
    document, binary = json.loads(data[20 : 20 + length]), data[28 + length :]

    def array(index: int) -> np.ndarray:
        accessor = document["accessors"][index]
        kind, columns = {5126: ("<f4", 3), 5125: ("<u4", 1)}[accessor["componentType"]]
        offset = document["bufferViews"][accessor["bufferView"]]["byteOffset"]
        return np.frombuffer(binary, kind, accessor["count"] * columns, offset).reshape(-1, columns)

    meshes = {}
    for node in document["nodes"]:
        (primitive,) = document["meshes"][node["mesh"]]["primitives"]
        x, y, z = array(primitive["attributes"]["POSITION"]).T
        meshes[node["name"]] = np.stack([x, -z, y], axis=1).astype(float), array(primitive["indices"]).reshape(-1, 3)
    return meshes


def bounds(vertices: np.ndarray) -> list:
    return [*vertices.min(axis=0).tolist(), *vertices.max(axis=0).tolist()]


def test_geometry_is_evaluated_named_and_in_the_world(scene: object, tool: ModuleType, tmp_path: Path) -> None:
    tool.main(["--", str(tmp_path)])
    meshes = read_glb(tmp_path / "scene.glb")
    assert set(meshes) == {"wall_01", "roof_01", "mirrored", "tree_0.crown", "tree_1.crown", "pipe", "rock"}
    expected = {
        "wall_01": (-1, 4, -1, 7, 6, 1),  # three cubes, 3 m apart
        "roof_01": (-4, -1, 3, 4, 1, 5),
        "mirrored": (-7, -2, -1, -5, 2, 1),
        "tree_0.crown": (19, -1, 2, 21, 1, 4),
        "tree_1.crown": (29, -1, 2, 31, 1, 4),
        "pipe": (-0.2, -0.2, 0, 0.2, 0.2, 5),
    }
    for name, box in expected.items():
        np.testing.assert_allclose(bounds(meshes[name][0]), box, atol=1e-5, err_msg=name)
    for name in set(expected) - {"pipe"}:  # a pipe has no ends
        vertices, faces = meshes[name]
        a, b, c = vertices[faces].transpose(1, 0, 2)
        volume = 8 * {"wall_01": 3, "roof_01": 2, "mirrored": 2}.get(name, 1)
        assert (a * np.cross(b, c)).sum() / 6 == pytest.approx(volume, rel=1e-5), name
    assert len(meshes["wall_01"][0]) == 72 and len(meshes["mirrored"][1]) == 12  # flat: one vertex per corner


def sphere(name: str, smooth: bool, **settings: tuple) -> object:
    """A sphere of radius 1 m around its origin; settings: attributes of the object."""
    bpy.ops.mesh.primitive_uv_sphere_add(segments=24, ring_count=12)
    obj = bpy.context.object
    obj.name = name
    obj.data.polygons.foreach_set("use_smooth", [smooth] * len(obj.data.polygons))
    for key, value in settings.items():
        setattr(obj, key, value)
    bpy.context.view_layer.update()
    return obj


def faces_of(geometry: Geometry, name: str) -> np.ndarray:
    return np.flatnonzero(geometry.objects == geometry.names.index(name))


@pytest.mark.parametrize(
    "scale", [(3, 0.5, 2), (-0.5, 2, 3), (-1, -2, -0.5)], ids=["uneven", "mirrored", "mirrored_thrice"]
)
def test_shading_survives(scene: object, tool: ModuleType, tmp_path: Path, scale: tuple) -> None:
    placed = {"location": (0, 0, 9), "rotation_euler": (0.3, 0.5, 0.7), "scale": scale}
    ball = sphere("ball", True, **placed)
    sphere("facets", False, **{**placed, "location": (9, 0, 9)})
    half = sphere("half", True, location=(0, 9, 9))
    flat = [polygon.center.z < 0 for polygon in half.data.polygons]
    half.data.polygons.foreach_set("use_smooth", [not below for below in flat])
    tool.main(["--", str(tmp_path)])
    geometry = turn(load_geometry(tmp_path / "scene.glb"), "+z")
    corners, normals = geometry.vertices[geometry.faces], geometry.corner_normals
    np.testing.assert_allclose(np.linalg.norm(normals, axis=2), 1, atol=1e-6)
    plane = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    plane /= np.linalg.norm(plane, axis=1, keepdims=True)

    round_faces = faces_of(geometry, "ball")
    assert geometry.smooth[round_faces].all()
    matrix = np.array(ball.matrix_world)
    local = (corners[round_faces] - matrix[:3, 3]) @ np.linalg.inv(matrix[:3, :3]).T
    truth = local @ np.linalg.inv(matrix[:3, :3])  # a sphere's normals, by the inverse transpose
    truth /= np.linalg.norm(truth, axis=2, keepdims=True)
    assert (truth * normals[round_faces]).sum(2).min() > 0.995  # Blender's are averages over faces
    assert ((plane[round_faces, None] * normals[round_faces]).sum(2) > 0.5).all()  # they point outwards

    for name in ("facets", "wall_01", "mirrored", "tree_0.crown"):
        faces = faces_of(geometry, name)
        assert not geometry.smooth[faces].any(), name
        np.testing.assert_allclose(normals[faces], np.repeat(plane[faces, None], 3, axis=1), atol=1e-3, err_msg=name)
    assert geometry.smooth[faces_of(geometry, "rock")].all()  # metaballs are shaded smoothly
    faces = faces_of(geometry, "half")
    np.testing.assert_array_equal(geometry.smooth[faces], corners[faces].mean(1)[:, 2] > 9)
    assert (np.unique(geometry.components[faces])).size == 1  # split vertices stay at one place


@pytest.mark.parametrize("size", [(1080, 720), (600, 902)])
@pytest.mark.parametrize("fit", ["AUTO", "HORIZONTAL", "VERTICAL"])
def test_cameras_project_like_blender(scene: object, tool: ModuleType, tmp_path: Path, fit: str, size: tuple) -> None:
    scene.render.resolution_x, scene.render.resolution_y = size
    lens = scene.camera.data
    lens.sensor_fit, lens.sensor_width, lens.sensor_height = fit, 30, 26
    lens.lens, lens.shift_x, lens.shift_y = 28, 0.12, -0.07
    tool.main(["--", str(tmp_path)])
    cameras = json.loads((tmp_path / "cameras.json").read_text())
    width, height = cameras["w"], cameras["h"]
    assert (width, height) == (size[0] // 2, size[1] // 2)
    assert [frame["frame"] for frame in cameras["frames"]] == list(range(1, FRAMES + 1))
    assert not set(LENS) & set(cameras["frames"][0])
    for number in (1, 17, FRAMES):
        check_projection(scene, tmp_path, number, cameras)


def check_projection(scene: object, folder: Path, number: int, lens: dict) -> None:
    """Frame `number` of the files in `folder` compared with Blender. lens: holds fl_x, fl_y, cx, cy."""
    cameras = json.loads((folder / "cameras.json").read_text())
    points = np.concatenate([vertices for vertices, _ in read_glb(folder / "scene.glb").values()])
    scene.frame_set(scene.frame_start + number - 1)
    c2w = np.array(cameras["frames"][number - 1]["transform_matrix"])
    np.testing.assert_allclose(c2w[:3, :3].T @ c2w[:3, :3], np.eye(3), atol=1e-12)
    np.testing.assert_allclose(c2w[:3, 3], scene.camera.matrix_world.translation, atol=1e-6)
    x, y, z = ((points - c2w[:3, 3]) @ c2w[:3, :3]).T
    pixels = np.stack([lens["cx"] - lens["fl_x"] * x / z, lens["cy"] + lens["fl_y"] * y / z])
    seen = np.array([world_to_camera_view(scene, scene.camera, Vector(point)) for point in points])
    ahead = z < -1
    assert ahead.sum() > 40
    truth = np.stack([seen[:, 0] * cameras["w"], (1 - seen[:, 1]) * cameras["h"]])
    np.testing.assert_allclose(pixels[:, ahead], truth[:, ahead], rtol=1e-6, atol=0.02)


ANIMATED = {
    "zoom": {"lens": (24, 60)},
    "sensor": {"sensor_width": (24, 36)},
    "shift": {"shift_x": (-0.1, 0.2), "shift_y": (0, 0.15)},
}


def animate(lens: object, what: str) -> None:
    for key, values in ANIMATED[what].items():
        for frame, value in zip((11, 56), values, strict=True):
            setattr(lens, key, value)
            lens.keyframe_insert(key, frame=frame)


@pytest.mark.parametrize("what", ANIMATED)
def test_a_lens_that_changes_is_written_per_frame(scene: object, tool: ModuleType, tmp_path: Path, what: str) -> None:
    animate(scene.camera.data, what)
    tool.main(["--", str(tmp_path)])
    cameras = json.loads((tmp_path / "cameras.json").read_text())
    assert not set(LENS) & set(cameras) and (cameras["w"], cameras["h"]) == (540, 360)
    for number in (1, 23, FRAMES):
        check_projection(scene, tmp_path, number, cameras["frames"][number - 1])
    path = read_cameras(tmp_path / "cameras.json")
    written = np.array([[frame[key] for key in LENS] for frame in cameras["frames"]])
    np.testing.assert_array_equal(np.hstack([path.focal, path.center]), written)
    assert (np.ptp(written, axis=0) > 1).tolist() == [what != "shift"] * 2 + [what == "shift"] * 2


@pytest.mark.slow
def test_preprocess_takes_the_files(scene: object, tool: ModuleType, tmp_path: Path) -> None:
    animate(scene.camera.data, "zoom")
    sphere("ball", True, location=(0, 0, 9))
    tool.main(["--", str(tmp_path)])
    sizes = ["--edge_size", "108x72", "--map_size", "36x24", "--latent_size", "9x6", "--threads", "1"]
    files = ["--scene", tmp_path / "scene.glb", "--cameras", tmp_path / "cameras.json", "--output", tmp_path / "town"]
    command = [sys.executable, TOOL.parent.parent / "preprocess.py", *files, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # preprocess.py wrote what it read: the scene in the cameras' world, with its shading and intrinsics.
    written = load_geometry(tmp_path / "town" / "scene.glb")
    read = turn(load_geometry(tmp_path / "scene.glb"), "+z")
    assert written.names == read.names and written.smooth.sum() == read.smooth.sum() > 0
    path = read_cameras(tmp_path / "town" / "cameras.json")
    assert len(path.c2w) == FRAMES and path.focal[-1, 0] / path.focal[0, 0] == pytest.approx(60 / 24)


def spoil(scene: object, what: str) -> None:
    camera = scene.camera
    if what == "no camera":
        scene.camera = None
    elif what in ("ORTHO", "PANO"):
        camera.data.type = what
    elif what == "pixels":
        scene.render.pixel_aspect_x = 1.5
    elif what == "mirrored":
        camera.scale = (-1, 1, 1)
    elif what == "sheared":
        camera.parent.scale = (1, 4, 1)
    elif what == "empty":
        for obj in scene.objects:
            obj.hide_render = obj != camera
    elif what == "cut":
        other = bpy.data.objects.new("other", camera.data)
        scene.collection.objects.link(other)
        scene.timeline_markers.new("first", frame=11).camera = camera
        scene.timeline_markers.new("second", frame=30).camera = other


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no camera", "no active camera"),
        ("ORTHO", "only perspective"),
        ("PANO", "only perspective"),
        ("pixels", "not square"),
        ("mirrored", "mirrored"),
        ("sheared", "sheared"),
        ("cut", "changes at frame 30"),
        ("empty", "nothing to export"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    scene: object, tool: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    spoil(scene, what)
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--", str(tmp_path / "out")])
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and re.search(message, errors[0])
    assert not (tmp_path / "out").exists()


def test_the_command_opens_a_file_and_keeps_what_is_there(scene: object, tmp_path: Path) -> None:
    moving = scene.objects["wall_01"]
    for frame, x in ((11, 0), (56, 3)):
        moving.location.x = x
        moving.keyframe_insert("location", frame=frame)
    blend, out = tmp_path / "my scene.blend", tmp_path / "out"
    bpy.ops.wm.save_as_mainfile(filepath=str(blend))

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=120)

    done = call(str(blend), "--", str(out))
    assert done.returncode == 0, done.stderr
    assert "7 meshes" in done.stdout and "46 frames" in done.stdout and "wall_01 move" in done.stdout
    np.testing.assert_allclose(bounds(read_glb(out / "scene.glb")["wall_01"][0]), (-1, 4, -1, 7, 6, 1), atol=1e-5)
    assert sorted(path.name for path in out.iterdir()) == ["cameras.json", "scene.glb"]
    again = call(str(blend), "--", str(out))
    assert again.returncode == 2 and "--overwrite" in again.stderr
    assert call(str(blend), "--", str(out), "--overwrite").returncode == 0
    missing = call(str(tmp_path / "none.blend"), "--", str(out))
    assert missing.returncode == 2 and "none.blend does not exist" in missing.stderr
    assert call(str(blend)).returncode == 2
    assert "name a file" in call("--", str(out)).stderr


def test_inside_blender_the_open_file_is_exported(
    scene: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["blender", "-b", "file.blend", "-P", str(TOOL), "--", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    exec(compile(TOOL.read_text(), TOOL, "exec"), {"__name__": "__main__"})  # as -P does
    assert len(read_glb(tmp_path / "out" / "scene.glb")) == 7
