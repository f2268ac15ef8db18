"""Helpers that the tests of preprocess share."""

import json
import sys
from pathlib import Path

import numpy as np
import trimesh

import preprocess
from tests.support.helpers import exit_code
from utils.scene.views import View

SMALL = ("--edge_size", "108x72", "--map_size", "72x48", "--latent_size", "18x12")


def write_boxes(path: Path, *boxes: tuple, up: str = "z") -> Path:
    """Axis-aligned boxes (centre, size) in a Z-up world, as a mesh file."""
    scene = trimesh.Scene()
    for i, (centre, extent) in enumerate(boxes):
        mesh = trimesh.creation.box(extents=extent)
        mesh.apply_translation(centre)
        if up == "y":
            mesh.apply_transform(np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]]))
        scene.add_geometry(mesh, node_name=f"box_{i}", geom_name=f"box_{i}")
    joined = scene if path.suffix in (".glb", ".gltf") else scene.to_mesh()
    joined.export(path)
    return path


BOXES = (((0, 0, -0.5), (40, 40, 1)), ((0, 6, 1.5), (4, 3, 3)), ((-4, 9, 1), (3, 3, 2)), ((5, 12, 2), (3, 3, 4)))


def write_path(path: Path, poses: int = 46, move: float = 2.0) -> Path:
    """A camera that slides sideways past the boxes, looking along +y; Z-up."""
    eyes = np.stack([np.linspace(-move / 2, move / 2, poses), np.full(poses, -8.0), np.full(poses, 2.0)], axis=1)
    c2w = np.tile(np.eye(4), (poses, 1, 1))
    c2w[:, :3, :3] = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    c2w[:, :3, 3] = eyes
    frames = [{"frame": i + 1, "transform_matrix": matrix.tolist()} for i, matrix in enumerate(c2w)]
    data = {"fl_x": 90.0, "fl_y": 90.0, "cx": 54.0, "cy": 36.0, "w": 108, "h": 72, "world_up": "+z", "frames": frames}
    path.write_text(json.dumps(data))
    return path


def view_at(x: float, y: float = -8.0, z: float = 2.0, size: tuple[int, int] = (72, 48)) -> View:
    rotation = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0.0]])
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = rotation, (x, y, z)
    return View(c2w, 60.0 * size[0] / 72, 60.0 * size[0] / 72, size[0] / 2, size[1] / 2, *size)


def run_main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *map(str, arguments)])
    return exit_code(preprocess.main)
