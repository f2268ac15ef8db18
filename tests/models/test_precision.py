"""What `--dtype auto` and `--mixed_precision auto` choose on each device, for new and for continued runs."""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ggi
import sag_distribution_alignment
import sag_generate_anchor_view
import train_ggi
from models.flux.lora import lora_targets
from models.loading.keymaps import lora_from_peft
from models.precision import automatic_precision, computes_in_bfloat16, settle_precision
from models.weights import WEIGHTS
from tests.support.helpers import ALIGN, ANCHORS, GGI, ROOT, assert_same, contents, write_picture
from tests.support.helpers import call_shipped as call
from tests.support.scenes import make_scene
from utils.cli import InputError
from utils.files import read_json, write_json
from utils.layout import anchor_path, anchor_run_name
from utils.runs import MANIFEST, Run

TRAIN = "train_ggi"
ASK = "from models.precision import computes_in_bfloat16 as ask; print(ask('cpu'))"
X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")


def answer(**environment: str) -> bool:
    """Whether a new process computes in bfloat16 on this CPU."""
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


@pytest.mark.slow
@X86
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert answer(ONEDNN_MAX_CPU_ISA="ALL") == bool({"avx512_bf16", "amx_bf16"} & flags)


@pytest.mark.slow
@X86
def test_a_cpu_that_is_held_back_does_not():
    assert not answer(ONEDNN_MAX_CPU_ISA="AVX2")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_attention_computes_in_bfloat16_on_older_instructions(capability: str):
    """Where oneDNN sees newer instructions than torch, torch's attention raises."""
    code = """
from utils.cli import set_up_libraries
set_up_libraries()
import torch
x = torch.randn(1, 2, 256, 64, dtype=torch.bfloat16)
print(torch.nn.functional.scaled_dot_product_attention(x, x, x).isfinite().all().item())
"""
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("own", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_both_answers_count(monkeypatch: pytest.MonkeyPatch, machine: str, own: str | None, onednn: bool):
    """oneDNN's answer, and on x86 one of the CPU's flags."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == own)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert computes_in_bfloat16("cpu") == (onednn and (machine == "aarch64" or own is not None))


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_answers_for_itself(monkeypatch: pytest.MonkeyPatch, native: bool):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert computes_in_bfloat16("cuda:1") == native


@pytest.mark.parametrize(
    "published, able, dtype, mixed",
    [
        ("float32", True, "bfloat16", "bf16"),
        ("float32", False, "float32", "no"),
        ("bfloat16", True, "bfloat16", "bf16"),
        ("bfloat16", False, "bfloat16", "bf16"),  # full weights are the paper's everywhere
    ],
)
def test_what_auto_means(monkeypatch: pytest.MonkeyPatch, published: str, able: bool, dtype: str, mixed: str):
    monkeypatch.setattr("models.precision.computes_in_bfloat16", lambda device: able)
    mean = lambda **flags: automatic_precision(argparse.Namespace(**flags), published, "cpu")  # noqa: E731
    assert mean(dtype="auto", mixed_precision="auto") == {"dtype": dtype, "mixed_precision": mixed}
    assert mean(dtype="auto") == {"dtype": dtype}
    assert mean(dtype="float16", mixed_precision="auto") == {"mixed_precision": mixed}
    assert mean(dtype="float16", mixed_precision="no") == {}


def test_runs_of_two_precisions_are_not_continued_together(tmp_path: Path):
    runs = [Run(tmp_path / dtype, {"arguments": {"dtype": dtype}}) for dtype in ("float32", "bfloat16")]
    with pytest.raises(InputError, match=r"several precisions \(.*float32 in float32, .*bfloat16 in bfloat16\)"):
        settle_precision(argparse.Namespace(dtype="auto"), runs)
    chosen = argparse.Namespace(dtype="auto")
    settle_precision(chosen, runs[:1])
    assert chosen.dtype == "float32"


# --- the scripts ---


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """machine(able): pretend from here on that this CPU computes in bfloat16, or does not."""

    def become(able: bool) -> None:
        monkeypatch.setattr("models.precision.computes_in_bfloat16", lambda device: able)

    return become


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The precision that each script works with; its work is replaced by beginning its runs."""
    found = []

    def note(args: argparse.Namespace, runs: list[Run]) -> None:
        found.append({name: getattr(args, name) for name in ("dtype", "mixed_precision") if name in args})
        for run in runs:
            run.begin()

    train = lambda args, preset, source, run, *others: note(args, [run])  # noqa: E731
    draw = lambda args, preset, jobs, others: note(args, [job.run for job in jobs])  # noqa: E731
    monkeypatch.setattr(sag_distribution_alignment, "train", train)
    monkeypatch.setattr(train_ggi, "train", train)
    monkeypatch.setattr(sag_generate_anchor_view, "draw_anchors", draw)
    monkeypatch.setattr(ggi, "fill_arcs", draw)
    monkeypatch.setattr(ggi, "finish_video", lambda *others: None)
    return found


def commands(folder: Path) -> dict[str, tuple]:
    """{script: a command that writes into folder/out}, on plain pictures and LoRAs of zeros."""
    scene, out = make_scene(folder / "scene", edge_size=(144, 96)), ("--output_dir", folder / "out")
    picture = write_picture(folder / "picture.png")
    for k in range(2):
        write_picture(anchor_path(folder / "views", k), 144, 96, seed=k)
    return {
        ALIGN: ("--path_image", picture, "--pfix", "new", *out),
        ANCHORS: ("--target", scene, "--pfix", "town", "--loras", zero_loras(folder / "loras"), *out),
        GGI: ("--target", folder / "views", "--scene", scene, "--prompt", "a town", *out),
        TRAIN: ("--dataset", "synthetic", "--clips", 1, "--cache_dir", folder / "cache", *out),
    }


def zero_loras(folder: Path, rank: int = 4) -> Path:
    """A folder with one LoRA, `town`, that changes nothing."""
    for name, part in (("lora", "flux/transformer"), ("controlnet.lora", "controlnet")):
        state = {}
        for target, (features, out) in lora_targets(read_json(WEIGHTS / "tiny" / part / "config.json")).items():
            state[f"{target}.lora_A.weight"] = torch.zeros(rank, features)
            state[f"{target}.lora_B.weight"] = torch.zeros(out, rank)
        path = folder / "town" / "checkpoint-400" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(lora_from_peft(state), path)
    return folder


LOW = {ALIGN: {"dtype": "bfloat16", "mixed_precision": "bf16"}, ANCHORS: {"dtype": "bfloat16"}}
LOW |= {GGI: LOW[ANCHORS], TRAIN: {"dtype": "float32", "mixed_precision": "bf16"}}
HIGH = {ALIGN: {"dtype": "float32", "mixed_precision": "no"}, ANCHORS: {"dtype": "float32"}}
HIGH |= {GGI: HIGH[ANCHORS], TRAIN: HIGH[ALIGN]}


@pytest.mark.parametrize("script", LOW)
@pytest.mark.parametrize("able", [True, False])
def test_a_run_keeps_the_precision_that_it_began_with(tmp_path: Path, able: bool, script: str, machine, work, capfd):
    command, wanted = commands(tmp_path)[script], (LOW if able else HIGH)[script]
    command += ("--seed", 3)
    machine(able)
    assert call(script, *command) == 0
    (manifest,) = (tmp_path / "out").rglob(MANIFEST)
    begun = read_json(manifest)["arguments"]
    assert {name: begun[name] for name in wanted} == wanted
    machine(not able)
    assert call(script, *command) == 0
    assert work == [wanted, wanted]
    flag = "mixed_precision" if "mixed_precision" in wanted else "dtype"
    other = (HIGH if able else LOW)[script][flag]
    capfd.readouterr()
    assert call(script, *command, f"--{flag}", other) == 2
    assert f"{flag} was {wanted[flag]!r} and is now {other!r}" in capfd.readouterr().err
    assert call(script, *command, "--overwrite") == 0  # a new run: this machine chooses
    assert work[2:] == [(HIGH if able else LOW)[script]]


def test_full_weights_stay_in_bfloat16(tmp_path: Path, machine, work, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sag_distribution_alignment, "locate", lambda *others: {})
    machine(False)
    full = ("--weights", "full", "--edges", "lines", "--resolution", 128)
    assert call(ALIGN, *commands(tmp_path)[ALIGN], *full) == 0
    assert work == [LOW[ALIGN]]


def test_networks_follow_the_training_where_that_is_given(tmp_path: Path, machine, work):
    machine(False)
    assert call(ALIGN, *commands(tmp_path)[ALIGN], "--mixed_precision", "bf16") == 0
    assert work == [{"dtype": "bfloat16", "mixed_precision": "bf16"}]


def test_float16_is_not_trained_on_a_cpu(tmp_path: Path, machine, work, capfd):
    machine(True)
    assert call(ALIGN, *commands(tmp_path)[ALIGN], "--mixed_precision", "fp16") == 2
    assert capfd.readouterr().err.startswith("error: --mixed_precision fp16 needs a GPU") and not work


def test_an_unfinished_run_is_found_whatever_its_precision(tmp_path: Path, machine, work):
    command = commands(tmp_path)[ANCHORS]
    for able in (False, True):
        machine(able)
        assert call(ANCHORS, *command) == 0
    assert work == [{"dtype": "float32"}] * 2
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_runs_begun_otherwise_are_refused_together(tmp_path: Path, machine, work, capfd):
    command = commands(tmp_path)[ANCHORS]
    for able, seed in ((False, 1), (True, 2)):
        machine(able)
        assert call(ANCHORS, *command, "--seed", seed) == 0
    assert call(ANCHORS, *command, "--seed", 1, 2) == 2
    assert "runs of several precisions" in capfd.readouterr().err
    assert len(work) == 2


@pytest.mark.slow
def test_anchors_go_on_in_the_precision_of_the_first(tmp_path: Path, machine, capfd):
    """End to end: another machine draws the second anchor as the first machine would have."""
    command = (*commands(tmp_path)[ANCHORS], "--seed", 1, "--num_steps", 2, "--num_replacement", 1)
    machine(False)
    assert call(ANCHORS, *command) == 0
    assert "precision: float32\n" in capfd.readouterr().err
    folder = tmp_path / "out" / anchor_run_name("town", ["", ""], 400, 1, 1)
    whole = contents(folder)
    anchor_path(folder, 1).unlink()
    manifest = read_json(folder / MANIFEST)
    write_json(folder / MANIFEST, manifest | {"finished": False})
    machine(True)
    assert call(ANCHORS, *command) == 0
    assert_same(contents(folder), whole)
    assert call(ANCHORS, *command, "--overwrite") == 0
    assert "precision: bfloat16\n" in capfd.readouterr().err
    assert contents(folder)[anchor_path(folder, 1).name] != whole[anchor_path(folder, 1).name]
