"""Run folders: manifests, seeds, and whether a run is finished, can be continued or must be refused.

Every script owns one output folder. `run.json` in it holds the arguments that decide the result, the versions and
weights used, and the cost. A folder is continued only with the same arguments, so that finished results are never
mixed or silently overwritten.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.cli import InputError, require_writable
from utils.files import files_sha256, read_json, write_json
from utils.layout import MANIFEST, Scene, find_checkpoints

PACKAGES = (  # their versions affect the results
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "numpy",
    "scipy",
    "opencv-python-headless",
    "pillow",
    "trimesh",
    "embreex",
)


def clear_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed process left in `folder` and its subfolders.

    A subfolder with a manifest is another run, which may be in progress, and is left alone.
    """
    parts = [path for path in folder.iterdir() if path.is_dir() and not (path / MANIFEST).exists()]
    for path in [leftover for part in (folder, *parts) for leftover in part.glob(".*.tmp*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def derive_seed(*keys: int) -> int:
    """A 63-bit seed that depends on every key, for example (seed, arc, purpose); nearby keys give independent ones."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def draw_seed() -> int:
    """A random seed in [0, 100000], as the reference draws for --seed -1."""
    return secrets.randbelow(100_001)


def is_first_process() -> bool:
    """Whether this is the first, or the only one, of the processes of a launch."""
    return os.environ.get("RANK", "0") == "0"


@dataclasses.dataclass
class Run:
    """One output folder and its manifest."""

    folder: Path
    manifest: dict
    replaces: bool = False  # remove an older run in the folder when this one begins
    owned: tuple[str, ...] = ("*",)  # patterns of the run's files; the folder may hold others
    manifest_name: str = MANIFEST
    started: float = dataclasses.field(default_factory=time.monotonic)
    earlier: float = dataclasses.field(init=False)  # seconds of attempts before this one

    def __post_init__(self) -> None:
        self.earlier = self.manifest.get("wall_seconds", 0.0)

    @property
    def finished(self) -> bool:
        return bool(self.manifest.get("finished"))

    @property
    def trained_steps(self) -> int:
        """Step of the newest checkpoint of a training; 0 before the first."""
        return 0 if self.replaces else max(find_checkpoints(self.folder), default=0)

    def require_begun_with(self, weights: dict) -> None:
        """Raise InputError if this is an interrupted run that was begun with other weights."""
        before = None if self.replaces else self.manifest.get("weights")
        if not before or before == weights:
            return
        kept = [entries.get("kept", "as loaded") for entries in (before, weights)]
        if before | {"kept": kept[1]} == weights | {"kept": kept[1]}:
            raise InputError(
                f"{self.folder} was begun with networks kept otherwise ({kept[0]}, now {kept[1]}): pass the --memory "
                f"of that time, or --overwrite"
            )
        raise InputError(f"{self.folder} was begun with other weights; pass --overwrite to start again")

    def begin(self, **entries: object) -> None:
        """Make the folder and its manifest. Call it after loading everything, so that a failed load changes nothing.

        Raises InputError when an interrupted run was begun with other `weights`.
        """
        if "weights" in entries:
            self.require_begun_with(entries["weights"])
        if self.replaces:
            (self.folder / self.manifest_name).unlink(missing_ok=True)  # first: it may say that the run is finished
            for path in owned_paths(self.folder, self.owned):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.replaces = False  # a second call must not remove the new results
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(self.folder)
        self.save(command=given_command(), **entries, finished=False)

    def save(self, **entries: object) -> None:
        """Merge `entries`, and the wall time over all attempts so far, into the manifest."""
        self.manifest.update(entries, wall_seconds=round(self.earlier + time.monotonic() - self.started, 1))
        write_json(self.folder / self.manifest_name, self.manifest)

    def finish(self, **entries: object) -> None:
        """Mark the run as complete, with the peak memory of this attempt."""
        self.save(**entries, finished=True, peak_memory_mib=peak_memory_mib())


def owned_paths(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Paths in `folder` that match one of `patterns`, without leftovers of killed processes."""
    return sorted({p for pattern in patterns for p in folder.glob(pattern) if ".tmp" not in p.name})


def open_run(
    folder: Path,
    arguments: dict,
    *,
    overwrite: bool = False,
    automatic: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
    owned: tuple[str, ...] = ("*",),
    manifest_name: str = MANIFEST,
) -> Run:
    """Open or continue the run in `folder`. Nothing is written or removed before `Run.begin`.

    arguments: everything that decides the result (JSON values). automatic: arguments that depend on this
    machine; a continued run keeps its own. defaults: values of flags that an older manifest lacks. owned: patterns of
    the run's files, if the folder may hold others, which are left alone. Raises InputError when the folder
    holds a run with other arguments, or files but no manifest, unless `overwrite`.
    """
    require_writable(folder)
    arguments = as_json({**arguments, **(automatic or {})})
    first = {"arguments": arguments, "versions": versions()}
    fresh = Run(folder, first, overwrite, owned, manifest_name)
    if overwrite or not folder.exists():
        return fresh
    if (folder / manifest_name).exists():
        manifest = read_json(folder / manifest_name)
        before = with_defaults(manifest.get("arguments", {}), arguments, defaults)
        _require_same_arguments(folder, before, arguments | {k: before[k] for k in automatic or () if k in before})
        return Run(folder, manifest, False, owned, manifest_name)
    if owned_paths(folder, owned):
        raise InputError(f"{folder} holds files but no {manifest_name}: pass --overwrite to replace them")
    return fresh


def as_json(values: Mapping[str, object]) -> dict:
    """The values as they read back from a manifest."""
    return json.loads(json.dumps(values, default=str))


def with_defaults(before: dict, now: dict, defaults: Mapping[str, object] | None) -> dict:
    """A manifest's arguments, with the defaults of flags that it lacks."""
    newer = {name: value for name, value in as_json(defaults or {}).items() if name in now}
    return newer | {name: value for name, value in before.items() if value is not None}


def find_other_scene(folder: Path, manifest: Mapping, scene: Scene) -> str:
    """Why the anchors or the video in `folder` do not belong to `scene`; empty if they do.

    They were made from other edges or correspondences than the scene has now.
    """
    noted = manifest.get("arguments", {})
    inputs = {"scene_sha256": scene.anchor_inputs, "edges_sha256": scene.edge_paths}
    if any(noted.get(name) and noted[name] != files_sha256(paths) for name, paths in inputs.items()):
        return f"{folder} was made for another scene than {scene.folder}, or before that was made again"
    return ""


def warn_of_another_scene(folder: Path, scene: Scene) -> None:
    """Say on stderr if the run in `folder`, if there is one, was made from another scene."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if is_first_process() and (reason := find_other_scene(folder, manifest, scene)):
        print(f"warning: {reason}", file=sys.stderr)


def require_distinct(runs: Sequence[Run]) -> None:
    """Raise InputError when two runs of one command would write to the same folder."""
    folders = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise InputError(f"two runs of this command have the folder {runs[i].folder}: give each of them once")


def _require_same_arguments(folder: Path, before: dict, now: dict) -> None:
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if changed:
        details = ", ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in changed[:3])
        raise InputError(f"{folder} holds a run with other arguments ({details}); pass --overwrite to replace it")


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that affect the results."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def given_command() -> str:
    """The command line of this process, as a shell takes it; without a launcher in front of it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def peak_memory_mib() -> dict[str, int]:
    """Peak memory of this process in MiB: resident, and allocated on the GPU if one was used."""
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    torch = sys.modules.get("torch")  # not worth importing for this
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated() // 2**20
    return peak


def find_unfinished(
    parent: Path,
    arguments: dict,
    free: str,
    automatic: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> object | None:
    """Value of argument `free` in the newest unfinished run below `parent` that agrees in all others.

    automatic: names of further arguments to ignore. defaults: see `open_run`.
    """
    now, blank = as_json(arguments), dict.fromkeys((free, *automatic))
    candidates = []
    for path in parent.glob(f"*/{MANIFEST}"):
        try:
            manifest = read_json(path)
        except InputError:  # skip a damaged run
            continue
        found = with_defaults(manifest.get("arguments", {}), now, defaults)
        agrees = {**now, **found, **blank} == {**found, **now, **blank}
        if agrees and not manifest.get("finished"):
            candidates.append((path.stat().st_mtime_ns, found[free]))
    return max(candidates)[1] if candidates else None
