"""The run of one video: save the frames of its arcs, tell which are done, write the mp4 and the contact sheet."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.cli import InputError
from utils.files import files_sha256
from utils.images import contact_sheet, read_image, write_image, write_video
from utils.layout import (
    ARC_FRAMES,
    CONTACT_SHEET,
    VIDEO_FILE,
    Arc,
    Scene,
    chain_path,
    frame_path,
    latents_path,
    resample_indices,
)
from utils.runs import Run
from utils.scene.scene_geometry import SceneGeometry
from utils.videos.page import METRICS, collect, write_page

SHEET_COLUMNS = 8  # frames per arc on the contact sheet


@dataclass
class VideoJob:
    """The anchors of one scene, and the run of the video made from them.

    noises: float32 [13, h, w, 16] per arc, None where it has no weight. prompt: the given one, or the caption
    stored by an interrupted run; None until one exists. geometry: of the scene, at the video's size, where anchors are
    carried. refill: numbers of finished arcs whose anchors were replaced since.
    """

    scene: Scene
    anchors: list[Path]
    noises: list[np.ndarray | None]
    run: Run
    prompt: str | None
    geometry: SceneGeometry | None = None
    refill: Sequence[int] = ()

    def begin(self, weights: Mapping, **entries: object) -> None:
        """Begin or continue the run, without the arcs to refill. weights: hashes of the networks' files."""
        if self.refill:
            self.run.require_begun_with(weights)
            # First, so that a run that is killed here still knows that these arcs are not those of its anchors.
            for arc in (self.scene.arcs[k] for k in self.refill):
                for path in [*arc_frame_paths(self.run, arc), latents_path(self.run.folder, arc.index)]:
                    path.unlink(missing_ok=True)
            (self.run.folder / METRICS).unlink(missing_ok=True)  # of the old arcs
            self.run.manifest["arguments"]["anchors_sha256"] = files_sha256(self.anchors)
        self.run.begin(weights=weights, **entries, anchors=anchor_hashes(self.anchors))


def anchor_hashes(anchors: Sequence[Path]) -> list[str]:
    return [files_sha256([path]) for path in anchors]


def arcs_to_refill(run: Run, anchors: Sequence[Path]) -> list[int]:
    """Numbers of the arcs of a run that depend on an anchor that was replaced since it began.

    Chained, an arc starts from the last frame of the one before, and so depends on all anchors before it, too.
    Raises InputError for a run that does not know its anchors one by one.
    """
    arguments, known = run.manifest["arguments"], run.manifest.get("anchors")
    if run.replaces or arguments["anchors_sha256"] == files_sha256(anchors):
        return []
    if known is None:
        raise InputError(f"{run.folder} was made with other anchors; pass --overwrite to replace it")
    changed = {k for k, (old, new) in enumerate(zip(known, anchor_hashes(anchors), strict=True)) if old != new}
    if arguments.get("sources") == "all":  # every arc carries every anchor
        return [*range(len(anchors) - 1)]
    if arguments.get("chain"):
        return [*range(max(min(changed) - 1, 0), len(anchors) - 1)]
    return sorted({arc for k in changed for arc in (k - 1, k) if 0 <= arc < len(anchors) - 1})


def arc_frame_paths(run: Run, arc: Arc) -> list[Path]:
    return [frame_path(run.folder, arc.index * ARC_FRAMES + i) for i in range(ARC_FRAMES)]


def is_done(run: Run, arc: Arc) -> bool:
    return chain_path(run.folder, arc.index + 1).exists() and all(p.exists() for p in arc_frame_paths(run, arc))


def save_arc(run: Run, arc: Arc, frames: np.ndarray) -> None:
    for path, frame in zip(arc_frame_paths(run, arc), frames[:ARC_FRAMES], strict=True):
        write_image(path, frame)
    latents_path(run.folder, arc.index).unlink(missing_ok=True)


def finish_video(job: VideoJob, fps: int, carried: Iterable[np.ndarray] | None = None) -> None:
    """Write video, contact sheet and page from the saved frames. carried: for the page, see `collect`."""
    run, arcs = job.run, job.scene.arcs
    shown = [path for arc in arcs for path in arc_frame_paths(run, arc)[bool(arc.index) :]]
    write_video(run.folder / VIDEO_FILE, (read_image(path) for path in shown), fps)
    rows = []
    columns = resample_indices(ARC_FRAMES, SHEET_COLUMNS)
    for arc in arcs:
        frames = arc_frame_paths(run, arc)
        rows.append((f"arc {arc.index}: edges", [read_image(arc.edge_paths[i]) for i in columns]))
        rows.append((f"arc {arc.index}: frames", [read_image(frames[i]) for i in columns]))
    rows.append(("anchors", [read_image(path) for path in job.anchors]))
    write_image(run.folder / CONTACT_SHEET, contact_sheet(rows))
    for arc in arcs:  # left by an arc that was interrupted at the very end
        latents_path(run.folder, arc.index).unlink(missing_ok=True)
    make_page(job, fps, carried)
    run.finish(fps=fps)


def make_page(job: VideoJob, fps: int, carried: Iterable[np.ndarray] | None = None) -> None:
    """Write the page of a video that is complete."""
    height, width = read_image(frame_path(job.run.folder, 0)).shape[:2]
    collect(job.run.folder, job.anchors, job.scene, (width, height), fps, carried)
    write_page(job.run.folder)
