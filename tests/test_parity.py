"""Golden vectors: everything passes, and for every item a deliberate mistake is seen."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import alignment, anchors, convert, flux, inbetween, keymaps
from tests import parity, parity_models
from tests.helpers import exit_code
from utils import arcs

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RECORDED = ROOT.parent / "shared" / "golden"  # the whole set, where it is at hand


def run(folder: Path = GOLDEN, *prefixes: str) -> dict[str, list[str]]:
    """{verdict: ['item/case quantity']} of the items with these prefixes."""
    golden = parity.Golden(folder, folder.parent / "data")
    found: dict[str, list[str]] = {"pass": [], "FAIL": [], "skip": []}
    for item, check in parity.checks(golden):
        if item.split("_")[0] in prefixes:
            found[check.verdict].append(f"{item}/{check.case} {check.quantity}")
    return found


@pytest.fixture
def only(monkeypatch):
    """Restrict parity to one item."""
    return lambda prefix: monkeypatch.setattr(parity, "ITEMS", {prefix: parity.ITEMS[prefix]})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(*args: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "tests.parity", *map(str, args)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_committed_vector_passes():
    done = command(GOLDEN)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = [line.split()[-1] for line in done.stdout.splitlines()]
    assert verdicts.count("pass") > 100
    items = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert items == {path.name for path in GOLDEN.iterdir() if path.is_dir()}


@pytest.mark.slow
@pytest.mark.skipif(not RECORDED.is_dir(), reason="the whole recorded set is not at hand")
def test_every_recorded_vector_passes():
    done = command(RECORDED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skip" not in done.stdout


def test_nothing_to_run_is_bad_input(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "absent"):
        monkeypatch.setattr(sys, "argv", ["parity", str(folder)])
        assert exit_code(parity.main) == 2


def test_a_damaged_vector_fails(tmp_path, only):
    only("2")
    shutil.copytree(GOLDEN / "2_schedule", tmp_path / "2_schedule")
    path = tmp_path / "2_schedule" / "schedules.json"
    path.write_text(
        path.read_text().replace(
            '"1080x720": {\n  "requested": [\n   1080', '"1080x720": {\n  "requested": [\n   1100'
        )
    )
    assert run(tmp_path, "2")["FAIL"]


# One mistake per item, made where the scripts would make it.


def test_item_1b_sees_a_narrower_mask(monkeypatch, only):
    only("1b")
    true_mask = parity.unreliable_mask
    monkeypatch.setattr(parity, "unreliable_mask", lambda code, n: true_mask(code, n - 1))
    assert run(GOLDEN, "1b")["FAIL"]


def test_item_2_sees_the_token_count_in_the_schedule(monkeypatch, only):
    only("2")
    monkeypatch.setattr(parity, "anchor_schedule", lambda n, w, h: flux.shifted_schedule(n, (w // 16) * (h // 16)))
    assert run(GOLDEN, "2")["FAIL"]


def failed_quantities(item: str) -> set[str]:
    return {line.split()[1] for line in run(GOLDEN, item)["FAIL"]}


def test_item_3_sees_more_guidance(monkeypatch, only):
    only("3")
    true_velocity = anchors.velocity
    monkeypatch.setattr(anchors, "velocity", lambda *a, guidance, **k: true_velocity(*a, guidance=guidance + 0.5, **k))
    assert {"pred_pos", "latent", "image_u8"} <= failed_quantities("3")


def test_item_3_sees_unswapped_norm_out(monkeypatch, only):
    only("3")

    def unswapped(source, params=None):
        config, state = keymaps.flux_transformer(source, params)
        for part in ("weight", "bias"):
            scale, shift = state[f"norm_out.linear.{part}"].chunk(2)
            state[f"norm_out.linear.{part}"] = torch.cat([shift, scale])
        return config, state

    cls, _, params = convert.MODEL_KINDS["flux"]
    monkeypatch.setitem(convert.MODEL_KINDS, "flux", (cls, unswapped, params))
    assert "latent" in failed_quantities("3")


def test_item_3_sees_an_inverted_mask(monkeypatch, only):
    only("3")
    true_encode = parity_models.encode_warped
    monkeypatch.setattr(
        parity_models, "encode_warped", lambda m, image, mask, eps: true_encode(m, image, 1 - mask, eps)
    )
    assert {"mask", "latent"} <= failed_quantities("3")


def test_item_4_sees_a_missing_lora(monkeypatch, only):
    only("4")
    monkeypatch.setattr(parity_models, "load_lora", lambda model, state, weight: None)
    assert "latent" in failed_quantities("4")


def test_item_5_sees_scaled_residuals(monkeypatch, only):
    only("5")
    true_velocity = alignment.velocity
    monkeypatch.setattr(alignment, "velocity", lambda *a, **k: true_velocity(*a, control_weight=0.8, **k))
    assert {"loss", "gradients"} <= failed_quantities("5")


def test_item_5_sees_both_loras_clipped_together(monkeypatch, only):
    only("5")
    true_step = parity_models.optimizer_step

    def clip_all(optimizer, groups, max_norm):
        return true_step(optimizer, [optimizer.param_groups[0]["params"]], max_norm)

    monkeypatch.setattr(parity_models, "optimizer_step", clip_all)
    assert "clip_returned" in failed_quantities("5")


def test_item_6_sees_swapped_condition_channels(monkeypatch, only):
    only("6")
    cls = inbetween.CogVideoXInbetweenPipeline
    true_encode = cls.encode_conditions
    monkeypatch.setattr(cls, "encode_conditions", lambda *a: true_encode(*a).roll(16, dims=2))
    assert {"image_latents", "final_latents", "frames_u8"} <= failed_quantities("6")


def test_item_6_sees_an_unmerged_lora(monkeypatch, only):
    only("6")
    monkeypatch.setattr(convert, "merge_tensor", lambda s, n: s[n] if n in s else s[keymaps.with_base(n)])
    assert "final_latents" in failed_quantities("6")


def test_item_7_sees_a_mix_that_loses_variance(monkeypatch, only):
    only("7")
    monkeypatch.setattr(parity, "blend_noise", lambda warped, fresh, alpha: alpha * fresh + (1 - alpha) * warped)
    assert run(GOLDEN, "7")["FAIL"]


def test_item_8_sees_a_lora_on_one_block_less(monkeypatch, only):
    only("8")
    from models import lora

    monkeypatch.setattr(lora, "SINGLE_BLOCKS", range(1, 4))
    assert run(GOLDEN, "8")["FAIL"]


def test_item_8_sees_an_unknown_key(tmp_path, only, capsys):
    only("8")
    (tmp_path / "8_inventory").mkdir()
    text = (GOLDEN / "8_inventory" / "flux_ae.json").read_text()
    (tmp_path / "8_inventory" / "flux_ae.json").write_text(
        text.replace('"decoder.conv_in.bias"', '"decoder.conv_on.bias"')
    )
    assert run(tmp_path, "8")["FAIL"]
    assert "decoder.conv_on.bias" in capsys.readouterr().err


def test_item_9_sees_another_numbering(monkeypatch, only):
    only("9")
    monkeypatch.setattr(arcs, "ARC_STEPS", 46)
    assert run(GOLDEN, "9")["FAIL"]
