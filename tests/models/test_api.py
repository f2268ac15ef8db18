"""The example of docs/python.md, run as it stands but on a small scene, gives the files of the scripts."""

import re
from pathlib import Path

import numpy as np
import pytest

import models
from tests.support.helpers import ROOT, forget_accelerator, probe_video
from tests.support.small import small_weights
from tests.support.stages import NUM_ARCS, PROMPT, RUN, VIDEO
from utils.cli import InputError
from utils.images import read_image
from utils.layout import ARC_FRAMES, anchor_path, frame_path


def example(scene: Path, loras: Path, video: Path, anchors: str, frames: str) -> str:
    """The code, with other files and quick settings."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 15
    changes = {
        'Path("assets/sampleA")': repr(scene),
        '"a village street in the evening sun"': repr(PROMPT),
        'Path("loras"), "boxtown", 400': f"{loras!r}, 'town', 4",
        "num_replacement=12": anchors,
        "num_inference_steps=30": frames,
        'weights="full"': "weights='tiny', device='cpu', dtype='float32'",
        "seed=42": "seed=1",
        'Path("video.mp4")': repr(video),
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return "from pathlib import PosixPath\n" + code


def run_example(*arguments: object) -> dict:
    found: dict = {}
    with small_weights():
        exec(example(*arguments), found)
    forget_accelerator()
    return found


QUICK = "num_steps=3, num_replacement=2, neg_prompt='fog'", "num_inference_steps=2"


@pytest.mark.slow
def test_the_example_gives_what_the_scripts_write(tmp_path: Path, filmed: Path, loras: Path):
    found = run_example(filmed, loras, tmp_path / "video.mp4", *QUICK)
    run, frames = filmed / "multiviews" / RUN, found["frames"]
    for k, anchor in enumerate(found["anchors"]):
        np.testing.assert_array_equal(anchor, read_image(anchor_path(run, k)))
    numbers = [arc * ARC_FRAMES + i for arc in range(NUM_ARCS) for i in range(bool(arc), ARC_FRAMES)]
    assert len(found["anchors"]) == NUM_ARCS + 1 and len(frames) == len(numbers) == 91
    for frame, number in zip(frames, numbers, strict=True):
        np.testing.assert_array_equal(frame, read_image(frame_path(run / VIDEO, number)))
    assert probe_video(tmp_path / "video.mp4")[1] == 91


def test_guidance_by_all_anchors_is_refused():
    with pytest.raises(InputError, match="from one anchor to the next only"):
        models.open_anchor_stage(None, (), [], models.AnchorSettings(sources="all"))


def test_bad_settings_are_refused_before_anything_is_loaded():
    with pytest.raises(InputError, match="there are 30 steps in all"):
        models.open_inbetween_stage([""], models.InbetweenSettings(num_replacement=31))
    with pytest.raises(InputError, match="leave --colour_match out"):
        models.open_inbetween_stage([""], models.InbetweenSettings(composite="seen", colour_match=True))


def test_all_public_names_are_there():
    for name in models.PUBLIC:
        assert getattr(models, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'stage'"):
        models.stage  # noqa: B018
    with pytest.raises(ImportError):
        from models import nothing  # noqa: F401
