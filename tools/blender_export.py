"""Write a Blender scene as scene.glb and cameras.json, the two files that preprocess.py starts from.

    blender -b file.blend -P tools/blender_export.py -- out/
    python tools/blender_export.py file.blend -- out/             # with the `bpy` package in place of Blender

Geometry: what is visible in the viewport and not disabled for renders, as at the first frame: meshes, curves, texts
and metaballs, with viewport modifiers and all kinds of instances. Names are kept; meshes are baked to the world.
Cameras: the active camera over the scene's frame range. cameras.json is in Blender's world (Z up); scene.glb is Y up,
as glTF asks: blender (x, y, z) = gltf (x, -z, y). Needs nothing but Blender: it imports nothing else from here.
"""

import argparse
import json
import os
import struct
import sys
from pathlib import Path

import bpy
import numpy as np

ARC_STEPS = 45  # frames from one anchor to the next
SOLID_TYPES = ("MESH", "CURVE", "SURFACE", "FONT", "META")
FLOAT, UINT, ARRAY_BUFFER, INDEX_BUFFER = 5126, 5125, 34962, 34963  # glTF's numbers


class InputError(ValueError):
    """Something about the scene or the command is wrong. One line."""


# --- Geometry --------------------------------------------------------------------------------------------------------


def rendered_objects(collection: bpy.types.Collection) -> set[bpy.types.Object]:
    """Objects in a collection and those below it, without what is disabled in renders."""
    if collection.hide_render:
        return set()
    found = {obj for obj in collection.objects if not obj.hide_render}
    return found.union(*(rendered_objects(child) for child in collection.children))


def visible_meshes() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, vertices float64 [V, 3] in the Z-up world, triangles uint32 [N, 3]) of everything visible now."""
    depsgraph = bpy.context.evaluated_depsgraph_get()
    rendered = rendered_objects(depsgraph.scene.original.collection)
    found, as_mesh = [], set()
    for instance in depsgraph.object_instances:
        obj, owner = instance.object, instance.parent if instance.is_instance else instance.object
        if not instance.show_self or obj.type not in SOLID_TYPES:
            continue
        if owner.original not in rendered or obj.original.hide_render:
            continue
        matrix = np.array(instance.matrix_world, float)
        # Blender lists a curve, text or metaball, and then its surface as an instance that it owns itself.
        name = obj.name if owner.original == obj.original else f"{owner.name}.{obj.name}"
        key = (name, matrix.tobytes())
        if obj.type == "MESH":
            as_mesh.add(key)
        found.append((key, obj.type, *world_mesh(obj, matrix)))
    names: set[str] = set()
    return [
        (unique_name(key[0], names), vertices, triangles)
        for key, kind, vertices, triangles in found
        if len(triangles) and (kind == "MESH" or key not in as_mesh)
    ]


def world_mesh(obj: bpy.types.Object, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of an evaluated object, carried to the world by matrix [4, 4]."""
    mesh = obj.to_mesh()
    if mesh is None:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint32)
    mesh.calc_loop_triangles()
    vertices = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", vertices)
    triangles = np.empty(3 * len(mesh.loop_triangles), np.int32)
    mesh.loop_triangles.foreach_get("vertices", triangles)
    obj.to_mesh_clear()
    triangles = triangles.reshape(-1, 3).astype(np.uint32)
    if np.linalg.det(matrix[:3, :3]) < 0:  # a mirrored object: keep the outside outside
        triangles = triangles[:, ::-1]
    return vertices.reshape(-1, 3).astype(float) @ matrix[:3, :3].T + matrix[:3, 3], triangles


def unique_name(name: str, taken: set[str]) -> str:
    """`name`, with a number if it is taken; adds it to `taken`."""
    free, number = name, 1
    while free in taken:
        free, number = f"{name}_{number:03d}", number + 1
    taken.add(free)
    return free


