"""Running scripts from tests on small weights: in forked processes (tests/support/warm.py) or as calls in this one."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest

from tests.support import warm
from tests.support.small import small_weights
from utils.cli import run_script
from utils.runs import MANIFEST
from utils.videos.page import CONTENTS, INDEX

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
GOLDEN = ROOT / "tests" / "golden"
ALIGN, ANCHORS, GGI = "sag_distribution_alignment", "sag_generate_anchor_view", "ggi"
ON_CPU = ("--weights", "tiny", "--device", "cpu")
SECONDS = 600  # no script of a test takes longer, even on a slow and busy machine


def words(*arguments: object) -> list[str]:
    """Command-line words of a script; tests may override the weights and the device."""
    return [str(argument) for argument in (*ON_CPU, *arguments)]


def call(script: str, *arguments: object) -> int:
    """Run `main` of a script in this process on the small weights; returns the exit code that a shell would see."""
    with small_weights():
        return call_shipped(script, *arguments)


def call_shipped(script: str, *arguments: object) -> int:
    """`call` with the tiny weights."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *words(*arguments)])
        try:
            return exit_code(module.main)
        finally:
            forget_accelerator()


def exit_code(main: Callable[[], None]) -> int:
    """The exit code that a shell would see of a script's `main`, run in this process."""
    try:
        run_script(main)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def forget_accelerator() -> None:
    """accelerate keeps its precision and device for the life of a process."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def start(script: str, *arguments: object, **options) -> warm.Processes:
    """Start a script on the small weights. options: of `tests.support.warm.fork`."""
    return start_module(script, *words(*arguments), **options)


def start_module(name: str, *arguments: object, prepare: Sequence[Callable] = (), **options) -> warm.Processes:
    """`start` for a script or module that does not take --weights."""
    return warm.fork(name, arguments, prepare=(warm.use_small_weights, *prepare), **options)


def run(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does, but on the small weights. options: of `tests.support.warm.fork`."""
    return end(start(script, *arguments, **options))


def end(process: warm.Processes) -> subprocess.CompletedProcess:
    out, err = process.communicate(SECONDS)
    return subprocess.CompletedProcess(process.name, process.returncode, out, err)


def kill_at(path: Path, script: str, *arguments: object, begin: Callable[..., warm.Processes] = start) -> None:
    """Start a script and kill it, with its children, as soon as `path` is there."""
    process = begin(script, *arguments, prepare=[partial(stop_after, path)])
    wait_for(path, process)
    if process.poll() is None:
        process.kill()
    out, err = process.communicate(SECONDS)
    assert process.returncode == -signal.SIGKILL, f"{script} ended before it could be killed: {out}{err}"


def stop_after(path: Path) -> None:
    """Stop this process once it has renamed a file to `path`, so that a kill comes in time on a busy machine."""
    replace = os.replace

    def replace_and_stop(source: object, target: object) -> None:
        replace(source, target)
        if Path(target) == path:
            os.kill(os.getpid(), signal.SIGSTOP)

    os.replace = replace_and_stop


def wait_for(path: Path, process: warm.Processes) -> None:
    """Wait until `path` exists or the process has ended."""
    deadline = time.monotonic() + SECONDS
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def contents(folder: Path, *left_out: str) -> dict[str, bytes]:
    """{name: bytes} of files below `folder`, except manifests, event logs, and names that hold a `left_out`.

    Nor pages, which name the command.
    """
    return {name: path.read_bytes() for name, path in _files(folder) if not any(part in name for part in left_out)}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (MANIFEST, INDEX, CONTENTS) and "tfevents" not in path.name:
            yield str(path.relative_to(folder)), path


def assert_same(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Compare names and bytes; a failure lists names, not bytes."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is too many" for name in found.keys() - wanted.keys()]
    problems += [f"{name} differs" for name in wanted.keys() & found.keys() if found[name] != wanted[name]]
    assert not problems, sorted(problems)


def assert_whole(folder: Path, finished: dict[str, bytes], *left_out: str) -> None:
    """After a kill: every file with a final name is already what an undisturbed run makes of it."""
    present = {name: data for name, data in contents(folder, *left_out).items() if ".tmp" not in name}
    assert present, "nothing was written yet"
    assert_same(present, {name: data for name, data in finished.items() if name in present})


def forbid_models(patch: pytest.MonkeyPatch) -> None:
    """Make the test fail when a script loads a network or a text encoder."""
    import diffusers

    import models.flux.network
    import models.inbetween.pipeline
    import models.inbetween.wan_loading

    def load(*arguments, **options):
        pytest.fail("a model was loaded")

    patch.setattr(models.flux.network, "load_model", load)
    patch.setattr(models.inbetween.pipeline, "load_model", load)
    patch.setattr(models.inbetween.wan_loading, "load_encoders", load)
    patch.setattr(models.inbetween.pipeline, "load_ggi_transformer", load)
    patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)


def write_picture(path: Path, width: int = 200, height: int = 160, seed: int = 0) -> Path:
    """A reference picture: smooth patches of colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return path


def probe_video(path: Path) -> tuple[dict, int]:
    """(metadata, number of frames that decode) of a video."""
    frames = imageio_ffmpeg.read_frames(str(path))
    metadata = next(frames)
    return metadata, sum(1 for _ in frames)


def open_in_chromium(page: Path) -> str:
    """The document that headless Chromium makes of a file; fails if anything is printed to its console."""
    line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    line += ["--enable-logging=stderr", f"--user-data-dir={page.parent}/.profile", page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=SECONDS)
    printed = [text for text in done.stderr.splitlines() if "CONSOLE" in text]
    assert not printed, printed
    return done.stdout


def profiled_peak(step: Callable[[], object]) -> int:
    """Peak of the CPU memory that `step` allocates, in bytes, beyond what was allocated before."""
    import torch

    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
