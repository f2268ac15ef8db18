"""The training loop: it learns, averages and keeps checkpoints, and resumes exactly where it was interrupted."""

import csv
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import tests.support.toy_training as toy
from models.settings import TrainSettings
from tests.support.helpers import assert_same, assert_whole, contents, end, forget_accelerator, kill_at, start_module
from utils.cli import InputError, settings_of
from utils.files import read_json
from utils.images import read_image
from utils.layout import LOSS_CURVE, LOSS_FILE, SAMPLES_FOLDER, STATE_FOLDER, find_checkpoints
from utils.runs import MANIFEST, open_run

STATE = f"/{STATE_FOLDER}/"
RANDOM_STATES = "random_states"  # they include Python's generator, which every process seeds differently
ONCE = ("--checkpointing_steps", 1000, "--sheet_steps", 1000)  # only at the end


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    forget_accelerator()


def train(folder: Path, *arguments: object, save=None) -> toy.Line:
    """Train the line in this process."""
    forget_accelerator()
    return toy.main(["--output_dir", str(folder), *map(str, arguments)], save)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / toy.WEIGHTS)


def flat(folder: Path, step: int) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in weights(folder, step).values()])


def losses(folder: Path) -> list[float]:
    with (folder / LOSS_FILE).open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption, with checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("line") / "run"
    train(folder)
    return folder


def settings(**changes: object) -> TrainSettings:
    args = toy.parse_args(["--output_dir", "unused"])
    return settings_of(TrainSettings, type(args)(**vars(args) | changes))


# What a run learns and writes


def test_the_loss_falls_to_the_line(tmp_path: Path):
    objective = train(tmp_path, "--max_train_steps", 120, *ONCE, "--decay_steps", 40)
    curve = losses(tmp_path)
    assert len(curve) == 120 and np.mean(curve[-10:]) < 1e-3 < 0.1 < np.mean(curve[:10])
    assert torch.allclose(objective.line.weight[0], toy.SLOPE, atol=0.02)
    assert objective.line.bias.item() == pytest.approx(1, abs=0.02)


def test_files_of_a_run(line: Path):
    names = {"checkpoint-3", "checkpoint-6", LOSS_FILE, LOSS_CURVE, SAMPLES_FOLDER, MANIFEST}
    assert {path.name for path in line.iterdir()} == names
    for step in (3, 6):
        assert {path.name for path in (line / f"checkpoint-{step}").iterdir()} == {toy.WEIGHTS, STATE_FOLDER}
    assert sorted(path.name for path in (line / SAMPLES_FOLDER).iterdir()) == [
        "000002.png",
        "000004.png",
        "000006.png",
    ]
    manifest = read_json(line / MANIFEST)
    assert manifest["finished"] and manifest["steps"] == 6 and manifest["arguments"]["train_batch_size"] == 4
    assert len(losses(line)) == 6


def test_curves_are_logged(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "--report_to", "tensorboard", "--max_train_steps", 3)
    (log,) = {path.parent for path in tmp_path.rglob("*tfevents*")}
    events = EventAccumulator(str(log)).Reload()
    assert {"loss", "bias", "grad_norm", "steps_per_second"} <= set(events.Tags()["scalars"])
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [1, 2, 3]
    assert [event.value for event in logged] == pytest.approx(losses(tmp_path), rel=1e-6)


def adamw(steps: int, decay: float, clip: float = 1.0) -> list[torch.Tensor]:
    """Averaged weights after each step, worked out without the training loop."""
    objective, draw = toy.Line(), toy.draw_points(4)
    optimizer = torch.optim.AdamW(objective.parameters(), 0.05, betas=(0.9, 0.999), weight_decay=0.01)
    average, found = [parameter.detach().clone() for parameter in objective.parameters()], []
    for step in range(steps):
        optimizer.zero_grad()
        objective(**draw((0, step, 0), range(4)))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), clip)
        optimizer.step()
        share = min(decay, (1 + step) / (10 + step)) if step else 0  # averages over few steps at first
        average = [share * a + (1 - share) * b.detach() for a, b in zip(average, objective.parameters(), strict=True)]
        found.append({"weight": average[0], "bias": average[1]})
    return found


@pytest.mark.parametrize("decay", [0.15, 0.999])
def test_checkpoints_hold_the_averaged_weights(tmp_path: Path, decay: float):
    objective = train(tmp_path, "--ema_decay", decay)
    for step, wanted in enumerate(adamw(6, decay), start=1):
        if step % 3 == 0:
            found = weights(tmp_path, step)
            assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    raw = objective.line.weight
    assert (raw - weights(tmp_path, 6)["weight"]).abs().max() > 1e-3  # training itself goes on from the raw ones
    level = int(weights(tmp_path, 6)["weight"][0, 0].clamp(-1, 1) * 127 + 128)
    assert (read_image(tmp_path / SAMPLES_FOLDER / "000006.png") == level).all()


