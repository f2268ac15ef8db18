"""The synthetic world: styles and captions, exact pictures, edges as in preprocessing, and splits that never meet."""

import itertools
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from synthetic.clips import clip_styles, has_coarse_mesh
from synthetic.pictures import EDGE_SIZE, SIZE, SPLITS, STYLES, scene_seed, style_seeds
from synthetic.render import SKY, World, class_map, draw_edges, make_world, paint, town_world, trace, typical_depth
from synthetic.scenes import IMAGE_SIZE, PATHS, Part, export_glb, make_path, make_town, to_camera_path
from synthetic.styles import (
    CLASSES,
    COLOURS,
    HAZE_START,
    JITTER,
    MAJOR_CLASSES,
    PLURALS,
    SKIES,
    TEXTURES,
    Style,
    make_style,
    sky_colours,
    surface_colours,
    vocabulary,
)
from tests.support.helpers import ROOT
from utils.edges import resize_edges
from utils.layout import ARC_FRAMES
from utils.meshes.load import load_geometry
from utils.meshes.mesh import build_geometry, turn
from utils.scene.views import View, correspondence, make_views

SEED = 200_003
SOME_SEEDS = (*range(400), *range(109_900, 110_000), *range(200_000, 200_100))


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    return make_town(SEED)


@pytest.fixture(scope="module")
def world(parts: list[Part]) -> World:
    return town_world(parts)


@pytest.fixture(scope="module")
def styles() -> list[Style]:
    return [make_style(seed) for seed in SOME_SEEDS]


def views_of(parts: list[Part], kind: str, size: tuple[int, int] = SIZE) -> list[View]:
    return make_views(to_camera_path(make_path(parts, kind, SEED, ARC_FRAMES)), size)


def at(eye: tuple, size: tuple[int, int] = (24, 16), pitch: float = 0.0) -> View:
    """A view northwards from `eye`, `pitch` radians upwards, 90 degrees wide."""
    c2w = np.eye(4)
    c2w[:3, :3] = np.array([(1, 0, 0), (0, -np.sin(pitch), np.cos(pitch)), (0, -np.cos(pitch), -np.sin(pitch))]).T
    c2w[:3, 3] = eye
    return View(c2w, size[0] / 2, size[0] / 2, size[0] / 2, size[1] / 2, *size)


