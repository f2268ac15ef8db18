"""Write a Blender scene as scene.glb and cameras.json, the two files that preprocess.py starts from.

    blender -b file.blend -P tools/blender_export.py -- out/
    python tools/blender_export.py file.blend -- out/             # with the `bpy` package in place of Blender

Geometry: what is visible in the viewport and not disabled for renders, as at the first frame: meshes, curves, texts
and metaballs, with viewport modifiers and all kinds of instances. Names are kept; meshes are baked to the world, with
the normals that Blender shades them with. Cameras: the active camera over the scene's frame range; a lens that changes
is written for each frame. cameras.json is in Blender's world (Z up); scene.glb is Y up, as glTF asks: blender
(x, y, z) = gltf (x, -z, y). Needs nothing but Blender: it imports nothing else from here.
"""

import argparse
import json
import os
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import bpy
import numpy as np

ARC_STEPS = 45  # frames from one anchor to the next
SOLID_TYPES = ("MESH", "CURVE", "SURFACE", "FONT", "META")
FLOAT, UINT, ARRAY_BUFFER, INDEX_BUFFER = 5126, 5125, 34962, 34963  # glTF's numbers


class InputError(ValueError):
    """An error in the scene or the command, described in one line."""


class Mesh(NamedTuple):
    """A mesh in the Z-up world, its vertices split at shading edges: one normal each."""

    name: str
    vertices: np.ndarray  # float64 [V, 3], metres
    normals: np.ndarray  # float64 [V, 3], unit
    triangles: np.ndarray  # uint32 [N, 3], counter-clockwise seen from outside


# --- Geometry --------------------------------------------------------------------------------------------------------


def rendered_objects(collection: bpy.types.Collection) -> set[bpy.types.Object]:
    """Objects in a collection and its children, except those that are disabled in renders."""
    if collection.hide_render:
        return set()
    found = {obj for obj in collection.objects if not obj.hide_render}
    return found.union(*(rendered_objects(child) for child in collection.children))


def visible_meshes() -> list[Mesh]:
    """World meshes of everything that is visible at the current frame."""
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
        if mesh := world_mesh(obj, name, matrix):
            found.append((key, obj.type, mesh))
    names: set[str] = set()
    return [
        mesh._replace(name=unique_name(mesh.name, names))
        for key, kind, mesh in found
        if kind == "MESH" or key not in as_mesh
    ]


def world_mesh(obj: bpy.types.Object, name: str, matrix: np.ndarray) -> Mesh | None:
    """An evaluated object transformed to the world by matrix [4, 4]; None if it has no faces."""
    mesh = obj.to_mesh()
    if mesh is None:
        return None
    mesh.calc_loop_triangles()
    local = None
    if count := len(mesh.loop_triangles):
        corners = numbers(mesh.loop_triangles, "loops", np.int32, 3 * count)
        points = numbers(mesh.loop_triangles, "vertices", np.int32, 3 * count)
        normals = corner_normals(mesh)[corners]
        vertices = numbers(mesh.vertices, "co", np.float32, 3 * len(mesh.vertices)).reshape(-1, 3)
        local = split_vertices(vertices, points, normals)
    obj.to_mesh_clear()
    if local is None:
        return None
    vertices, normals, triangles = local
    if np.linalg.det(matrix[:3, :3]) < 0:  # a mirrored object: flip the winding, to keep the outside out
        triangles = triangles[:, ::-1]
    return Mesh(name, vertices @ matrix[:3, :3].T + matrix[:3, 3], turn_normals(normals, matrix[:3, :3]), triangles)


def numbers(items: bpy.types.bpy_prop_collection, what: str, kind: type, size: int) -> np.ndarray:
    """The attribute `what` of all items, [size] of `kind`."""
    values = np.empty(size, kind)
    items.foreach_get(what, values)
    return values


def corner_normals(mesh: bpy.types.Mesh) -> np.ndarray:
    """float32 [corners, 3]: flat and smooth faces, sharp edges and custom normals as Blender shades them."""
    size = 3 * len(mesh.loops)
    if hasattr(mesh, "corner_normals"):
        return numbers(mesh.corner_normals, "vector", np.float32, size).reshape(-1, 3)
    mesh.calc_normals_split()  # before Blender 4.1
    return numbers(mesh.loops, "normal", np.float32, size).reshape(-1, 3)


