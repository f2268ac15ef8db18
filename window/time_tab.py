"""Scrubbing through the frames of a scene: where the camera is, and its edges or the finished frame in the corner."""

from pathlib import Path

import numpy as np
import viser

from window.shapes import NOW, PATH, SMALLER, add_curve, add_frustum, move_frustum, read_small
from window.stage import Stage

EDGES = "edges"


class TimeTab:
    def __init__(self, stage: Stage) -> None:
        self.stage, content, gui = stage, stage.content, stage.server.gui
        self.pictures = {EDGES: [p for arc in content.scene.arcs for p in arc.edge_paths[bool(arc.index) :]]}
        self.pictures |= content.results.videos if content.results else {}
        scene = stage.server.scene
        add_curve(scene, "/path", np.array([view.eye for view in content.views]), PATH)
        self.camera = add_frustum(scene, "/now", content.views[0], SMALLER * stage.scale, NOW)
        self.frame = gui.add_slider("frame", 1, len(content.views), 1, 1)
        self.kind = gui.add_dropdown("picture", tuple(self.pictures), initial_value=list(self.pictures)[-1])
        self.follow = gui.add_checkbox("browser follows the camera", False)
        self.picture = gui.add_image(read_small(self.chosen()))
        for control in (self.frame, self.kind, self.follow):
            control.on_update(stage.on(self.show))

    def chosen(self) -> Path:
        """The file of the picture to show."""
        return self.pictures[self.kind.value][self.frame.value - 1]

    def show(self, client: viser.ClientHandle) -> None:
        self.picture.image = read_small(self.chosen())
        view = self.stage.content.views[self.frame.value - 1]
        move_frustum(self.camera, view)
        if self.follow.value:
            self.stage.look_through(client, view)