def glb_bytes(meshes: list[tuple[str, np.ndarray, np.ndarray]]) -> bytes:
    """A binary glTF of named meshes without normals or materials, one node each."""
    views, accessors, data = [], [], bytearray()

    def add(array: np.ndarray, kind: str, component: int, target: int, **bounds: list) -> int:
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": array.nbytes, "target": target})
        data.extend(array.tobytes())  # four-byte numbers: always aligned
        accessors.append(
            {"bufferView": len(views) - 1, "componentType": component, "count": len(array), "type": kind, **bounds}
        )
        return len(accessors) - 1

    gltf_meshes = []
    for name, vertices, triangles in meshes:
        x, y, z = vertices.astype("<f4").T
        points = np.ascontiguousarray(np.stack([x, z, -y], axis=1))
        bounds = {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}
        position = add(points, "VEC3", FLOAT, ARRAY_BUFFER, **bounds)
        indices = add(np.ascontiguousarray(triangles, "<u4").reshape(-1), "SCALAR", UINT, INDEX_BUFFER)
        gltf_meshes.append({"name": name, "primitives": [{"attributes": {"POSITION": position}, "indices": indices}]})
    document = {
        "asset": {"version": "2.0", "generator": "blender_export.py"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(meshes)))}],
        "nodes": [{"name": name, "mesh": i} for i, (name, _, _) in enumerate(meshes)],
        "meshes": gltf_meshes,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(data)}],
    }
    text = json.dumps(document, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(data))
    return header + struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data


# --- Cameras ---------------------------------------------------------------------------------------------------------


def read_cameras(scene: bpy.types.Scene) -> dict:
    """The active camera over the frame range, with the keys of a nerfstudio transforms.json."""
    camera = scene.camera
    if camera is None:
        raise InputError("the scene has no active camera: choose one in Scene properties > Camera")
    if camera.type != "CAMERA":
        raise InputError(f"the active camera {camera.name!r} is a {camera.type.lower()}, not a camera")
    numbers = range(scene.frame_start, scene.frame_end + 1, scene.frame_step)
    poses, lens = [], None
    for number in numbers:
        scene.frame_set(number)
        if scene.camera != camera:
            raise InputError(f"the active camera changes at frame {number}: a path is one shot; remove the marker")
        evaluated = camera.evaluated_get(bpy.context.evaluated_depsgraph_get())
        poses.append(camera_pose(np.array(evaluated.matrix_world, float), f"{camera.name!r} at frame {number}"))
        now = intrinsics(scene.render, evaluated.data)
        if lens is not None and not np.allclose(list(now.values()), list(lens.values()), rtol=1e-5):
            raise InputError(f"the lens of {camera.name!r} changes at frame {number}: a path has one focal length")
        lens = lens or now
    frames = [
        {"file_path": f"images/{n:04d}.png", "frame": n, "transform_matrix": pose.tolist()}
        for n, pose in enumerate(poses, start=1)
    ]
    distortion = dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0)
    fps = scene.render.fps / scene.render.fps_base
    return {"camera_model": "OPENCV", **lens, **distortion, "fps": fps, "world_up": "+z", "frames": frames}


def camera_pose(matrix: np.ndarray, what: str) -> np.ndarray:
    """Camera-to-world [4, 4] without its scale; refuses what no rotation can express."""
    axes = matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0)
    if np.linalg.det(axes) < 0:
        raise InputError(f"the camera {what} is mirrored by a negative scale; apply the scale of it and its parents")
    u, _, v = np.linalg.svd(axes)
    if abs(u @ v - axes).max() > 1e-3:
        raise InputError(f"the camera {what} is sheared by a parent of uneven scale; apply the parent's scale")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = u @ v, matrix[:3, 3]  # the nearest rotation: Blender's numbers are single precision
    return pose


