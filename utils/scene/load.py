"""Scenes: one triangle mesh in world coordinates, with object names, components and shading; reading and writing.

    geometry = turn(load_geometry("town.glb"), "+z")
    face = RayCaster(geometry).cast(eye, directions)

Formats: GLB and glTF through `gltf_scene`; OBJ, PLY, STL and OFF through trimesh. glTF is +y up unless its asset or
scene has the extra `world_up`; the other formats are taken as +z up unless `up` says otherwise. Only the
file itself, and a glTF file's buffers in the same folder, are opened.
"""

import io
import logging
import re
import warnings
from pathlib import Path

import numpy as np

from utils.cli import InputError
from utils.gltf import MAX_TRIANGLES
from utils.scene.gltf_scene import read_gltf
from utils.scene.mesh import UPS, Geometry, Part, assemble, make_part, unique_names

FORMATS = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")


def load_geometry(path: Path, up: str | None = None) -> Geometry:
    """Read a scene. Raises InputError when it cannot be read or holds no triangles.

    up: '+y' or '+z', the axis that points up in the file; None takes the file's `world_up` or the convention of
    its format: +y for glTF, +z for all others. The coordinates stay as they are: see `turn`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: scenes are read from {', '.join(FORMATS)} files")
    if not path.is_file():
        raise InputError(f"scene {path} does not exist")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; export the scene again")
    if path.suffix.lower() in (".glb", ".gltf"):
        parts, file_up = read_gltf(path)
        up = up or file_up or "+y"
    else:
        parts, up = _read_plain(path), up or "+z"
    if up not in UPS:
        raise InputError(f"{path}: {str(up)[:20]!r} is not an up axis; give {' or '.join(UPS)}")
    parts = [part for part in parts if len(part.faces)]
    if not parts:
        raise InputError(f"{path} holds no triangles; export the scene with its meshes")
    return assemble(path, parts, up)


def _read_plain(path: Path) -> list[Part]:
    """OBJ, PLY, STL or OFF."""
    kind, data = path.suffix.lower()[1:], path.read_bytes()
    options = {}
    if kind == "obj":
        data = _absolute_indices(path, data)
        objects = re.search(rb"^o\s", data, re.MULTILINE) is not None
        options = {"skip_materials": True, "group_material": False}
        options |= {"split_objects": objects, "split_groups": not objects}
    elif kind == "ply":
        options = {"skip_materials": True}
    scene = _load_trimesh(path, io.BytesIO(data), kind, **options)
    meshes = [(name, mesh) for name, mesh in scene.geometry.items() if hasattr(mesh, "faces")]
    if kind == "obj":
        meshes.reverse()  # trimesh returns the last object first
    named = [path.stem if name.startswith("geometry") else name for name, _ in meshes]
    parts = [_to_part(path, name, mesh) for name, (_, mesh) in zip(unique_names(named), meshes, strict=True)]
    if sum(len(part.faces) for part in parts) > MAX_TRIANGLES:
        raise InputError(f"{path} has more than {MAX_TRIANGLES:,} triangles: simplify it")
    return parts


def _load_trimesh(path: Path, file: io.BytesIO, kind: str, **options: object):
    """trimesh's scene of a file, exactly as it is stored: nothing merged, reordered or repaired."""
    import trimesh

    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # trimesh logs tracebacks of harmless errors
    try:
        with warnings.catch_warnings():
            # At text that is not a number numpy only warns, and drops the rest of the file.
            warnings.filterwarnings("error", message="string or file could not be read")
            return trimesh.load_scene(file, file_type=kind, process=False, **options)
    except Exception as error:  # any error of the parser means a damaged file
        reason = f"{type(error).__name__}: {error}"[:120]
        raise InputError(f"{path} cannot be read as {kind.upper()} ({reason}); export the scene again") from error
    finally:
        logging.disable(disabled)


def _absolute_indices(path: Path, data: bytes) -> bytes:
    """OBJ text with negative indices counted from the start, as trimesh needs. Refuses material files elsewhere."""
    for library in re.findall(rb"^\s*mtllib\s+(.*?)\s*$", data, re.MULTILINE):
        name = library.decode(errors="replace")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|[/\\]", name) or ".." in re.split(r"[/\\]", name):
            raise InputError(f"{path} refers to {name[:80]!r}, outside its own folder: put that file beside the scene")
    if not re.search(rb"^\s*f\s.*-\d", data, re.MULTILINE):
        return data
    counts, keys, lines = {"v": 0, "vt": 0, "vn": 0}, ("v", "vt", "vn"), []
    for line in data.decode(errors="replace").replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word in counts:
            counts[word] += 1
        elif word == "f":
            corners = [zip(keys, corner.split("/"), strict=False) for corner in rest.split()]
            fixed = ("/".join(_from_start(index, counts[key]) for key, index in corner) for corner in corners)
            line = "f " + " ".join(fixed)
        lines.append(line)
    return "\n".join(lines).encode()


def _from_start(index: str, count: int) -> str:
    return str(count + 1 + int(index)) if re.fullmatch(r"-\d+", index) else index


def _to_part(path: Path, name: str, mesh) -> Part:
    """Convert a trimesh.Trimesh to a Part, in its own coordinates."""
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    if vertices.shape[1:] != (3,) or faces.shape[1:] != (3,):
        raise InputError(f"{path} has vertices that are not x, y, z or faces that are no triangles; export it again")
    # Reading `vertex_normals` would compute missing ones; only the file's own are already in the cache.
    normals = np.asarray(mesh.vertex_normals) if "vertex_normals" in mesh._cache.cache else None
    return make_part(path, name, vertices, faces, normals)