def colours_along(world: World, style: Style, eye: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(colours float32 [N, 3], classes int [N]) of the first hit of each ray, without `trace` and `paint`."""
    caster, face = world.caster, world.caster.cast(eye, rays)
    hit, kind = face >= 0, np.where(face >= 0, world.kinds[face], SKY)
    depth = caster.plane_depth(face, eye, rays)
    normal = caster.normals[face]
    normal = np.where((normal * rays).sum(1, keepdims=True) > 0, -normal, normal)
    colours = sky_colours(style, rays[:, 2] / np.hypot(rays[:, 0], rays[:, 1]))
    points = (eye + depth[:, None] * rays)[hit]
    colours[hit] = surface_colours(style, kind[hit], points, normal[hit])
    return colours, kind


# Styles and captions


def test_a_seed_gives_one_style():
    one, again, other = make_style(7), make_style(7), make_style(8)
    for field in fields(Style):
        a, b = getattr(one, field.name), getattr(again, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        else:
            assert np.array_equal(a, b)
    assert not np.array_equal(one.colours["wall"], other.colours["wall"])


def test_captions_name_colours_textures_and_sky(styles: list[Style]):
    for style in styles:
        phrases = style.caption.split(", ")
        assert len(phrases) == len(PLURALS) + 1
        for phrase, (kind, plural) in zip(phrases, PLURALS.items(), strict=False):
            name, *texture, last = phrase.split()
            assert last == plural
            assert (np.abs(style.colours[kind] - COLOURS[kind][name]) <= JITTER).all()
            assert texture == [name for name in [style.textures.get(kind, "plain")] if name != "plain"]
        low, high, *_ = SKIES[phrases[-1].removesuffix(" sky")]
        assert (np.abs(style.low_sky - low) <= JITTER).all() and (np.abs(style.high_sky - high) <= JITTER).all()


def test_palettes_stay_in_range(styles: list[Style]):
    for style in styles:
        assert set(style.colours) == set(CLASSES) - {"sky"}
        for colour in (*style.colours.values(), style.low_sky, style.high_sky):
            assert colour.shape == (3,) and colour.min() >= 0 and colour.max() <= 255
        assert np.linalg.norm(style.sun) == pytest.approx(1) and 0.866 < style.sun[2] < 0.966  # 60 to 75 degrees
        assert 120 <= style.haze <= 400
    seen = {kind: {style.textures[kind] for style in styles} for kind in TEXTURES}
    assert all(seen[kind] == set(options) for kind, options in TEXTURES.items())


def test_captions_use_the_whole_vocabulary_and_nothing_else(styles: list[Style]):
    said = {word for style in styles for word in style.caption.replace(",", "").split()}
    assert said == set(vocabulary()) and len(vocabulary()) == len(said)


@pytest.mark.slow
def test_random_networks_are_written_by_the_command(tmp_path: Path):
    command = [sys.executable, "-m", "synthetic.tiny_models", "--output", tmp_path / "random"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = {path.name for path in (tmp_path / "random").iterdir()}
    assert names == {"flux", "controlnet", "cogvideox", "preset.json"}


def test_both_tokenizers_know_every_caption(styles: list[Style]):
    from synthetic.tiny_models import MAX_TOKENS, clip_text, t5_text

    clip, t5 = clip_text()[1], t5_text()[1]
    captions = ["", *(style.caption for style in styles)]
    for tokenizer in (clip, t5):
        for caption in captions:
            ids = tokenizer(caption).input_ids
            assert len(ids) <= MAX_TOKENS and ids[-1] == tokenizer.eos_token_id
            if tokenizer is t5:
                assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",").split() == captions[-1].split()
    for caption in captions:  # a word is one token
        words = caption.replace(",", " ,").split()
        assert clip(caption).input_ids[1:-1] == [clip.convert_tokens_to_ids(word + "</w>") for word in words]
    assert t5("a castle").input_ids.count(t5.unk_token_id) > 0  # a word no caption has


# Splits


def seeds_of(split: str) -> tuple[set[int], set[int]]:
    """Seeds of scenes and of styles that the pictures and clips of a split use, at both ends of it."""
    first, end = SPLITS[split]
    count = min((end - first) // STYLES, 3000)
    numbers = [*range(20), *range(count - 20, count)]
    scenes = {scene_seed(split, n) for n in numbers}
    styles = {seed for n in numbers for seed in style_seeds(split, n)}
    return scenes, styles | {style.seed for n in numbers for style in clip_styles(split, n)}


@pytest.mark.parametrize("split", SPLITS)
def test_seeds_stay_in_their_split(split: str):
    first, end = SPLITS[split]
    for seeds in seeds_of(split):
        assert first <= min(seeds) and max(seeds) < end
    last = (end - first) // STYLES - 1
    assert scene_seed(split, last) < end and max(style_seeds(split, last)) < end
    for wrong in (-1, last + 1):
        with pytest.raises(ValueError, match=f"outside the {split} split"):
            scene_seed(split, wrong)


def test_splits_never_meet():
    ranges = sorted(SPLITS.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    for one, two in itertools.combinations(SPLITS, 2):
        assert all(a.isdisjoint(b) for a, b in zip(seeds_of(one), seeds_of(two), strict=True))
    assert [SPLITS[split][0] for split in ("train", "validation", "test")] == [0, 100_000, 200_000]


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_and_clips_of_a_town_have_their_own_styles(split: str):
    for number in (0, 1, 500, 2000):
        assert not {style.seed for style in clip_styles(split, number)} & set(style_seeds(split, number))
    both = [seed for number in range(100) for seed in style_seeds(split, number)]
    assert len(set(both)) == len(both)


def test_every_kind_of_path_has_clips_with_coarse_meshes():
    coarse = {(n % len(PATHS), has_coarse_mesh(n)) for n in range(2 * len(PATHS))}
    assert len(coarse) == 2 * len(PATHS)


# Pictures


@pytest.mark.parametrize(("kind", "frames"), [("walk", (0, 20)), ("orbit", (0, 45)), ("flyover", (45, 5))])
def test_a_point_has_one_colour_in_every_view(world: World, parts: list[Part], kind: str, frames: tuple[int, int]):
    source, target = (views_of(parts, kind)[frame] for frame in frames)
    found = correspondence(world.caster, source, target)
    seen = found.visible.ravel()
    assert seen.mean() > 0.25
    rays = target.rays().reshape(-1, 3)[seen]
    back = source.directions(*found.position.reshape(-1, 2)[seen].T)
    for seed in (SEED, SEED + 1):
        style = make_style(seed)
        here, kinds = colours_along(world, style, target.eye, rays)
        there, _ = colours_along(world, style, source.eye, back)
        differs = np.abs(here - there).max(axis=1) > 0.5
        assert differs.mean() < 2e-3  # at a boundary of two colours, rounding may choose the other one
        assert np.abs(here - there)[~differs].mean() < 0.01
        assert len(set(kinds)) > 4 and here[kinds != SKY].std() > 10


def test_painting_is_the_mean_of_its_samples(world: World, parts: list[Part]):
    view, style = views_of(parts, "walk")[10], make_style(SEED)
    colours, kinds = colours_along(world, style, view.eye, view.rays(2).reshape(-1, 3))
    width, height = SIZE
    wanted = colours.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    buffer = trace(world, view)
    picture = paint(buffer, style)
    assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
    assert np.array_equal(buffer.kind, kinds)
    error = np.abs(picture - wanted)
    assert (error > 0.51).mean() < 1e-3 and error.mean() < 0.3  # rounding to whole numbers alone


def test_one_buffer_serves_every_style(world: World, parts: list[Part]):
    buffer = trace(world, views_of(parts, "orbit")[0])
    one, other = make_style(1), make_style(2)
    first = paint(buffer, one)
    assert (paint(buffer, other) != first).any()
    assert np.array_equal(paint(buffer, one), first)


def test_class_map_holds_pixels_whose_samples_agree(world: World, parts: list[Part]):
    view = views_of(parts, "walk")[10]
    classes = class_map(trace(world, view))
    _, centre = colours_along(world, make_style(0), view.eye, view.rays().reshape(-1, 3))
    sure = classes.ravel() >= 0
    assert classes.shape == SIZE[::-1] and 0.7 < sure.mean() < 1
    assert (classes.ravel() == centre)[sure].mean() > 0.995
    _, samples = colours_along(world, make_style(0), view.eye, view.rays(2).reshape(-1, 3))
    samples = samples.reshape(SIZE[1], 2, SIZE[0], 2)
    agree = (samples == samples[:, :1, :, :1]).all(axis=(1, 3))
    assert np.array_equal(classes, np.where(agree, samples[:, 0, :, 0], -1))


def test_sky_fades_from_the_horizon_upwards():
    style = make_style(0)
    low, half, high, below = sky_colours(style, np.array([0, 0.25, 0.5, -3.0]))
    assert np.allclose(low, style.low_sky, atol=1e-3) and np.array_equal(low, below)
    assert np.allclose(high, style.high_sky, atol=1e-3)
    assert np.allclose(half, (style.low_sky + style.high_sky) / 2, atol=1e-3)
    assert np.array_equal(sky_colours(style, np.array([9.0, np.inf])), np.array([high, high]))


def flat_ground(name: str = "ground_00") -> World:
    corners = np.array([(-500, -500, 0), (500, -500, 0), (500, 500, 0), (-500, 500, 0)], float)
    return town_world([Part(name, corners, np.array([(0, 1, 2), (0, 2, 3)]))])


def test_flat_ground_under_the_sky():
    """Every term computed by hand: ground below the horizon, lit from above, hazed far from the middle."""
    style = replace(make_style(3), textures=dict.fromkeys(TEXTURES, "plain"))
    view = at((0, -10, 2), size=(24, 16))
    buffer = trace(flat_ground(), view)
    classes = class_map(buffer)
    assert (classes[:8] == SKY).all() and (classes[8:] == CLASSES.index("ground")).all()
    picture = paint(buffer, style).astype(float)
    light = style.ambient + style.sunlight * style.sun[2]
    lit = np.clip(style.colours["ground"] * light, 0, 255)
    assert np.abs(picture[12:] - lit).max() <= 0.51  # less than HAZE_START away
    height = np.array([(8 - (row + 0.5)) / 12 for row in (6, 7)])  # of rows above the horizon, over the focal length
    assert (np.abs(picture[7] - style.low_sky) <= np.abs(style.high_sky - style.low_sky) * height[1] / 0.5 + 1).all()
    far = surface_colours(style, np.array([CLASSES.index("ground")] * 2), np.array([(0, HAZE_START, 0), (1e5, 0, 0)]),
                          np.array([(0, 0, 1.0)] * 2))  # fmt: skip
    assert np.allclose(far[0], lit, atol=1e-3) and np.allclose(far[1], style.low_sky, atol=1e-3)


def test_a_view_of_nothing_but_sky():
    buffer = trace(flat_ground(), at((0, 0, 2), pitch=1.2))
    style = make_style(0)
    assert (class_map(buffer) == SKY).all() and len(buffer.points) == 0
    assert np.abs(paint(buffer, style) - style.high_sky).max() <= 1


def test_a_name_without_a_class_is_refused():
    corners = np.eye(3)
    with pytest.raises(ValueError, match="castle"):
        make_world(build_geometry([("castle_00", corners, np.array([(0, 1, 2)]))], "+z"))


def test_pictures_show_every_class():
    """All classes occur in some view, the major ones in the views of every town."""
    seen = set()
    for seed in (SEED, SEED + 1, 4):
        parts = make_town(seed)
        world, town = town_world(parts), set()
        for kind in PATHS:
            views = make_views(to_camera_path(make_path(parts, kind, seed, ARC_FRAMES)), SIZE)
            for view in views[::15]:
                town |= {CLASSES[k] for k in np.unique(class_map(trace(world, view))) if k >= 0}
        assert town >= set(MAJOR_CLASSES)
        seen |= town
    assert seen == set(CLASSES)


# The same geometry and edges as preprocessing


def test_geometry_is_the_exported_files(parts: list[Part], world: World, tmp_path: Path):
    export_glb(parts, tmp_path / "scene.glb")
    exported = make_world(turn(load_geometry(tmp_path / "scene.glb"), "+z"))
    assert len(exported.kinds) == len(world.kinds)
    style = make_style(SEED)
    for kind in PATHS:
        view = views_of(parts, kind)[20]
        ours, theirs = trace(world, view), trace(exported, view)
        assert (ours.kind != theirs.kind).mean() < 1e-3
        assert (class_map(ours) != class_map(theirs)).mean() < 2e-3
        error = np.abs(paint(ours, style).astype(int) - paint(theirs, style))
        assert error.mean() < 0.05 and (error > 1).mean() < 5e-3


@pytest.mark.slow
def test_half_size_edges_are_nearly_those_of_preprocessing(world: World, parts: list[Part]):
    assert IMAGE_SIZE == (1080, 720) and EDGE_SIZE == (540, 360)
    likeness = []
    for kind in ("walk", "flyover", "rise"):
        depth = typical_depth(world, views_of(parts, kind)[::9])
        small, full = (
            resize_edges(draw_edges(world, views_of(parts, kind, size)[20], depth), *SIZE)
            for size in (EDGE_SIZE, IMAGE_SIZE)
        )
        assert small.shape == (*SIZE[::-1], 3) and small.max() > 200
        assert abs(small.mean() / full.mean() - 1) < 0.15
        likeness.append(np.corrcoef(small.ravel(), full.ravel())[0, 1])
    assert np.mean(likeness) > 0.97 and min(likeness) > 0.95
