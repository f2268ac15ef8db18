"""Test scenes of the benchmark: what preprocessing gives the stages, and what the true pictures are.

A scene is a town and a camera path of two arcs. Its edges and correspondences are made by the functions of
preprocessing at preprocessing's sizes, and cached; its true pictures are rendered when they are needed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from synthetic.clips import MAP_SIZE, path_noise
from synthetic.render import World, class_map, draw_edges, paint, town_world, trace, typical_depth
from synthetic.scenes import IMAGE_SIZE, PATHS, coarsen, make_path, make_town, to_camera_path
from synthetic.styles import Style
from utils.cameras.path import CameraPath
from utils.cli import InputError
from utils.correspondence import encode_map
from utils.data.tensor_cache import read_arrays, write_arrays
from utils.edges import resize_edges
from utils.evaluation.covisibility import Covisibility, make_covisibility
from utils.evaluation.pictures import line_size, thin
from utils.layout import ARC_FRAMES, ARC_STEPS
from utils.scene.views import View, correspondence, make_views

ARCS = 2
ANCHORS = [ARC_STEPS * k for k in range(ARCS + 1)]  # frames, counted from 0
VERSION = 1  # of what is drawn; a cache of another version is made again


@dataclass(frozen=True)
class AnchorData:
    """What the anchors need. Maps lie on anchor k + 1 and lead to anchor k.

    edges: uint8 [3, H, W]. codes: uint16 [2, 240, 360, 3]. positions: float32 [2, H, W, 2], exact, in pixels of the
    picture, with visible: bool [2, H, W].
    """

    edges: np.ndarray
    codes: np.ndarray
    positions: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class ArcData:
    """What the frames between the first two anchors need. edges: uint8 [46, H, W]; noise: float32 [13, h, w, 16]."""

    edges: np.ndarray
    noise: np.ndarray


@dataclass(frozen=True)
class PathData:
    """What a video of the whole path needs, and what its structure is measured against.

    edges: uint8 [91, H, W]. noise: float32 [2, 13, h, w, 16], for each arc. lines: bool [91, l, 720], one pixel wide.
    """

    edges: np.ndarray
    noise: np.ndarray
    lines: np.ndarray


@dataclass(frozen=True)
class CheckScene:
    """One test scene. number: its place in the benchmark, which decides how the camera moves; size: width, height.

    coarse: by how much the mesh that the method gets is off (`coarsen`); 0: not at all. Pictures and the lines and
    correspondences of the metrics are the true town's. loop: the second arc is the way back of the first.

    Raises InputError, when its path is asked for, if there is none that keeps clear of the town.
    """

    seed: int
    number: int
    size: tuple[int, int]
    cache: Path
    coarse: float = 0.0
    loop: bool = False

    edge_size: ClassVar[tuple[int, int]] = IMAGE_SIZE  # at which edges are drawn

    @cached_property
    def _town(self) -> tuple[World, World, CameraPath]:
        """The method's town, the true one, and the path."""
        parts = make_town(self.seed)
        for k in range(len(PATHS)):
            try:
                c2w = make_path(parts, PATHS[(self.number + k) % len(PATHS)], self.seed, ARCS * ARC_STEPS + 1)
            except InputError:  # this town is too narrow for this kind
                continue
            if self.loop:
                c2w = np.concatenate([c2w[:ARC_STEPS], c2w[ARC_STEPS::-1]])
            true = town_world(parts)
            world = town_world(coarsen(parts, self.coarse, self.seed)) if self.coarse else true
            return world, true, to_camera_path(c2w)
        raise InputError(f"town {self.seed} has no clear camera path; choose another --first_scene")

    @property
    def world(self) -> World:
        return self._town[0]

    @property
    def true_world(self) -> World:
        return self._town[1]

    @cached_property
    def views(self) -> list[View]:
        """All frames of the path, at the picture's size."""
        return make_views(self._town[2], self.size)

    @cached_property
    def anchors(self) -> AnchorData:
        return AnchorData(**self._cached("anchors", self._draw_anchors))

    @cached_property
    def arc(self) -> ArcData:
        return ArcData(**self._cached("arc", self._draw_arc))

    @cached_property
    def path(self) -> PathData:
        stored = self._cached("path", self._draw_path)
        lines = np.unpackbits(stored["lines"], axis=2, count=line_size(self.size)[0])
        return PathData(stored["edges"], stored["noise"], lines.astype(bool))

    @cached_property
    def covisibility(self) -> Covisibility:
        """All correspondences that the metrics of a video look at."""
        stored = self._cached("covisibility", self._find_covisible)
        width, height, step, frames = stored["numbers"].tolist()
        arrays = (stored[name] for name in ("pairs", "position", "visible"))
        return Covisibility((width, height), step, frames, *arrays)

    def _cached(self, name: str, draw) -> dict[str, np.ndarray]:
        kind = f"_coarse{self.coarse}" * bool(self.coarse) + "_loop" * self.loop
        path = self.cache / f"{self.seed}_{name}{kind}.safetensors"
        identity = {"seed": self.seed, "number": self.number, "size": list(self.size), "version": VERSION}
        identity |= ({"coarse": self.coarse} if self.coarse else {}) | ({"loop": True} if self.loop else {})
        arrays = read_arrays(path, identity)
        if arrays is None:
            arrays = draw()
            write_arrays(path, arrays, identity)
        return arrays

    def _draw_anchors(self) -> dict[str, np.ndarray]:
        maps, caster = make_views(self._town[2], MAP_SIZE), self.world.caster
        coarse = [correspondence(caster, maps[a], maps[b]) for a, b in pairwise(ANCHORS)]
        exact = [correspondence(self.true_world.caster, self.views[a], self.views[b]) for a, b in pairwise(ANCHORS)]
        return {
            "edges": self._edges(ANCHORS),
            "codes": np.array([encode_map(one.position, one.visible) for one in coarse]),
            "positions": np.array([np.nan_to_num(one.position) for one in exact], np.float32),
            "visible": np.array([one.visible for one in exact]),
        }

    def _draw_arc(self) -> dict[str, np.ndarray]:
        return {"edges": self._edges(range(ARC_FRAMES)), "noise": self._noise(0)}

    def _draw_path(self) -> dict[str, np.ndarray]:
        frames, edges, lines = range(ARCS * ARC_STEPS + 1), [], []
        drawn = self._large_edges(frames, self.world)
        true = self._large_edges(frames, self.true_world) if self.coarse else None
        for given in drawn:
            truth = next(true) if true else given
            edges.append(resize_edges(given, *self.size)[..., 0])
            lines.append(np.packbits(thin(resize_edges(truth, *line_size(self.size))), axis=1))
        noise = [self._noise(arc) for arc in range(ARCS)]
        return {name: np.array(a) for name, a in (("edges", edges), ("noise", noise), ("lines", lines))}

    def _find_covisible(self) -> dict[str, np.ndarray]:
        found = make_covisibility(self.true_world.caster, self.views)
        numbers = np.array([*found.size, found.step, found.num_frames])
        return {"numbers": numbers, "pairs": found.pairs, "position": found.position, "visible": found.visible}

    def _noise(self, arc: int) -> np.ndarray:
        """Noise that follows an arc: float32 [13, h, w, 16]."""
        first, (width, height) = ARC_STEPS * arc + 1, self.size
        along = self._town[2].subset(first, first + ARC_STEPS)
        return path_noise(self.world, along, (width // 8, height // 8), 0, arc)

    def _edges(self, frames: Iterable[int]) -> np.ndarray:
        """Soft edges drawn at preprocessing's size and resized as for the models: uint8 [N, H, W]."""
        return np.array([resize_edges(edges, *self.size)[..., 0] for edges in self._large_edges(frames, self.world)])

    def _large_edges(self, frames: Iterable[int], world: World) -> Iterator[np.ndarray]:
        """Soft edges at preprocessing's size, uint8 [720, 1080, 3], one by one."""
        path = self._town[2]
        depth = typical_depth(world, make_views(path, MAP_SIZE))
        large = make_views(path, self.edge_size)
        return (draw_edges(world, large[frame], depth) for frame in frames)

    def anchor_pictures(self, style: Style) -> tuple[np.ndarray, np.ndarray]:
        """True anchors, uint8 [3, H, W, 3], and the class of each of their pixels, int8 [3, H, W]."""
        return self._pictures(ANCHORS, style)

    def path_pictures(self, style: Style) -> tuple[np.ndarray, np.ndarray]:
        """True frames of both arcs, uint8 [91, H, W, 3], and the class of each of their pixels, int8 [91, H, W]."""
        return self._pictures(range(len(self.views)), style)

    def _pictures(self, frames: Iterable[int], style: Style) -> tuple[np.ndarray, np.ndarray]:
        pairs = []
        for frame in frames:
            buffer = trace(self.true_world, self.views[frame])
            pairs.append((paint(buffer, style), class_map(buffer)))
        pictures, classes = map(np.array, zip(*pairs, strict=True))
        return pictures, classes

    def arc_pictures(self, style: Style) -> np.ndarray:
        """True frames of the first arc: uint8 [46, H, W, 3]."""
        return np.array([paint(trace(self.true_world, view), style) for view in self.views[:ARC_FRAMES]])
