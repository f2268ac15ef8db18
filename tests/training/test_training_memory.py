"""The memory plan of training compared with real use, and 8-bit moments: their error, resuming, refusals."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

from benchmarks.memory.counting import LiveBytes, count_activations, held_bytes, materialize, without_data
from benchmarks.memory.steps import inbetween_training_step
from benchmarks.memory.training_plan import (
    TrainingSetup,
    empty_trained,
    gradient_bytes,
    holder,
    moment_bytes,
    plan_training,
    trained_builder,
    update_bytes,
)
from models.flags import MEMORY_MODES
from models.inbetween.frozen_lora import add_frozen_lora, read_frozen_lora
from models.inbetween.training import InbetweenObjective, load_start
from models.runtime.memory import (
    EIGHT_BITS,
    PAGED,
    PLACEMENTS,
    RESIDENT,
    Phase,
    choose_mode,
    look_up_plan,
    lossy_placements,
    placement_on,
)
from models.runtime.optimizers import make_optimizer
from models.weights import Preset
from tests.support.clips import TRAIN, arguments, weights_of, write_lora
from tests.support.helpers import ROOT, call, forbid_models, kill_at, profiled_peak
from tests.support.small import small_checkpoints, small_preset
from utils.cli import InputError
from utils.files import read_json
from utils.runs import MANIFEST

FULL = ROOT / "configs" / "full"
SETUP = TrainingSetup((720, 480), 49, 1, 4, True, torch.bfloat16, 0.0, torch.bfloat16, True, True)
GB = 10**9
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def preset() -> Preset:
    return small_preset()


def start_folder() -> Path:
    return small_checkpoints() / "tiny/cogvideox/transformer"


def tiny_config() -> dict:
    return read_json(start_folder() / "config.json")


# --- what is held ---


@pytest.mark.parametrize("moments", [RESIDENT, EIGHT_BITS])
@pytest.mark.parametrize("with_lora", [False, True])
def test_training_holds_what_was_counted(moments: str, with_lora: bool, tmp_path: Path):
    """Weights, gradients and moments of the tiny transformer after one update."""
    transformer, lora = load_start(start_folder()), {}
    if with_lora:
        lora = read_frozen_lora(write_lora(tmp_path / "lora.safetensors", transformer), transformer.config)
        add_frozen_lora(transformer, lora, torch.bfloat16)
    ranks = {key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in lora.items() if key.endswith("_A.weight")}
    empty = empty_trained(trained_builder(tiny_config(), ranks, torch.bfloat16), checkpointing=False)
    counted = [parameter for parameter in empty.parameters() if parameter.requires_grad]
    assert held_bytes(transformer) == held_bytes(empty)

    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters, 1e-3, (0.9, 0.95), 1e-4, moments)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert sum(p.grad.numel() * p.grad.element_size() for p in parameters) == gradient_bytes(counted)
    held = {}
    for state in optimizer.state.values():
        held |= {id(t): t.numel() * t.element_size() for key, t in state.items() if key != "step"}  # a scalar
    assert sum(held.values()) == moment_bytes(counted, moments)


def test_paged_moments_leave_the_gpu():
    """Scales, small tensors, and the largest tensor in use stay."""
    sizes = (100, 5_000, 200_000, 300_001)
    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    scales = 2 * 4 * (20 + 782 + 1172)
    assert moment_bytes(parameters, EIGHT_BITS) == 800 + 2 * (5_000 + 200_000 + 300_001) + scales + 2048
    assert moment_bytes(parameters, PAGED) == 800 + 2 * (5_000 + 300_001) + scales + 2048


@pytest.mark.parametrize("foreach", [False, True])
def test_an_update_takes_what_was_counted(foreach: bool):
    """With `foreach` a CPU updates all tensors at once, as a GPU does."""
    parameters, optimizer = updated(RESIDENT)
    optimizer.param_groups[0]["foreach"] = foreach
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    held = holder([*parameters, *(parameter.grad for parameter in parameters), *states])
    with LiveBytes() as live:
        live.ignore(held)
        optimizer.step()
    assert live.peak == update_bytes(parameters, RESIDENT, "cuda" if foreach else "cpu")


def test_an_update_in_eight_bits_takes_what_was_counted():
    parameters, optimizer = updated(EIGHT_BITS)
    counted = update_bytes(parameters, EIGHT_BITS, "cpu")
    assert 0 <= profiled_peak(optimizer.step) - counted < 100  # plus three scalars
    assert update_bytes(parameters, EIGHT_BITS, "cuda") == 0


def updated(moments: str) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Three tensors and their optimizer, after one update."""
    parameters = [torch.nn.Parameter(torch.randn(size, 100)) for size in (3, 50, 700)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(parameters, 1e-3, (0.9, 0.95), 1e-4, moments)
    optimizer.step()
    return parameters, optimizer


@slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_training_step(checkpointing: bool, preset: Preset):
    """The same code with data, under the profiler, with the gradients of the previous batch in memory."""
    transformer = load_start(Path(preset.ggi_transformer)).train()
    empty = empty_trained(trained_builder(tiny_config(), {}, torch.float32), checkpointing)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    sizes = (preset.video_size, preset.num_frames, 2)
    step = inbetween_training_step(InbetweenObjective(transformer, CogVideoXDDIMScheduler()), *sizes)
    step()
    peak = profiled_peak(step)
    with without_data(torch.float32):
        step = inbetween_training_step(InbetweenObjective(materialize(empty), CogVideoXDDIMScheduler()), *sizes)
        step()
        gradients = holder([parameter.grad for parameter in empty.parameters()])
        counted = count_activations(step, empty, gradients)
    assert counted == pytest.approx(peak, rel=0.15)


# --- the plan at full size ---


def test_full_size_plan():
    """The full transformer with the rank-2048 LoRA frozen inside; weights and moments also counted by hand."""
    config = read_json(FULL / "inbetween/config.json")
    plan = look_up_plan("full", "training", pixels=720 * 480)
    peaks = [max(phase.total for phase in plan[mode]) for mode in MEMORY_MODES]
    assert peaks[0] > peaks[1] > peaks[2]
    assert 100 * GB < peaks[0] < 120 * GB and 60 * GB < peaks[1] < 75 * GB and 50 * GB < peaks[2] < 65 * GB

    with torch.device("meta"):
        shapes = [p.numel() for p in CogVideoXTransformer3DModel.from_config(config).parameters()]
    count, lora = sum(shapes), 42 * 4 * 2 * 2048 * 3072
    positions = 4 * 3072 * (226 + 13 * 30 * 45)
    eight = sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 8 * n for n in shapes) + 2 * 256 * 4
    paged = sum(2 * n for n in shapes if n >= 100_000) - 2 * max(shapes)
    for mode, moments in zip(MEMORY_MODES, (8 * count, eight, eight - paged), strict=True):
        training = next(phase for phase in plan[mode] if phase.name == "training")
        assert training.weights == 4 * count + 2 * lora + positions
        assert training.optimizer == 4 * count + moments


