"""Detect camera files that do not follow their format: other axes, or transposed matrices."""

import numpy as np

from utils.cameras.path import UP_AXES, CameraPath

MOST = 0.9  # of the cameras hang upside down
TILTED, LEVELLER = 0.12, 6  # sine of a horizon's tilt; how much less of it makes another reading likely


def suspicions(path: CameraPath) -> list[str]:
    """One line for each sign that the cameras are not what they seem. People hold cameras upright and level."""
    up = UP_AXES[path.up]
    rotation = path.c2w[:, :3, :3]
    tilt, stored = np.abs(up @ rotation[..., 0].T), np.abs(rotation @ up)[:, 0]
    if np.median(tilt) > max(TILTED, LEVELLER * np.median(stored)):
        return [
            "its horizons are tilted, and level if the matrices are transposed: are they stored column by column, or "
            "world-to-camera? Export them camera-to-world, row by row (axes: --camera_axes opencv or opengl)"
        ]
    upright = rotation[:, :, 1] @ up
    if (upright < 0).mean() > MOST and upright.mean() < -0.05:
        return [
            f"its cameras hang upside down with {path.up} up: if they have OpenCV axes (+y down, +z forward), pass "
            "--camera_axes opencv; a world that is upside down (COLMAP's may be) does no harm to a mesh of that world"
        ]
    return []