def split_vertices(
    vertices: np.ndarray, points: np.ndarray, normals: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices float64 [S, 3], normals float64 [S, 3], triangles uint32 [N, 3]: one vertex for each normal.

    vertices: float32 [V, 3]; points: int32 [3 N], the vertex of each triangle corner; normals: float32 [3 N, 3].
    """
    rows = np.ascontiguousarray(np.column_stack([points, normals.view(np.int32)]))
    _, first, index = np.unique(rows.view("V16").reshape(-1), return_index=True, return_inverse=True)
    triangles = index.reshape(-1, 3).astype(np.uint32)
    return vertices[points[first]].astype(float), normals[first].astype(float), triangles


def turn_normals(normals: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """Unit normals [V, 3] of a surface after linear [3, 3]; zero where it collapses to nothing."""
    x, y, z = linear.T
    cofactor = np.stack([np.cross(y, z), np.cross(z, x), np.cross(x, y)], axis=1)
    # The inverse transpose is the cofactors over the determinant, of which only the sign matters here.
    turned = normals @ (cofactor if x @ cofactor[:, 0] >= 0 else -cofactor).T
    length = np.linalg.norm(turned, axis=1, keepdims=True)
    return np.divide(turned, length, out=np.zeros_like(turned), where=length > 0)


def unique_name(name: str, taken: set[str]) -> str:
    """`name`, with a number if it is taken; adds it to `taken`."""
    free, number = name, 1
    while free in taken:
        free, number = f"{name}_{number:03d}", number + 1
    taken.add(free)
    return free


def glb_bytes(meshes: list[Mesh]) -> bytes:
    """A binary glTF of meshes with normals and without materials, one node each."""
    views, accessors, data = [], [], bytearray()

    def add(array: np.ndarray, kind: str, component: int, target: int, **bounds: list) -> int:
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": array.nbytes, "target": target})
        data.extend(array.tobytes())  # four-byte numbers: always aligned
        accessors.append(
            {"bufferView": len(views) - 1, "componentType": component, "count": len(array), "type": kind, **bounds}
        )
        return len(accessors) - 1

    gltf_meshes = []
    for mesh in meshes:
        points, normals = y_up(mesh.vertices), y_up(mesh.normals)
        bounds = {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}
        attributes = {
            "POSITION": add(points, "VEC3", FLOAT, ARRAY_BUFFER, **bounds),
            "NORMAL": add(normals, "VEC3", FLOAT, ARRAY_BUFFER),
        }
        indices = add(np.ascontiguousarray(mesh.triangles, "<u4").reshape(-1), "SCALAR", UINT, INDEX_BUFFER)
        gltf_meshes.append({"name": mesh.name, "primitives": [{"attributes": attributes, "indices": indices}]})
    document = {
        "asset": {"version": "2.0", "generator": "blender_export.py"},
        "scene": 0,
        "scenes": [{"nodes": list(range(len(meshes)))}],
        "nodes": [{"name": mesh.name, "mesh": i} for i, mesh in enumerate(meshes)],
        "meshes": gltf_meshes,
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(data)}],
    }
    text = json.dumps(document, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 4)
    header = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(data))
    return header + struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data


def y_up(vectors: np.ndarray) -> np.ndarray:
    """float64 [V, 3] of Blender's world in glTF's: little-endian float32 [V, 3]."""
    x, y, z = vectors.astype("<f4").T
    return np.ascontiguousarray(np.stack([x, z, -y], axis=1))


# --- Cameras ---------------------------------------------------------------------------------------------------------


def read_cameras(scene: bpy.types.Scene) -> dict:
    """The active camera over the frame range, with the keys of a nerfstudio transforms.json."""
    camera = scene.camera
    if camera is None:
        raise InputError("the scene has no active camera: choose one in Scene properties > Camera")
    if camera.type != "CAMERA":
        raise InputError(f"the active camera {camera.name!r} is a {camera.type.lower()}, not a camera")
    poses, lenses = [], []
    for number in range(scene.frame_start, scene.frame_end + 1, scene.frame_step):
        scene.frame_set(number)
        if scene.camera != camera:
            raise InputError(f"the active camera changes at frame {number}: a path is one shot; remove the marker")
        evaluated = camera.evaluated_get(bpy.context.evaluated_depsgraph_get())
        poses.append(camera_pose(np.array(evaluated.matrix_world, float), f"{camera.name!r} at frame {number}"))
        lenses.append(intrinsics(scene.render, evaluated.data))
    frames = [
        {"file_path": f"images/{n:04d}.png", "frame": n, "transform_matrix": pose.tolist()}
        for n, pose in enumerate(poses, start=1)
    ]
    shared = image_size(scene.render)
    values = np.array([list(lens.values()) for lens in lenses])
    if np.allclose(values, values[0], rtol=1e-5):
        shared = {**lenses[0], **shared}
    else:
        frames = [{**frame, **lens} for frame, lens in zip(frames, lenses, strict=True)]
    distortion = dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0)
    fps = scene.render.fps / scene.render.fps_base
    return {"camera_model": "OPENCV", **shared, **distortion, "fps": fps, "world_up": "+z", "frames": frames}


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


def image_size(render: bpy.types.RenderSettings) -> dict:
    """w, h in pixels."""
    width, height = (side * render.resolution_percentage // 100 for side in (render.resolution_x, render.resolution_y))
    return {"w": width, "h": height}


def intrinsics(render: bpy.types.RenderSettings, lens: bpy.types.Camera) -> dict:
    """fl_x, fl_y, cx, cy in pixels of a perspective camera, as Blender's renderers use it."""
    if lens.type != "PERSP":
        raise InputError(f"the camera {lens.name!r} is {lens.type.lower()}; only perspective cameras can be exported")
    if not np.isclose(render.pixel_aspect_x, render.pixel_aspect_y):
        raise InputError("the pixels are not square: set Output properties > Format > Aspect to 1, 1")
    width, height = image_size(render).values()
    fit = lens.sensor_fit
    wide = width >= height if fit == "AUTO" else fit == "HORIZONTAL"
    sensor = lens.sensor_height if fit == "VERTICAL" else lens.sensor_width  # AUTO: the width for either side
    side = width if wide else height  # what the sensor, and shifts, are measured against
    focal = lens.lens / sensor * side
    # A shift moves the picture right and up over the scene, so that the principal point moves left and down in it.
    center = {"cx": width / 2 - lens.shift_x * side, "cy": height / 2 + lens.shift_y * side}
    return {"fl_x": focal, "fl_y": focal, **center}


# --- Command ---------------------------------------------------------------------------------------------------------


def write_all(contents: dict[Path, bytes]) -> None:
    """Write files atomically: under temporary names first, then all are renamed."""
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
    print(f"scene: {scene_path} ({len(meshes)} meshes, {sum(len(mesh.triangles) for mesh in meshes)} triangles)")
    print(f"cameras: {cameras_path} ({count} frames)")
    if moving:
        print(f"note: {', '.join(moving[:3])} move; the scene is exported as at frame {scene.frame_start}")
    if count % ARC_STEPS != 1 or count == 1:
        print(f"note: arcs need {ARC_STEPS} N + 1 frames (46, 91, 136, ...), this path has {count}")


def moving_names(first: list[Mesh], last: list[Mesh]) -> list[str]:
    """Names of meshes whose triangles are not the same in the other list."""
    corners = {mesh.name: mesh.vertices[mesh.triangles] for mesh in last}

    def moves(mesh: Mesh) -> bool:
        before, after = mesh.vertices[mesh.triangles], corners.get(mesh.name)
        return after is None or after.shape != before.shape or abs(after - before).max() > 1e-4

    return [mesh.name for mesh in first if moves(mesh)]


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
    """Print an error and exit with `code`; after a traceback Blender would exit with 0."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def command_line() -> list[str]:
    """Arguments for `main`. Inside Blender sys.argv is Blender's own command line, and its file is already open."""
    if sys.argv[0].endswith(".py"):
        if sys.argv[1:2] in ([], ["--"]):
            stop("name a file: python tools/blender_export.py file.blend -- out/", 2)
        return sys.argv[1:]
    return sys.argv[sys.argv.index("--") :] if "--" in sys.argv else []


if __name__ == "__main__":
    main(command_line())
