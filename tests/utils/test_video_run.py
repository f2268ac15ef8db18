"""The run of a video whose anchors are replaced after it was made."""

from pathlib import Path

import pytest

from tests.support.helpers import write_picture
from utils.files import files_sha256
from utils.layout import Arc, Scene, frame_path
from utils.runs import open_run
from utils.videos.run import VideoJob, anchor_hashes, arcs_to_refill

ARCS = 3


@pytest.fixture
def anchors(tmp_path: Path) -> list[Path]:
    return [write_picture(tmp_path / f"anchor{k}.png", 16, 8, seed=k) for k in range(ARCS + 1)]


def made(folder: Path, anchors: list[Path], **arguments: object):
    """The run of a finished video, opened again."""
    arguments |= {"anchors_sha256": files_sha256(anchors)}
    run = open_run(folder, arguments)
    run.begin(anchors=anchor_hashes(anchors), weights={})
    write_picture(frame_path(folder, 0), 16, 8)
    run.finish()
    return open_run(folder, arguments)


@pytest.mark.parametrize(
    ("sources", "chain", "replaced", "again"),
    [
        ("ends", False, 1, [0, 1]),
        ("ends", True, 1, [0, 1, 2]),  # arc 2 starts from arc 1's last frame
        ("ends", True, 0, [0, 1, 2]),
        ("ends", True, 3, [2]),
        ("all", False, 1, [0, 1, 2]),
    ],
)
def test_arcs_that_depend_on_a_replaced_anchor_are_filled_again(tmp_path, anchors, sources, chain, replaced, again):
    run = made(tmp_path / "video", anchors, sources=sources, chain=chain)
    assert arcs_to_refill(run, anchors) == []
    write_picture(anchors[replaced], 16, 8, seed=9)
    assert arcs_to_refill(run, anchors) == again


def test_a_kill_while_old_frames_are_removed_leaves_them_to_be_filled_again(tmp_path, anchors, monkeypatch):
    run = made(tmp_path / "video", anchors)
    write_picture(anchors[0], 16, 8, seed=9)
    scene = Scene(tmp_path, tuple(Arc(k, tmp_path / f"arc{k}") for k in range(ARCS)), (16, 8), (16, 8))
    job = VideoJob(scene, anchors, [None] * ARCS, run, "", refill=arcs_to_refill(run, anchors))

    def killed(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        job.begin(weights={})
    again = open_run(run.folder, run.manifest["arguments"])
    assert arcs_to_refill(again, anchors) == [0]
    job.begin(weights={})
    assert not frame_path(run.folder, 0).exists()
    assert arcs_to_refill(open_run(run.folder, run.manifest["arguments"]), anchors) == []
