"""Rows of the benchmark: methods, statistics, baselines, metrics."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from models.weights import load_preset
from synthetic import benchmark
from synthetic.measuring import baselines, figures
from synthetic.measuring.intervals import Estimate, estimate, paired_difference
from synthetic.measuring.methods import (
    BASELINES,
    CLAIMS,
    FULL,
    MAIN,
    METHODS,
    REMOVALS,
    SWEEPS,
    Claim,
    choose_methods,
    made_as,
)
from synthetic.measuring.report import CURVES, claim_rows
from synthetic.measuring.rows import BENCH_METRICS
from synthetic.measuring.scene_bench import Unit, choose_units
from synthetic.measuring.scenes import CheckScene
from synthetic.measuring.settings import Settings
from synthetic.render import paint, trace
from synthetic.styles import make_style
from utils.cli import InputError
from utils.evaluation.measure import Metric
from utils.layout import ARC_STEPS
from utils.scene.views import correspondence


@pytest.fixture(scope="module")
def anchors(scene: CheckScene) -> np.ndarray:
    return scene.anchor_pictures(make_style(200_000))[0]


def test_groups_of_methods():
    assert choose_methods(["main"]) == list(MAIN)
    assert choose_methods(["all"]) == list(METHODS) and METHODS["full"] == FULL
    assert set(MAIN) == {"full", "autoencoder", "truth", *REMOVALS, *BASELINES}
    assert choose_methods(["copy", "full", "copy"]) == ["full", "copy"]
    assert choose_methods(["degr_0.25", "main"]) == [*MAIN, "degr_0.25"]
    with pytest.raises(InputError, match="--methods best: choose from main, carried, true_anchors, all, full"):
        choose_methods(["full", "best"])


def test_equal_recipes_are_made_once():
    assert made_as("replace_12") == made_as("degr_0.5") == "full"
    different = {name for name in METHODS if made_as(name) == name}
    assert len(different) == len(METHODS) - 2 == len(set(METHODS.values()))


def test_every_removal_changes_one_thing():
    for method in REMOVALS.values():
        changed = [key for key, value in vars(method).items() if value != getattr(FULL, key)]
        assert len(changed) == 1
    assert {claim.than for claim in CLAIMS if claim.row == "full"} == set(REMOVALS)


def test_claims_are_told_with_what_was_found():
    metrics = [Metric("a", "", "", "higher"), Metric("b", "", "", "lower"), Metric("c", "", "", "lower")]
    results = {
        "guided": {str(i): {"a": 2.0 + i, "b": 1.0, "c": 0.5 + i % 2} for i in range(4)},
        "full": {str(i): {"a": 1.0 + i, "b": 2.0, "c": 1.0} for i in range(4)},
    }
    claim = Claim("guidance", "guided", "full", ("a", "b"), ("c",))
    found = claim_rows(claim, results, metrics)
    assert [(row[1:4], row[-2:]) for row in found] == [
        (["guided", "full", "a"], ["better", "better"]),
        (["guided", "full", "b"], ["better", "better"]),
        (["guided", "full", "c"], ["no worse", "undecided"]),
    ]
    assert claim_rows(Claim("", "full", "guided", ("a",)), results, metrics)[0][-1] == "worse"
    assert claim_rows(Claim("", "guided", "reproject", ("a",)), results, metrics) == []
    known = {metric.name for metric in BENCH_METRICS}
    for claim in CLAIMS:
        assert {claim.row, claim.than} <= METHODS.keys() and {*claim.better, *claim.no_worse} <= known


def test_loops_come_back_through_the_same_views(tmp_path: Path):
    scene = CheckScene(200_000, 0, (48, 32), tmp_path, loop=True)
    once = CheckScene(200_000, 0, (48, 32), tmp_path)
    eyes = np.array([view.c2w for view in scene.views])
    np.testing.assert_array_equal(eyes, eyes[::-1])
    np.testing.assert_array_equal(eyes[:46], [view.c2w for view in once.views[:46]])
    frames = np.array([paint(trace(scene.world, view), make_style(200_000)) for view in scene.views])
    assert figures.closure(frames) == 0
    frames[2] = np.clip(frames[2], 9, None) - 9
    assert figures.closure(frames) == pytest.approx(np.abs(frames[2].astype(float) - frames[-3]).mean() / 45)


def test_sweeps_are_rows_of_the_table():
    for sweep, (_, places) in SWEEPS.items():
        assert set(places) <= set(METHODS) and CURVES[sweep]
        numbers = [place for place in places.values() if place is not None]
        assert numbers == sorted(numbers)
        assert len(numbers) == len(places) or sweep in asdict(Settings())


def test_interval_of_known_values():
    values = np.random.default_rng(1).normal(10, 2, 400).tolist()
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values)) and found.count == 400
    wanted = 1.96 * np.std(values) / 20
    assert found.high - found.mean == pytest.approx(wanted, rel=0.1)
    assert found.mean - found.low == pytest.approx(wanted, rel=0.1)
    assert estimate(values) == found
    assert estimate([3.0] * 5) == Estimate(3, 3, 3, 5)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(2)
    held = [(e := estimate(rng.normal(0, 1, 30).tolist())).low <= 0 <= e.high for _ in range(100)]
    assert 86 <= sum(held) <= 100


def test_unmeasured_units_do_not_count():
    assert estimate([1.0, None, 3.0, math.nan]).mean == 2 and estimate([1.0, None]).count == 1
    assert math.isnan(estimate([None]).mean) and not estimate([]).excludes_zero
    assert paired_difference([1.0, 2.0, None], [0.5, None, 9.0]) == Estimate(0.5, 0.5, 0.5, 1)


def test_paired_differences_see_what_means_hide():
    """Units differ far more from each other than rows do."""
    rng = np.random.default_rng(3)
    hard = rng.normal(50, 20, 16)
    ours, theirs = hard.tolist(), (hard + 1 + rng.normal(0, 0.5, 16)).tolist()
    a, b = estimate(ours), estimate(theirs)
    assert a.low < b.mean < a.high
    found = paired_difference(ours, theirs)
    assert found.excludes_zero and found.high < 0 and found.mean == pytest.approx(-1, abs=0.4)
    assert not paired_difference(ours, (hard + rng.normal(0, 0.5, 16)).tolist()).excludes_zero


def test_crossfade_and_copy_of_known_anchors():
    pictures = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (0, 90, 180)])
    faded, copied = baselines.crossfade(pictures), baselines.copy(pictures)
    assert faded.shape == copied.shape == (91, 4, 6, 3) and faded.dtype == copied.dtype == np.uint8
    np.testing.assert_array_equal(faded[::ARC_STEPS], pictures)
    np.testing.assert_array_equal(faded[:, 0, 0, 0], 2 * np.arange(91))
    np.testing.assert_array_equal(copied[::ARC_STEPS], pictures)
    np.testing.assert_array_equal(np.flatnonzero(np.diff(copied[:, 0, 0, 0])), [22, 67])


def test_per_frame_draws_every_frame_from_its_edges():
    edges = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    np.testing.assert_array_equal(baselines.per_frame(lambda e: np.stack([e] * 3, -1), edges)[..., 1], edges)


@pytest.mark.slow
def test_reprojection_keeps_anchors_and_is_close_between_them(scene: CheckScene, anchors: np.ndarray):
    caster, style, faded = scene.world.caster, make_style(200_000), baselines.crossfade(anchors)
    made = baselines.reproject(anchors, caster, scene.views)
    assert made.dtype == np.uint8 and len(made) == 91
    np.testing.assert_array_equal(made[::ARC_STEPS], anchors)
    for frame in (8, 60):
        view, ends = scene.views[frame], (0, 45) if frame < 45 else (45, 90)
        truth = paint(trace(scene.world, view), style).astype(float)
        seen = np.any([correspondence(caster, scene.views[end], view).visible for end in ends], axis=0)
        error, fade = (np.abs(picture - truth).mean(axis=2)[seen] for picture in (made[frame], faded[frame]))
        assert 0.3 < seen.mean() < 1
        assert np.median(error) < 6 and error.mean() < 0.6 * fade.mean()


def test_the_last_frames_of_every_arc():
    from synthetic.measuring.rows import arc_end_frames

    assert arc_end_frames(91) == [*range(36, 46), *range(81, 91)]


def test_units_share_no_style():
    units = choose_units(3, 2, 200_000, 200_100)
    assert units[3] == Unit(1, 200_001, 200_103)
    assert len({unit.style_seed for unit in units}) == 6 and len({unit.scene_seed for unit in units}) == 3


def test_more_scenes_and_seeds_add_to_the_units_of_fewer():
    few, more, most = (set(benchmark.choose_passes(*n, 200_000, 200_100)) for n in ((2, 1), (2, 2), (3, 2)))
    assert few < more < most
    assert len({unit.style_seed for unit in most}) == 6 and len({unit.scene_seed for unit in most}) == 3


def test_identities_hold_what_decides_a_video_and_no_more(tmp_path: Path):
    from models.weights import FLUX_STAGE, GGI_STAGE
    from synthetic.measuring.rows import RowBench

    names = (*FLUX_STAGE, *GGI_STAGE, "transformer")
    hashes = {name: {"model.safetensors": "1"} for name in names}

    def identity(method: str, settings: Settings | None = None, **changed: str) -> dict:
        new = hashes | {name: {"model.safetensors": value} for name, value in changed.items()}
        bench = RowBench(
            Unit(0, 200_000, 200_000), load_preset("tiny"), {}, settings or Settings(), tmp_path, hashes=new
        )
        return bench.video_identity(METHODS[method])

    assert identity("full") == identity("full") != identity("no_warp")
    assert identity("replace_12") == identity("full") != identity("replace_8")
    for change in ({"settings": Settings(lora_steps=3)}, {"settings": Settings(num_steps=3)}, {"controlnet": "2"}):
        assert identity("full", **change) != identity("full")
        assert identity("crossfade", **change) != identity("crossfade")
        assert identity("truth", **change) == identity("truth")
    for change in ({"settings": Settings(num_inference_steps=3)}, {"transformer": "2"}):
        assert identity("full", **change) != identity("full")
        assert identity("per_frame", **change) == identity("per_frame")
        assert identity("reproject", **change) == identity("reproject")
    assert identity("no_align", Settings(lora_steps=3)) == identity("no_align")
    for change in (Settings(coarse=0.05), Settings(loop=True)):
        assert identity("full", change) != identity("full")
    assert identity("truth", Settings(loop=True)) != identity("truth")
    assert identity("sources_all") != identity("guided")
    assert identity("lora_50") == identity("full", Settings(lora_steps=50)) != identity("full")
    assert identity("steps_10") == identity("full", Settings(num_inference_steps=10)) != identity("full")
