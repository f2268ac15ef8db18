"""OBJ, PLY, STL and OFF as common programs write them, and polygons of every shape."""

import struct
from pathlib import Path

import numpy as np
import pytest

from tests.scene.geometry_common import corners
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry, face_normals
from utils.meshes.polygons import triangulate

POINTS = [(x, y, z) for z in (0, 1) for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
QUADS = [(3, 2, 1, 0), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6), (3, 0, 4, 7)]
TRIANGLES = [(a, b, c) for p, q, r, s in QUADS for a, b, c in ((p, q, r), (r, s, p))]
WALL = [(0, 0), (1.5, 0), (1.5, 2), (2.5, 2), (2.5, 0), (4, 0), (4, 3), (0, 3)]  # 4 x 3 with a door of 1 x 2


def area(geometry: Geometry) -> float:
    a, b, c = corners(geometry).transpose(1, 0, 2)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def volume(geometry: Geometry) -> float:
    a, b, c = corners(geometry).transpose(1, 0, 2)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def is_cube(geometry: Geometry) -> bool:
    """Whether it is the unit cube with faces turned outwards."""
    bounds = geometry.vertices.min(0).tolist(), geometry.vertices.max(0).tolist()
    return bounds == ([0] * 3, [1] * 3) and len(geometry.faces) == 12 and volume(geometry) == pytest.approx(1)


def obj(gap: str = " ", end: str = "\n", after: str = "") -> str:
    rows = [gap.join(("v", *map(str, point))) for point in POINTS]
    rows += [gap.join(("f", *(str(k + 1) for k in quad))) for quad in QUADS]
    return "".join(row + after + end for row in rows)


def off(gap: str = " ", end: str = "\n", head: str = "OFF", colour: str = "") -> str:
    rows = [head, "8 6 0", *(gap.join(map(str, point)) for point in POINTS)]
    rows += [gap.join(map(str, (4, *quad))) + colour for quad in QUADS]
    return end.join(rows) + end


def ply_header(kind: str, faces: str = "element face 6\nproperty list uchar int vertex_indices\n") -> str:
    vertex = "element vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
    return f"ply\nformat {kind} 1.0\ncomment sch\xf6n\nobj_info a b\n{vertex}{faces}end_header\n"


def ply_ascii() -> bytes:
    rows = [" ".join(map(str, row)) for row in [*POINTS, *((4, *quad) for quad in QUADS)]]
    return (ply_header("ascii") + "\n".join(rows) + "\n").encode("latin-1")


def ply_binary(order: str = "<", end: str = "\n", faces: list[tuple] = QUADS, extra: bytes = b"") -> bytes:
    kind = f"binary_{'little' if order == '<' else 'big'}_endian"
    texture = "property list uchar float texcoord\n" if extra else ""
    element = f"element face {len(faces)}\nproperty list uchar int vertex_index\n{texture}property uchar red\n"
    body = b"".join(struct.pack(f"{order}3f", *point) for point in POINTS)
    body += b"".join(struct.pack(f"{order}B{len(f)}i", len(f), *f) + extra + b"\7" for f in faces)
    return ply_header(kind, element).replace("\n", end).encode("latin-1") + body


def ply_strips() -> bytes:
    strip = (0, 1, 4, 5, -1, 3, 2, 0, 1)
    element = "element tristrips 1\nproperty list int int vertex_indices\n"
    body = b"".join(struct.pack("<3f", *point) for point in POINTS)
    return ply_header("binary_little_endian", element).encode("latin-1") + body + struct.pack("<10i", 9, *strip)


def stl_ascii(end: str = "endsolid", gap: str = "\n") -> str:
    facets = [
        f"facet normal 0 0 0{gap}outer loop{gap}"
        + gap.join("vertex {}.0e+00 {} {}".format(*POINTS[k]) for k in triangle)
        + f"{gap}endloop{gap}endfacet{gap}"
        for triangle in TRIANGLES
    ]
    return f"solid my facet{gap}" + "".join(facets) + end


def stl_binary(head: bytes = b"solid of Some Program") -> bytes:
    body = b"".join(struct.pack("<12fH", 0, 0, 0, *np.ravel([POINTS[k] for k in t]), 0) for t in TRIANGLES)
    return head.ljust(80) + struct.pack("<I", 12) + body


