"""The committed reference pictures: test seeds, all major classes in view, and a correct index."""

import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from synthetic import reference
from synthetic.pictures import SPLITS
from synthetic.reference import CHOSEN, FOLDER, INDEX, SIZE, chosen_entries, main, style_of
from synthetic.reference_views import ENOUGH, completeness, find_reference, look, town_world_and_views
from synthetic.render import World, class_map, paint, trace
from synthetic.scenes import SAMPLE_SEED
from synthetic.styles import CLASSES, COLOURS, MAJOR_CLASSES, SKIES, make_style
from tests.support.helpers import ROOT
from utils.cli import InputError
from utils.images import read_image, write_image
from utils.scene.views import View, resize_view

COMMITTED = ROOT / FOLDER
BAND = 48  # pixels; width of the parts of a picture that are drawn again


@functools.cache
def chosen_view(name: str) -> tuple[World, View]:
    """The town of a reference and the view that shows the most of it, at full size."""
    world, views = town_world_and_views(CHOSEN[name][0], SIZE)
    return world, max(views, key=lambda view: completeness(look(world, view)))


def bands(view: View) -> list[tuple[View, tuple[slice, slice]]]:
    """A horizontal and a vertical band across the middle of a view, and their positions in its picture."""
    x, y = ((side - BAND) // 2 for side in SIZE)
    row = replace(view, cy=view.cy - y, height=BAND), (slice(y, y + BAND), slice(None))
    column = replace(view, cx=view.cx - x, width=BAND), (slice(None), slice(x, x + BAND))
    return [row, column]


def same_picture(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Compare with tolerance: rounding of a float32 may put a pixel beside a joint on its other side."""
    off = np.abs(found.astype(int) - wanted)
    return off.mean() < 0.1 and np.percentile(off, 99) <= 1


def test_seeds_are_those_kept_for_tests():
    first, end = SPLITS["test"]
    seeds = [seed for pair in CHOSEN.values() for seed in pair]
    assert len(CHOSEN) >= 6 and "boxtown" in CHOSEN
    assert all(first <= seed < end for seed in seeds) and SAMPLE_SEED not in seeds
    for one in zip(*CHOSEN.values(), strict=True):
        assert len(set(one)) == len(CHOSEN)  # every town and every style once


def test_styles_differ():
    """Every sky is there, and every colour of what covers most of a picture."""
    captions = [entry.caption for entry in chosen_entries().values()]
    assert all(any(f"{sky} sky" in caption for caption in captions) for sky in SKIES)
    for place, kind in ((0, "wall"), (2, "ground"), (3, "road"), (4, "tree"), (5, "window")):
        named = {caption.split(", ")[place].split()[0] for caption in captions}
        assert named == set(COLOURS[kind]), kind


def test_the_index_agrees_with_the_files():
    index = json.loads((COMMITTED / INDEX).read_text())
    assert index == {name: asdict(entry) for name, entry in chosen_entries().items()}
    assert {path.stem for path in COMMITTED.glob("*.png")} == set(index)
    for name in index:
        assert read_image(COMMITTED / f"{name}.png").shape == (SIZE[1], SIZE[0], 3)
        assert style_of(COMMITTED / f"{name}.png").seed == index[name]["style_seed"]
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) < 3e6


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_a_committed_picture_is_what_its_seeds_give(name: str):
    """It differs from other styles, other views, and the same picture moved by a pixel."""
    world, view = chosen_view(name)
    committed, style = read_image(COMMITTED / f"{name}.png"), CHOSEN[name][1]
    other = replace(view, c2w=view.c2w @ np.array([[1, 0, 0, 0.05], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    for (band, place), (beside, _) in zip(bands(view), bands(other), strict=True):
        seen, wanted = trace(world, band), committed[place]
        drawn = paint(seen, make_style(style))
        assert same_picture(drawn, wanted)
        wrong = [np.roll(drawn, 1, axis) for axis in (0, 1)]
        wrong += [paint(seen, make_style(style + 1)), paint(trace(world, beside), make_style(style))]
        assert not any(same_picture(picture, wanted) for picture in wrong)


@pytest.mark.parametrize("name", CHOSEN)
def test_every_major_class_is_well_visible(name: str):
    world, view = chosen_view(name)
    classes = class_map(trace(world, resize_view(view, (144, 96))))
    for kind in MAJOR_CLASSES:
        assert (classes == CLASSES.index(kind)).mean() >= 0.8 * ENOUGH[kind], kind


def test_the_sky_has_the_style_s_colours():
    style = make_style(CHOSEN["snow"][1])
    world, view = chosen_view("snow")
    buffer = trace(world, resize_view(view, (144, 96)))
    sky = paint(buffer, style)[class_map(buffer) == CLASSES.index("sky")].astype(float)
    low, high = np.minimum(style.low_sky, style.high_sky), np.maximum(style.low_sky, style.high_sky)
    assert (sky >= low - 1).all() and (sky <= high + 1).all()


@pytest.mark.slow
def test_a_reference_is_deterministic():
    style = make_style(200_069)
    one, two = (find_reference(200_130, style, (72, 48)) for _ in range(2))
    assert one.dtype == np.uint8 and one.shape == (48, 72, 3)
    np.testing.assert_array_equal(one, two)


def test_style_of_knows_only_what_the_index_names(tmp_path: Path):
    picture = tmp_path / "mine.png"
    write_image(picture, np.zeros((4, 4, 3), np.uint8))
    assert style_of(picture) is None  # no index
    caption = make_style(200_005).caption
    index = {"other": {"scene_seed": 1, "style_seed": 200_005, "caption": caption}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert style_of(picture) is None
    assert style_of(tmp_path / "other.png").caption == caption


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"style_seed": 200_005, "caption": "grey walls"}, "draw it again"),
        ({"style_seed": -1, "caption": "grey walls"}, "draw it again"),
        ({"style_seed": "many", "caption": "grey walls"}, "needs style_seed and caption"),
        ({"caption": "grey walls"}, "needs style_seed and caption"),
        (7, "needs style_seed and caption"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, entry: object, words: str):
    (tmp_path / INDEX).write_text(json.dumps({"mine": entry}))
    with pytest.raises(InputError, match=words):
        style_of(tmp_path / "mine.png")


def test_nothing_is_replaced_unasked(tmp_path: Path):
    (tmp_path / "boxtown.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="--overwrite"):
        main(["--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["boxtown.png"]


@pytest.mark.slow
def test_the_command_makes_the_committed_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One of them, drawn in full and under its own name."""
    monkeypatch.setattr(reference, "CHOSEN", {"boxtown": CHOSEN["boxtown"]})
    main(["--output_dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"boxtown.png", INDEX}
    assert json.loads((tmp_path / INDEX).read_text()).items() <= json.loads((COMMITTED / INDEX).read_text()).items()
    drawn = read_image(tmp_path / "boxtown.png")
    assert same_picture(drawn, read_image(COMMITTED / "boxtown.png"))
    assert not same_picture(drawn, read_image(COMMITTED / "autumn.png"))
