"""The tables of memory plans: they equal the counts, they scale, and scripts look them up without counting."""

import subprocess
import sys

import pytest
import torch

from benchmarks.memory.__main__ import STAGES
from benchmarks.memory.plans import plan_alignment, plan_anchors
from benchmarks.memory.table import count_stage
from benchmarks.memory.wan import count_wan
from benchmarks.setup import setup_of
from models.runtime.memory import PLAN_FILE, SPARE, Plan, look_up_plan, plan_on, scale_plan, shard_plan
from models.settings import AlignmentSettings
from models.weights import WEIGHTS, load_preset
from tests.support.helpers import ROOT
from utils.files import read_json

GB = 10**9
TINY = setup_of("tiny")
SHARED = (AlignmentSettings.rank, TINY.text_length)
BF16, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("weights", ["full", "tiny"])
def test_the_table_is_the_count(weights: str, stage: str):
    table = read_json(WEIGHTS / weights / PLAN_FILE)
    assert list(table) == list(STAGES)
    assert table[stage] == count_stage(weights, stage), f"python -m benchmarks.memory --weights {weights}"


@pytest.mark.slow
def test_the_table_of_wan_is_the_count_and_fits_small_cards():
    table = read_json(WEIGHTS / "wan_vace" / PLAN_FILE)
    assert table == count_wan(), "python -m benchmarks.memory --weights wan_vace"
    (width, height), room = load_preset("full", "wan_vace").video_size, 1 - SPARE
    for name, mode, card in (("1.3B", "low", 8), ("1.3B", "balanced", 12), ("14B", "low", 8), ("14B", "full", 48)):
        plan = look_up_plan("wan_vace", name, pixels=width * height)
        assert max(phase.total for phase in plan[mode]) < room * card * 2**30, (name, mode)


def test_a_plan_for_networks_of_another_width():
    plan = look_up_plan("wan_vace", "1.3B", pixels=100)
    half = scale_plan(plan, 0.5)
    for mode, phases in plan.items():
        for whole, scaled in zip(phases, half[mode], strict=True):
            assert scaled.name == whole.name and scaled.total == pytest.approx(whole.total / 2, abs=2)


# --- other sizes ---


def require_near(scaled: Plan, counted: Plan) -> None:
    """Weights alike, totals within 5 %: a restored matrix and the LoRAs' gradients do not grow with pictures."""
    for mode, phases in counted.items():
        for found, wanted in zip(scaled[mode], phases, strict=True):
            assert (found.name, found.weights, found.optimizer) == (wanted.name, wanted.weights, wanted.optimizer)
            assert found.total == pytest.approx(wanted.total, rel=0.05), (mode, wanted)


@pytest.mark.slow
def test_anchors_of_another_size_without_guidance():
    counted = plan_anchors(TINY.paths, (288, 192), *SHARED, FLOAT, "cuda", guided=False)
    scaled = look_up_plan("tiny", "anchors", pixels=288 * 192, batch=1)
    require_near(scaled, counted)
    for found, wanted in zip(scaled["full"], counted["full"], strict=True):
        assert found.activations == pytest.approx(wanted.activations, rel=0.01)


@pytest.mark.slow
def test_alignment_in_batches():
    counted = plan_alignment(TINY.paths, TINY.crop, 2, *SHARED, BF16, "cuda", autocast=BF16)
    require_near(look_up_plan("tiny", "alignment", pixels=TINY.crop**2, batch=2), counted)


def test_only_activations_of_pictures_scale():
    """Encoding and sample sheets process one clip at a time, whatever the batch size."""
    once, twice = (look_up_plan("full", "training", pixels=720 * 480, frames=n * 49, batch=n) for n in (1, 2))
    grown = {"encoding": 2, "text": 1, "training": 4, "update": 1, "sheets": 2}
    for mode in once:
        for before, after in zip(once[mode], twice[mode], strict=True):
            assert after.activations == grown[before.name] * before.activations > 0 or before.activations == 0
            assert (after.weights, after.optimizer) == (before.weights, before.optimizer)


# --- other devices ---


def test_a_cpu_needs_what_lies_on_a_gpu_that_streams_nothing():
    plans = {stage: look_up_plan("full", stage, pixels=10**6) for stage in STAGES}
    here = {stage: plan_on("cpu", stage, plan) for stage, plan in plans.items()}
    assert here["anchors"]["low"] == here["anchors"]["full"] == plans["anchors"]["full"]
    assert here["anchors"]["balanced"] == plans["anchors"]["balanced"]
    assert here["ggi"]["low"] == here["ggi"]["balanced"] == plans["ggi"]["full"]
    assert here["training"]["low"] == plans["training"]["balanced"]
    assert here["alignment"]["low"] == [plans["alignment"]["full"][0], plans["alignment"]["low"][1]]
    assert all(plan_on("cuda", stage, plan) == plan for stage, plan in plans.items())


def test_sharded_training():
    """Counted: 60.5 GB on each of 2, 34.9 GB on each of 4."""
    plan = look_up_plan("full", "training", pixels=720 * 480)
    for processes, counted in ((2, 60.5), (4, 34.9)):
        shard = shard_plan(plan, processes)
        assert list(shard) == ["full"]
        peak = max(phase.total for phase in shard["full"])
        assert 0.9 * counted * GB < peak < counted * GB


# --- the start of a script ---


@pytest.mark.slow
def test_scripts_count_nothing():
    """No file that a script runs imports the counting, and looking up imports no diffusers."""
    files = [*ROOT.glob("*.py"), *(ROOT / "models").rglob("*.py"), *(ROOT / "utils").rglob("*.py")]
    assert len(files) > 40
    assert [file for file in files if "benchmarks" in file.read_text().replace("python -m benchmarks", "")] == []
    code = (
        "import sys; from models.runtime.memory import look_up_plan; "
        "look_up_plan('full', 'ggi', pixels=720 * 480); "
        "sys.exit(any(m.partition('.')[0] in ('benchmarks', 'diffusers') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