LIBRARIES = "mtllib C:\\Users\\anna\\house.mtl\nmtllib ../../a b.mtl\nusemtl wall\n"
MIXED = [*QUADS[:3], *((a, b, c) for p, q, r, s in QUADS[3:] for a, b, c in ((p, q, r), (r, s, p)))]
CUBES = {
    "tabs.obj": obj(gap="\t"),
    "indents.obj": "\n".join("  \t" + line for line in obj(gap="  ").split("\n")),
    "comments.obj": obj(after=" # a comment 7"),
    "tight.obj": obj(after="#8 9"),
    "colours.obj": obj().replace("v 1 1 1\n", "v 1 1 1 0.5 0.5 0.5\n"),
    "mac.obj": obj(end="\r"),
    "windows.obj": obj(end="\r\n"),
    "continued.obj": obj().replace("f 4 3", "f 4 \\\n3"),
    "continued_blank.obj": obj(end="\r\n").replace("f 4 3", "f 4 \\ \t\r\n3"),
    "continued_end.obj": obj()[:-1] + " \\",
    "comment_path.obj": "# C:\\scenes\\\n" + obj(),
    "materials.obj": LIBRARIES + obj(),
    "others.obj": "vt 0 0\nvp 1\ns off\n" + obj() + "l 1 2\np 1\ncstype bezier\n",
    "marked.obj": b"\xef\xbb\xbf" + obj().encode(),
    "wide.obj": obj().encode("utf-16"),
    "zero_normals.obj": obj().replace("f 1 2 6 5", "f 1/0/0 2/0/0 6/0/0 5/0/0"),
    "plain.off": off(),
    "lines.off": off().replace("4 3 2", "4 3\n\n2").replace("4 0 1", "4\n0\n1"),
    "one_line.off": off(end="\t"),
    "comments.off": off(end=" # x\r\n"),
    "colours.off": off(head="COFF", colour=" 255 0 0"),
    "no_head.off": off(head=""),
    "no_edges.off": off().replace("8 6 0", "8 6"),
    "head_line.off": off().replace("OFF\n8", "OFF 8"),
    "after.off": off() + "that was all\n",
    "marked.off": b"\xef\xbb\xbf" + off(end="\r").encode(),
    "ascii.ply": ply_ascii(),
    "marked.ply": b"\xef\xbb\xbf" + ply_ascii(),
    "ascii_mac.ply": ply_ascii().replace(b"\n", b"\r"),
    "ascii_stream.ply": ply_ascii().replace(b"1 1 0\n", b"1\n1 0 ").replace(b"4 3 2", b"4\n3\t2"),
    "little.ply": ply_binary(),
    "big.ply": ply_binary(">", "\r\n"),
    "mac.ply": ply_binary(end="\r"),
    "mixed.ply": ply_binary(faces=MIXED),
    "mixed_textured.ply": ply_binary(faces=MIXED, extra=b"\2" + struct.pack("<2f", 0.5, 0.5)),
    "after.ply": ply_binary() + b"more",
    "ascii.stl": stl_ascii(),
    "end_solid.stl": stl_ascii("end solid my facet\nmore text"),
    "no_end.stl": stl_ascii(""),
    "one_line.stl": stl_ascii(gap=" "),
    "capitals.stl": "\n\n" + stl_ascii(gap="\r\n").upper(),
    "solid.stl": stl_binary(),
    "binary.stl": stl_binary(b"") + b"more",
}


@pytest.mark.parametrize("name", CUBES)
def test_a_cube_is_a_cube(tmp_path: Path, name: str) -> None:
    content = CUBES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    geometry = load_geometry(tmp_path / name)
    assert is_cube(geometry)
    assert (geometry.up, geometry.up_stated) == ("+y" if name.endswith("obj") else "+z", False)
    notes = (f"{tmp_path / name} has no end: look whether all of it is there",) if name == "no_end.stl" else ()
    assert geometry.notes == notes


