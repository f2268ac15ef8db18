"""Carry pictures along a scene's geometry: reproject what other views of a scene show to one view.

    carried = carry(caster, [Picture(anchor, view, nearness), ...], target)

Rays decide visibility, not a z-buffer. Several pictures that see a point are blended: those that show it in less than
full resolution count less, then the nearer one counts more, and each fades out towards the border of what it sees, so
that no seam runs through a face. The idea of projecting pictures as textures that depend on the view: Debevec et al.,
SIGGRAPH 1996; of fading at borders: Buehler et al., Unstructured Lumigraph Rendering, SIGGRAPH 2001.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import permutations

import cv2
import numpy as np

from utils.layout import ARC_FRAMES, ARC_STEPS
from utils.meshes.mesh import dot
from utils.scene.raycast import RayCaster
from utils.scene.views import Sight, View, find_in, look, resize_view

FADE = 8.0  # pixels of the target over which a picture fades in from the border of what it shows
SHARPNESS = 4  # power of the resolution, in source pixels per target pixel, by which pictures are weighed
GRAZING = 0.2  # cosine between the line of sight and the normal, below which a colour is not sure
MAGNIFICATION = 2.0  # target pixels per source pixel, above which it is not sure
JUMP = 0.02  # share of its depth by which a pixel lies off its neighbour's plane, at a border between surfaces
FARTHEST = 1e-3  # nearness of a picture that is an arc or more away
INPAINT_RADIUS = 3  # pixels


@dataclass(frozen=True)
class Picture:
    """A picture of a view of the scene. pixels: uint8 [h, w, 3], of any size: the view is resized to it.

    nearness: above 0; its weight beside other pictures that show a point as sharply, such as nearness in time.
    """

    pixels: np.ndarray
    view: View
    nearness: float = 1.0


@dataclass(frozen=True)
class Carried:
    """colours: float32 [H, W, 3], 0 to 255, 0 where nothing is seen. seen, sure: bool [H, W].

    sure: seen squarely and in enough resolution by one picture at least, and not at a border between surfaces.
    """

    colours: np.ndarray
    seen: np.ndarray
    sure: np.ndarray


@dataclass(frozen=True)
class CarriedVideo:
    """Pictures carried to a sequence of views, holes inpainted. frames: uint8 [F, H, W, 3]; others as in `Carried`."""

    frames: np.ndarray
    seen: np.ndarray
    sure: np.ndarray


def anchors_for_arc(arc: int, sources: str, count: int) -> range:
    """Numbers of the anchors that are carried to an arc: all of `count`, or its two ends."""
    return range(count) if sources == "all" else range(arc, arc + 2)


def carry_to_arc(
    caster: RayCaster, views: Sequence[View], anchors: Mapping[int, np.ndarray], arc: int
) -> CarriedVideo:
    """Carry anchors to the 46 frames of an arc, blended by their nearness in time where several see a point.

    views: one per frame of the path, at the size of the result. anchors: {number: picture}. arc: its number, from 0.
    """

    def one(frame: int) -> tuple[np.ndarray, Carried]:
        near = {k: max(1 - abs(frame - ARC_STEPS * k) / ARC_STEPS, FARTHEST) for k in anchors}
        carried = carry(caster, [Picture(anchors[k], views[ARC_STEPS * k], near[k]) for k in anchors], views[frame])
        return fill_holes(np.round(carried.colours).astype(np.uint8), ~carried.seen), carried

    first = ARC_STEPS * arc
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        pictures, parts = zip(*pool.map(one, range(first, first + ARC_FRAMES)), strict=True)
    return CarriedVideo(
        np.array(pictures), *(np.array([getattr(part, name) for part in parts]) for name in ("seen", "sure"))
    )


def carry_to_anchor(
    caster: RayCaster, views: Sequence[View], anchors: Mapping[int, np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Carry all other anchors to anchor k: (uint8 [H, W, 3], bool [H, W] where it is seen); None if there is none.

    Holes are inpainted: black ones would be encoded into the latents beside them.
    views: one per frame of the path, at the size of the result. anchors: {number: picture}.
    """
    pictures = [Picture(anchors[j], views[ARC_STEPS * j], 1 / abs(j - k)) for j in anchors if j != k]
    if not pictures:
        return None
    carried = carry(caster, pictures, views[ARC_STEPS * k])
    return fill_holes(np.round(carried.colours).astype(np.uint8), ~carried.seen), carried.seen