@slow
def test_what_changes_the_plan():
    larger = {"num_layers": 8, "sample_width": 18, "sample_height": 12}
    build = trained_builder(tiny_config() | larger, {}, torch.float32)
    small = {"size": (144, 96), "num_frames": 9, "dtype": torch.float32, "tiling": False}
    paths = dict.fromkeys(("cogvideox_vae", "cogvideox_text"), small_checkpoints() / "tiny/cogvideox")
    base = TrainingSetup(**{**vars(SETUP), **small})

    def phases(**changes: object) -> dict:
        plan = plan_training(paths, build, TrainingSetup(**{**vars(base), **changes}), "cuda")
        return {phase.name: phase for phase in plan["balanced"]}

    before = phases()
    weights = before["training"].weights
    assert list(before) == ["encoding", "text", "training", "update", "sheets"]
    assert "encoding" not in phases(encoding=False)
    assert phases(checkpointing=False)["training"].activations > 1.5 * before["training"].activations
    assert phases(batch=2)["training"].activations > 1.5 * before["training"].activations
    averaged = phases(ema_decay=0.9)
    for name in ("training", "update", "sheets"):
        assert 0.95 * weights < averaged[name].optimizer - before[name].optimizer <= weights
    assert phases(processes=4, sharded=True)["training"].total < 0.6 * before["training"].total
    assert (
        phases(processes=2)["sheets"].total - before["sheets"].total
        == averaged["update"].optimizer - before["update"].optimizer
    )  # DDP's buckets, as large as the averaged weights


# --- modes ---


