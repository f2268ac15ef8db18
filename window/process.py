"""preprocess.py as a process of its own, with its progress."""

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "preprocess.py"
LINES = 12  # of what it prints, kept for the window


class Preprocessing:
    """One run of preprocess.py. It is told nothing but its arguments, and refuses to replace results by itself."""

    def __init__(self, arguments: Sequence[object], on_change: Callable[["Preprocessing"], None]) -> None:
        """Start it. on_change: called from a thread whenever it prints, and when it has ended."""
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        self.percent, self.code = 0, None
        self._lines: deque[str] = deque(maxlen=LINES)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # Ctrl-C ends the window, and the window this, once
        )
        self._thread = threading.Thread(target=self._follow, args=(on_change,), daemon=True)
        self._thread.start()

    @property
    def printed(self) -> str:
        return "\n".join(self._lines)

    @property
    def running(self) -> bool:
        return self.code is None

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        self._thread.join()
        return self.code

    def stop(self) -> None:
        """End it: preprocess.py writes whole arcs only, and the same arguments go on from there."""
        if self._process.poll() is None:
            self._process.terminate()
            self.wait()

    def _follow(self, on_change: Callable[["Preprocessing"], None]) -> None:
        text = b""
        while part := self._process.stdout.read(4096):
            *whole, text = re.split(rb"[\r\n]", text + part)
            for line in whole:
                self._take(line.decode(errors="replace").strip())
            on_change(self)
        self._take(text.decode(errors="replace").strip())
        self.code = self._process.wait()
        on_change(self)

    def _take(self, line: str) -> None:
        """Note a line of output: one of the progress bar, or one to show."""
        if found := re.match(r"preprocess: +(\d+)%", line):
            self.percent = int(found[1])
        elif line:
            self._lines.append(line)
