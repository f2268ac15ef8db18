"""The README's commands: every line of its bash blocks has flags that exist, and `make demo` leaves a video."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, probe_video

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line and not line.startswith("#")]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_exist(monkeypatch, command):
    words = shlex.split(command)
    if words[0] == "blender":
        assert (ROOT / words[words.index("-P") + 1]).is_file()
        return
    if words[:2] == ["python", "-m"]:
        script, arguments = words[2], words[3:]
    else:
        position = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script, arguments = words[position].removesuffix(".py"), words[position + 1 :]
        assert words[0] in ("python", "accelerate")
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    module.parse_args()  # raises on an unknown flag or a missing value


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`?((?:utils|models|tools|docs|assets|configs)/[\w./-]+\.\w+)", TEXT)))
)
def test_files_exist(path):
    assert (ROOT / path).exists() or path.startswith("assets/mytown")


@pytest.mark.slow
def test_make_demo_leaves_a_video(tmp_path):
    line = [
        "make",
        "--no-print-directory",
        "demo",
        f"BIN={Path(sys.executable).parent}",
        "SETUP=",
        f"OUT={tmp_path / 'demo'}",
        "STEPS=2",  # of 200, on one crop of eight: the rest of the demo is as it is
        "BATCH=1",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [line for line in done.stdout.splitlines() if " " not in line]  # the rest are make's own commands
    paths = [Path(line) for line in printed if line.endswith((".png", ".mp4"))]
    assert [path.name for path in paths[-4:]] == ["video.mp4", "contact_sheet.png", "demo.mp4", "demo.png"]
    assert all(path.is_file() for path in paths[-4:])
    metadata, frames = probe_video(paths[-4])
    assert frames == 91 and metadata["size"] == (144, 96)
    assert probe_video(paths[-2])[1] == 91
