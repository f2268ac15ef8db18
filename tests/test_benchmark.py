"""The benchmark's rows, statistics, baselines and tables, and one unit end to end."""

import csv
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from models.weights import load_preset
from synthetic import benchmark
from synthetic.measuring import baselines
from synthetic.measuring.curves import draw_curves
from synthetic.measuring.intervals import Estimate, estimate, paired_difference
from synthetic.measuring.methods import (
    BASELINES,
    CLAIMS,
    FULL,
    MAIN,
    METHODS,
    REMOVALS,
    SWEEPS,
    choose_methods,
    made_as,
)
from synthetic.measuring.report import CURVES, compare, show, summarise, write_report, write_sheets
from synthetic.measuring.scenes import CheckScene
from synthetic.measuring.settings import Settings
from synthetic.measuring.units import Unit, choose_units
from synthetic.render import paint, trace
from synthetic.styles import make_style
from tests.helpers import end, exit_code, start_module
from tests.small import write_small_weights
from tests.warm import fork_workers
from utils.cli import InputError
from utils.evaluation.measure import Metric
from utils.files import read_json, write_json
from utils.images import read_image
from utils.layout import ARC_STEPS
from utils.scene.views import correspondence

SIZE = (144, 96)
slow = pytest.mark.slow
METRICS = (Metric("anchors_error", "levels", "0 …", "lower"), Metric("seams", "ratio", "0 …", "near 1"))


@pytest.fixture(scope="module")
def anchors(scene: CheckScene) -> np.ndarray:
    return scene.anchor_pictures(make_style(200_000))[0]


def call(*arguments: object) -> int:
    return exit_code(lambda: benchmark.main([str(argument) for argument in arguments]))


# --- rows ---


def test_groups_of_methods():
    assert choose_methods(["main"]) == list(MAIN)
    assert choose_methods(["all"]) == list(METHODS) and METHODS["full"] == FULL
    assert set(MAIN) == {"full", "truth", *REMOVALS, *BASELINES}
    assert choose_methods(["copy", "full", "copy"]) == ["full", "copy"]
    assert choose_methods(["degr_0.25", "main"]) == [*MAIN, "degr_0.25"]
    with pytest.raises(InputError, match="--methods best: choose from main, all, full"):
        choose_methods(["full", "best"])


def test_equal_recipes_are_made_once():
    assert made_as("replace_12") == made_as("degr_0.5") == "full"
    different = {name for name in METHODS if made_as(name) == name}
    assert len(different) == len(METHODS) - 2 == len(set(METHODS.values()))


def test_every_removal_changes_one_thing():
    for method in REMOVALS.values():
        changed = [key for key, value in vars(method).items() if value != getattr(FULL, key)]
        assert len(changed) == 1
    assert {claim.removal for claim in CLAIMS} == set(REMOVALS)


def test_sweeps_are_rows_of_the_table():
    for sweep, (_, places) in SWEEPS.items():
        assert set(places) <= set(METHODS) and CURVES[sweep]
        numbers = [place for place in places.values() if place is not None]
        assert numbers == sorted(numbers)
        assert len(numbers) == len(places) or sweep in asdict(Settings())


# --- statistics ---


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
    """Units differ far more than rows do."""
    rng = np.random.default_rng(3)
    hard = rng.normal(50, 20, 16)
    ours, theirs = hard.tolist(), (hard + 1 + rng.normal(0, 0.5, 16)).tolist()
    a, b = estimate(ours), estimate(theirs)
    assert a.low < b.mean < a.high
    found = paired_difference(ours, theirs)
    assert found.excludes_zero and found.high < 0 and found.mean == pytest.approx(-1, abs=0.4)
    assert not paired_difference(ours, (hard + rng.normal(0, 0.5, 16)).tolist()).excludes_zero


# --- baselines ---


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


def test_a_picture_carried_to_its_own_view_is_itself(scene: CheckScene, anchors: np.ndarray):
    for k, frame in enumerate((0, 45, 90)):
        colours, seen = baselines.carry(anchors[k], scene.world.caster, scene.views[frame], scene.views[frame])
        assert seen.all()
        np.testing.assert_allclose(colours, anchors[k], atol=0.02)


