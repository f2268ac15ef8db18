"""Passes: further pictures of a frame, which control video models or serve in compositing.

    stage = make_stage(make_line_scene(geometry, caster), limits)
    frame = Frame(stage, look(caster, view), next_view, (first_anchor, last_anchor))
    picture = PASSES["normal"].draw(frame)

All passes of a frame come from one cast of rays through the centres of its pixels, so that they agree in every pixel.
Where faces overlap in one plane, all show the one that edges and maps show (`overlaps`).
"""

import colorsys
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from utils.meshes.mesh import Geometry, dot
from utils.scene.lines import LineScene, lines_between, lit_from_camera
from utils.scene.raycast import RayCaster
from utils.scene.views import Sight, View, find_in, look

WHITE = 65535
OUTLIERS = 0.005  # share of pixels that may be nearer, and farther, than the range: they are clipped
STILL, STEPS = 32768, 64  # values of a pass `motion`: no motion, and per pixel; KITTI's format of optical flow


@dataclass(frozen=True)
class Stage:
    """What passes need to know of the whole scene. limits: of depth. colours: uint8 [O + 1, 3], the last: the sky.

    sky: whether points at infinity count as visible in anchors that show the sky there.
    """

    scene: LineScene
    limits: tuple[float, float] | None
    colours: np.ndarray
    sky: bool


def make_stage(scene: LineScene, limits: tuple[float, float] | None = None, *, sky: bool = True) -> Stage:
    return Stage(scene, limits, object_colours(scene.geometry.names), sky)


@dataclass(frozen=True)
class Frame:
    """What one frame sees, and what its passes relate it to. following: None for the last frame of a path."""

    stage: Stage
    sight: Sight
    following: View | None
    anchors: tuple[View, View]

    @cached_property
    def rays(self) -> np.ndarray:
        """Those of the sight in float32, which is enough for 8 bits of brightness."""
        return self.sight.rays.astype(np.float32)

    @cached_property
    def normals(self) -> np.ndarray:
        """Unit normals in world axes on the viewer's side of the faces, float32 [N, 3]; 0 for the sky.

        They are interpolated between corners where the file shades a face smoothly.
        """
        sight, geometry = self.sight, self.stage.scene.geometry
        normals = self.stage.scene.caster.normals_of(sight.face)
        normals *= np.where(sight.hit, -np.sign(dot(normals, self.rays)), 0)[:, None]
        if geometry.corner_normals is not None:
            smooth = np.flatnonzero(sight.hit & np.take(geometry.smooth, sight.face))
            normals[smooth] = _interpolate(geometry, sight, smooth, normals[smooth])
        return normals

    @cached_property
    def camera_normals(self) -> np.ndarray:
        """Normals in camera axes, float32 [N, 3]: +x right, +y up, +z towards the viewer; 0 for the sky."""
        axes = self.sight.view.c2w[:3, :3].astype(np.float32)
        return np.einsum("jn,jk->kn", np.ascontiguousarray(self.normals.T), axes).T

    @cached_property
    def motion(self) -> np.ndarray:
        """Motion in the picture to the next frame, float64 [N, 2] pixels, x to the right, y down; NaN if unknown.

        That of the point that is seen here, whether or not it is seen in the next frame; the sky is at infinity.
        """
        view = self.sight.view
        if self.following is None:
            return np.full((len(self.sight.face), 2), np.nan)
        offsets = self.sight.offsets(self.following.eye)
        moved = self.following.project(offsets)[0].reshape(view.height, view.width, 2)
        moved[..., 0] -= np.arange(view.width) + 0.5
        moved[..., 1] -= (np.arange(view.height) + 0.5)[:, None]
        moved = moved.reshape(-1, 2)
        moved[dot(offsets, self.following.c2w[:3, 2]) >= 0] = np.nan  # behind the next camera
        return moved

    def picture(self, values: np.ndarray) -> np.ndarray:
        """Values of pixels [N, ...] as [H, W, ...]."""
        return values.reshape(self.sight.view.height, self.sight.view.width, *values.shape[1:])