def test_pages_change_no_number():
    assert lossy_placements(PLACEMENTS["training"]["full"]) == {}
    assert (
        lossy_placements(PLACEMENTS["training"]["balanced"])
        == lossy_placements(PLACEMENTS["training"]["low"])
        == {"kept": {"optimizer": EIGHT_BITS}}
    )
    assert placement_on("cpu", "training", "low") == {"optimizer": EIGHT_BITS}
    assert placement_on("cuda", "training", "low") == {"optimizer": PAGED}


@slow
def test_eight_bit_moments_stay_near(dataset: Path, tmp_path: Path):
    """Relative to how far the weights moved: below 5 % after four updates (measured: 3.7 %)."""
    for mode in ("full", "balanced"):
        steps = ("--train_batch_size", 2, "--max_grad_norm", 1, "--memory", mode)
        assert call(TRAIN, *arguments(dataset, tmp_path / mode, 4, *steps)) == 0
    full, balanced = weights_of(tmp_path / "full", 4), weights_of(tmp_path / "balanced", 4)
    start = load_start(start_folder()).state_dict()
    moved = sum((full[name] - start[name]).square().sum() for name in full).sqrt()
    apart = sum((full[name] - balanced[name]).square().sum() for name in full).sqrt()
    assert 1e-4 < apart / moved < 0.05, (apart, moved)


@slow
def test_eight_bit_training_goes_on_exactly(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """After a kill, with averaged weights, in the mode of less memory; but not with 32-bit moments."""
    ema = ("--ema_decay", 0.5)
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert call(TRAIN, *arguments(dataset, once, 4, *ema, "--memory", "balanced")) == 0
    assert "memory balanced: " in capsys.readouterr().err
    assert read_json(once / "run" / MANIFEST)["weights"]["kept"] == {"optimizer": "8 bits"}
    kill_at(twice / "run" / "checkpoint-2", TRAIN, *arguments(dataset, twice, 4, *ema, "--memory", "balanced"))
    assert call(TRAIN, *arguments(dataset, twice, 4, *ema, "--memory", "full")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was begun with networks kept otherwise ({'optimizer': '8 bits'}, now as loaded)" in error
    assert call(TRAIN, *arguments(dataset, twice, 4, *ema, "--offload")) == 0
    found, wanted = weights_of(twice, 4), weights_of(once, 4)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (twice / "run" / "loss.csv").read_text() == (once / "run" / "loss.csv").read_text()


# --- no room ---


@slow
def test_the_plan_comes_before_any_model(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    forbid_models(monkeypatch)
    monkeypatch.setattr("models.runtime.memory.free_memory", lambda device: 10**6)
    command = arguments(dataset, tmp_path, 2, "--cache_dir", tmp_path / "cache")
    assert call(TRAIN, *command) == 2
    assert "cpu has room for 0.9 MB: no mode fits" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_the_fastest_mode_that_fits_is_named():
    with pytest.raises(InputError, match="no mode fits"):
        choose_mode("auto", {"full": plan_of(9)}, 5, "cuda")
    with pytest.raises(InputError, match="use --memory balanced"):
        choose_mode("full", {"full": plan_of(9), "balanced": plan_of(4), "low": plan_of(3)}, 5, "cuda")
    with pytest.raises(InputError, match="--memory low: there is only full here"):
        choose_mode("low", {"full": plan_of(4)}, 5, "cuda")


def plan_of(total: int) -> list[Phase]:
    return [Phase("training", total, 0)]


def test_bitsandbytes_that_is_not_installed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("models.runtime.memory.find_spec", lambda name: None)
    assert call(TRAIN, *arguments(dataset, tmp_path, 2, "--memory", "low")) == 2
    assert "--memory low needs bitsandbytes: pip install bitsandbytes==" in capsys.readouterr().err


@slow
@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        ("full", "begin again with --memory balanced --overwrite"),
        ("balanced", "run the same command again with --memory low"),
        ("low", "free some, or use a larger GPU"),
    ],
)
def test_out_of_memory_names_a_smaller_mode(
    mode: str,
    advice: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def fail(*inputs, **more):
        raise torch.OutOfMemoryError("a step that needs too much")

    monkeypatch.setattr("models.runtime.training._backward", fail)
    assert call(TRAIN, *arguments(dataset, tmp_path, 2, "--memory", mode)) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: out of memory with --memory {mode}") and error.endswith(advice)