def test_strips_of_a_ply_file(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(ply_strips())
    geometry = load_geometry(tmp_path / "a.ply")
    assert len(geometry.faces) == 4 and area(geometry) == pytest.approx(2)
    expected = [[0, -1, 0]] * 2 + [[0, 0, -1]] * 2
    np.testing.assert_allclose(face_normals(geometry.vertices, geometry.faces), expected)


def test_groups_solids_and_names(tmp_path: Path) -> None:
    triangle = "v 0 0 {0}\nv 1 0 {0}\nv 0 1 {0}\n"
    groups = "".join(f"g {name}\n{triangle.format(k)}f -3 -2 -1\n" for k, name in enumerate(["a", "b", "a", "n\xf6"]))
    (tmp_path / "a.obj").write_bytes(groups.encode("latin-1"))
    geometry = load_geometry(tmp_path / "a.obj")
    assert geometry.names == ("a", "b", "n\xf6") and np.bincount(geometry.objects).tolist() == [2, 1, 1]
    solids = stl_ascii().replace("my facet", "front") + "\nsolid back side\n" + stl_ascii().split("\n", 1)[1]
    (tmp_path / "a.stl").write_text(solids.replace("vertex 0.0", "vertex 5.0", 3))
    assert load_geometry(tmp_path / "a.stl").names == ("front", "back side")


def test_normals_shade(tmp_path: Path) -> None:
    text = "v 0 0 0\nv 1 0 0\nv 1 1 0\nvn 0 0 1\nvn 0 1 1\nf 1//1 2//2 3//1\nf 3 2 1\nv 5 0 0\nf 1//1 2//1 4\n"
    (tmp_path / "a.obj").write_text(text.replace("f 3 2 1", "v 0 0 1\nf 1//1 2//1 4//1"))
    assert load_geometry(tmp_path / "a.obj").smooth.tolist() == [True, False]
    rows = "0 0 0 0 0 1\n1 0 0 0 0 2\n0 1 0 0 1 1\n3 0 1 2\n"
    head = "ply\nformat ascii 1.0\nelement vertex 3\n" + "".join(
        f"property float {k}\n" for k in ["x", "y", "z", "nx", "ny", "nz"]
    )
    (tmp_path / "a.ply").write_text(
        f"{head}element face 1\nproperty list uchar int vertex_indices\nend_header\n{rows}"
    )
    assert load_geometry(tmp_path / "a.ply").smooth.tolist() == [True]
    (tmp_path / "a.off").write_text("NOFF\n3 1 0\n" + rows)
    assert load_geometry(tmp_path / "a.off").smooth.tolist() == [True]


def filled(ring: list[tuple[float, float]], turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(areas, normals, how often it intersects itself) of a ring that is rotated and moved in space."""
    points = np.array(ring, float) @ turn[:2] + (3, -1e4, 7)
    triangles, crossed = triangulate(points, np.array([len(ring)]))
    a, b, c = points[triangles].transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2, face_normals(points, triangles), crossed


HOLE = [(0, 0), (4, 0), (4, 3), (0, 3), (0, 0), (1, 1), (1, 2), (2, 2), (2, 1), (1, 1)]  # one ring, cut open
HOLES = [*HOLE, (2, 1), (2.5, 1), (2.5, 2), (3, 2), (3, 1), (2.5, 1), (2, 1), (1, 1)]
STAR = [((2 + (-1) ** k) * np.cos(k * np.pi / 12), (2 + (-1) ** k) * np.sin(k * np.pi / 12)) for k in range(24)]
RINGS = {
    "wall": (WALL, 10),
    "hole": (HOLE, 11),
    "holes": (HOLES, 10.5),
    "arrow": ([(0, 0), (2, -1), (0, 3), (-2, -1)], 6),
    "dart": ([(2, -1), (0, 3), (-2, -1), (0, 0)], 6),
    "star": (STAR, 24 * 3 * np.sin(np.pi / 12) / 2),
    "convex": ([(0, 0), (1, 0), (2, 1), (1, 2), (0, 1)], 2.5),
    "repeated": ([(0, 0), (1, 0), (1, 0), (2, 1), (1, 2), (0, 1)], 2.5),
}


@pytest.mark.parametrize("name", RINGS)
def test_polygons_are_filled_and_no_more(name: str) -> None:
    ring, expected = RINGS[name]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    axis = np.cross(turn[0], turn[1])
    for start in range(len(ring)):
        for sign in (1, -1):
            areas, normals, crossed = filled([*ring[start:], *ring[:start]][::sign], turn)
            assert areas.sum() == pytest.approx(expected, rel=1e-9) and not crossed
            solid = areas > 1e-6 * expected
            assert (normals[solid] @ axis * sign).min() > 0.99


def test_convex_polygons_stay_fans() -> None:
    points = np.array(
        [(np.cos(k), np.sin(k), 0) for k in np.linspace(0, 6, 5)] + [(0, 0, 0.2), (1, 0, 0), (1, 1, 0.1), (0, 1, 0)]
    )
    triangles, _ = triangulate(points, np.array([5, 4]))
    assert triangles.tolist() == [[5, 6, 7], [7, 8, 5], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


@pytest.mark.parametrize("suffix", ["obj", "ply", "off"])
def test_a_wall_keeps_its_door(tmp_path: Path, suffix: str) -> None:
    points = [(x, 0, z) for x, z in WALL]
    rows = "\n".join(" ".join(map(str, point)) for point in points)
    header = ply_header("ascii").replace("face 6", "face 1")
    text = {
        "obj": rows.replace("\n", "\nv ").join(["v ", "\nf 1 2 3 4 5 6 7 8\n"]),
        "ply": f"{header}{rows}\n8 0 1 2 3 4 5 6 7\n",
        "off": f"OFF\n8 1 0\n{rows}\n8 0 1 2 3 4 5 6 7\n",
    }[suffix]
    (tmp_path / f"wall.{suffix}").write_bytes(text.encode("latin-1"))
    assert area(load_geometry(tmp_path / f"wall.{suffix}")) == pytest.approx(10)


def test_a_polygon_that_crosses_itself_is_noted(tmp_path: Path) -> None:
    rows = "".join(f"v {x} {y} 0\n" for x, y in ((0, 0), (4, 0), (4, 4), (1, 4), (1, -1), (0, -1)))
    (tmp_path / "a.obj").write_text(rows + "f 1 2 3 4 5 6\n")
    assert "1 faces of" in load_geometry(tmp_path / "a.obj").notes[0]
