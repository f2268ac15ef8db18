"""A scene folder with results for the window, written by the tests."""

from pathlib import Path

import numpy as np

from tests.scene.preprocess_common import BOXES, write_boxes, write_path
from tests.support.helpers import write_picture
from tests.support.scenes import make_scene
from utils.cameras.read import read_cameras, write_transforms
from utils.files import files_sha256, write_json
from utils.images import write_image
from utils.layout import anchor_path, frame_path, load_scene
from utils.meshes.load import load_geometry
from utils.meshes.mesh import turn
from utils.meshes.write import write_glb

RUN, VIDEO = "multiviews/town_run", "d0.5_e1350_n2"
SIZE = (108, 72)
AT_WALL = (11.83, 4.57)  # metres: half the width and half the height of a wall


def make_content(folder: Path) -> Path:
    """A scene folder of one arc with anchors and a video; its edges are not those of its mesh, boxes."""
    make_scene(folder, edge_size=SIZE)
    boxes = write_boxes(folder / "boxes.glb", *BOXES, up="y")
    write_glb(folder / "scene.glb", turn(load_geometry(boxes), "+z"))
    write_transforms(folder / "cameras.json", read_cameras(write_path(folder / "cameras.json")))
    scene, run = load_scene(folder), folder / RUN
    for k in range(2):
        write_picture(anchor_path(run, k), 48, 32, seed=k)
    inputs = [*scene.anchor_edge_paths, *(arc.corres_end_path for arc in scene.arcs)]
    command = "python sag_generate_anchor_view.py --target scene --pfix town --seed -1"
    arguments = {"pfix": "town", "seed": 3, "weights": "tiny", "scene_sha256": files_sha256(inputs)}
    write_json(run / "run.json", {"command": command, "arguments": arguments, "finished": True})
    for k in range(46):
        write_image(frame_path(run / VIDEO, k), np.full((32, 48, 3), 5 * k, np.uint8))
    edges = files_sha256([path for arc in scene.arcs for path in arc.edge_paths])
    anchors = files_sha256([anchor_path(run, k) for k in range(2)])
    arguments = {"weights": "tiny", "edges_sha256": edges, "anchors_sha256": anchors}
    write_json(run / VIDEO / "run.json", {"arguments": arguments, "finished": True})
    return folder
