"""Anchors on their frusta, what neighbours see in common as colours on the mesh, and the command that redraws some."""

from functools import partial

import viser

from utils.scene.arcs import GRID
from utils.scene.views import View, correspondence, resize_view
from window.covisible import SmallFaces, cut_small, seen_by_anchors
from window.redo import redo_command
from window.shapes import ANCHOR, add_frustum, add_seen, read_small
from window.stage import Stage
from window.texts import preformatted

OFF = "off"
LEGEND = "green: seen by both; blue: by the first only; orange: by the second only; grey: by neither"
NONE = "Mark anchors that you want drawn again."


class AnchorsTab:
    def __init__(self, stage: Stage) -> None:
        self.stage, content, gui = stage, stage.content, stage.server.gui
        views, drawn = content.anchor_views, content.results.anchors if content.results else ()
        for k, (view, path) in enumerate(zip(views, drawn or content.scene.anchor_edge_paths, strict=True)):
            frustum = add_frustum(
                stage.server.scene, f"/anchors/{k}", view, stage.scale, ANCHOR, picture=read_small(path)
            )
            frustum.on_click(stage.on(partial(stage.look_through, view=view)))
        self.small: SmallFaces | None = None
        self.coloured: list[viser.MeshHandle] = []
        self.arcs = {f"arc {k}: anchors {k} and {k + 1}": (views[k], views[k + 1]) for k in range(len(views) - 1)}
        self.arc = gui.add_dropdown("covisibility", (OFF, *self.arcs), initial_value=OFF)
        self.arc.on_update(stage.on(self.colour))
        self.legend = gui.add_html("")
        self.chosen = [gui.add_checkbox(f"redo anchor {k}", False) for k in range(len(drawn))]
        self.command = gui.add_html(preformatted(NONE) if drawn else "")
        for box in self.chosen:
            box.on_update(stage.on(self.tell))

    def colour(self, client: viser.ClientHandle) -> None:
        """Colour the mesh for the chosen arc, or show it plain."""
        content, pair = self.stage.content, self.arcs.get(self.arc.value)
        for handle in self.coloured:
            handle.remove()
        self.coloured, self.legend.content = [], ""
        self.stage.mesh.visible = pair is None
        if pair is None:
            return
        if self.small is None:
            self.small = cut_small(content.geometry, content.anchor_views)
        seen = seen_by_anchors(content.caster, self.small, *pair)
        self.coloured = add_seen(self.stage.server.scene, self.small, seen)
        share = f"Of the second picture, the first shows {self.share(*pair):.0%} as well."
        self.legend.content = preformatted(f"{LEGEND}\n{share}")

    def share(self, first: View, second: View) -> float:
        """Share of the second anchor's picture, sky included, that the first one shows as well."""
        size = (GRID, max(1, round(GRID * first.height / first.width)))
        found = correspondence(self.stage.content.caster, *(resize_view(view, size) for view in (first, second)))
        return float(found.visible.mean())

    def tell(self, client: viser.ClientHandle) -> None:
        """Show the command for the anchors that are marked."""
        content, marked = self.stage.content, [k for k, box in enumerate(self.chosen) if box.value]
        text = redo_command(content.results, str(content.scene.folder), marked) if marked else NONE
        self.command.content = preformatted(text)
