"""The commands of README and docs: the bash blocks use existing flags, and `make demo` makes a video."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import ROOT, probe_video

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line for line in LINES if shlex.split(line, comments=True)]
FOREIGN = ("hf", "pip")  # programs that are not ours
LINKS = sorted({(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^):#]+)[)#]", text)})


def test_there_are_commands():
    assert len(COMMANDS) >= 16


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_exist(monkeypatch, command):
    words = shlex.split(command, comments=True)
    if words[0] in FOREIGN:
        assert all((ROOT / words[i + 1]).is_file() for i, word in enumerate(words) if word == "-r")
        return
    if words[0] == "blender":
        assert (ROOT / words[words.index("-P") + 1]).is_file()
        return
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{re.escape(word)}(:| [:?]?=)", makefile, re.M) for word in map(_name, words[1:]))
        return
    if words[:2] == ["python", "-m"]:
        script, arguments = words[2], words[3:]
    else:
        position = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, arguments = words[position].removesuffix(".py").replace("/", "."), words[position + 1 :]
        assert words[0] in ("python", "accelerate")
    package = (ROOT / script.replace(".", "/")).is_dir()  # its command is in __main__.py
    module = importlib.import_module(f"{script}.__main__" if package else script)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    module.parse_args()  # raises on an unknown flag or a missing value


def _name(word: str) -> str:
    """A target of make, or the variable that is set."""
    return word.split("=")[0]


@pytest.mark.parametrize(
    "path",
    sorted(
        set(
            re.findall(
                r"(?<![\w/])((?:utils|models|tests|tools|docs|assets|configs)/[\w./-]+\.\w+)", "".join(PAGES.values())
            )
        )
    ),
)
def test_files_exist(path):
    assert (ROOT / path).exists() or path.startswith("assets/mytown")


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: getattr(value, "name", value))
def test_links_lead_somewhere(page, link):
    assert (page.parent / link).exists()


@pytest.mark.slow
def test_make_demo_leaves_a_video(tmp_path):
    line = [
        "make",
        "--no-print-directory",
        "demo",
        f"BIN={Path(sys.executable).parent}",
        "SETUP=",
        f"OUT={tmp_path / 'demo'}",
        "STEPS=2",  # instead of 200, on one crop instead of eight: the rest of the demo is unchanged
        "BATCH=1",
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}  # for the times that generate.py notes
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [line for line in done.stdout.splitlines() if " " not in line]  # the others are make's commands
    paths = [Path(line) for line in printed if line.endswith((".png", ".mp4"))]
    assert [path.name for path in paths[-4:]] == ["contact_sheet.png", "video.mp4", "demo.mp4", "demo.png"]
    assert all(path.is_file() for path in paths[-4:])
    assert str(paths[-3].with_name("index.html")) in printed
    metadata, frames = probe_video(paths[-3])
    assert frames == 91 and metadata["size"] == (144, 96)
    assert probe_video(paths[-2])[1] == 91