def carry(caster: RayCaster, pictures: Sequence[Picture], target: View) -> Carried:
    """Carry `pictures` to the view `target`. The sky is at infinity."""
    sight = look(caster, target)
    shape = (target.height, target.width)
    normals = caster.normals_of(sight.face)
    own_density, _ = _footprint(sight, normals, target, sight.own_offsets)
    weights, total = np.zeros(shape, np.float32), np.zeros((*shape, 3), np.float32)
    sure = np.zeros(shape, bool)
    for picture in pictures:
        source = resize_view(picture.view, (picture.pixels.shape[1], picture.pixels.shape[0]))
        offsets = sight.offsets(source.eye)
        found = find_in(caster, source, sight, offsets=offsets)
        visible = found.visible
        density, cosine = _footprint(sight, normals, source, offsets)
        scale = np.sqrt(density / own_density).reshape(shape)
        colours = _sample(picture.pixels, found.position, np.where(visible, scale, 1))
        fade = np.minimum(cv2.distanceTransform(visible.astype(np.uint8), cv2.DIST_L2, 3) / FADE, 1)
        weight = visible * (picture.nearness * np.minimum(scale, 1) ** SHARPNESS * fade + 1e-9)
        total += _weighted(colours, weight)
        weights += weight
        sure |= visible & (cosine.reshape(shape) >= GRAZING) & (scale >= 1 / MAGNIFICATION)
    seen = weights > 0
    total /= np.maximum(weights, 1e-12)[..., None]
    return Carried(total, seen, sure & ~borders(caster, sight))


def _footprint(sight: Sight, normals: np.ndarray, view: View, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well `view` samples the points seen: (density, cosine), both float32 [N].

    normals: float32 [N, 3], of the faces seen. offsets: [N, 3], from the eye of `view` to the points. density: its
    pixels per unit of area, per unit of solid angle for the sky. cosine: between the line of sight and
    the normal, without sign; 1 for the sky.
    """
    offsets = offsets.astype(np.float32)
    planar = np.maximum(-dot(offsets, view.c2w[:3, 2].astype(np.float32)), 1e-6)
    length = np.sqrt(dot(offsets, offsets))
    across = np.where(sight.hit, np.abs(dot(normals, offsets)), length)
    return np.maximum(np.float32(view.fx * view.fy) * across / planar**3, 1e-12), across / length


def _sample(pixels: np.ndarray, position: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Colours at `position` [H, W, 2]: float32 [H, W, 3]. scale: source pixels per target pixel, [H, W].

    Bilinear; trilinear in an image pyramid where the source is finer.
    """
    level = np.log2(np.maximum(scale, 1))
    levels = [pixels.astype(np.float32)]
    while len(levels) <= level.max() and min(levels[-1].shape[:2]) > 1:
        height, width = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA))
    place = cv2.patchNaNs(position.astype(np.float32), -1)
    colours = np.zeros((*position.shape[:2], 3), np.float32)
    for number, image in enumerate(levels):
        share = np.maximum(0, 1 - np.abs(np.minimum(level, len(levels) - 1) - number))
        if share.any():
            factors = np.divide(image.shape[1::-1], pixels.shape[1::-1], dtype=np.float32)
            x, y = (place[..., k] * factors[k] - np.float32(0.5) for k in (0, 1))
            seen = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            colours += _weighted(seen, share)
    return colours


def _weighted(colours: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Colours, float32 [H, W, 3], times a weight of each pixel, float32 [H, W]: OpenCV is faster here than numpy."""
    return cv2.multiply(colours, cv2.merge([weight] * 3))


def borders(caster: RayCaster, sight: Sight) -> np.ndarray:
    """Pixels whose neighbour's surface does not go on from theirs, or the other way round: bool [H, W]."""
    shape = (sight.view.height, sight.view.width)
    face, numbers = sight.face.reshape(shape), np.arange(len(sight.face)).reshape(shape)
    found = np.zeros(len(sight.face), bool)
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        other = face[here] != face[there]
        for a, b in permutations((numbers[here][other], numbers[there][other])):
            rays, depth = np.take(sight.rays.T, b, axis=1).T, sight.depth[b]
            expected = caster.plane_depth(sight.face[a], sight.view.eye, rays)
            apart = ~(np.abs(expected - depth) <= JUMP * depth) | (sight.face[b] < 0)
            found[a[apart]] = found[b[apart]] = True
    return found.reshape(shape)


def fill_holes(picture: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Inpaint holes with OpenCV (Telea 2004). picture: uint8 [H, W, 3]. holes: bool [H, W]; all of it stays black."""
    if not holes.any() or holes.all():
        return picture
    return cv2.inpaint(picture, holes.astype(np.uint8), INPAINT_RADIUS, cv2.INPAINT_TELEA)
