"""What the window shows: a mesh, or a scene folder with its camera path, and the anchors and videos of a run on it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.cli import InputError
from utils.files import files_sha256, read_json
from utils.layout import (
    ARC_STEPS,
    MANIFEST,
    SCENE_FILE,
    Scene,
    anchor_path,
    find_anchors,
    frame_path,
    load_scene,
)
from utils.meshes.load import load_geometry
from utils.meshes.mesh import Geometry
from utils.runs import find_other_scene
from utils.scene.raycast import RayCaster
from utils.scene.scene_geometry import load_scene_geometry
from utils.scene.views import View
from utils.videos.page import shown_frames


@dataclass(frozen=True)
class Results:
    """Anchors, as many as the scene has arcs and one more, and finished videos: {name: 45 N + 1 frames}, made of them.

    run: folder of the anchors. anchors: empty where only the video is there. manifest: of the anchors.
    """

    run: Path
    anchors: Sequence[Path] = ()
    videos: dict[str, list[Path]] = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Content:
    """mesh: its file. scene_up: as given. views: one per frame, none for a mesh. scene, results: None where not given.

    geometry: in the world of the views, where there are some, else as the file has it.
    """

    mesh: Path
    geometry: Geometry
    caster: RayCaster
    scene_up: str | None = None
    views: Sequence[View] = ()
    scene: Scene | None = None
    results: Results | None = None

    @property
    def anchor_views(self) -> Sequence[View]:
        return self.views[::ARC_STEPS]


def open_content(source: Path, scene_up: str | None = None, run: Path | None = None) -> Content:
    """Read a mesh file or a scene folder, and the results of `run` on it. scene_up: '+y' or '+z', of a mesh file.

    Raises InputError, one line, for whatever is missing, damaged or does not belong together.
    """
    if not source.is_dir():
        if run:
            raise InputError(f"--run goes with the scene folder that it was made on; {source} is no folder")
        if not source.exists():
            raise InputError(f"{source} does not exist: give a mesh file, or a scene folder of preprocess.py")
        geometry = load_geometry(source, scene_up)
        for line in geometry.notes:
            print(f"note: {line}", file=sys.stderr)
        if not geometry.up_stated:
            print(f"note: {source} is taken as {geometry.up} up; if it lies down give --scene_up", file=sys.stderr)
        return Content(source, geometry, RayCaster(geometry), scene_up)
    if scene_up:
        raise InputError("--scene_up goes with a mesh file; a scene folder says which way is up")
    scene = load_scene(source)
    whole = load_scene_geometry(scene, scene.edge_size, "view.py")
    results = open_results(run, scene) if run else None
    return Content(source / SCENE_FILE, whole.geometry, whole.caster, None, whole.views, scene, results)


def open_results(folder: Path, scene: Scene) -> Results:
    """The results in a folder of anchors, with all finished videos in it, or in a folder of one video."""
    manifest = _manifest(folder)
    if anchor_path(folder, 0).is_file():
        _require_scene(folder, manifest, scene)
        if not manifest.get("finished"):
            raise InputError(f"{folder} is not finished: run sag_generate_anchor_view.py again")
        anchors = find_anchors(folder, len(scene.arcs) + 1)
        within = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}") if frame_path(path.parent, 0).is_file())
        videos = {}
        for video in within:
            try:
                videos[video.name] = _frames(video, scene, anchors, manifest)
            except InputError as error:
                print(f"note: {video.name} is not shown: {error}", file=sys.stderr)
        return Results(folder, anchors, videos, manifest)
    if not frame_path(folder, 0).is_file():
        raise InputError(f"{folder} holds neither anchors (image_00.png) nor frames of a video (0000.png)")
    run, anchors, of_anchors = folder.absolute().parent, (), {}
    if anchor_path(run, 0).is_file():
        of_anchors = _manifest(run)
        _require_scene(run, of_anchors, scene)
        anchors = find_anchors(run, len(scene.arcs) + 1)
    else:
        print(f"note: the anchors of {folder} do not lie around it, and are not shown", file=sys.stderr)
    videos = {folder.name: _frames(folder, scene, anchors, of_anchors)}
    return Results(run if anchors else folder, anchors, videos, of_anchors)


def _manifest(folder: Path) -> dict:
    if not folder.is_dir():
        raise InputError(f"run folder {folder} does not exist")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} holds no {MANIFEST}: give a folder of sag_generate_anchor_view.py or ggi.py")
    return read_json(folder / MANIFEST)


def _require_scene(folder: Path, manifest: dict, scene: Scene) -> None:
    """Refuse anchors or a video that were made for another scene."""
    if reason := find_other_scene(folder, manifest, scene):
        raise InputError(reason)


def _frames(folder: Path, scene: Scene, anchors: Sequence[Path], of_anchors: dict) -> list[Path]:
    """The frames of a finished video along the path; notes what its anchors do not have in common with it."""
    manifest = _manifest(folder)
    noted = manifest.get("arguments", {})
    if not manifest.get("finished"):
        raise InputError(f"{folder} is not finished: run ggi.py again")
    _require_scene(folder, manifest, scene)
    frames = [frame_path(folder, index) for index in shown_frames(len(scene.arcs))]
    if missing := [path for path in frames if not path.is_file()]:
        raise InputError(f"{missing[0]} is missing, one of {len(missing)}: run ggi.py again")
    if anchors and noted.get("anchors_sha256", "") not in ("", files_sha256(anchors)):
        print(f"note: {folder} was filled before an anchor was replaced: run ggi.py again", file=sys.stderr)
    weights = [values.get("weights") for values in (of_anchors.get("arguments", {}), noted)]
    if all(weights) and weights[0] != weights[1]:
        print(f"note: {folder} was filled by {weights[1]} weights, its anchors drawn by {weights[0]}", file=sys.stderr)
    return frames
