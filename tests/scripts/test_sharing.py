"""Several runs, scenes, styles and seeds in one command, alone or among processes."""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextModel, T5EncoderModel

import models.flux.network
import models.inbetween.pipeline
from models.inbetween.pipeline import CogVideoXInbetweenPipeline
from tests.support.helpers import ALIGN, ANCHORS, GGI, assert_same, call, contents, kill_at, run, start
from tests.support.stages import QUICK_ANCHORS, QUICK_VIDEO, RUN, VIDEO, anchor_run, draw, new_scene, train
from utils.layout import anchor_run_name, lora_paths

pytestmark = pytest.mark.slow

Count = Callable[[str, object, str], None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], Count]:
    """(calls so far, count(name, owner, attribute)); `count` counts the calls of a function under a name.

    Calls with meta tensors, for the plan of memory, do not count.
    """
    calls: dict[str, int] = {}

    def count(name: str, owner: object, attribute: str) -> None:
        original, calls[name] = getattr(owner, attribute), 0

        def counted(*arguments, **options):
            calls[name] += not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((arguments, options)))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, attribute, counted)

    return calls, count


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory, loras: Path) -> Path:
    """A folder with two LoRAs, `town` and `village`."""
    folder = shutil.copytree(loras, tmp_path_factory.mktemp("styles") / "loras")
    shutil.copytree(folder / "town", folder / "village")
    for path in lora_paths(folder, "village", 4):
        save_file({key: -tensor if ".up." in key else tensor for key, tensor in load_file(path).items()}, path)
    return folder


def test_networks_and_prompts_are_loaded_once_for_all_targets(tmp_path: Path, one_arc: Path, calls):
    """Two runs, one prompt: one pipeline, one pass of the text encoder for each text, one denoising per arc."""
    calls, count = calls
    count("load", models.inbetween.pipeline, "load_ggi_transformer")
    count("encode", T5EncoderModel, "forward")
    count("denoise", CogVideoXInbetweenPipeline, "__call__")
    scenes = [shutil.copytree(one_arc, tmp_path / name) for name in ("first", "second")]
    targets = [scene / "multiviews" / anchor_run(1) for scene in scenes]
    assert call(GGI, "--target", *targets, *QUICK_VIDEO) == 0
    assert calls == {"load": 1, "encode": 2, "denoise": 2}
    first, second = (contents(target / VIDEO) for target in targets)
    assert_same(first, second)


def test_networks_are_loaded_once_for_all_scenes_and_styles(tmp_path: Path, styles: Path, calls):
    """Two scenes in two styles, two prompts: one pass of each text encoder for each, one of the others per step."""
    calls, count = calls
    scenes = [new_scene(tmp_path / name, num_arcs=1) for name in ("first", "second")]
    count("load", models.flux.network, "load_model")
    for name, cls in (("t5", T5EncoderModel), ("clip", CLIPTextModel)):
        count(name, cls, "forward")
    for name, cls in (("transformer", FluxTransformer2DModel), ("controlnet", FluxControlNetModel)):
        count(name, cls, "forward")
    shared = ("--loras", styles, "--seed", 1, *QUICK_ANCHORS)
    assert call(ANCHORS, "--target", *scenes, "--pfix", "town", "village", *shared) == 0
    passes = 3 * 2 * 2 * 2  # steps, anchors, scenes, styles
    assert calls == {"load": 3, "t5": 2, "clip": 2, "transformer": passes, "controlnet": passes}
    for pfix in ("town", "village"):
        folder = anchor_run_name(pfix, ["a town"] * 2, 4, 1, 2)
        assert call(ANCHORS, "--target", scenes[0], "--pfix", pfix, *shared, "--output_dir", tmp_path / "alone") == 0
        found = [contents(scene / "multiviews" / folder) for scene in scenes]
        assert_same(*found)
        assert_same(found[0], contents(tmp_path / "alone" / folder))
    town, village = (path.read_bytes() for path in sorted((tmp_path / "alone").glob("*/image_00.png")))
    assert town != village


def test_arcs_are_shared_among_processes(tmp_path: Path, anchored: Path, unchained: Path):
    """Two processes are killed; three do the rest: the same files as one makes."""
    arguments = ("--target", anchored / "multiviews" / RUN, *QUICK_VIDEO, "--no-chain", "--output_dir", tmp_path)
    folder = tmp_path / VIDEO
    kill_at(folder / "0046.png", GGI, *arguments, begin=partial(start, processes=2))  # the second one's first frame
    assert not (folder / "video.mp4").exists()
    result = run(GGI, *arguments, processes=3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(folder / "video.mp4"), str(folder / "contact_sheet.png")]
    assert_same(contents(folder), contents(unchained / VIDEO))


@pytest.mark.parametrize("processes", [2, 3])
def test_scenes_styles_and_seeds_are_shared_among_processes(processes: int, tmp_path: Path, styles: Path):
    """Four runs: the same files as one by one."""
    scenes = [new_scene(tmp_path / name, num_arcs=1) for name in ("first", "second")]
    shared = ("--loras", styles, *QUICK_ANCHORS)
    pfixes, seeds = (["town"], [1, 2]) if processes == 2 else (["town", "village"], [1])
    several = ("--target", *scenes, "--pfix", *pfixes, "--seed", *seeds)
    result = run(ANCHORS, *shared, *several, processes=processes)
    assert result.returncode == 0, result.stderr
    names = {(p, seed): anchor_run_name(p, ["a town"] * 2, 4, seed, 2) for p in pfixes for seed in seeds}
    folders = [scene / "multiviews" / names[p, seed] for p in pfixes for scene in scenes for seed in seeds]
    assert result.stdout.split() == [str(folder) for folder in folders]
    for (pfix, seed), name in names.items():
        alone = ("--target", scenes[0], "--pfix", pfix, "--seed", seed, "--output_dir", tmp_path / "alone")
        assert call(ANCHORS, *shared, *alone) == 0
        for scene in scenes:
            assert_same(contents(scene / "multiviews" / name), contents(tmp_path / "alone" / name))


def test_processes_need_a_seed_to_agree_on(tmp_path: Path, loras: Path):
    result = run(ANCHORS, *draw(new_scene(tmp_path / "scene"), loras, "--seed", -1), processes=2)
    assert result.returncode != 0 and "error: --seed -1: several processes need a seed to agree on" in result.stderr


def come_last_to_every_renaming() -> None:
    """Delay every renaming in the second of two processes."""
    if os.environ["RANK"] == "1":
        replace = os.replace
        os.replace = lambda *paths: (time.sleep(0.5), replace(*paths))[1]


def test_two_processes_write_one_checkpoint(tmp_path: Path):
    single, double = tmp_path / "single", tmp_path / "double"
    assert call(ALIGN, *train(single, "--max_train_steps", 2, "--train_batch_size", 2)) == 0
    arguments = train(double, "--max_train_steps", 2)
    result = run(ALIGN, *arguments, processes=2, prepare=[come_last_to_every_renaming])
    assert result.returncode == 0, result.stderr
    assert contents(double, "random_states").keys() == contents(single, "random_states").keys()
    losses = [np.loadtxt(folder / "town" / "loss.csv", delimiter=",", skiprows=1) for folder in (single, double)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)