def test_reprojection_keeps_anchors_and_is_close_between_them(scene: CheckScene, anchors: np.ndarray):
    caster, style, faded = scene.world.caster, make_style(200_000), baselines.crossfade(anchors)
    for k, frame in enumerate((0, 45, 90)):
        made = baselines.reproject_frame(anchors, caster, scene.views, frame)
        assert made.dtype == np.uint8
        np.testing.assert_array_equal(made, anchors[k])
    for frame in (8, 60):
        view, ends = scene.views[frame], (0, 45) if frame < 45 else (45, 90)
        truth = paint(trace(scene.world, view), style).astype(float)
        seen = np.any([correspondence(caster, scene.views[end], view).visible for end in ends], axis=0)
        made = baselines.reproject_frame(anchors, caster, scene.views, frame)
        error, fade = (np.abs(picture - truth).mean(axis=2)[seen] for picture in (made, faded[frame]))
        assert 0.3 < seen.mean() < 1
        assert np.median(error) < 6 and error.mean() < 0.6 * fade.mean()


def test_holes_are_where_no_anchor_sees_the_surface(scene: CheckScene, anchors: np.ndarray):
    source, target = scene.views[0], scene.views[45]
    colours, seen = baselines.carry(anchors[0], scene.world.caster, source, target)
    assert 0 < (~seen).mean() < 0.95 and not colours[~seen].any()
    outside_or_hidden = correspondence(scene.world.caster, source, target)
    np.testing.assert_array_equal(seen, outside_or_hidden.visible)
    near = correspondence(scene.world.caster, source, scene.views[1])
    hidden = near.occluded.mean()
    _, seen_near = baselines.carry(anchors[0], scene.world.caster, source, scene.views[1])
    assert (~seen_near).mean() < 0.2 and hidden <= (~seen_near).mean()


def test_inpainting_touches_holes_alone():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    holes = np.zeros((20, 30), bool)
    np.testing.assert_array_equal(baselines.fill_holes(picture, holes), picture)
    np.testing.assert_array_equal(baselines.fill_holes(picture, ~holes), picture)
    holes[5:9, 5:9] = True
    filled = baselines.fill_holes(picture, holes)
    np.testing.assert_array_equal(filled[~holes], picture[~holes])
    flat = np.full_like(picture, 77)
    flat[holes] = 0
    np.testing.assert_allclose(baselines.fill_holes(flat, holes), 77, atol=3)


# --- what is measured ---


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
    from synthetic.measuring.rows import Bench

    names = (*FLUX_STAGE, *GGI_STAGE, "transformer")
    hashes = {name: {"model.safetensors": "1"} for name in names}

    def identity(method: str, settings: Settings | None = None, **changed: str) -> dict:
        new = hashes | {name: {"model.safetensors": value} for name, value in changed.items()}
        bench = Bench(Unit(0, 200_000, 200_000), load_preset("tiny"), {}, settings or Settings(), tmp_path, hashes=new)
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
    assert identity("lora_50") == identity("full", Settings(lora_steps=50)) != identity("full")
    assert identity("steps_10") == identity("full", Settings(num_inference_steps=10)) != identity("full")


# --- tables ---


def example() -> dict[str, dict[str, dict[str, float | None]]]:
    """`full` has a lower error than `copy`, unit by unit; its seams are as far from 1, on the other side."""
    rng = np.random.default_rng(0)
    error = rng.uniform(5, 50, 8)
    full = {f"u{k}": {"anchors_error": e, "seams": 0.75} for k, e in enumerate(error)}
    copy = {f"u{k}": {"anchors_error": e + 2 + 0.1 * k, "seams": 1.25} for k, e in enumerate(error)}
    copy["u7"]["anchors_error"] = None
    return {"full": full, "copy": copy}


def test_differences_know_which_way_is_better():
    results = example()
    error, seams = compare(results, METRICS)
    assert error.verdict == "better" and error.difference.count == 7 and error.difference.high < 0
    assert seams.verdict == "undecided" and seams.difference.mean == pytest.approx(0)
    (other, _) = compare({"full": results["copy"], "copy": results["full"]}, METRICS)
    assert other.verdict == "worse"
    (higher,) = compare(results, [replace(METRICS[0], better="higher")])
    assert higher.verdict == "worse"
    assert compare({"copy": results["copy"]}, METRICS) == []
    assert compare({"full": results["full"], "replace_12": results["full"]}, METRICS) == []


