"""Drawing a camera path: keyframes at the browser's view, a preview of their edges, saving, preprocessing."""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import viser

from utils.cameras.path import CameraPath, to_arcs
from utils.cli import InputError, folder_name, size
from utils.images import unreadable_size
from utils.layout import count_arcs
from utils.scene.arcs import covisible_shares
from utils.scene.lines import find_lines, make_line_scene, soften
from utils.scene.survey import survey
from utils.scene.views import View, make_views
from window.draft import KEYFRAMES, Key, require_lens
from window.poses import lens_of, rotation_of
from window.process import Preprocessing
from window.shapes import DRAWN, NOW, SMALLER, add_curve, add_frustum, move_frustum
from window.stage import Stage
from window.texts import preformatted

NO_KEY = "none yet"
ACTIONS = ("add", "move", "look", "delete")
HINT = "add what you see after the keyframe; move the keyframe here; look through it; delete it"
PREVIEW = 360  # pixels; longest side of the edges
LONGEST = 2000  # frames of a path that is checked while it is drawn
SCENE_FOLDER = "scene"  # of a path that is preprocessed, beside its files
EMPTY = "Turn the scene until you see the first picture, and add it. Frames to the next 45: every keyframe an anchor."


class PathTab:
    def __init__(self, stage: Stage) -> None:
        self.stage, self.draft, content = stage, stage.draft, stage.content
        self.lines = make_line_scene(content.geometry, content.caster)
        self.path: CameraPath | None = None
        self.typical_depth, self.latest = 1.0, 0
        self.nodes: list[viser.SceneNodeHandle] = []
        first = self._view_of(Key(np.zeros(3), np.eye(3), None))
        self.now = add_frustum(stage.server.scene, "/drawn/now", first, SMALLER * stage.scale, NOW)
        self.job: Preprocessing | None = None
        self._add_keyframe_controls()
        self._add_path_controls()
        self._add_saving_controls()
        self.refresh()

    # --- controls ---

    def _add_keyframe_controls(self) -> None:
        gui, on, draft = self.stage.server.gui, self.stage.on, self.draft
        with gui.add_folder("Keyframes"):
            self.chosen = gui.add_dropdown("keyframe", self._labels(), initial_value=self._labels()[-1])
            self.action = gui.add_button_group("this view", ACTIONS, hint=HINT)
            fov = draft.keys[-1].fov if draft.keys else self._first_fov()
            self.fov = gui.add_number("field of view", fov, step=0.1, hint="vertical, degrees, between 0 and 180")
            self.frames = gui.add_number("frames to the next", draft.keys[-1].frames if draft.keys else 45, min=1)
        self.chosen.on_update(on(self.choose))
        self.action.on_click(on(self.act))
        self.fov.on_update(on(self.change_key))
        self.frames.on_update(on(self.change_key))

    def _first_fov(self) -> float:
        """Degrees; of the scene's first frame, or 45."""
        views = self.stage.content.views
        return float(np.degrees(lens_of(views[0])[0])) if views else 45.0

    def _add_path_controls(self) -> None:
        gui, on, draft = self.stage.server.gui, self.stage.on, self.draft
        with gui.add_folder("Path"):
            self.tension = gui.add_slider("tension", 0.0, 1.0, 0.05, draft.tension)
            self.loop = gui.add_checkbox("loop", draft.loop, hint="the last keyframe's frames lead back to the first")
            self.size = gui.add_text("size in pixels", "{}x{}".format(*draft.size))
            self.frame = gui.add_slider("frame", 1, 2, 1, 1)
            self.follow = gui.add_checkbox("browser follows the camera", False)
            self.picture = gui.add_image(np.zeros((2, 3, 3), np.uint8), label="edges")
            self.info = gui.add_html("")
        for control in (self.tension, self.loop, self.size):
            control.on_update(on(self.change_path))
        for control in (self.frame, self.follow):
            control.on_update(self.scrub)

    def _add_saving_controls(self) -> None:
        gui, on = self.stage.server.gui, self.stage.on
        with gui.add_folder("Save"):
            self.name = gui.add_text("name", "path", hint=f"a folder in {self.stage.output}")
            self.replace = gui.add_checkbox("replace a saved path", False)
            self.save_button = gui.add_button("Save")
            self.preprocess_button = gui.add_button("Preprocess the saved path")
            self.progress = gui.add_progress_bar(0, visible=False)
            self.told = gui.add_html("")
        self.save_button.on_click(on(self.save))
        self.preprocess_button.on_click(on(self.preprocess))

    # --- keyframes ---

    def _labels(self) -> tuple[str, ...]:
        numbers = self.draft.frame_numbers()
        return tuple(f"{k + 1}: frame {number}" for k, number in enumerate(numbers)) or (NO_KEY,)

    def selected(self) -> int:
        """Number of the chosen keyframe, from 0. Raises InputError while there is none."""
        if not self.draft.keys:
            raise InputError("there is no keyframe yet: add the view that you see")
        number = int(self.chosen.value.partition(":")[0])  # its frame may have changed in another browser
        return min(number, len(self.draft.keys)) - 1

    def here(self, client: viser.ClientHandle) -> Key:
        """A keyframe at a browser's view, with the lens and duration that are set."""
        camera = client.camera
        distance = float(np.linalg.norm(camera.look_at - camera.position))
        return Key(camera.position, rotation_of(camera.wxyz), distance, float(self.fov.value), int(self.frames.value))

    def act(self, client: viser.ClientHandle) -> None:
        actions = (self.add, self.move, self.look, self.delete)
        dict(zip(ACTIONS, actions, strict=True))[self.action.value](client)

    def add(self, client: viser.ClientHandle) -> None:
        after = self.selected() if self.draft.keys else None
        self.refresh(self.draft.add(self.here(client), after))

    def move(self, client: viser.ClientHandle) -> None:
        k = self.selected()
        self.draft.move(k, self.here(client))
        self.refresh(k)

    def delete(self, client: viser.ClientHandle) -> None:
        k = self.selected()
        self.draft.delete(k)
        self.refresh(max(0, k - 1))

    def look(self, client: viser.ClientHandle) -> None:
        k = self.selected()
        self.stage.look_through(client, self._view_of(self.draft.keys[k]), self.draft.keys[k].distance)

    def choose(self, client: viser.ClientHandle) -> None:
        self._show_key(self.selected())

    def change_key(self, client: viser.ClientHandle) -> None:
        """Take over the lens and the duration of the chosen keyframe; before there is one, of the next."""
        require_lens(self.fov.value)
        client.camera.fov = float(np.radians(self.fov.value))
        if self.draft.keys:
            k = self.selected()
            self.draft.change(k, fov=float(self.fov.value), frames=int(self.frames.value))
            self.refresh(k)

    def change_path(self, client: viser.ClientHandle) -> None:
        try:
            wanted = size(self.size.value.strip())
        except argparse.ArgumentTypeError as error:
            raise InputError(str(error)) from error
        if reason := unreadable_size(wanted):
            raise InputError("a size of {}x{}: {}".format(*wanted, reason))
        self.draft.size = wanted
        self.draft.tension, self.draft.loop = float(self.tension.value), bool(self.loop.value)
        self.refresh(self.selected() if self.draft.keys else 0)

    # --- what is shown ---

    def refresh(self, k: int | None = None) -> None:
        """Show the draft as it is now. k: the keyframe to choose, from 0; None for the last."""
        labels = self._labels()
        self.chosen.options = labels
        self.chosen.value = labels[-1 if k is None else k]
        if self.draft.keys:
            self._show_key(self.selected())
        for node in self.nodes:
            node.remove()
        self.nodes = [node for k, key in enumerate(self.draft.keys) for node in self._add_key(k, key)]
        try:
            self.path = self.draft.path()
            text = self._check(self.path)
        except InputError as error:
            self.path, text = None, str(error) if self.draft.keys else EMPTY
        self.info.content = preformatted(text)
        if self.path:
            self.nodes.append(add_curve(self.stage.server.scene, "/drawn/curve", self.path.c2w[:, :3, 3], DRAWN))
            self.frame.max = len(self.path)
            self.frame.value = min(self.frame.value, len(self.path))
        self._draw()

    def _show_key(self, k: int) -> None:
        self.fov.value, self.frames.value = self.draft.keys[k].fov, self.draft.keys[k].frames

    def _view_of(self, key: Key) -> View:
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = key.rotation, key.position
        width, height = self.draft.size
        focal = height / 2 / np.tan(np.radians(key.fov) / 2)
        return View(pose, focal, focal, width / 2, height / 2, width, height)

    def _add_key(self, k: int, key: Key) -> tuple[viser.SceneNodeHandle, ...]:
        """A keyframe's frustum, which a click chooses, and its number."""
        scene = self.stage.server.scene
        frustum = add_frustum(scene, f"/drawn/{k + 1}", self._view_of(key), self.stage.scale, DRAWN)
        number = scene.add_label(f"/numbers/{k + 1}", str(k + 1), position=key.position)

        def choose(client: viser.ClientHandle) -> None:
            self.chosen.value = self._labels()[k]
            self._show_key(k)

        frustum.on_click(self.stage.on(choose))
        return frustum, number

    def _check(self, path: CameraPath) -> str:
        """What preprocess.py will say of a path, as text."""
        arcs = to_arcs(path)
        count = count_arcs(len(arcs))
        text = f"{len(path)} frames, {count} arc{'s' * (count > 1)}"
        text += "" if len(path) == len(arcs) else f" (resampled to {len(arcs)} frames)"
        some = make_views(arcs, arcs.size)[:: math.ceil(len(arcs) / LONGEST)]
        found = survey(self.stage.content.caster, some)
        self.typical_depth = found.typical_depth
        if len(some) < len(arcs):
            return f"{text}; too long to be checked here"
        shares = ", ".join(f"{share:.0%}" for share in covisible_shares(self.stage.content.caster, arcs))
        return "\n".join([text, f"neighbouring anchors share {shares}", *found.warnings])

    def scrub(self, event: viser.GuiEvent) -> None:
        """Show another frame; of many that are asked for at a time, the last one."""
        if event.client is None:
            return
        self.latest += 1
        mine = self.latest
        with self.stage.lock:
            if mine != self.latest or self.path is None:
                return
            self._draw()
            if self.follow.value:
                self.stage.look_through(event.client, self._frame_view(self.path.size))

    def _frame_view(self, wanted: tuple[int, int]) -> View:
        k = min(self.frame.value, len(self.path)) - 1
        return make_views(self.path, wanted)[k]

    def _draw(self) -> None:
        """The edges of the chosen frame, and its camera."""
        self.picture.visible = self.now.visible = self.path is not None
        if self.path is None:
            return
        scale = PREVIEW / max(self.path.size)
        view = self._frame_view(tuple(max(1, round(scale * side)) for side in self.path.size))
        self.picture.image = soften(find_lines(self.lines, view), self.typical_depth)
        move_frustum(self.now, view)

    # --- saving ---

    def _folder(self) -> Path:
        try:
            return self.stage.output / folder_name(self.name.value.strip())
        except argparse.ArgumentTypeError as error:
            raise InputError(str(error)) from error

    def save(self, client: viser.ClientHandle) -> None:
        files = self.draft.save(self._folder(), replace_old=bool(self.replace.value))
        self.replace.value = False
        self.told.content = preformatted("\n".join(map(str, files)))

    def preprocess(self, client: viser.ClientHandle) -> None:
        """Start preprocess.py on the saved path, into a folder beside it."""
        if self.job and self.job.running:
            raise InputError("preprocess.py is running already: wait for it")
        folder, content = self._folder(), self.stage.content
        file = folder / KEYFRAMES
        if not self.draft.is_saved(folder):
            raise InputError(f"{file} does not hold this path: save it first")
        made = folder / SCENE_FOLDER
        words = ["--scene", content.mesh, "--cameras", file, "--output", made, "--preview"]
        words += ["--edge_size", "{}x{}".format(*self.draft.size)]
        words += ["--scene_up", content.scene_up[1:]] if content.scene_up else []
        self.progress.visible, self.progress.value = True, 0
        self.job = Preprocessing(words, partial(self._report, made))

    def _report(self, made: Path, job: Preprocessing) -> None:
        """Show how far a job is; made: the scene folder that it writes."""
        self.progress.value = 100 if job.code == 0 else job.percent
        ends = {None: "", 0: f"\npython view.py {made}"}
        self.told.content = preformatted(job.printed + ends.get(job.code, f"\nended with exit code {job.code}"))

    def stop(self) -> None:
        """End a preprocess.py that is running."""
        if self.job:
            self.job.stop()
