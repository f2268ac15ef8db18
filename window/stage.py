"""What the tabs of the window share: the server, what is shown, the path that is drawn, and callbacks of browsers."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import viser

from utils.cameras.builtin import builtin_path
from utils.cameras.path import UP_AXES
from utils.cli import InputError
from utils.scene.views import View, make_views
from window.content import Content
from window.draft import PathDraft
from window.poses import is_level, lens_of
from window.shapes import add_geometry, frustum_scale

FAR, NEAR = 20.0, 2e-4  # of the scene's diagonal: what a browser cuts off
AHEAD = 10  # frusta; how far away a browser turns about where nothing else is known
BEHIND = 4  # frusta; from where a browser sees the first camera


class Stage:
    """server, content, draft: see above. output: folder for paths. lock: held while a browser's wish is carried out.

    scale: depth of frusta in metres.
    """

    def __init__(self, server: viser.ViserServer, content: Content, draft: PathDraft, output: Path) -> None:
        self.server, self.content, self.draft, self.output = server, content, draft, output
        self.lock = threading.RLock()
        self.scale = frustum_scale(content.geometry, content.views)
        server.scene.set_up_direction(content.geometry.up)
        self.mesh = add_geometry(server.scene, content.geometry)
        self._place_browsers()

    @property
    def up(self) -> np.ndarray:
        return UP_AXES[self.content.geometry.up]

    def on(self, action: Callable[[viser.ClientHandle], None]) -> Callable[[viser.GuiEvent], None]:
        """A callback for what a browser causes, one at a time; bad input becomes a line in that browser."""

        def called(event: viser.GuiEvent) -> None:
            if event.client is None:  # this program set the value
                return
            with self.lock:
                try:
                    action(event.client)
                except (InputError, OSError) as error:  # OSError: the disk is full, a folder is read-only
                    event.client.add_notification("That does not work", str(error), color="red")

        return called

    def look_through(self, client: viser.ClientHandle, view: View, distance: float | None = None) -> None:
        """Give a browser the pose and the height of view of a camera. distance: metres to the point it turns about."""
        rotation = view.c2w[:3, :3]
        with client.atomic():
            client.camera.position = view.eye
            client.camera.look_at = view.eye - (distance or AHEAD * self.scale) * rotation[:, 2]
            client.camera.up_direction = self.up if is_level(rotation, self.up) else rotation[:, 1]
            client.camera.fov = lens_of(view)[0]

    def _place_browsers(self) -> None:
        """Where a browser begins: behind the first camera, or in front of the mesh."""
        geometry = self.content.geometry
        bounds = np.stack([geometry.vertices.min(0), geometry.vertices.max(0)])
        diagonal = float(np.linalg.norm(bounds[1] - bounds[0]))
        camera = self.server.initial_camera
        if self.content.views:
            view = self.content.views[0]
            backward = self.scale * view.c2w[:3, 2]
            camera.look_at = view.eye - AHEAD * backward
            camera.position = view.eye + BEHIND * backward + self.scale * self.up
        else:
            around = builtin_path("orbit", bounds, geometry.up)
            view = make_views(around, around.size)[0]
            camera.look_at, camera.position = bounds.mean(0), view.eye
        camera.up, camera.fov = self.up, lens_of(view)[0]
        camera.near, camera.far = NEAR * diagonal, FAR * diagonal
