"""Choose the number of arcs of a camera path, so that neighbouring anchors share enough of what they see."""

from collections.abc import Callable
from itertools import pairwise

from utils.cameras.path import CameraPath
from utils.layout import ARC_STEPS
from utils.scene.raycast import RayCaster
from utils.scene.views import correspondence, make_views

GRID = 90  # rays across; as many down as keep the aspect


def covisible_shares(caster: RayCaster, path: CameraPath) -> list[float]:
    """For each arc, the share of its last frame, sky included, that its first frame shows as well."""
    width, height = path.size
    views = make_views(path, (GRID, max(1, round(GRID * height / width))))[::ARC_STEPS]
    return [float(correspondence(caster, first, last).visible.mean()) for first, last in pairwise(views)]


def choose_num_arcs(
    caster: RayCaster, path_of: Callable[[int], CameraPath], least: float, most: int
) -> tuple[int, list[float]]:
    """The smallest number of arcs whose ends all share at least `least`, by bisection, and the share of each arc.

    path_of: the path, resampled to a number of arcs. most: upper limit, also the result if no number is enough.
    """
    shares = {}

    def is_enough(count: int) -> bool:
        shares[count] = covisible_shares(caster, path_of(count))
        return min(shares[count]) >= least

    low, high = 1, 1
    while high < most and not is_enough(high):
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    if high not in shares:
        is_enough(high)
    return high, shares[high]
