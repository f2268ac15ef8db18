"""Preparing a machine with `python -m models.weights`, with a local server in place of the hub."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.hub import Source, parse_source
from tests.support.helpers import GOLDEN, ROOT, SECONDS
from tests.support.hub_server import Hub, serve
from tests.support.small import small_checkpoints

FLUX, COGVIDEOX, CONTROLNET = (
    "black-forest-labs/FLUX.1-dev",
    "THUDM/CogVideoX-5b-I2V",
    "XLabs-AI/flux-controlnet-hed-v3",
)
SHARD = "transformer/diffusion_pytorch_model.safetensors"
CONTROL_FILE = "flux-hed-controlnet-v3.safetensors"

Prepare = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """The repositories of the full weights, with the small weights in them."""
    folder = tmp_path / "repositories"
    for repo, part in ((FLUX, "flux"), (COGVIDEOX, "cogvideox")):
        shutil.copytree(small_checkpoints() / "tiny" / part, folder / repo)
    (folder / CONTROLNET).mkdir(parents=True)
    shutil.copy(GOLDEN / "3_flux" / "controlnet_tiny.safetensors", folder / CONTROLNET / CONTROL_FILE)
    with serve(folder) as hub:
        yield hub


@pytest.fixture
def prepare(hub: Hub, tmp_path: Path) -> Prepare:
    """Run the command with an empty cache of its own; the in-between transformer is there."""
    model_path = tmp_path / "released"
    shutil.copytree(
        small_checkpoints() / "tiny" / "cogvideox" / "transformer", model_path / "checkpoint-1350" / "transformer"
    )
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "models.weights", *words, "--model_path", str(model_path)]
        settings = {**os.environ, "HF_HUB_OFFLINE": "0", **here, **environment}
        return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=SECONDS)

    return run


def error(result: subprocess.CompletedProcess, code: int = 2) -> str:
    """The one line that a failed command ends with."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    return last


def files_sent(hub: Hub) -> list[str]:
    return [request for request in hub.asked if request.startswith("GET") and "/resolve/" in request]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("org/name", Source("org/name", "main", None)),
        ("org/name@v1.0", Source("org/name", "v1.0", None)),
        ("org/name@abc/folder/a.safetensors", Source("org/name", "abc", "folder/a.safetensors")),
        ("org/name/a.safetensors", Source("org/name", "main", "a.safetensors")),
        ("./org/name", None),
        ("/org/name", None),
        ("~/name", None),
        ("name", None),
        ("folder/flux--v2", None),
        ("größe/flux", None),
    ],
)
def test_what_a_source_means(text: str, source: Source | None):
    assert parse_source(text) == source


@pytest.mark.slow
def test_fetch_prepares_a_machine_and_check_needs_no_network(hub: Hub, prepare: Prepare, tmp_path: Path):
    assert "6 components are missing" in error(prepare("check"))
    assert not hub.asked
    assert prepare("fetch").returncode == 0
    sent = len(hub.asked)
    result = prepare("check", "--hashes", HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert len(hub.asked) == sent
    assert f"models.convert controlnet {tmp_path}" in result.stdout and "inbetween" in result.stdout
    assert prepare("fetch").returncode == 0 and len(hub.asked) == sent
    snapshot = next((tmp_path / "home" / "hub").glob("models--black*/snapshots/3de623*"))
    assert (snapshot / SHARD).read_bytes() == (small_checkpoints() / "tiny" / "flux" / SHARD).read_bytes()


def test_a_licence_is_asked_for_before_anything_is_downloaded(hub: Hub, prepare: Prepare):
    hub.gated.add(FLUX)
    message = error(prepare("fetch"))
    assert f"{FLUX} is gated: accept its licence at https://huggingface.co/{FLUX}" in message
    assert not files_sent(hub)


def test_what_does_not_fit_on_the_disk_is_not_begun(hub: Hub, prepare: Prepare):
    hub.claimed[SHARD] = 10**16
    message = error(prepare("fetch"), 3)
    assert "10000000.0 GB to download" in message and "HF_HOME" in message
    assert not files_sent(hub)


@pytest.mark.slow
def test_after_a_download_that_broke_off_the_rest_is_fetched(hub: Hub, prepare: Prepare):
    hub.torn.add(CONTROL_FILE)  # FLUX comes before it, CogVideoX after it
    assert "run the same command again" in error(prepare("fetch"))
    hub.torn.clear()
    hub.asked.clear()
    assert prepare("fetch").returncode == 0
    repositories = {request.split()[1].split("/resolve/")[0] for request in files_sent(hub)}
    assert repositories == {f"/{CONTROLNET}", f"/{COGVIDEOX}"}
    assert prepare("check", "--hashes").returncode == 0


@pytest.mark.slow
def test_a_damaged_download_is_removed(hub: Hub, prepare: Prepare):
    hub.swapped.add(CONTROL_FILE)
    assert f"{CONTROL_FILE} arrived damaged and was removed" in error(prepare("fetch"))
    hub.swapped.clear()
    assert prepare("fetch").returncode == 0


@pytest.mark.slow
def test_damage_on_the_disk_is_found(hub: Hub, prepare: Prepare, tmp_path: Path):
    assert prepare("fetch").returncode == 0
    shard = next((tmp_path / "home" / "hub").glob(f"models--THUDM*/snapshots/*/vae/{Path(SHARD).name}"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.resolve().write_bytes(data)
    assert prepare("check").returncode == 0
    assert f"{shard} is damaged" in error(prepare("check", "--hashes"))


def test_a_repository_or_file_that_is_not_there_is_named(hub: Hub, prepare: Prepare):
    assert "there is no repository org/nothing on the hub" in error(prepare("fetch", "--controlnet", "org/nothing"))
    wrong = f"{CONTROLNET}/other.safetensors"
    assert f"{CONTROLNET} has no file other.safetensors" in error(prepare("fetch", "--controlnet", wrong))
