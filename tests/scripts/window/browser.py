"""A browser for tests: it speaks the protocol of viser's page, turns its camera, presses buttons, reads messages."""

import time
from collections.abc import Callable

import msgspec.msgpack
import numpy as np
import viser
import zstandard
from viser import _messages as messages
from websockets.sync.client import connect

from window.poses import wxyz_of

SECONDS = 120  # that a test waits for an answer, on a busy machine


class Browser:
    """A client of a window. nodes: {name: pose} of what is drawn, as viser sent it, up to the last `wait_for`."""

    def __init__(self, url: str) -> None:
        protocol = [f"viser-v{viser.__version__}"]
        self.socket = connect(url.replace("http", "ws"), subprotocols=protocol, max_size=None, max_queue=None)
        self.nodes: dict[str, dict] = {}

    def look(self, c2w: np.ndarray, distance: float = 5.0, up: tuple = (0.0, 0.0, 1.0)) -> None:
        """Turn the camera. c2w: [4, 4], OpenGL axes. distance: to the point that it turns about."""
        target = c2w[:3, 3] - distance * c2w[:3, 2]
        wxyz, position = wxyz_of(c2w[:3, :3]).tolist(), c2w[:3, 3].tolist()
        self._send(messages.ViewerCameraMessage(wxyz, position, 0.8, 0.01, 1e3, 600, 800, target.tolist(), up))

    def press(self, button: viser.GuiButtonHandle) -> None:
        self.set(button, True)

    def set(self, control: viser.GuiInputHandle, value: object) -> None:
        """What a user does to a control."""
        self._send(messages.GuiUpdateMessage(control._impl.uuid, {"value": value}))

    def _send(self, message: messages.Message) -> None:
        self.socket.send(msgspec.msgpack.encode(message.as_serializable_dict()))

    def wait_for(self, kind: str, fits: Callable[[dict], bool] = lambda message: True) -> dict:
        """The next message of a type that fits; those before it, and with it, are dropped."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            data = self.socket.recv(timeout=SECONDS)
            length = int.from_bytes(data[8:16], "little")
            window = msgspec.msgpack.decode(zstandard.decompress(data[16 : 16 + length]))
            for message in window["messages"]:
                if message["type"] in ("SetPositionMessage", "SetOrientationMessage"):
                    self.nodes.setdefault(message["name"], {}).update(message)
            for message in window["messages"]:
                if message["type"] == kind and fits(message):
                    return message
        raise TimeoutError(f"no {kind} in {SECONDS} seconds")

    def close(self) -> None:
        self.socket.close()


def until(holds: Callable[[], bool]) -> None:
    """Wait for the threads of the window."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, "the window does not answer"
        time.sleep(0.01)
