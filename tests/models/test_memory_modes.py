"""--memory of the scripts: the plan, the memory that networks take, and the modes' effect on results."""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

import models.flux.alignment
import models.flux.anchors
from benchmarks.memory.counting import held_bytes
from benchmarks.memory.plans import Plan, plan_alignment, plan_anchors, plan_ggi
from models.inbetween.pipeline import CogVideoXInbetweenPipeline
from models.weights import FLUX_STAGE, GGI_STAGE, locate
from tests.support.helpers import ALIGN, ANCHORS, GGI, call, forbid_models
from tests.support.small import SIZE, small_preset
from tests.support.stages import QUICK_VIDEO, RUN, draw, train
from utils.files import read_json
from utils.images import read_image
from utils.runs import MANIFEST

pytestmark = pytest.mark.slow


def test_the_plan_comes_before_any_model(anchored: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """On a machine without free memory."""
    monkeypatch.setattr("models.runtime.memory.free_memory", lambda device: 10**6)
    forbid_models(monkeypatch)
    video = anchored.parent / "video"
    assert call(GGI, "--target", anchored / "multiviews" / RUN, *QUICK_VIDEO, "--output_dir", video) == 2
    assert "cpu has room for 0.9 MB: no mode fits" in capsys.readouterr().err
    assert not video.exists()


def test_anchors_in_eight_bits_stay_near(anchored: Path, loras: Path, tmp_path: Path):
    assert call(ANCHORS, *draw(anchored, loras, "--memory", "balanced", "--output_dir", tmp_path)) == 0
    assert read_json(tmp_path / RUN / MANIFEST)["weights"]["kept"] == {"transformer": "fp8"}
    exact, near = (
        read_image(folder / RUN / "image_00.png").astype(int) for folder in (anchored / "multiviews", tmp_path)
    )
    assert 0 < abs(exact - near).mean() < 5


def test_a_quantised_alignment_is_not_continued_in_full(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "loras"
    assert call(ALIGN, *train(folder, "--memory", "low")) == 0
    assert read_json(folder / "town" / MANIFEST)["weights"]["kept"] == {"transformer": "nf4", "controlnet": "nf4"}
    more = train(folder, "--max_train_steps", 6)
    assert call(ALIGN, *more, "--memory", "full") == 2
    assert "was begun with networks kept otherwise" in capsys.readouterr().err
    assert call(ALIGN, *more, "--memory", "low") == 0


# --- what is held in each phase of a run ---

Watch = Callable[[str, object, str], None]


def alive() -> set[torch.nn.Module]:
    gc.collect()
    return {thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], Watch]:
    """(bytes of all networks in memory, by phase; watch(phase, owner, attribute)).

    Networks are counted on the first call of each watched function, without those of other tests.
    """
    before, found = alive(), {}

    def watch(phase: str, owner: object, attribute: str) -> None:
        original = getattr(owner, attribute)

        def watched(*arguments, **options):
            found.setdefault(phase, held_bytes(torch.nn.ModuleList(alive() - before)))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, attribute, watched)

    return found, watch


def weights(plan: Plan, mode: str) -> dict[str, int]:
    return {phase.name: phase.weights for phase in plan[mode]}


@pytest.mark.parametrize("mode", ["full", "balanced", "low"])
def test_alignment_holds_what_is_planned(mode: str, tmp_path: Path, held):
    found, watch = held
    watch("text", diffusers.FluxPipeline, "encode_prompt")
    watch("training", models.flux.alignment, "batch_flow_sample")
    precision = ("--mixed_precision", "bf16")
    assert call(ALIGN, *train(tmp_path / "loras", "--max_train_steps", 1, "--memory", mode, *precision)) == 0
    preset = small_preset()
    paths, length = locate(argparse.Namespace(), preset, FLUX_STAGE), preset.max_sequence_length
    bf16 = torch.bfloat16
    plan = plan_alignment(paths, preset.resolution, 1, 16, length, bf16, "cpu", autocast=bf16)
    training = next(phase for phase in plan[mode] if phase.name == "training")
    lora = training.optimizer // (3 * 4 + 2)  # parameters: gradient, two moments, and the float32 beyond the bfloat16
    assert found == weights(plan, mode) | {"training": training.weights + 2 * lora}


@pytest.mark.parametrize("mode", ["full", "balanced"])
def test_anchors_hold_what_is_planned(mode: str, tmp_path: Path, anchored: Path, loras: Path, held):
    found, watch = held
    watch("text", diffusers.FluxPipeline, "encode_prompt")
    watch("denoising", models.flux.anchors, "sample_anchor")
    watch("decoding", models.flux.anchors, "decode_anchor")
    assert call(ANCHORS, *draw(anchored, loras, "--memory", mode, "--output_dir", tmp_path)) == 0
    preset = small_preset()
    paths, length = locate(argparse.Namespace(), preset, FLUX_STAGE), preset.max_sequence_length
    plan = plan_anchors(paths, SIZE, 16, length, torch.float32, "cpu", guided=True)
    assert found == weights(plan, mode)


def test_a_video_holds_what_is_planned(tmp_path: Path, anchored: Path, held):
    found, watch = held
    for phase, name in {"text": "encode_prompt", "encoding": "encode_conditions", "denoising": "__call__"}.items():
        watch(phase, CogVideoXInbetweenPipeline, name)
    watch("decoding", CogVideoXInbetweenPipeline, "decode_video")
    assert call(GGI, "--target", anchored / "multiviews" / RUN, *QUICK_VIDEO, "--output_dir", tmp_path) == 0
    preset = small_preset()
    paths, transformer = locate(argparse.Namespace(), preset, GGI_STAGE), Path(preset.ggi_transformer)
    plan = plan_ggi(paths, transformer, SIZE, 49, torch.float32, "cpu", guided=True, tiling=False)
    assert found == weights(plan, "full")
