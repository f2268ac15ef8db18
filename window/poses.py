"""Poses of the browser and ours: viser's have OpenCV axes and quaternions w, x, y, z; ours are OpenGL matrices.

Both are camera-to-world, in one world: OpenCV's +y is down and its +z forward, OpenGL's +y is up and its -z forward.
"""

import math

import numpy as np
from scipy.spatial.transform import Rotation

from utils.scene.views import View

OPENCV = np.diag([1.0, -1.0, -1.0])
LEVEL = 1e-6  # sine of the tilt of a horizon that counts as level
STEEP = 1e-3  # sine of the angle between view and vertical below which a horizon has no direction


def rotation_of(wxyz: np.ndarray) -> np.ndarray:
    """Camera-to-world [3, 3] with OpenGL axes, of viser's quaternion [4]."""
    return Rotation.from_quat(wxyz, scalar_first=True).as_matrix() @ OPENCV


def wxyz_of(rotation: np.ndarray) -> np.ndarray:
    """viser's quaternion [4] of a camera-to-world [3, 3] with OpenGL axes."""
    return Rotation.from_matrix(rotation @ OPENCV).as_quat(scalar_first=True)


def is_level(rotation: np.ndarray, up: np.ndarray) -> bool:
    """Whether a camera [3, 3] with OpenGL axes is upright with a level horizon, and does not look straight up or down.

    up: unit [3].
    """
    right, above, _ = rotation.T
    return bool(abs(right @ up) < LEVEL and above @ up > STEEP)


def lens_of(view: View) -> tuple[float, float]:
    """(vertical field of view in radians, width over height as drawn) of a view, for a frustum.

    Pixels that are not square count; a centre off the middle is left out.
    """
    return 2 * math.atan(view.height / 2 / view.fy), (view.width / view.fx) / (view.height / view.fy)
