"""Scenes: one triangle mesh in world coordinates, with object names, components and shading; reading and writing.

    geometry = turn(load_geometry("town.glb"), "+z")
    face = RayCaster(geometry).cast(eye, directions)

Formats: GLB and glTF through `gltf_scene`; OBJ, PLY, STL and OFF through `plain`. Only the file itself, and a glTF
file's buffers in the same folder, are opened.
"""

from dataclasses import replace
from pathlib import Path

from utils.cli import InputError
from utils.meshes.gltf_scene import read_gltf
from utils.meshes.mesh import UPS, Geometry, assemble
from utils.meshes.plain import read_plain

CUSTOMS = {".glb": "+y", ".gltf": "+y", ".obj": "+y", ".ply": "+z", ".stl": "+z", ".off": "+z"}  # if none is stated
BY_BLENDER = "export it as glTF (Blender: File > Export > glTF, or tools/blender_export.py)"
OTHERS = {
    **dict.fromkeys((".blend", ".fbx", ".dae", ".usd", ".usda", ".usdc", ".usdz", ".abc", ".x3d", ".wrl"), BY_BLENDER),
    **dict.fromkeys((".3ds", ".max", ".ma", ".mb", ".c4d", ".skp", ".3dm", ".3mf", ".dxf"), "export it as glTF"),
    **dict.fromkeys((".stp", ".step", ".igs", ".iges", ".ifc"), "it has no triangles yet: export it as glTF or STL"),
    **dict.fromkeys(
        (".splat", ".ksplat", ".spz", ".sog"),
        "it is Gaussian splats: make a mesh of it first, such as with SuGaR or 2DGS",
    ),
    **dict.fromkeys(
        (".las", ".laz", ".xyz", ".pts", ".pcd", ".e57"),
        "it is a point cloud: make a mesh of it first, such as with MeshLab's Poisson filter",
    ),
    **dict.fromkeys((".zip", ".gz", ".7z", ".rar"), "unpack it first"),
}  # formats that are not read, and the next step


def load_geometry(path: Path, up: str | None = None) -> Geometry:
    """Read a scene. Raises InputError when it cannot be read or holds no triangles.

    up: '+y' or '+z', the axis that points up in the file; None takes the file's `world_up` or its format's
    convention: +y for glTF and OBJ, +z for all others. The coordinates stay as they are: see `turn`.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in CUSTOMS:
        step = f"; {OTHERS[kind]}" if kind in OTHERS else ""
        raise InputError(f"{path}: scenes are read from {', '.join(CUSTOMS)} files{step}")
    if not path.is_file():
        raise InputError(f"scene {path} does not exist")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; export the scene again")
    file_up = None
    if kind in (".glb", ".gltf"):
        parts, file_up, notes = read_gltf(path)
    else:
        parts, notes = read_plain(path)
    stated = up or file_up
    if stated not in (None, *UPS):
        raise InputError(f"{path}: {stated[:20]!r} is not an up axis; give {' or '.join(UPS)}")
    parts = [part for part in parts if len(part.faces)]
    if not parts:
        raise InputError(f"{path} holds no triangles; export the scene with its meshes")
    geometry = assemble(path, parts, stated or CUSTOMS[kind])
    return replace(geometry, up_stated=stated is not None, notes=tuple(notes))
