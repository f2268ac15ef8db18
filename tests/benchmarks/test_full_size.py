"""The full-size benchmark: its counts at full size, and its measurements on small networks."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from benchmarks import full_size
from benchmarks.memory.counting import default_dtype
from benchmarks.memory.steps import ggi_step
from benchmarks.setup import setup_of
from models.loading.files import load_ggi_transformer
from tests.support.helpers import exit_code
from tests.support.small import small_preset, small_weights
from utils.files import read_json

PFLOP = 10**15
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures, for minutes")


def rows(path: Path) -> dict[tuple[str, str], dict]:
    return {(row["phase"], row["step"]): row for row in read_json(path)["rows"]}


@pytest.mark.slow
def test_operations_of_an_in_betweening_pass():
    """By hand: 2 per weight and token, 4 S^2 D per layer for attention; layers that run once per pass are left out."""
    rows = [full_size.count(setup_of("full"), "ggi", recipe, [recipe]) for recipe in ("ours", "reference")]
    (ours,), (theirs,) = ([row.flops for row in one] for one in rows)
    tokens, width, layers = 17_776, 3072, 42
    linear = 2 * tokens * layers * 12 * width**2  # q, k, v, out: 4 D^2; feed-forward: 8 D^2
    attention = 4 * tokens**2 * width * layers
    assert ours == pytest.approx(2 * (linear + attention), rel=0.01)
    lora = 2 * tokens * layers * 4 * 2 * 2048 * width
    assert theirs - ours == pytest.approx(2 * lora, rel=1e-6)
    assert lora == pytest.approx(0.075 * PFLOP, rel=0.01)


@pytest.mark.slow
@without_gpu
def test_without_a_gpu_nothing_is_called_measured(capsys: pytest.CaptureFixture):
    full_size.main(["--phases", "anchors", "--no_reference"])
    out = capsys.readouterr().out
    assert "no CUDA device" in out and out.count("not measured") >= 4 and "reference" not in out


@pytest.mark.slow
def test_what_cannot_be_measured_leaves_the_rest(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    measure = full_size.measure

    def fail_on_text(rows, setup, recipe, *more):
        if recipe == "text":
            raise RuntimeError("a kernel that is not there")
        measure(rows, setup, recipe, *more)

    monkeypatch.setattr(full_size, "measure", fail_on_text)
    arguments = ["--weights", "tiny", "--memory", "balanced", "--phases", "anchors", "--no_reference", "--steps", "1"]
    with small_weights():
        assert exit_code(lambda: full_size.main([*arguments, "--json", str(tmp_path / "out.json")])) == 3
    found = rows(tmp_path / "out.json")
    assert found["anchors", "text"]["seconds"] is None and found["anchors", "decoding"]["seconds"] > 0
    assert "a kernel that is not there" in capsys.readouterr().err


@pytest.mark.slow
def test_measuring_small_networks(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The reference's second pass has the expected cost."""
    with small_weights():
        full_size.main(["--weights", "tiny", "--steps", "1", "--json", str(tmp_path / "o")])
    found = rows(tmp_path / "o")
    assert all(row["seconds"] > 0 for row in found.values()) and len(found) == 13
    assert found["anchors", "reference"]["flops"] == 2 * found["anchors", "ours"]["flops"]
    planned = {key: row["planned"] for key, row in found.items()}
    assert [key for key, size in planned.items() if not size] == [(phase, "reference") for phase in full_size.PHASES]
    assert planned["anchors", "ours"] < planned["anchors", "both branches"] < planned["anchors", "decoding"]
    assert found["ggi", "ours"]["flops"] < found["ggi", "reference"]["flops"]  # with its LoRA beside the weights
    assert all(found["ggi", recipe]["loading"] > 0 for recipe in ("ours", "reference"))
    assert 0 <= found["ggi", "reference"]["merged_distance"] < 1e-2
    assert "for 10 arcs with loading the transformer, encoding and decoding" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_lora_moves_the_output_by_rounding(dtype: torch.dtype):
    preset = small_preset()
    network = load_ggi_transformer(Path(preset.ggi_transformer), dtype)
    network.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    with default_dtype(dtype), torch.no_grad():
        step = ggi_step(network.to(dtype), preset.video_size, 49, 1)
        assert 0 < full_size.merged_distance(network, step) < 4 * torch.finfo(dtype).eps


def test_bad_phase(capsys: pytest.CaptureFixture):
    assert exit_code(lambda: full_size.main(["--phases", "ggi,decode"])) == 2
    assert "'decode' is none of alignment, anchors, ggi" in capsys.readouterr().err


def test_compiled_blocks_are_resident(capsys: pytest.CaptureFixture):
    assert exit_code(lambda: full_size.main(["--compile", "--memory", "low"])) == 2
    assert "--compile goes with --memory full: the transformer would be kept nf4" in capsys.readouterr().err


@without_gpu
def test_a_limit_needs_a_gpu(capsys: pytest.CaptureFixture):
    assert exit_code(lambda: full_size.main(["--limit_gb", "22"])) == 2
    assert "--limit_gb 22 needs a CUDA device" in capsys.readouterr().err
