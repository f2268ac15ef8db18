"""Render random towns: rays find the surface of each sample, and a style colours it.

Rays are cast as in preprocessing. Visibility does not depend on the style, so a G-buffer can be coloured in several
styles. World axes are Blender's: Z up, metres.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from synthetic.scenes import Part
from synthetic.styles import CLASSES, Style, sky_colours, surface_colours
from utils.meshes.mesh import Geometry, build_geometry
from utils.scene.lines import LineScene, find_lines, make_line_scene, soften
from utils.scene.raycast import RayCaster
from utils.scene.survey import survey
from utils.scene.views import View

SAMPLES = 2  # rays per pixel and axis
SKY = CLASSES.index("sky")


@dataclass(frozen=True)
class World:
    """A scene prepared for rays and lines. kinds: int8 [F], class of each face, an index into CLASSES."""

    lines: LineScene
    kinds: np.ndarray

    @property
    def caster(self) -> RayCaster:
        return self.lines.caster


@dataclass(frozen=True)
class GBuffer:
    """What a view sees at SAMPLES x SAMPLES points per pixel, row by row; N samples, M of them on a surface.

    kind: int8 [N], index into CLASSES. points, normals: float32 [M, 3], world; normals face the viewer. rise: float32
    [N - M], tangent of the elevation of rays into the sky. size: width, height in pixels.
    """

    kind: np.ndarray
    points: np.ndarray
    normals: np.ndarray
    rise: np.ndarray
    size: tuple[int, int]


def make_world(geometry: Geometry) -> World:
    """geometry: Z up, with names that start with a class. Raises ValueError for a name that does not."""
    kinds = [name.split("_")[0] for name in geometry.names]
    if unknown := sorted(set(kinds) - set(CLASSES)):
        raise ValueError(f"objects of unknown class: {', '.join(unknown[:3])}; names start with one of {CLASSES}")
    numbers = np.array([CLASSES.index(kind) for kind in kinds], np.int8)
    return World(make_line_scene(geometry, RayCaster(geometry)), numbers[geometry.objects])


def town_world(parts: list[Part]) -> World:
    return make_world(build_geometry([(part.name, part.vertices, part.faces) for part in parts], "+z"))


def trace(world: World, view: View) -> GBuffer:
    """Cast the rays of a view."""
    rays = view.rays(SAMPLES).reshape(-1, 3)
    face = world.caster.cast(view.eye, rays)
    hit = face >= 0
    seen, surface = rays[hit], face[hit]
    depth = world.caster.plane_depth(surface, view.eye, seen)
    normal = world.caster.normals[surface]
    normal = normal * -np.sign(np.einsum("ij,ij->i", normal, seen))[:, None]
    kind = np.full(len(face), SKY, np.int8)
    kind[hit] = world.kinds[surface]
    away = rays[~hit]
    rise = away[:, 2] / np.hypot(away[:, 0], away[:, 1])
    points = view.eye + depth[:, None] * seen
    return GBuffer(kind, *(a.astype(np.float32) for a in (points, normal, rise)), (view.width, view.height))


def paint(buffer: GBuffer, style: Style) -> np.ndarray:
    """Colour a G-buffer in a style: uint8 [H, W, 3]."""
    width, height = buffer.size
    sky = buffer.kind == SKY
    samples = np.empty((len(sky), 3), np.float32)
    samples[~sky] = surface_colours(style, buffer.kind[~sky], buffer.points, buffer.normals)
    samples[sky] = sky_colours(style, buffer.rise)
    large = samples.reshape(SAMPLES * height, SAMPLES * width, 3)
    return cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA).round().astype(np.uint8)


def class_map(buffer: GBuffer) -> np.ndarray:
    """Class of each pixel whose samples agree, int8 [H, W]; -1 where they do not."""
    width, height = buffer.size
    kind = buffer.kind.reshape(height, SAMPLES, width, SAMPLES)
    first = kind[:, :1, :, :1]
    return np.where((kind == first).all(axis=(1, 3)), first[:, 0, :, 0], -1)


def draw_edges(world: World, view: View, typical_depth: float) -> np.ndarray:
    """Soft edges as preprocessing draws them, uint8 [H, W, 3]."""
    return soften(find_lines(world.lines, view), typical_depth)


def typical_depth(world: World, views: list[View]) -> float:
    """Depth at which lines have the middle width, found as in preprocessing, from small views of a path."""
    return survey(world.caster, views).typical_depth
