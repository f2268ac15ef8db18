"""Pictures of a preprocessed scene, so that a wrong up axis or path is seen before hours of GPU time.

OUTPUT/preview/contact_sheet.png   edges, correspondence maps, and a grid warped between latent frames
OUTPUT/preview/edges.mp4           all edge frames
OUTPUT/preview/top.png             the scene from above, the path, and what the camera sees at the anchors
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from utils.cameras.path import CameraPath
from utils.correspondence import read_map, warp_image
from utils.images import contact_sheet, read_image, write_image, write_video
from utils.layout import ARC_STEPS, CONTACT_SHEET, LATENT_FRAMES, PREVIEW_FOLDER, Scene, load_scene
from utils.meshes.mesh import Geometry

COLUMNS = 6  # pictures per row of the contact sheet
TOP_SIZE = 900  # pixels; side of the view from above
GRID_CELL = 20  # pixels; side of the cells of the warped grid


def write_preview(folder: Path, geometry: Geometry, path: CameraPath, fps: float) -> None:
    """Write all three pictures of a finished scene folder."""
    scene = load_scene(folder)
    write_image(folder / PREVIEW_FOLDER / CONTACT_SHEET, scene_sheet(scene))
    write_path_video(folder / PREVIEW_FOLDER / "edges.mp4", [arc.edge_paths for arc in scene.arcs], fps)
    write_image(folder / PREVIEW_FOLDER / "top.png", top_view(geometry, path))


def scene_sheet(scene: Scene) -> np.ndarray:
    """Per arc: edges, maps (red: x, green: y, black: hidden), and a grid warped from the latent frame before."""
    rows = []
    for arc in scene.arcs:
        picks = np.linspace(0, ARC_STEPS, COLUMNS).astype(int)
        rows.append((f"arc {arc.index}: edges", [read_image(arc.edge_paths[i]) for i in picks]))
        codes = [read_map(arc.corres_paths[i]) for i in np.linspace(0, LATENT_FRAMES - 2, COLUMNS).astype(int)]
        rows.append((f"arc {arc.index}: correspondences", [(code >> 8).astype(np.uint8) for code in codes]))
        grid = _grid(*scene.map_size)
        end = warp_image(grid, read_map(arc.corres_end_path))
        rows.append((f"arc {arc.index}: grid, carried by one map", [warp_image(grid, code) for code in codes]))
        rows.append((f"arc {arc.index}: grid, from the first frame to the last", [grid, end]))
    return contact_sheet(rows)


def _grid(width: int, height: int) -> np.ndarray:
    """A checkerboard tinted by position, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    tint = np.stack([255 * x / width, 255 * y / height, np.full(x.shape, 160.0)], axis=-1)
    return (tint * np.where((x // GRID_CELL + y // GRID_CELL) % 2, 1.0, 0.45)[..., None]).astype(np.uint8)


def write_path_video(path: Path, arcs: Sequence[Sequence[Path]], fps: float) -> None:
    """Write the pictures of all arcs as one video; the frame that neighbouring arcs share is shown once."""
    shown = [picture for number, pictures in enumerate(arcs) for picture in pictures[bool(number) :]]
    write_video(path, (_even(read_image(picture)) for picture in shown), fps)


def _even(image: np.ndarray) -> np.ndarray:
    """Crop an odd last row or column: H.264 needs even sides."""
    return image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]


def top_view(geometry: Geometry, path: CameraPath) -> np.ndarray:
    """The scene from above (higher is lighter), the path in red, and frusta at the arc boundaries; uint8 [S, S, 3]."""
    up = 1 if geometry.up == "+y" else 2
    plane = [0, 2] if up == 1 else [0, 1]
    flip = 1 if up == 1 else -1  # in the picture, +x is right, and the world's depth axis points up or down
    eyes = path.c2w[:, :3, 3]
    low, high = _framed(eyes[:, plane], geometry.vertices[:, plane])
    scale = (TOP_SIZE - 40) / max((high - low).max(), 1e-9)
    middle = (low + high) / 2

    def to_pixels(points: np.ndarray) -> np.ndarray:
        return (points[..., plane] - middle) * (scale, flip * scale) + TOP_SIZE / 2

    canvas = _height_picture(geometry, to_pixels, up)
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    draw.line([tuple(p) for p in to_pixels(eyes)], fill="red", width=3)
    for i in range(0, len(eyes), ARC_STEPS):
        left, right = (eyes[i] + (high - low).max() / 8 * ray for ray in _sides(path, i))
        triangle = [tuple(to_pixels(p)) for p in (eyes[i], left, right)]
        draw.polygon(triangle, outline="blue")
        draw.text(triangle[0], f" {i + 1}", fill="black")
    draw.text(
        (6, 4), f"from above; {geometry.up} is up; frames at the anchors; {1 / scale:.3g} m per pixel", fill="black"
    )
    return np.asarray(image)


def _framed(eyes: np.ndarray, vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the picture, [2] each: the path, and the scene up to three times the path's size around it."""
    low, high = eyes.min(0), eyes.max(0)
    reach = max(3 * (high - low).max(), 1e-3)
    near = vertices[((vertices > low - reach) & (vertices < high + reach)).all(1)]
    points = np.concatenate([eyes, near if len(near) else vertices])
    return points.min(0), points.max(0)


def _sides(path: CameraPath, i: int) -> list[np.ndarray]:
    """Directions to the left and right border of the image of pose i, one unit long along the view axis."""
    slopes = [-path.center[i, 0] / path.focal[i, 0], (path.size[0] - path.center[i, 0]) / path.focal[i, 0]]
    return [path.c2w[i, :3, :3] @ (slope, 0, -1) for slope in slopes]


def _height_picture(geometry: Geometry, to_pixels, up: int) -> np.ndarray:
    """All faces, lowest first, grey by height; uint8 [S, S, 3]."""
    canvas = np.full((TOP_SIZE, TOP_SIZE, 3), 245, np.uint8)
    height = geometry.vertices[geometry.faces, up].mean(1)
    low, high = np.percentile(height, [2, 98])
    grey = 90 + 130 * np.clip((height - low) / max(high - low, 1e-9), 0, 1)
    corners = to_pixels(geometry.vertices)[geometry.faces].round().clip(-30000, 30000).astype(np.int32)
    for f in np.argsort(height, kind="stable"):
        cv2.fillConvexPoly(canvas, corners[f], (float(grey[f]),) * 3)
    return canvas
