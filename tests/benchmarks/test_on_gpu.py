"""Random weights that the scripts take for real ones, and the peak of a script."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import random_weights
from tests.support.small import small_checkpoints, small_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "weights"
    with small_weights():
        random_weights.main(["--weights", "tiny", "--output", str(folder)])
    return folder


def shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


def test_random_weights_lie_where_the_real_ones_do(folder: Path):
    real = small_checkpoints() / "tiny"
    places = {path.relative_to(real): path for path in real.rglob("*.safetensors")}
    moved = {Path("cogvideox/transformer"): Path("checkpoint-1350/transformer")}
    assert len(places) == 8
    for place, path in places.items():
        made = folder / moved.get(place.parent, place.parent) / place.name
        assert shapes(made) == shapes(path), place


def test_the_stages_find_nothing_to_refuse(folder: Path):
    """What `models.weights check` and every script look at before they load."""
    from argparse import Namespace

    from models.weights import FLUX_STAGE, GGI_STAGE, load_preset, locate

    given = Namespace(**{name: str(folder / name) for name in ("flux", "controlnet", "cogvideox")})
    with small_weights():
        paths = locate(given, load_preset("tiny"), (*FLUX_STAGE, *GGI_STAGE))
    assert all(folder in path.parents for path in paths.values())


@pytest.mark.parametrize("code", [0, 2])
def test_peak_passes_the_exit_code_on(tmp_path: Path, code: int):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nprint(sys.argv[1:])\nsys.exit({code})\n")
    command = [sys.executable, "-m", "benchmarks.peak", str(script), "--memory", "low"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == code
    assert "['--memory', 'low']" in run.stdout and "peak" in run.stdout


def test_an_unknown_call_is_refused(tmp_path: Path):
    command = ["bash", "benchmarks/on_gpu.sh", "nonsense"]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={"OUT": str(tmp_path), "PATH": "/bin:/usr/bin"}
    )
    assert run.returncode == 2 and "no call nonsense" in run.stdout
