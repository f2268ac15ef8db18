"""The benchmark's tables and command."""

import csv
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from synthetic import benchmark
from synthetic.measuring.curves import draw_curves
from synthetic.measuring.intervals import Estimate
from synthetic.measuring.report import compare, show, summarise, write_report, write_sheets
from synthetic.measuring.scenes import CheckScene
from synthetic.measuring.settings import Settings
from tests.support.helpers import end, exit_code, start_module
from tests.support.small import write_small_weights
from tests.support.warm import fork_workers
from utils.evaluation.measure import Metric
from utils.files import read_json, write_json
from utils.images import read_image

SIZE = (144, 96)


slow = pytest.mark.slow


METRICS = (Metric("anchors_error", "levels", "0 …", "lower"), Metric("seams", "ratio", "0 …", "near 1"))


def call(*arguments: object) -> int:
    return exit_code(lambda: benchmark.main([str(argument) for argument in arguments]))


def example() -> dict[str, dict[str, dict[str, float | None]]]:
    """`full` has a lower error than `copy` in every unit; its seams are as far from 1, on the other side."""
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
    """Edges and noise agree, and everything is drawn once."""
    path, first = scene.path, scene.arc
    np.testing.assert_array_equal(path.edges[:46], first.edges)
    np.testing.assert_array_equal(path.noise[0], first.noise)
    assert path.noise.shape == (2, *first.noise.shape) and abs(np.corrcoef(path.noise.reshape(2, -1))[0, 1]) < 0.05
    np.testing.assert_array_equal(path.edges[[0, 45, 90]], scene.anchors.edges)
    assert path.lines.shape == (91, 480, 720) and path.lines.dtype == bool
    again = CheckScene(scene.seed, scene.number, scene.size, scene.cache)
    again.__dict__["_town"] = None  # the town must not be needed
    np.testing.assert_array_equal(again.path.lines, path.lines)


QUICK = ("--scenes", 1, "--seeds", 1, "--processes", 1, "--lora_steps", 2, "--train_batch_size", 2, "--num_steps", 2,
         "--num_inference_steps", 2)  # fmt: skip


def run_benchmark(*arguments: object) -> str:
    done = end(start_module("synthetic.benchmark", *QUICK, *arguments, prepare=[fork_workers]))
    assert done.returncode == 0, done.stderr
    return done.stdout


@slow
def test_one_unit_from_end_to_end(scene: CheckScene, tmp_path: Path):
    """A few rows; then further rows make only what is new, and a finished run makes nothing."""
    weights, out = tmp_path / "weights", tmp_path / "out"
    assert len(scene.anchors.edges) == 3 and len(scene.path.edges) == 91
    shutil.copytree(scene.cache, out / "scenes")  # else they would be drawn
    write_small_weights(weights, SIZE)
    common = ("--weights_dir", weights, "--output", out)
    printed = run_benchmark(*common, "--methods", "full", "no_warp", "copy", "truth")
    assert printed.strip() == str(out / "results.md")
    unit = out / "units" / "200000_200000"
    written = read_json(out / "results.json")
    values = {name: row["200000_200000"] for name, row in written["units"].items()}
    assert list(values) == ["full", "no_warp", "copy", "truth"]
    unmeasured = {m for name in ("full", "no_warp") for m, value in values[name].items() if value is None}
    assert unmeasured == {"closure"}  # not a loop
    assert values["truth"]["fidelity_psnr"] == 100 and values["truth"]["class_colour"] == 0
    assert values["truth"]["structure_f1"] > values["copy"]["structure_f1"]
    assert all(values[n]["cpu_seconds"] > 0 for n in ("copy", "full")) and values["truth"]["cpu_seconds"] is None
    assert {p.name for p in (out / "pictures").iterdir()} == {"full.png", "no_warp.png", "copy.png", "methods.png"}

    before = {p: p.stat().st_mtime_ns for p in unit.iterdir()}
    entry = read_json(unit / "no_warp.json")
    entry["values"]["flicker"] = 7.0  # kept, and therefore reported
    write_json(unit / "no_warp.json", entry)
    (unit / "full.json").unlink()  # measured again, from the existing video
    run_benchmark(*common, "--methods", "full", "no_warp", "replace_12", "crossfade")
    again = read_json(out / "results.json")["units"]
    assert again["no_warp"]["200000_200000"]["flicker"] == 7
    assert again["full"]["200000_200000"] == again["replace_12"]["200000_200000"] == values["full"]
    after = {p: p.stat().st_mtime_ns for p in unit.iterdir()}
    assert {p.name for p in after.keys() - before.keys()} == {"crossfade.json", "video_crossfade.safetensors"}
    assert {p.name for p in before if after[p] != before[p]} == {"no_warp.json", "full.json"}