def test_without_decay_the_raw_weights_are_saved(tmp_path: Path):
    objective = train(tmp_path, "--ema_decay", 0)
    assert torch.equal(objective.line.weight, weights(tmp_path, 6)["weight"])


@pytest.mark.parametrize(
    ("warmup", "decay", "wanted"),
    [
        (0, 0, {0: 1, 5: 1, 9: 1}),
        (4, 0, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 9: 1}),
        (0, 4, {0: 1, 6: 1, 7: 0.75, 8: 0.5, 9: 0.25}),
        (2, 2, {0: 0.5, 1: 1, 5: 1, 8: 1, 9: 0.5}),
        (20, 20, {0: 0.05, 4: 0.25, 6: 0.2, 9: 0.05}),  # longer than the training: the smaller of both
    ],
)
def test_learning_rate(warmup: int, decay: int, wanted: dict[int, float]):
    plan = settings(max_train_steps=10, warmup_steps=warmup, decay_steps=decay, learning_rate=3e-4)
    assert {step: plan.learning_rate_at(step) / 3e-4 for step in wanted} == pytest.approx(wanted)


def test_gradients_are_clipped(tmp_path: Path):
    train(tmp_path, "--max_grad_norm", 0.05, "--ema_decay", 0.15)
    wanted = adamw(6, 0.15, clip=0.05)[-1]
    assert all(torch.allclose(tensor, wanted[name], atol=1e-6) for name, tensor in weights(tmp_path, 6).items())


# Resuming


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0, 0.5])
def test_more_steps_go_on_to_the_same_bytes(tmp_path: Path, dropout: float):
    """Also with an objective that draws from the global generator."""
    flags = ("--dropout", dropout)
    train(tmp_path / "once", *flags)
    train(tmp_path / "twice", *flags, "--max_train_steps", 3)
    assert losses(tmp_path / "twice") == losses(tmp_path / "once")[:3]
    torch.manual_seed(99)
    train(tmp_path / "twice", *flags)
    kept = [contents(tmp_path / name, "samples/000003") for name in ("once", "twice")]
    assert_same(kept[1], kept[0])


def test_a_finished_run_is_trained_on_only_when_steps_are_raised(line: Path, tmp_path: Path):
    args = toy.parse_args(["--output_dir", str(line)])
    arguments = read_json(line / MANIFEST)["arguments"]
    run = open_run(line, arguments)
    assert run.trained_steps == args.max_train_steps == 6
    assert open_run(line, arguments, overwrite=True).trained_steps == 0
    assert open_run(tmp_path / "new", arguments).trained_steps == 0


def test_other_arguments_are_refused(line: Path):
    before = contents(line)
    with pytest.raises(InputError, match=r"learning_rate was 0\.05 and is now 0\.1"):
        train(line, "--learning_rate", 0.1, "--max_train_steps", 9)
    assert_same(contents(line), before)


def test_only_the_newest_states_are_kept(tmp_path: Path):
    train(tmp_path, "--checkpointing_steps", 1)
    found = find_checkpoints(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert all((path / toy.WEIGHTS).is_file() for path in found.values())
    assert [step for step, path in found.items() if (path / STATE_FOLDER).exists()] == [5, 6]


def cut_short(state: Path, name: str) -> None:
    path = state / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(state: Path, name: str) -> None:
    """Change a byte in the largest entry of the archive; between entries there is only padding."""
    with zipfile.ZipFile(state / name) as archive:
        entry = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    data = bytearray((state / name).read_bytes())
    data[data.index(entry)] ^= 1
    (state / name).write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "random_states_0.pkl", STATE_FOLDER]
)
@pytest.mark.parametrize("damage", ["gone", "cut short", "another byte"])
def test_a_damaged_state_is_passed_over(
    tmp_path: Path, line: Path, name: str, damage: str, capsys: pytest.CaptureFixture
):
    if damage == "another byte" and name.endswith("safetensors"):
        pytest.skip("has no check sum")
    shutil.copytree(line, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "checkpoint-6" / STATE_FOLDER
    if name == STATE_FOLDER:
        shutil.rmtree(state)
    elif damage == "gone":
        (state / name).unlink()
    else:
        (cut_short if damage == "cut short" else change_a_byte)(state, name)
    train(tmp_path, "--max_train_steps", 9)
    assert f"going on from checkpoint-3: {state}" in capsys.readouterr().err
    train(tmp_path.with_name("whole"), "--max_train_steps", 9)
    assert torch.equal(flat(tmp_path, 9), flat(tmp_path.with_name("whole"), 9))
    assert losses(tmp_path) == losses(tmp_path.with_name("whole"))
    shutil.rmtree(tmp_path.with_name("whole"))


def test_without_any_whole_state_nothing_is_trained_again(tmp_path: Path, line: Path):
    shutil.copytree(line, tmp_path, dirs_exist_ok=True)
    for state in tmp_path.glob(f"checkpoint-*/{STATE_FOLDER}"):
        shutil.rmtree(state)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="state is missing; pass --overwrite to start again"):
        train(tmp_path, "--max_train_steps", 9)
    assert_same(contents(tmp_path), before)


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, b"step,loss\n1,", b"\xff\x00", b"step,loss\n1,0.5\n"])
def test_losses_without_their_beginning_keep_their_steps(tmp_path: Path, line: Path, content: bytes | None):
    shutil.copytree(line, tmp_path, dirs_exist_ok=True)
    (tmp_path / LOSS_FILE).unlink() if content is None else (tmp_path / LOSS_FILE).write_bytes(content)
    train(tmp_path, "--max_train_steps", 9)
    with (tmp_path / LOSS_FILE).open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["7", "8", "9"]


