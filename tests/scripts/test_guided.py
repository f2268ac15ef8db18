"""ggi.py with anchors that are carried along the geometry."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.scene.preprocess_common import BOXES, SMALL, run_main, write_boxes, write_path
from tests.support.helpers import GGI, assert_same, call, contents, kill_at, run
from tests.support.stages import FLOAT32, PROMPT, VIDEO
from utils.images import read_image, write_image
from utils.layout import anchor_path

ARCS = 2
RUN = "multiviews/hand_drawn"
QUICK = ("--prompt", PROMPT, "--num_inference_steps", 2, "--guidance_scale", 1, *FLOAT32)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A run with three anchors, of a scene that was preprocessed."""
    folder = tmp_path_factory.mktemp("guided")
    mesh, cameras = write_boxes(folder / "boxes.glb", *BOXES, up="y"), write_path(folder / "path.json", 45 * ARCS + 1)
    with pytest.MonkeyPatch.context() as patch:
        assert run_main(patch, "--scene", mesh, "--cameras", cameras, "--output", folder / "scene", *SMALL) == 0
    for k in range(ARCS + 1):
        y, x = np.mgrid[:32, :48]
        write_image(anchor_path(folder / "scene" / RUN, k), np.uint8(np.stack([5 * x, 7 * y, 0 * x + 90 * k], -1)))
    return folder / "scene" / RUN


def fill(target: Path, output: Path, *flags: object) -> Path:
    assert call(GGI, "--target", target, "--output_dir", output, *QUICK, *flags) == 0
    return output / VIDEO


def frames(folder: Path) -> np.ndarray:
    return np.array([read_image(path) for path in sorted(folder.glob("[0-9]*.png"))]).astype(int)


@pytest.mark.slow
def test_flags_that_guide_change_the_video_and_no_others_do(target: Path, tmp_path: Path):
    plain = contents(fill(target, tmp_path / "plain"))
    assert_same(contents(fill(target, tmp_path / "none", "--num_replacement", 0)), plain)
    guided = frames(fill(target, tmp_path / "guided", "--num_replacement", 2))
    covered = frames(fill(target, tmp_path / "covered", "--composite"))
    assert guided.shape == covered.shape == (46 * ARCS, 32, 48, 3)
    usual = frames(tmp_path / "plain" / VIDEO)
    assert (guided != usual).any() and (covered != usual).any()
    for k in range(ARCS):  # a frame with an anchor's camera shows the anchor
        anchor = read_image(anchor_path(target, k)).astype(int)
        assert np.abs(covered[46 * k] - anchor).mean() < 1 < np.abs(usual[46 * k] - anchor).mean()


@pytest.mark.slow
def test_guided_arcs_go_on_where_they_were_stopped_and_are_shared(target: Path, tmp_path: Path):
    flags = ("--num_replacement", 2, "--composite", "--sources", "all", "--no-chain")
    whole = contents(fill(target, tmp_path / "whole", *flags))
    arguments = ("--target", target, "--output_dir", tmp_path / "parts", *QUICK, *flags)
    kill_at(tmp_path / "parts" / VIDEO / "0010.png", GGI, *arguments)
    assert run(GGI, *arguments, processes=2).returncode == 0
    assert_same(contents(tmp_path / "parts" / VIDEO), whole)


@pytest.mark.parametrize(
    ("flags", "telling"),
    [
        (("--num_replacement", 3), "--num_replacement 3: there are 2 steps in all"),
        (("--composite", "--colour_match"), "leave --colour_match out"),
        (("--sources", "all"), "--sources all goes with"),
        (("--replacement_coverage", 0.5), "--replacement_coverage goes with --num_replacement"),
        (("--replacement_coverage", 1.5), "between 0 and 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(target: Path, tmp_path: Path, capsys, flags: tuple, telling: str):
    assert call(GGI, "--target", target, "--output_dir", tmp_path, *QUICK, *flags) == 2
    assert telling in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["scene.glb", "cameras.json"])
def test_a_scene_without_geometry_is_refused(target: Path, tmp_path: Path, capsys, missing: str):
    scene = shutil.copytree(target.parent.parent, tmp_path / "scene")
    (scene / missing).unlink()
    assert call(GGI, "--target", scene / RUN, *QUICK, "--composite") == 2
    assert f"has no {missing}, which --num_replacement, --composite and --colour_match need" in capsys.readouterr().err


@pytest.mark.slow
def test_another_mesh_is_another_input(target: Path, tmp_path: Path, capsys):
    scene = shutil.copytree(target.parent.parent, tmp_path / "scene")
    flags = ("--target", scene / RUN, "--output_dir", tmp_path / "video", *QUICK, "--composite")
    assert call(GGI, *flags) == 0
    write_boxes(tmp_path / "other.glb", *BOXES[:2], up="y")
    shutil.copy(tmp_path / "other.glb", scene / "scene.glb")
    assert call(GGI, *flags) == 2
    assert "geometry_sha256" in capsys.readouterr().err


@pytest.mark.slow
def test_arcs_are_as_few_as_share_enough(tmp_path: Path, capsys, monkeypatch):
    mesh, cameras = write_boxes(tmp_path / "boxes.glb", *BOXES, up="y"), write_path(tmp_path / "path.json", 46, 30)
    common = ("--scene", mesh, "--cameras", cameras, *SMALL)
    for least, most in ((0.3, 64), (0.8, 64), (0.95, 3)):
        output = tmp_path / f"scene_{least}"
        flags = ("--num_arcs", "auto", "--min_covisible", least, "--max_arcs", most)
        assert run_main(monkeypatch, *common, "--output", output, *flags) == 0
        said = capsys.readouterr().out
        count = len(list(output.glob("arc*")))
        shares = [float(word.strip("%,")) / 100 for word in said.split("share ")[1].split("\n")[0].split()]
        assert f"note: {count} arcs" in said and len(shares) == count
        if least == 0.95:
            assert count == 3 and "warning: --max_arcs 3 is too few" in said
        else:
            assert min(shares) >= least - 0.005
    assert len(list((tmp_path / "scene_0.3").glob("arc*"))) < len(list((tmp_path / "scene_0.8").glob("arc*")))