def _interpolate(geometry: Geometry, sight: Sight, chosen: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Shading normals of chosen pixels, [M, 3], in the world, on the side of their faces' own normals `flat`."""
    face = sight.face[chosen]
    a, b, c = (geometry.vertices[geometry.faces[face, k]] for k in range(3))
    points = sight.view.eye + sight.depth[chosen, None] * sight.rays[chosen]
    # Areas opposite the corners; their sign does not matter, since it is that of all three.
    weights = [dot(flat, np.cross(q - points, r - points)) for q, r in ((b, c), (c, a), (a, b))]
    mixed = np.einsum("kn,nkj->nj", weights, geometry.corner_normals[face].astype(np.float64))
    mixed *= np.where(dot(mixed, flat) < 0, -1.0, 1.0)[:, None]
    length = np.linalg.norm(mixed, axis=1, keepdims=True)
    return np.divide(mixed, length, out=flat.copy(), where=length > 0)


def depth_range(caster: RayCaster, views: Sequence[View]) -> tuple[float, float] | None:
    """(near, far) in metres of the surfaces that these views see; None if they see none."""
    depths = [sight.depth[sight.hit] for sight in (look(caster, view) for view in views)]
    seen = np.concatenate(depths)
    if not seen.size:
        return None
    near, far = np.quantile(seen, [OUTLIERS, 1 - OUTLIERS])
    return float(near), float(far)


def draw_depth(sight: Sight, limits: tuple[float, float] | None) -> np.ndarray:
    """Inverse planar depth, uint16 [H, W]: WHITE at `near` and nearer, 1 at `far` and farther, 0 for the sky.

    One range for the whole scene, so that a surface keeps its grey while the camera moves.
    """
    shape = (sight.view.height, sight.view.width)
    if limits is None:
        return np.zeros(shape, np.uint16)
    near, far = limits
    above, span = 1 / np.clip(sight.depth, near, far) - 1 / far, 1 / near - 1 / far
    nearness = above / span if span > 0 else np.ones_like(above)
    return np.where(sight.hit, np.round(1 + (WHITE - 1) * nearness), 0).astype(np.uint16).reshape(shape)


def draw_normal(frame: Frame) -> np.ndarray:
    """Normals in camera axes, uint8 [H, W, 3]: (n + 1) / 2 · 255; black for the sky, which no normal is."""
    colours = (127.5 * frame.camera_normals + 128).astype(np.uint8)  # rounded: nothing is negative
    return frame.picture(colours * frame.sight.hit[:, None])


def draw_clay(frame: Frame) -> np.ndarray:
    """A grey render lit from the camera, uint8 [H, W], white for the sky."""
    return frame.picture(lit_from_camera(frame.normals, frame.rays, frame.sight.hit))


def draw_lines(frame: Frame) -> np.ndarray:
    """Lines of objects and creases, one pixel wide, uint8 [H, W]: 255 on black."""
    sight = frame.sight
    lines = lines_between(frame.stage.scene, sight.view, frame.picture(sight.face), frame.picture(sight.rays))
    return np.where(lines.brightness > 0, 255, 0).astype(np.uint8)


def draw_ids(frame: Frame) -> np.ndarray:
    """The colour of the object that is seen, uint8 [H, W, 3]; black for the sky."""
    objects = np.take(frame.stage.scene.geometry.objects, frame.sight.face)
    return frame.picture(np.take(frame.stage.colours, np.where(frame.sight.hit, objects, -1), axis=0))


def object_colours(names: Sequence[str]) -> np.ndarray:
    """A colour for every object and black for the sky, uint8 [O + 1, 3], all different.

    It follows from the object's name: other scenes give it the same one, unless two names have one by chance.
    """
    taken = {(0, 0, 0): ""}
    for name in names:
        for attempt in count():
            drawn = hashlib.sha256(f"{attempt}:{name}".encode(errors="surrogatepass")).digest()
            hue, saturation, value = int.from_bytes(drawn[:2]) / 65536, drawn[2] / 255, drawn[3] / 255
            shares = colorsys.hsv_to_rgb(hue, 0.4 + 0.6 * saturation, 0.5 + 0.5 * value)
            if taken.setdefault(tuple(round(255 * share) for share in shares), name) is name:
                break
    sky, *colours = taken
    return np.array([*colours, sky], np.uint8)


def draw_motion(frame: Frame) -> np.ndarray:
    """Motion to the next frame, uint16 [H, W, 3]: x and y as STILL + STEPS · pixels, and 1 where they are valid.

    Not valid are points behind the next camera, motions beyond 512 pixels, and all of a path's last frame: 0, 0, 0.
    """
    values = np.round(STILL + STEPS * np.ascontiguousarray(frame.motion.T))
    valid = ((values >= 0) & (values <= WHITE)).all(axis=0)  # NaN is not
    x, y = np.where(valid, values, 0)
    return frame.picture(np.stack([x, y, valid], axis=1, dtype=np.uint16, casting="unsafe"))


def draw_visibility(frame: Frame) -> np.ndarray:
    """Which anchors of the arc see a point, uint8 [H, W, 3]: red 255 the first, green 255 the last; blue is 0."""
    view, stage = frame.sight.view, frame.stage
    seen = np.zeros((view.height, view.width, 3), np.uint8)
    for channel, anchor in enumerate(frame.anchors):
        seen[..., channel] = 255 * find_in(stage.scene.caster, anchor, frame.sight, sky=stage.sky).visible
    return seen


def draw_floats(frame: Frame) -> dict[str, np.ndarray]:
    """{channel: float32 [H, W]}: Z, planar depth in metres (the sky: inf); N, normals in camera axes (the sky: 0);
    P, position in the world in metres (the sky: NaN); motion, pixels to the next frame (unknown: NaN).
    """
    sight = frame.sight
    points = np.where(sight.hit[:, None], sight.view.eye + sight.depth[:, None] * sight.rays, np.nan)
    channels = {"Z": np.where(sight.hit, sight.depth, np.inf)}
    for name, values in (("N", frame.camera_normals), ("P", points), ("motion", frame.motion)):
        channels |= {f"{name}.{axis}": column for axis, column in zip("XYZ", values.T, strict=False)}
    return {name: frame.picture(values).astype(np.float32) for name, values in channels.items()}


@dataclass(frozen=True)
class Pass:
    """draw: of a frame. video: whether a video of 8 bits shows it. Others: what values mean, for the manifest."""

    draw: Callable[[Frame], np.ndarray | dict[str, np.ndarray]]
    bits: int
    channels: str
    range: str
    unit: str
    axes: str = ""
    video: bool = False

    def about(self) -> dict[str, str | int]:
        return {key: getattr(self, key) for key in ("bits", "channels", "range", "unit", "axes") if getattr(self, key)}


NORMAL_AXES, PICTURE_AXES = "+x right, +y up, +z towards the viewer", "+x right, +y down"
PASSES = {
    "depth": Pass(
        lambda frame: draw_depth(frame.sight, frame.stage.limits),
        bits=16,
        channels="grey",
        range="near and nearer: 65535; far and farther: 1",
        unit="metres, inverse, 65535 to 1; 0: sky",
        axes="along the view axis",
        video=True,
    ),
    "normal": Pass(
        draw_normal,
        bits=8,
        channels="x, y, z",
        range="-1 to 1 as 0 to 255; 0, 0, 0: sky",
        unit="length 1",
        axes=NORMAL_AXES,
        video=True,
    ),
    "clay": Pass(
        draw_clay,
        bits=8,
        channels="grey",
        range="60, seen edge on, to 220, seen squarely; 255: sky",
        unit="brightness, lit from the camera",
        video=True,
    ),
    "lines": Pass(draw_lines, bits=8, channels="grey", range="0 or 255", unit="255: line, one pixel wide", video=True),
    "ids": Pass(draw_ids, bits=8, channels="RGB", range="0, 0, 0: sky", unit="a colour per object", video=True),
    "motion": Pass(
        draw_motion,
        bits=16,
        channels="x, y, valid",
        range=f"{STILL} + {STEPS} * pixels, from -512 to 511.98; valid: 1, else 0, 0, 0",
        unit="pixels to the next frame",
        axes=PICTURE_AXES,
    ),
    "visibility": Pass(
        draw_visibility,
        bits=8,
        channels="first anchor of the arc, last anchor of the arc, 0",
        range="0 or 255",
        unit="255: the anchor sees the point",
    ),
    "exr": Pass(
        draw_floats,
        bits=32,
        channels="Z; N.X, N.Y, N.Z; P.X, P.Y, P.Z; motion.X, motion.Y",
        range="sky: Z inf, N 0, P NaN; unknown motion: NaN",
        unit="Z and P: metres; N: length 1; motion: pixels to the next frame",
        axes=f"Z along the view axis; N {NORMAL_AXES}; P world of cameras.json; motion {PICTURE_AXES}",
    ),
}
PICTURES = [name for name in PASSES if name != "exr"]
