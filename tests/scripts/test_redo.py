"""Draw one anchor again, replace one by a picture, and fill the arcs again that they end."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.scene.preprocess_common import BOXES, SMALL, run_main, write_boxes, write_path
from tests.support.helpers import ANCHORS, GGI, call, contents, write_picture
from tests.support.stages import NUM_ARCS, QUICK_VIDEO, RUN, VIDEO, draw
from utils.files import read_json
from utils.images import read_image
from utils.layout import anchor_path, find_anchors

ALWAYS = {"run.json", "contact_sheet.png"}  # files that depend on all anchors


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]} - ALWAYS


@pytest.mark.slow
def test_one_anchor_is_drawn_anew_and_its_arc_filled_again(tmp_path: Path, filmed: Path, loras: Path, capsys):
    scene = shutil.copytree(filmed, tmp_path / "scene")
    run, video = scene / "multiviews" / RUN, scene / "multiviews" / RUN / VIDEO
    before, frames = contents(run), contents(video)
    assert call(ANCHORS, *draw(scene, loras, "--redo", 2, "--redo_prompt", "a town at night")) == 0
    assert {name for name in changed(before, contents(run)) if "/" not in name} == {"image_02.png"}
    assert read_json(run / "run.json")["redone"] == {"2": {"seed": 2, "prompt": "a town at night"}}
    redrawn = anchor_path(run, 2).read_bytes()
    assert call(ANCHORS, *draw(scene, loras, "--redo", 2, "--redo_seed", 2, "--redo_prompt", "a town at night")) == 0
    assert anchor_path(run, 2).read_bytes() == redrawn
    assert call(ANCHORS, *draw(scene, loras)) == 0 and "is finished" in capsys.readouterr().out

    assert call(GGI, "--target", run, *QUICK_VIDEO) == 0
    assert f"arcs 1 of {video} are filled again" in capsys.readouterr().out
    differing = {name for name in changed(frames, contents(video)) if name.endswith(".png") and name[0].isdigit()}
    assert differing and min(differing) >= "0046.png"
    assert read_json(video / "run.json")["finished"]
    again = contents(video)
    assert call(GGI, "--target", run, *QUICK_VIDEO) == 0 and "is finished" in capsys.readouterr().out
    assert contents(video) == again


@pytest.mark.slow
def test_a_picture_takes_the_place_of_an_anchor(tmp_path: Path, filmed: Path, loras: Path, capsys):
    scene = shutil.copytree(filmed, tmp_path / "scene")
    run = scene / "multiviews" / RUN
    before, picture = contents(run), write_picture(tmp_path / "retouched.png", 48, 32)
    for _ in range(2):
        assert call(ANCHORS, *draw(scene, loras, "--use_picture", f"0={picture}")) == 0
        assert read_json(run / "run.json")["pictures"] == [0]
    assert {name for name in changed(before, contents(run)) if "/" not in name} == {"image_00.png"}
    np.testing.assert_array_equal(read_image(anchor_path(run, 0)), read_image(picture))
    assert not capsys.readouterr().err
    square = write_picture(tmp_path / "square.png", 40, 40)
    assert call(ANCHORS, *draw(scene, loras, "--use_picture", f"0={square}")) == 0
    assert "square.png: 40x40 is stretched to 48x32" in capsys.readouterr().err
    assert call(ANCHORS, *draw(scene, loras, "--redo", 1, 0)) == 0  # in order, whatever the order given
    noted = read_json(run / "run.json")
    assert noted["pictures"] == [] and noted["redone"].keys() == {"0", "1"}
    drawn = contents(run)
    assert call(ANCHORS, *draw(scene, loras, "--redo", 0, 1)) == 0
    assert not {name for name in changed(drawn, contents(run)) if "/" not in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (("--redo", 3), "each anchor once, of 0 to 2"),
        (("--redo", 1, 1), "each anchor once"),
        (("--redo", 1, "--seed", -1), "go with one scene, LoRA and --seed"),
        (("--redo", 1, "--overwrite"), "without --overwrite"),
        (("--redo", 1, "--seed", 5), "is not finished: give the command without --redo"),
        (("--redo_seed", 5), "--redo_seed and --redo_prompt go with --redo"),
        (("--redo", 1, "--redo_seed", 2**63), "is not below 2^63"),
        (("--use_picture", "picture.png"), "is not K=FILE"),
        (("--use_picture", "1=missing.png"), "missing.png does not exist"),
    ],
)
def test_what_cannot_be_redone_is_refused(filmed: Path, loras: Path, capsys, flags: tuple, telling: str):
    before = contents(filmed / "multiviews" / RUN)
    assert call(ANCHORS, *draw(filmed, loras, *flags)) == 2
    assert telling in capsys.readouterr().err
    assert contents(filmed / "multiviews" / RUN) == before


@pytest.mark.slow
def test_all_anchors_guide_one_another(tmp_path: Path, loras: Path, capsys, monkeypatch):
    mesh, cameras = write_boxes(tmp_path / "boxes.glb", *BOXES, up="y"), write_path(tmp_path / "path.json", 91)
    scene = tmp_path / "scene"
    assert run_main(monkeypatch, "--scene", mesh, "--cameras", cameras, "--output", scene, *SMALL) == 0
    runs = {}
    for sources in ("previous", "all"):
        assert call(ANCHORS, *draw(scene, loras, "--sources", sources, "--output_dir", tmp_path / sources)) == 0
        runs[sources] = contents(tmp_path / sources / RUN)
    assert runs["all"]["image_00.png"] == runs["previous"]["image_00.png"]
    assert runs["all"]["image_02.png"] != runs["previous"]["image_02.png"]
    assert len(find_anchors(tmp_path / "all" / RUN, NUM_ARCS + 1)) == 3
    redo = ("--sources", "all", "--output_dir", tmp_path / "all", "--redo", 0)
    assert call(ANCHORS, *draw(scene, loras, *redo)) == 0
    assert (tmp_path / "all" / RUN / "warped_x_00.png").exists()  # guided by the anchor after it
    (scene / "scene.glb").unlink()
    assert call(ANCHORS, *draw(scene, loras, "--sources", "all", "--output_dir", tmp_path / "none")) == 2
    assert "--sources all needs" in capsys.readouterr().err
