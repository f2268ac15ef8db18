"""The stages of generate.py: their flags, what they cost, and running them one after the other."""

import argparse
import ctypes
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from models.flags import resolve_device
from utils.cli import InputError, require_writable
from utils.files import read_json, show_bytes, write_json
from utils.layout import MANIFEST, SCENE_MANIFEST

if TYPE_CHECKING:
    from models.runtime.memory import Plan

ROOM = {"full": 5 * 10**9, "tiny": 5 * 10**8}  # bytes: LoRAs of rank 16 with their state, and pictures of several arcs
PR_SET_PDEATHSIG = 1


@dataclass
class Stage:
    """One script with its flags. words: the flags as text; args: as its own parser reads them.

    steps, pixels, result, size: what `describe` tells, see `costs`. plan: of memory, where it is not the table's for
    `size`. threads: OpenMP threads, None for the libraries'.
    """

    name: str
    script: ModuleType
    words: list[str]
    args: argparse.Namespace = field(init=False)
    steps: int = 0
    pixels: int = 0
    result: Path = Path()
    size: dict[str, int] = field(default_factory=dict)
    plan: "Plan | None" = None
    threads: int | None = None

    def __post_init__(self) -> None:
        try:
            self.args = self.script.parse_args(self.words)
        except InputError as error:
            raise InputError(f"{Path(self.script.__file__).name}: {error}") from error

    def costs(self, steps: int, pixels: int, result: Path, **size: int) -> None:
        """steps: of denoising or training, or files. pixels: per picture. size: frames and batch for the memory."""
        self.steps, self.pixels, self.result, self.size = steps, pixels, result, size

    def but(self, *flags: object) -> "Stage":
        """The same stage with other values of some flags."""
        return Stage(self.name, self.script, [*self.words, *map(str, flags)])

    @property
    def kind(self) -> str:
        """What steps that take equally long have in common."""
        if self.name == "preprocess":
            return f"preprocess, {self.pixels} pixels"
        import torch

        device = resolve_device(self.args.device)
        name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
        network = getattr(self.args, "backbone", "image")
        how = f"{self.name}, {network}, {self.args.weights}, memory {self.args.memory}, {name}, {self.pixels} pixels"
        return ", ".join((how, *(f"{key} {number}" for key, number in self.size.items())))


def make_stage(args: argparse.Namespace, scripts: Mapping[str, ModuleType], name: str, *flags: object) -> Stage:
    """A stage with these flags, then those that all stages share, then the user's. args: of generate.py."""
    shared = ["--overwrite"] if args.overwrite else []
    if name != "preprocess":
        shared += ["--weights", args.weights, "--device", args.device, "--memory", args.memory]
    words = (*flags, *shared, *args.stage_flags[name])
    return Stage(name, scripts[name], [str(word) for word in words])


def split_flags(words: Sequence[str], stages: Collection[str]) -> dict[str, list[str]]:
    """{stage: its flags} of `--STAGE.FLAG VALUE …`. Raises InputError for flags of no stage."""
    flags: dict[str, list[str]] = {name: [] for name in stages}
    stage = None
    for word in words:
        if match := re.fullmatch(r"--(\w+)\.([a-zA-Z].*)", word, re.DOTALL):
            stage, word = match[1], f"--{match[2]}"
        if stage not in flags:
            raise InputError(f"{word}: after -- come flags such as --ggi.fps 24, of {', '.join(stages)}")
        flags[stage].append(word)
    return flags


def quietly(check: Callable, *arguments: object) -> object:
    """Call a check of a stage, whose notes the stage itself will print."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return check(*arguments)


def require_room(folder: Path, weights: str) -> None:
    """Raise InputError unless results can be written to `folder`, and there is room for them."""
    require_writable(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if (free := shutil.disk_usage(existing).free) < ROOM[weights]:
        raise InputError(f"{folder} has {show_bytes(free)} free, {show_bytes(ROOM[weights])} are needed")


def describe(stage: Stage) -> str:
    """One line: steps, memory, time where it is known, and where the results lie."""
    if stage.name == "preprocess":
        memory, unit = "no GPU", "files"
    else:
        memory, unit = show_memory(stage), "steps"
    return f"{stage.name:10} {stage.steps:5} {unit}, {memory}{show_time(stage)}: {stage.result}"


def show_memory(stage: Stage) -> str:
    """Peak memory in the stage's --memory mode, or in all of them for auto."""
    from models.runtime.memory import look_up_plan

    phases = stage.plan or look_up_plan(stage.args.weights, stage.name, pixels=stage.pixels, **stage.size)
    peaks = {mode: show_bytes(max(phase.total for phase in parts)) for mode, parts in phases.items()}
    chosen = peaks if stage.args.memory == "auto" else {stage.args.memory: peaks[stage.args.memory]}
    return "memory " + " or ".join(f"{peak} ({mode})" for mode, peak in chosen.items())


def run_stage(stage: Stage) -> None:
    """Run a stage in its own process, which ends with this one. Exits with its code when it fails."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(stage.threads)} if stage.threads else {})
    line = [sys.executable, str(Path(stage.script.__file__).resolve()), *stage.words]
    code = subprocess.run(line, env=environment, preexec_fn=end_with_parent, check=False).returncode
    if code:
        print(f"{stage.name} ended with exit code {code}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
    manifest = stage.result / (SCENE_MANIFEST if stage.name == "preprocess" else MANIFEST)
    remember(stage, read_json(manifest).get("wall_seconds", 0.0))


def end_with_parent() -> None:
    """In a new process: be killed when the one that started it ends, so that never two of a stage work."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# --- time ---


def times_file() -> Path:
    """Seconds per step that this machine took, {kind: seconds}; in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "videofrom3d" / "seconds_per_step.json"


def show_time(stage: Stage) -> str:
    """About how long a stage takes; empty where nothing like it was measured."""
    seconds = known_times().get(stage.kind)
    if not isinstance(seconds, int | float):
        return ""
    minutes = seconds * stage.steps / 60
    return f", about {minutes:.0f} min" if minutes >= 2 else f", about {60 * minutes:.0f} s"


def remember(stage: Stage, seconds: float) -> None:
    """Note what a stage took, for the next time. A cache folder that cannot be written is left alone."""
    try:
        write_json(times_file(), known_times() | {stage.kind: round(seconds / stage.steps, 4)})
    except OSError:
        return


def known_times() -> dict:
    try:
        return read_json(times_file())
    except (InputError, OSError):  # none yet, or damaged: times are a convenience
        return {}
