"""Run folders and atomic writes, pictures and videos, training crops: utilities of all scripts."""

import json
import shutil

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from models.flux.alignment import draw_batch
from models.latents import pack, to_signed, token_positions, unpack
from utils.cli import InputError
from utils.data.references import Reference, crop_size, draw_crop, load_references
from utils.files import atomic_path, write_json
from utils.images import contact_sheet, plot_curve, read_image, write_image, write_video
from utils.layout import anchor_run_name, edge_frame_indices, pad_prompts
from utils.runs import clear_leftovers, derive_seed, find_unfinished, open_run


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_atomic_path_replaces_folders(tmp_path):
    for content in ("one", "two"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["two"]


def test_leftovers_of_a_killed_process_go(tmp_path):
    (tmp_path / ".image_00.123.abc.tmp.png").touch()
    (tmp_path / ".checkpoint-2.123.abc.tmp").mkdir()
    (tmp_path / "image_00.png").touch()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["image_00.png"]


def test_a_run_belongs_to_its_arguments(tmp_path):
    folder = tmp_path / "run"
    run = open_run(folder, {"seed": 1, "prompt": ("a", "b")})
    assert not folder.exists()
    run.begin(weights={"flux": {"f": "1"}})
    assert not open_run(folder, {"seed": 1, "prompt": ["a", "b"]}).finished
    with pytest.raises(InputError, match=r"seed was 1 and is now 2.*--overwrite"):
        open_run(folder, {"seed": 2, "prompt": ["a", "b"]})
    with pytest.raises(InputError, match="other weights"):
        open_run(folder, {"seed": 1, "prompt": ["a", "b"]}).begin(weights={"flux": {"f": "2"}})
    run.finish()
    again = open_run(folder, {"seed": 1, "prompt": ["a", "b"]})
    assert again.finished and again.manifest["wall_seconds"] >= 0 and again.manifest["peak_memory_mib"]["resident"] > 0


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    kept = tmp_path / "results" / "a.txt"
    kept.parent.mkdir()
    kept.write_text("an hour of work")
    with pytest.raises(OSError, match="results"):
        write_json(tmp_path / "results", {})
    assert kept.read_text() == "an hour of work" and list(tmp_path.iterdir()) == [kept.parent]


def test_overwriting_waits_until_the_new_run_begins(tmp_path):
    folder = tmp_path / "run"
    open_run(folder, {"seed": 1}).begin()
    (folder / "result").touch()
    replacement = open_run(folder, {"seed": 2}, overwrite=True)
    assert (folder / "result").exists()
    replacement.begin()
    assert not (folder / "result").exists()
    assert json.loads((folder / "run.json").read_text())["arguments"] == {"seed": 2}


def test_a_run_that_is_killed_while_it_is_replaced_is_not_taken_for_finished(tmp_path, monkeypatch):
    run = open_run(tmp_path / "run", {"seed": 1})
    run.begin()
    (run.folder / "results").mkdir()
    run.finish()
    replacement = open_run(run.folder, {"seed": 2}, overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupt)
        replacement.begin()
    with pytest.raises(InputError, match="files but no run"):
        open_run(run.folder, {"seed": 1})


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_of_something_else_is_not_taken_over(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(InputError, match="files but no run"):
        open_run(tmp_path, {})


def test_the_newest_unfinished_run_is_found(tmp_path):
    for seed, finished in ((1, False), (2, False), (3, True)):
        run = open_run(tmp_path / f"run{seed}", {"seed": seed, "steps": 5})
        run.begin()
        if finished:
            run.finish()
    assert find_unfinished(tmp_path, {"seed": -1, "steps": 5}, "seed") == 2
    assert find_unfinished(tmp_path, {"seed": -1, "steps": 6}, "seed") is None


def test_derived_seeds_differ():
    seeds = {derive_seed(seed, arc, purpose) for seed in range(5) for arc in range(5) for purpose in range(3)}
    assert len(seeds) == 75 and derive_seed(1, 2) == derive_seed(1, 2)


@pytest.mark.parametrize(
    ("prompt", "shown"), [("", ""), ("exterior view", "exterior_view"), ("a/b: c?", "a_b__c_"), ("x" * 80, "x" * 60)]
)
def test_prompts_become_file_names(prompt, shown):
    assert anchor_run_name("n", [prompt], 400, 42, 12).split("_e400_")[0].rsplit("-", 1)[0] == f"n_p{shown}"


def test_prompts_are_padded_with_the_last():
    assert pad_prompts(["a", "b"], 4) == ["a", "b", "b", "b"]
    with pytest.raises(InputError, match="3 prompts for 2 anchors"):
        pad_prompts(["a", "b", "c"], 2)


def test_the_last_edge_frame_is_repeated():
    assert edge_frame_indices(49) == [*range(46), 45, 45, 45]


def test_video_plays_and_is_reproducible(tmp_path):
    rng = np.random.default_rng(0)
    frames = [np.tile(rng.integers(0, 256, (1, 1, 3), np.uint8), (48, 64, 1)) for _ in range(9)]
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, fps=12)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with imageio.get_reader(tmp_path / "a.mp4") as reader:
        meta = reader.get_meta_data()
        assert (meta["codec"], meta["fps"], meta["size"]) == ("h264", 12, (64, 48))
        assert meta["pix_fmt"].startswith("yuv420p")
        shown = [reader.get_data(i) for i in range(reader.count_frames())]
    assert len(shown) == 9
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(shown, frames, strict=True)) < 6


