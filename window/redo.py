"""The command line that draws chosen anchors of a run again, from the one that its manifest records."""

import shlex
from collections.abc import Sequence

from window.content import Results

SCRIPT = "sag_generate_anchor_view.py"
# Flags of the recorded command that do not go with --redo, or that an earlier --redo had.
DROPPED = ("--redo", "--redo_seed", "--redo_prompt", "--use_picture", "--overwrite", "--first")
REPLACED = ("--target", "--pfix", "--seed")  # which may have named several runs


def redo_command(results: Results, scene: str, chosen: Sequence[int]) -> str:
    """One line for a shell that draws the anchors `chosen` anew. scene: folder, as it was given."""
    numbers = [str(k) for k in sorted(chosen)]
    recorded, noted = results.manifest.get("command"), results.manifest.get("arguments", {})
    own = ["--target", scene, "--pfix", str(noted.get("pfix")), "--seed", str(noted.get("seed"))]
    if not recorded:  # manifests of earlier versions have none: the user knows what else was given
        return f"python {SCRIPT} {shlex.join(own)} … --redo {' '.join(numbers)}"
    words, *groups = _groups(shlex.split(recorded))
    kept = [word for group in groups if not _matches(group[0], (*DROPPED, *REPLACED)) for word in group]
    before = results.manifest.get("redone", {})
    used = [before[k]["seed"] for k in numbers if k in before]  # --redo takes the run's seed + 1: drawn already
    anew = ["--redo_seed", str(max(used) + 1)] if used else []
    return shlex.join([*words, *own, *kept, "--redo", *numbers, *anew])


def _groups(words: Sequence[str]) -> list[list[str]]:
    """The words before the first flag, then each flag with its values."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return groups


def _matches(word: str, flags: Sequence[str]) -> bool:
    """Whether a word is one of the flags, which may be shortened, or have its value behind an equals sign."""
    name = word.partition("=")[0]
    return any(flag.startswith(name) for flag in flags)