def intrinsics(render: bpy.types.RenderSettings, lens: bpy.types.Camera) -> dict:
    """fl_x, fl_y, cx, cy, w, h in pixels of a perspective camera, as Blender's renderers use it."""
    if lens.type != "PERSP":
        raise InputError(f"the camera {lens.name!r} is {lens.type.lower()}; only perspective cameras can be exported")
    if not np.isclose(render.pixel_aspect_x, render.pixel_aspect_y):
        raise InputError("the pixels are not square: set Output properties > Format > Aspect to 1, 1")
    width, height = (side * render.resolution_percentage // 100 for side in (render.resolution_x, render.resolution_y))
    fit = lens.sensor_fit
    wide = width >= height if fit == "AUTO" else fit == "HORIZONTAL"
    sensor = lens.sensor_height if fit == "VERTICAL" else lens.sensor_width  # AUTO: the width for either side
    side = width if wide else height  # what the sensor, and shifts, are measured against
    focal = lens.lens / sensor * side
    # A shift moves the picture right and up over the scene, so that the principal point moves left and down in it.
    center = {"cx": width / 2 - lens.shift_x * side, "cy": height / 2 + lens.shift_y * side}
    return {"fl_x": focal, "fl_y": focal, **center, "w": width, "h": height}


# --- Command ---------------------------------------------------------------------------------------------------------


def write_all(contents: dict[Path, bytes]) -> None:
    """Write files so that none is seen half written: temporary names first, then all are renamed."""
    temporary = {path: path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}") for path in contents}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(data)
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def export(output: Path, overwrite: bool) -> None:
    """Write the open scene to the folder `output`."""
    scene_path, cameras_path = output / "scene.glb", output / "cameras.json"
    for path in (scene_path, cameras_path):
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already; pass --overwrite to replace it, or choose another folder")
    scene = bpy.context.scene
    cameras = read_cameras(scene)
    last = visible_meshes()
    scene.frame_set(scene.frame_start)
    meshes = visible_meshes()
    if not meshes:
        raise InputError("nothing to export: no visible object has faces")
    text = json.dumps(cameras, indent=2) + "\n"
    write_all({scene_path: glb_bytes(meshes), cameras_path: text.encode()})
    count, moving = len(cameras["frames"]), moving_names(meshes, last)
    print(f"scene: {scene_path} ({len(meshes)} meshes, {sum(len(faces) for _, _, faces in meshes)} triangles)")
    print(f"cameras: {cameras_path} ({count} frames)")
    if moving:
        print(f"note: {', '.join(moving[:3])} move; the scene is exported as at frame {scene.frame_start}")
    if count % ARC_STEPS != 1 or count == 1:
        print(f"note: arcs need {ARC_STEPS} N + 1 frames (46, 91, 136, ...), this path has {count}")


def moving_names(first: list[tuple], last: list[tuple]) -> list[str]:
    """Names of meshes whose vertices differ between two frames."""
    after = {name: vertices for name, vertices, _ in last}
    return [
        name
        for name, vertices, _ in first
        if name not in after or after[name].shape != vertices.shape or abs(after[name] - vertices).max() > 1e-4
    ]


def open_blend(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        bpy.ops.wm.open_mainfile(filepath=str(path.resolve()))
    except RuntimeError as error:
        raise InputError(f"cannot open {path}: {error}") from error


def main(argv: list[str]) -> None:
    """argv: [file.blend] -- OUTPUT [--overwrite]. The file is opened here only where Blender has not done so."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="blender_export.py --", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder for scene.glb and cameras.json")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args(argv[split + 1 :])
    try:
        for path in argv[:split]:
            open_blend(Path(path))
        export(args.output, args.overwrite)
    except InputError as error:
        stop(error, 2)
    except OSError as error:
        stop(f"{error.strerror or error}: {error.filename or args.output}", 3)


def stop(message: object, code: int) -> None:
    """Blender would end with 0 after a traceback."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def command_line() -> list[str]:
    """Arguments for `main`. Inside Blender sys.argv is Blender's own command line, whose file is open already."""
    if sys.argv[0].endswith(".py"):
        if sys.argv[1:2] in ([], ["--"]):
            stop("name a file: python tools/blender_export.py file.blend -- out/", 2)
        return sys.argv[1:]
    return sys.argv[sys.argv.index("--") :] if "--" in sys.argv else []


if __name__ == "__main__":
    main(command_line())
