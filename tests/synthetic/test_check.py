"""The check: its metrics on pictures with known answers, its bars, its command line, and one unit end to end."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from models.weights import load_preset
from synthetic import check
from synthetic.check import FIGURES, judge, means_over_units
from synthetic.clips import MAP_SIZE
from synthetic.measuring import figures
from synthetic.measuring import units as check_units
from synthetic.measuring.scene_bench import Unit
from synthetic.measuring.scenes import ANCHORS, CheckScene
from synthetic.measuring.settings import Settings
from synthetic.measuring.units import PARTS, finished_parts, part_identity, result_path
from synthetic.reference_views import ENOUGH, completeness, find_reference
from synthetic.render import draw_edges, typical_depth
from synthetic.scenes import IMAGE_SIZE
from synthetic.styles import CLASSES, MAJOR_CLASSES, make_style
from tests.support.helpers import end, exit_code, start_module
from tests.support.small import write_small_weights
from tests.support.warm import fork_workers
from utils.cli import InputError, settings_of
from utils.correspondence import source_positions
from utils.edges import resize_edges
from utils.evaluation.pictures import BEST_PSNR
from utils.files import read_json, write_json
from utils.scene.views import resize_view

SIZE = (144, 96)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def anchors(scene: CheckScene) -> tuple[np.ndarray, np.ndarray]:
    return scene.anchor_pictures(make_style(200_000))


def call(*arguments: object) -> int:
    return exit_code(lambda: check.main([str(argument) for argument in arguments]))


# --- measures ---


def test_psnr_of_a_known_error() -> None:
    truth = np.full((3, 8, 9, 3), 100, np.uint8)
    assert figures.psnr(truth, truth) == BEST_PSNR
    assert figures.psnr(truth + 10, truth) == pytest.approx(20 * math.log10(25.5))
    frames = truth.copy()
    frames[1] += 1
    frames[0], frames[2] = 0, 255  # frames at the ends do not count
    assert figures.inbetween_psnr(frames, truth) == pytest.approx(20 * math.log10(255))
    with pytest.raises(ValueError, match="cannot be compared"):
        figures.psnr(truth, truth[0])


def test_crossfade_keeps_its_ends_and_is_linear() -> None:
    start, end = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 100, np.uint8)
    faded = figures.crossfade(start, end, 11)
    assert faded.shape == (11, 4, 5, 3) and faded.dtype == np.uint8
    np.testing.assert_array_equal(faded[:, 0, 0, 0], np.arange(0, 101, 10))


def test_gain_of_truth_and_of_the_crossfade_itself() -> None:
    truth = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    faded = figures.crossfade(truth[0], truth[-1], 6)
    assert check_units.gain(truth, truth) == BEST_PSNR - figures.inbetween_psnr(faded, truth)
    assert check_units.gain(faded, truth) == 0


def test_gradients_of_a_ramp_and_a_step() -> None:
    ramp = np.repeat(np.tile(np.arange(0, 60, 3, dtype=np.uint8), (10, 1))[..., None], 3, axis=2)
    np.testing.assert_allclose(figures.gradient_magnitude(ramp)[:, 4:-4], 3)
    np.testing.assert_allclose(figures.gradient_magnitude(ramp.transpose(1, 0, 2))[4:-4], 3)


def test_edge_correlation_sees_shifts_and_not_colours(anchors: tuple[np.ndarray, np.ndarray]) -> None:
    truth = anchors[0][0]
    shifted = [figures.gradient_correlation(np.roll(truth, k, axis=1), truth) for k in (0, 1, 2, 6)]
    assert shifted[0] == pytest.approx(1)
    assert shifted == sorted(shifted, reverse=True) and shifted[-1] < 0.3
    assert figures.gradient_correlation(255 - truth, truth) == pytest.approx(1)
    assert figures.gradient_correlation(truth // 2 + 60, truth) > 0.99
    assert figures.gradient_correlation(np.full_like(truth, 9), truth) == 0


def test_edge_correlation_of_other_views_is_low(anchors: tuple[np.ndarray, np.ndarray]) -> None:
    one, two, three = anchors[0]
    assert max(figures.gradient_correlation(a, b) for a, b in ((one, two), (two, three), (one, three))) < 0.45


def test_style_error_sees_palettes_and_not_places(scene: CheckScene, anchors: tuple[np.ndarray, np.ndarray]) -> None:
    (truth, *_), (classes, *_) = anchors
    assert figures.class_colour_error(truth, truth, classes) == 0
    assert figures.class_colour_error(truth // 2 + 60, truth // 2 + 50, classes) == pytest.approx(10)
    repainted = scene.anchor_pictures(make_style(200_001))[0][0]
    assert figures.class_colour_error(repainted, truth, classes) > 12
    wall = classes == CLASSES.index("wall")
    mirrored = truth.copy()
    mirrored[wall] = truth[wall][::-1]
    assert figures.class_colour_error(mirrored, truth, classes) == 0
    assert math.isnan(figures.class_colour_error(truth, truth, np.full_like(classes, -1)))


def test_small_classes_do_not_count() -> None:
    truth, image = np.zeros((2, 10, 20, 3), np.uint8)
    classes = np.zeros((10, 20), np.int8)
    classes.flat[: figures.LEAST_PIXELS - 1] = 1
    image[classes == 1] = 200
    assert figures.class_colour_error(image, truth, classes) == 0
    classes.flat[figures.LEAST_PIXELS - 1] = 1
    image[classes == 1] = 200
    assert figures.class_colour_error(image, truth, classes) == 100


def test_covisible_error_of_a_known_shift() -> None:
    source = np.random.default_rng(1).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    target = np.roll(source, -3, axis=1)
    y, x = np.mgrid[:12, :20] + 0.5
    position, visible = np.stack([x + 3, y], axis=-1), x + 3 < 20
    assert figures.covisible_error(source, target, position, visible) == 0
    assert figures.covisible_error(source, source, position, visible) > 50
    position[3, 4] = 4.0, 2.5  # between two pixels
    seen = np.zeros_like(visible)
    seen[3, 4] = True
    halfway = (source[2, 3].astype(float) + source[2, 4]) / 2
    error = figures.covisible_error(source, target, position, seen)
    assert error == pytest.approx(np.abs(halfway - target[3, 4]).mean(), rel=1e-6)
    assert math.isnan(figures.covisible_error(source, target, position, np.zeros_like(visible)))


# --- scenes and references ---


@slow
def test_scene_data_agree_with_each_other(scene: CheckScene, anchors: tuple[np.ndarray, np.ndarray]) -> None:
    """True anchors warped along the exact correspondences agree, and the coarse maps give the same positions."""
    data = scene.anchors
    assert data.edges.shape == (3, *SIZE[::-1]) and 5 < data.edges.mean() < 80
    for k, (truth, other) in enumerate(zip(anchors[0][:-1], anchors[0][1:], strict=True)):
        carried = figures.covisible_error(truth, other, data.positions[k], data.visible[k])
        unmoved = np.abs(truth.astype(float) - other)[data.visible[k]].mean()
        assert carried < 0.4 * unmoved
        position, valid = source_positions(data.codes[k])
        step = len(valid) / SIZE[1]
        centres = tuple((np.indices(SIZE[::-1]) * step + step / 2).astype(int))
        both = valid[centres] & data.visible[k]
        apart = np.linalg.norm(position[centres] / step - data.positions[k], axis=-1)[both]
        assert both.mean() > 0.8 * data.visible[k].mean() and np.median(apart) < 1


@slow
def test_edges_are_drawn_at_the_size_of_preprocessing(scene: CheckScene, tmp_path: Path) -> None:
    given = CheckScene(scene.seed, scene.number, scene.size, tmp_path)
    depth = typical_depth(given.world, [resize_view(view, MAP_SIZE) for view in given.views])
    large = draw_edges(given.world, resize_view(given.views[ANCHORS[1]], IMAGE_SIZE), depth)
    wanted = resize_edges(large, *SIZE)[..., 0].astype(float)
    assert np.abs(given.anchors.edges[1] - wanted).mean() < 0.1 and np.abs(scene.anchors.edges[1] - wanted).mean() > 1


@slow
def test_scenes_are_drawn_once(scene: CheckScene) -> None:
    before = scene.anchors
    again = CheckScene(scene.seed, scene.number, scene.size, scene.cache)
    again.__dict__["_town"] = None  # the town must not be needed
    np.testing.assert_array_equal(again.anchors.edges, before.edges)
    assert again.anchors.visible.dtype == bool and again.anchors.codes.dtype == np.uint16


def test_anchors_are_the_ends_of_two_arcs() -> None:
    assert ANCHORS == [0, 45, 90]


@pytest.mark.slow
def test_reference_shows_every_major_class() -> None:
    assert set(ENOUGH) == set(MAJOR_CLASSES)
    assert completeness(ENOUGH) > completeness(ENOUGH | {"sky": 0.0}) + 0.9
    style = make_style(200_003)
    picture = find_reference(700_000, style, SIZE)
    assert picture.shape == (*SIZE[::-1], 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, find_reference(700_000, style, SIZE))
    assert np.abs(picture.astype(float) - style.high_sky).max(axis=2).min() < 80
    assert np.abs(picture.astype(float) - find_reference(700_001, style, SIZE)).mean() > 10


# --- means and bars ---


def perfect() -> dict[str, float]:
    values = {name: 0.0 for name in FIGURES if not name.startswith("covisible_ratio")}
    return values | {
        "image_vae_psnr": 30.0, "video_vae_psnr": 31.5, "edge_correlation": 0.85, "style_error": 12.0,
        "style_error_replacement": 12.0, "covisible_error": 10.0, "covisible_error_replacement": 6.0,
        "covisible_error_base": 10.0,
        "inbetween_gain_db": 6.0, "last_frame_psnr": 28.5, "chain_fidelity": 0.1,
    }  # fmt: skip


def verdicts(unit: dict[str, float]) -> dict[str, str]:
    return {row["name"]: row["verdict"] for row in judge(means_over_units([unit]), FIGURES)}


def test_every_bar_is_met_at_its_edge() -> None:
    assert set(verdicts(perfect()).values()) == {"ok", "info"}


@pytest.mark.parametrize(
    ("name", "value", "short"),
    [
        ("image_vae_psnr", 29.9, {"image_vae_psnr"}),
        ("video_vae_psnr", 31.4, {"video_vae_psnr"}),
        ("edge_correlation", 0.84, {"edge_correlation"}),
        ("edge_correlation_shuffled", 0.425, {"edge_correlation_shuffled"}),
        ("style_error", 12.1, {"style_error"}),
        ("style_error_replacement", 12.1, {"style_error_replacement"}),
        ("covisible_error_replacement", 6.1, {"covisible_ratio"}),
        ("inbetween_gain_db", 5.9, {"inbetween_gain_db"}),
        ("gain_no_edges", 6.0, {"gain_no_edges"}),
        ("gain_no_end", 6.0, {"gain_no_end"}),
        ("gain_no_warp", 6.0, {"gain_no_warp"}),
        ("last_frame_psnr", 28.4, {"last_frame_psnr"}),
        ("chain_no_align", 0.1, {"chain_no_align", "chain_fidelity"}),
        ("chain_no_edges", 0.2, {"chain_no_edges", "chain_fidelity"}),
        ("style_error", math.nan, {"style_error"}),
        ("edge_correlation_base", 0.9, set()),
    ],
)
def test_a_figure_that_misses_its_bar_is_short(name: str, value: float, short: set[str]) -> None:
    found = verdicts(perfect() | {name: value})
    assert {name for name, verdict in found.items() if verdict == "short"} == short


def test_the_covisible_ratio_is_one_of_means() -> None:
    units = [{"covisible_error": e, "covisible_error_replacement": r} for e, r in ((10, 2), (30, 10), (math.nan,) * 2)]
    assert means_over_units(units)["covisible_ratio"] == pytest.approx(6 / 20)


def test_parts_and_figures_fit_together() -> None:
    assert {part for part, _ in FIGURES.values()} == set(PARTS) == set(check.PART_ORDER)


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--first_scene", 199_999), "--first_scene 199999: tests start at 200000"),
        (("--first_style", 7), "--first_style 7: tests start at 200000"),
        (("--lora_steps", 401), "400 at most"),
        (("--only", "beauty"), "beauty"),
        (("--scenes", 0), "not a positive whole number"),
        (("--weights_dir", "nowhere"), "nowhere holds no preset.json"),
        (("--json", "docs"), "--json docs is a folder"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple, said: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert call(*arguments, "--output_dir", tmp_path / "check") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "check").exists()


def test_results_of_other_conditions_are_not_kept(tmp_path: Path) -> None:
    unit, settings, hashes = Unit(0, 200_000, 200_000), Settings(), {"flux_vae": {"a.safetensors": "1"}}
    entry = {
        "identity": part_identity(PARTS["image_vae"], unit, settings, hashes),
        "figures": {"image_vae_psnr": 31.0},
    }
    path = result_path(unit, tmp_path)
    write_json(path, {"image_vae": entry})

    def kept(unit: Unit = unit, settings: Settings = settings, hashes: dict = hashes) -> dict:
        return finished_parts(unit, ["image_vae"], settings, hashes, tmp_path)

    assert kept() == {"image_vae": {"image_vae_psnr": 31.0}}
    assert kept(settings=Settings(lora_steps=300)) == {}
    assert kept(hashes={"flux_vae": {"a.safetensors": "2"}}) == {}
    assert kept(unit=Unit(1, 200_000, 200_000)) == {}
    path.write_text("{")
    assert kept() == {}


def test_every_setting_is_a_flag() -> None:
    assert settings_of(Settings, check.parse_args([])) == Settings()
    assert settings_of(Settings, check.parse_args(["--true_gs", "1", "--lora_steps", "7"])) == Settings(
        true_gs=1, lora_steps=7
    )


QUICK = ("--scenes", 1, "--seeds", 1, "--processes", 1, "--lora_steps", 2, "--train_batch_size", 2, "--num_steps", 2,
         "--num_inference_steps", 2)  # fmt: skip


def run_check(*arguments: object) -> subprocess.CompletedProcess:
    return end(start_module("synthetic.check", *QUICK, *arguments, prepare=[fork_workers]))


@slow
def test_one_unit_from_end_to_end(scene: CheckScene, tmp_path: Path) -> None:
    """All parts on weights of the right shape; then --resume measures only what other weights or settings change."""
    weights, out = tmp_path / "weights", tmp_path / "out"
    assert len(scene.anchors.edges) == 3 and len(scene.arc.edges) == 46
    shutil.copytree(scene.cache, out / "scenes")  # else they would be drawn
    write_small_weights(weights, SIZE)
    common = ("--weights_dir", weights, "--output_dir", out)
    done = run_check(*common, "--json", tmp_path / "check.json")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == list(FIGURES), done.stderr
    assert {line[3] for line in lines} <= {"ok", "short", "info"}
    assert done.returncode == int("short" in {line[3] for line in lines})
    written = read_json(tmp_path / "check.json")
    assert [row["name"] for row in written["figures"]] == list(FIGURES) and len(written["units"]) == 1
    folder = out / "units" / "200000_200000"
    pictures = {"reference.png", "anchors.png", "video.png", "chain.png", "chain.mp4"}
    assert {path.name for path in folder.iterdir()} == pictures

    result = folder.with_suffix(".json")
    first = result.stat().st_mtime_ns
    again = run_check(*common, "--resume")
    assert again.stdout == done.stdout and result.stat().st_mtime_ns == first

    entries = json.loads(result.read_text())
    del entries["image_vae"]
    entries["anchors"]["figures"]["style_error"] = 7.0  # kept, and therefore reported
    result.write_text(json.dumps(entries))
    image = run_check(*common, "--resume", "--only", "image_vae_psnr", "style_error")
    assert [line.split()[0] for line in image.stdout.splitlines()] == ["image_vae_psnr", "style_error"]
    assert image.stdout.splitlines()[1].split()[1] == "7.000"
    assert image.stdout.splitlines()[0] == done.stdout.splitlines()[0]
    assert set(read_json(result)) == set(PARTS)


@slow
def test_missing_networks_end_in_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "preset.json", read_json(Path(load_preset("tiny").flux).parent / "preset.json"))
    done = run_check("--weights_dir", tmp_path, "--output_dir", tmp_path / "out", "--only", "image_vae_psnr")
    assert done.returncode == 2 and "flux_vae" in done.stderr and done.stderr.count("\n") == 1


def test_a_town_without_a_path_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = CheckScene(200_000, 0, SIZE, tmp_path)
    monkeypatch.setattr("synthetic.measuring.scenes.make_path", _no_path)
    with pytest.raises(InputError, match="town 200000 has no clear camera path"):
        _ = scene.views


def _no_path(*arguments: object) -> None:
    raise InputError("no path")
