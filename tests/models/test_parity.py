"""Golden vectors: everything passes, and every item detects a deliberate mistake."""

import json
import subprocess
import sys

import pytest

from tests.support.helpers import ROOT

pytestmark = pytest.mark.slow
GOLDEN = ROOT / "tests" / "golden"
RECORDED = ROOT.parent / "shared" / "golden"  # the whole set, where it is available
SEEN = {  # mistake of tests.models.parity_mistakes: quantities of its item that must fail
    "1b narrower mask": {"mask"},
    "2 token count in the schedule": {"timesteps"},
    "3 draws in half precision": {"noise"},
    "3 more guidance": {"pred_pos", "latent", "image_u8"},
    "3 unswapped norm_out": {"latent"},
    "3 inverted mask": {"mask", "latent"},
    "4 missing LoRA": {"latent"},
    "5 scaled residuals": {"loss", "gradients"},
    "5 both LoRAs clipped together": {"clip_returned"},
    "6 swapped condition channels": {"image_latents", "final_latents", "frames_u8"},
    "6 end drawn before start": {"start_eps", "end_eps"},
    "6 unmerged LoRA": {"final_latents"},
    "7 mix that loses variance": {"mixed_alpha_0.25", "mixed_alpha_0.50"},
    "8 LoRA on one block less": {"raised"},
    "9 another numbering": {"edge_frames"},
    "2 another size": {"rounded_size"},
    "8 unknown key": {"raised"},
}


def command(module: str, *args: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", f"tests.{module}", *map(str, args)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def ran() -> tuple[dict, str]:
    """What tests.models.parity_mistakes printed on stdout (JSON) and on stderr."""
    done = command("models.parity_mistakes")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_every_committed_vector_passes(ran):
    code, lines = ran[0]["runs"][0]
    assert code == 0 and sum(line.endswith(" pass") for line in lines) > 100, lines
    assert {line.split("/")[0] for line in lines} == {path.name for path in GOLDEN.iterdir() if path.is_dir()}


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the whole recorded set is not at hand")
def test_every_recorded_vector_passes():
    done = command("parity", RECORDED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skip" not in done.stdout


def test_nothing_to_run_is_bad_input(ran):
    assert ran[0]["runs"][1:] == [[2, []], [2, []]]


def test_every_mistake_has_its_answer(ran):
    assert ran[0]["mistakes"].keys() == SEEN.keys()


@pytest.mark.parametrize("mistake", SEEN)
def test_a_mistake_is_seen(ran, mistake: str):
    assert SEEN[mistake] <= set(ran[0]["mistakes"][mistake])


@pytest.mark.parametrize("mistake", ["3 draws in half precision", "6 end drawn before start"])
def test_networks_work_on_the_recorded_draws(ran, mistake: str):
    """So that wrong draws fail only their own comparison: 1e-3 in half precision, 300 times its bound."""
    assert SEEN[mistake] == set(ran[0]["mistakes"][mistake])


def test_an_unknown_key_is_named(ran):
    assert "decoder.conv_on.bias" in ran[1]