def test_dynamo_of_the_launcher_is_left_out(
    tmp_path: Path, line: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    train(tmp_path / "run")
    assert "asks for dynamo (inductor); it is left out" in capsys.readouterr().err
    assert torch.equal(flat(tmp_path / "run", 6), flat(line, 6))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError, match="DEEPSPEED, which these scripts do not support"):
        train(tmp_path / "other")


@pytest.mark.slow
def test_an_older_state_serves_when_the_newest_is_gone(tmp_path: Path, line: Path):
    train(tmp_path)
    for path in (tmp_path / "checkpoint-6" / STATE_FOLDER).iterdir():
        path.unlink()
    (tmp_path / "checkpoint-6" / STATE_FOLDER).rmdir()
    train(tmp_path, "--max_train_steps", 7)
    assert losses(tmp_path)[:6] == losses(line)


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_bytes(tmp_path: Path):
    flags = ("--max_train_steps", 9, "--dropout", 0.3)
    folder = tmp_path / "run"
    kill_at(folder / "checkpoint-3", "tests.support.toy_training", "--output_dir", folder, *flags, begin=start_module)
    assert 3 in find_checkpoints(folder) and 9 not in find_checkpoints(folder)
    train(tmp_path / "undisturbed", *flags)
    wanted = contents(tmp_path / "undisturbed", RANDOM_STATES)
    assert_whole(folder, wanted, STATE, LOSS_FILE, LOSS_CURVE)  # older states are removed later
    (folder / ".checkpoint-6.1.abcdef.tmp").mkdir(exist_ok=True)  # left when killed while writing a checkpoint
    train(folder, *flags)
    assert_same(contents(folder, RANDOM_STATES), wanted)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("write failed"), SafetensorError("disk full")]
)
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path, line: Path, failure: Exception):
    def save(objective: toy.Line, folder: Path) -> None:
        if folder.name.startswith(".checkpoint-6"):
            (folder / "half").write_bytes(b"half")
            raise failure

    with pytest.raises(OSError):
        train(tmp_path, save=save)
    assert set(find_checkpoints(tmp_path)) == {3} and not list(tmp_path.glob(".*"))
    assert not read_json(tmp_path / MANIFEST)["finished"]
    train(tmp_path)
    assert_same(contents(tmp_path, RANDOM_STATES), contents(line, RANDOM_STATES))


def test_a_failure_while_saving_leaves_the_raw_weights_in_place(tmp_path: Path):
    """The averaged weights replace the raw ones only while saving."""
    seen = []

    def save(objective: toy.Line, folder: Path) -> None:
        seen.append(objective)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        train(tmp_path / "failed", "--max_train_steps", 3, save=save)
    raw = train(tmp_path / "raw", "--max_train_steps", 3, "--ema_decay", 0)
    assert torch.equal(seen[0].line.weight, raw.line.weight)


# The same global batch, divided differently


def test_accumulated_batches_equal_a_larger_one(tmp_path: Path, line: Path):
    train(tmp_path, "--train_batch_size", 1, "--gradient_accumulation_steps", 4)
    for step in (3, 6):
        assert (flat(tmp_path, step) - flat(line, step)).abs().max() < 1e-6
    assert losses(tmp_path) == pytest.approx(losses(line), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(tmp_path: Path, line: Path, accumulation: int):
    part = 4 // accumulation
    flags = ("--train_batch_size", part // 2, "--gradient_accumulation_steps", accumulation, "--points", part)
    result = end(start_module("tests.support.toy_training", "--output_dir", tmp_path / "run", *flags, processes=2))
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(line), abs=1e-6)
    for step in (3, 6):
        assert (flat(tmp_path / "run", step) - flat(line, step)).abs().max() < 1e-6
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    result = end(start_module("tests.support.toy_training", "--output_dir", tmp_path / "run", *flags))
    assert "began with 2 processes and goes on with 1" in result.stderr