def test_no_ffmpeg_is_not_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "ffmpeg"))
    with pytest.raises(InputError, match=r"there is no ffmpeg .*pip install"):
        write_video(tmp_path / "a.mp4", [np.zeros((32, 48, 3), np.uint8)], 12)
    assert not list(tmp_path.iterdir())


def test_video_with_an_odd_side_is_refused(tmp_path):
    with pytest.raises(ValueError, match="63x48"):
        write_video(tmp_path / "a.mp4", [np.zeros((48, 63, 3), np.uint8)], fps=12)
    assert not list(tmp_path.iterdir())


def test_pictures_round_trip(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    write_image(tmp_path / "x.png", image)
    assert np.array_equal(read_image(tmp_path / "x.png"), image)
    (tmp_path / "x.png").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(tmp_path / "x.png")


def test_sheets_and_curves_have_their_sizes():
    cells = [np.zeros((40, 60, 3), np.uint8)] * 3
    assert contact_sheet([("a", cells), ("b", cells[:1])], cell_width=30).shape == (2 * (18 + 20), 90, 3)
    assert plot_curve([3.0, 2.0, 1.0], "loss").shape == (360, 640, 3)
    assert plot_curve([1.0], "loss").shape == (360, 640, 3)


def test_tokens_round_trip_in_the_documented_order():
    latents = torch.arange(2 * 16 * 4 * 6).float().reshape(2, 16, 4, 6)
    tokens = pack(latents)
    assert torch.equal(unpack(tokens, 4, 6), latents)
    assert torch.equal(tokens[0, 4, :4], latents[0, 0, 2:4, 2:4].flatten())  # token (row 1, column 1): channel, dy, dx
    assert token_positions(4, 6, torch.device("cpu"))[4].tolist() == [0, 1, 1]


def test_colours_map_to_the_signed_range():
    image = np.array([[[0, 128, 255]]], np.uint8)
    assert to_signed(image).flatten().tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)
    with pytest.raises(ValueError, match="float64"):
        to_signed(image.astype(float))


def reference(width: int = 300, height: int = 200, prompt: str = "") -> Reference:
    ramp = np.linspace(0, 255, width, dtype=np.uint8)
    image = np.repeat(np.tile(ramp, (height, 1))[..., None], 3, axis=2)
    return Reference(None, image, image, prompt)


@pytest.mark.parametrize(
    ("aspect", "size"), [(16 / 9, (1024, 576)), (4 / 3, (1024, 768)), (1.0, (1024, 1024)), (2 / 3, (672, 1024))]
)
def test_crop_sizes(aspect, size):
    assert crop_size(aspect, 1024, 32) == size


def test_a_crop_and_its_edges_are_the_same_window():
    for seed in range(5):
        image, edges = draw_crop(reference(), (96, 96), np.random.default_rng(seed))
        assert image.shape == edges.shape == (96, 96, 3)
        assert np.abs(image.astype(int) - edges).max() <= 2


def test_a_global_batch_does_not_depend_on_who_draws_it():
    references = [reference(prompt="a"), reference(prompt="b")]
    whole = draw_batch(references, (7, 3, 0), range(4), 96, 16)
    halves = [draw_batch(references, (7, 3, 0), items, 96, 16) for items in (range(2), range(2, 4))]
    for field in ("images", "control", "noise", "eps", "t"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(half, field) for half in halves]))
    assert whole.prompt == halves[0].prompt == halves[1].prompt
    other = draw_batch(references, (7, 4, 0), range(4), 96, 16)
    assert not torch.equal(whole.t, other.t)


def test_timesteps_cover_the_schedule():
    t = torch.cat([draw_batch([reference()], (0, step, 0), range(4), 16, 16).t for step in range(100)])
    assert 0 <= t.min() < 0.1 and 0.9 < t.max() <= 1
    assert t.mean() == pytest.approx(0.68, abs=0.05)  # the mean of the shifted schedule


def test_references_are_checked(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((60, 80, 3), np.uint8))
    write_image(tmp_path / "edges.png", np.zeros((60, 81, 3), np.uint8))
    image, edges = [tmp_path / "a.png"], [tmp_path / "edges.png"]
    blank = lambda picture: 0 * picture  # noqa: E731
    assert load_references(image, [], [], blank, 80)[0].prompt == ""
    with pytest.raises(InputError, match=r"--prompt has 2 value\(s\) for 1 picture"):
        load_references(image, ["a", "b"], [], blank, 80)
    with pytest.raises(InputError, match="80x60, too small for crops of 96"):
        load_references(image, [], [], blank, 96)
    with pytest.raises(InputError, match="81x60, its picture 80x60"):
        load_references(image, [], edges, None, 80)
