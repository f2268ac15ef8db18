"""The window: a server for browsers, and its three tabs."""

import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path

import viser

from utils.cli import InputError
from window.anchors_tab import AnchorsTab
from window.content import Content
from window.draft import PathDraft
from window.path_tab import PathTab
from window.stage import Stage
from window.time_tab import TimeTab


class Window:
    """A running window. url: where a browser finds it. time, anchors: their tabs, None without a scene folder."""

    def __init__(self, content: Content, draft: PathDraft, output: Path, host: str, port: int) -> None:
        """Open it. output: folder for paths. port: 0 for a free one. Raises InputError where it cannot listen."""
        require_port(host, port)
        with redirect_stdout(sys.stderr):  # viser's greeting; stdout is for what a program may read
            self.server = viser.ViserServer(host, port, label="VideoFrom3D", verbose=False)
        found = self.server.get_port()
        if port and found != port:  # taken in the meantime: viser took the next one
            self.server.stop()
            raise InputError(f"port {port} is taken; choose another --port")
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{found}"
        self.server.gui.configure_theme(show_logo=False, show_share_button=False)
        stage = Stage(self.server, content, draft, output)
        tabs = self.server.gui.add_tab_group()
        self.time, self.anchors = None, None
        if content.scene:
            with tabs.add_tab("Time"):
                self.time = TimeTab(stage)
            with tabs.add_tab("Anchors"):
                self.anchors = AnchorsTab(stage)
        with tabs.add_tab("Path"):
            self.path = PathTab(stage)

    def stop(self) -> None:
        """Close it, and end a preprocess.py that it runs."""
        self.path.stop()
        with redirect_stdout(sys.stderr):
            self.server.stop()


def require_port(host: str, port: int) -> None:
    """Raise InputError unless a server can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
            trial.bind(address)
    except socket.gaierror as error:
        raise InputError(f"--host {host} is no address ({error.strerror})") from error
    except OSError as error:
        raise InputError(f"cannot listen on port {port} of {host} ({error.strerror}): give another --port") from error