def test_numbers_are_shown_with_their_interval():
    assert show(Estimate(1.23456, 1.0, 2.0, 5)) == "1.235 [1.000, 2.000]"
    assert show(Estimate(-1.0, -12.0, 2.0, 5), signed=True) == "-1.00 [-12.00, +2.00]"
    assert show(Estimate(-1.0, -1.0, -1.0, 1)) == "-1.000" and not Estimate(-1.0, -1.0, -1.0, 1).excludes_zero
    assert show(Estimate(math.nan, math.nan, math.nan, 0)) == "n/a"


def test_tables_are_written_and_alike_every_time(tmp_path: Path):
    results = example()
    for folder in ("a", "b"):
        write_report(tmp_path / folder, results, METRICS, {"units": 8}, asdict(Settings()))
    files = ("results.json", "results.csv", "results.md")
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)

    written = read_json(tmp_path / "a" / "results.json")
    assert written["units"] == results and written["about"] == {"units": 8}
    assert written["summary"]["copy"]["anchors_error"]["count"] == 7
    assert [d["verdict"] for d in written["differences"]] == ["better", "undecided"]
    with (tmp_path / "a" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 and lines[0]["method"] == "full" and lines[2]["units"] == "7"
    assert float(lines[0]["mean"]) == pytest.approx(
        summarise(results, METRICS)["full"]["anchors_error"].mean, rel=1e-5
    )
    text = (tmp_path / "a" / "results.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows if row[0] in ("| method", "| full", "| copy")} == {3}
    assert "anchors_error ↓" in text and "seams →1" in text and text.count("**") >= 4


def test_curves_need_three_rows(tmp_path: Path):
    values = {"u0": {"anchors_error": 3.0}, "u1": {"anchors_error": 5.0}}
    metrics = [Metric("anchors_error", "levels", "0 … 255", "lower")]
    write_report(tmp_path / "two", dict.fromkeys(("no_replace", "replace_4"), values), metrics, {}, asdict(Settings()))
    assert not (tmp_path / "two" / "pictures").exists()
    write_report(
        tmp_path / "three",
        dict.fromkeys(("no_replace", "replace_4", "replace_12"), values),
        metrics,
        {},
        asdict(Settings()),
    )
    assert [p.name for p in (tmp_path / "three" / "pictures").iterdir()] == ["curve_num_replacement.png"]
    assert "pictures/curve_num_replacement.png" in (tmp_path / "three" / "results.md").read_text()


def test_a_curve_rises_with_its_values():
    rising = [Estimate(v, v - 1, v + 1, 4) for v in (0, 5, 10)]
    picture = draw_curves("x", [0, 1, 2], [("up", rising)], columns=1)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    dark = (picture < 60).all(axis=2)
    dark[:47] = dark[-47:] = False  # labels
    left, right = dark[:, 50:90], dark[:, -90:-50]
    assert np.nonzero(left)[0].mean() > np.nonzero(right)[0].mean() + 60
    falling = draw_curves("x", [2, 1, 0], [("up", rising)], columns=1)
    assert not np.array_equal(picture, falling)
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    assert draw_curves("x", [0], [("empty", [nothing])], columns=1).shape == picture.shape


def test_sheets_show_rows_above_the_truth(tmp_path: Path):
    truth, video = np.full((91, 8, 12, 3), 200, np.uint8), np.full((91, 8, 12, 3), 20, np.uint8)
    write_sheets(tmp_path, {"full": video, "truth": truth}, truth)
    assert {p.name for p in tmp_path.iterdir()} == {"full.png", "methods.png"}
    sheet = read_image(tmp_path / "full.png")
    middle = sheet.shape[0] // 2
    assert (sheet[:middle] == 20).any() and (sheet[middle:] == 200).any() and not (sheet[:middle] == 200).all(2).any()


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--first_scene", 199_999), "--first_scene 199999: tests start at 200000"),
        (("--first_style", 7), "--first_style 7: tests start at 200000"),
        (("--methods", "best"), "--methods best: choose from"),
        (("--weights_dir", "nowhere"), "nowhere holds no preset.json"),
        (("--scenes", 0), "not a positive whole number"),
        (("--scenes", 1001), "--scenes 1001: 1000 at most"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple, said: str, capsys: pytest.CaptureFixture, tmp_path: Path):
    assert call(*arguments, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@slow
def test_the_whole_path_agrees_with_its_first_arc(scene: CheckScene):
    """And its lines with its edges; drawn once."""
    path, first = scene.path, scene.arc
    np.testing.assert_array_equal(path.edges[:46], first.edges)
    np.testing.assert_array_equal(path.noise[0], first.noise)
    assert path.noise.shape == (2, *first.noise.shape) and abs(np.corrcoef(path.noise.reshape(2, -1))[0, 1]) < 0.05
    np.testing.assert_array_equal(path.edges[[0, 45, 90]], scene.anchors.edges)
    assert path.lines.shape == (91, 480, 720) and path.lines.dtype == bool
    again = CheckScene(scene.seed, scene.number, scene.size, scene.cache)
    again.__dict__["_town"] = None  # it must not be asked for
    np.testing.assert_array_equal(again.path.lines, path.lines)


QUICK = ("--scenes", 1, "--seeds", 1, "--processes", 1, "--lora_steps", 2, "--train_batch_size", 2, "--num_steps", 2,
         "--num_inference_steps", 2)  # fmt: skip


def run_benchmark(*arguments: object) -> str:
    done = end(start_module("synthetic.benchmark", *QUICK, *arguments, prepare=[fork_workers]))
    assert done.returncode == 0, done.stderr
    return done.stdout


@slow
def test_one_unit_from_end_to_end(scene: CheckScene, tmp_path: Path):
    """A few rows; then more rows make only what is new, and a finished run makes nothing."""
    weights, out = tmp_path / "weights", tmp_path / "out"
    assert len(scene.anchors.edges) == 3 and len(scene.path.edges) == 91
    shutil.copytree(scene.cache, out / "scenes")  # drawing takes a minute
    write_small_weights(weights, SIZE)
    common = ("--weights_dir", weights, "--output", out)
    printed = run_benchmark(*common, "--methods", "full", "no_warp", "copy", "truth")
    assert printed.strip() == str(out / "results.md")
    unit = out / "units" / "200000_200000"
    written = read_json(out / "results.json")
    values = {name: row["200000_200000"] for name, row in written["units"].items()}
    assert list(values) == ["full", "no_warp", "copy", "truth"]
    assert all(v is not None for name in ("full", "no_warp") for v in values[name].values())
    assert values["truth"]["fidelity_psnr"] == 100 and values["truth"]["class_colour"] == 0
    assert values["truth"]["structure_f1"] > values["copy"]["structure_f1"]
    assert all(values[n]["cpu_seconds"] > 0 for n in ("copy", "full")) and values["truth"]["cpu_seconds"] is None
    assert {p.name for p in (out / "pictures").iterdir()} == {"full.png", "no_warp.png", "copy.png", "methods.png"}

    before = {p: p.stat().st_mtime_ns for p in unit.iterdir()}
    entry = read_json(unit / "no_warp.json")
    entry["values"]["flicker"] = 7.0  # kept, therefore shown
    write_json(unit / "no_warp.json", entry)
    (unit / "full.json").unlink()  # measured again, from the video that is there
    run_benchmark(*common, "--methods", "full", "no_warp", "replace_12", "crossfade")
    again = read_json(out / "results.json")["units"]
    assert again["no_warp"]["200000_200000"]["flicker"] == 7
    assert again["full"]["200000_200000"] == again["replace_12"]["200000_200000"] == values["full"]
    after = {p: p.stat().st_mtime_ns for p in unit.iterdir()}
    assert {p.name for p in after.keys() - before.keys()} == {"crossfade.json", "video_crossfade.safetensors"}
    changed = {p.name for p in before if after[p] != before[p]}
    assert changed - {"reference.png"} == {"no_warp.json", "full.json"}  # a row may need the reference again
