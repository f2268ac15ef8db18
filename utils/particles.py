"""Noise warping by a particle grid (docs: utils/noise.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.cli import InputError
from utils.layout import NOISE_CHANNELS, fit_sizes

REACH = 1.6  # elements; largest distance at which an unseen element joins one that was taken over
MAX_OFFSET = 0.75  # elements; largest distance of a mass from the centre of its element
MAX_PIECE_OFFSET = 1.0  # elements; the same before averaging with the masses that join
RELAX = 0.95  # exponent on the masses after each step: evens them out, so that no element dominates its cell
BLOCK = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
CROSS = [(0, 0), (0, -1), (-1, 0), (1, 0), (0, 1)]


@dataclass(frozen=True)
class Particles:
    """Masses and their offsets on a grid of N = height * width elements in row-major order."""

    mass: np.ndarray  # float64 [N], mean 1
    offset: np.ndarray  # float64 [2, N], x and y of the mass from the element's centre, in elements


@dataclass(frozen=True)
class Groups:
    """M elements sorted by the group they belong to."""

    members: np.ndarray  # int64 [M]
    starts: np.ndarray  # int64 [G], where each group begins in `members`
    keys: np.ndarray  # int64 [G], the element that each group belongs to

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """rows: [M, C] in the order of `members`. Returns [G, C]."""
        return np.add.reduceat(rows, self.starts, axis=0) if len(self.starts) else rows[:0]


@dataclass(frozen=True)
class WarpStep:
    """How values move from one frame to the next. Gains are float32 columns: [N, 1], [M, 1], [G, 1], [K, 1]."""

    source: np.ndarray  # int64 [N], the earlier frame's element that each element takes over (0 where fresh)
    gain: np.ndarray  # factor on its values (0 where fresh)
    split: Groups  # elements that share their source, grouped by source
    split_gain: np.ndarray  # factor on the noise that makes the M pieces independent
    merged: Groups  # elements of the earlier frame that none takes over, grouped by the one they join
    merged_gain: np.ndarray  # factor on their G sums
    fresh: np.ndarray  # int64 [K], disoccluded elements
    fresh_gain: np.ndarray


def warp_noise(
    correspondences: Sequence[tuple[np.ndarray, np.ndarray]],
    latent_size: tuple[int, int],
    seed: int | Sequence[int],
    channels: int = NOISE_CHANNELS,
) -> np.ndarray:
    """Noise for a first frame and for each frame that follows it, float32 [1 + len(correspondences), h, w, channels].

    correspondences: per following frame (source positions float [H, W, 2], x then y, in map pixels, origin at the
    outer corner, centres at +0.5; valid bool [H, W]), given on that frame and pointing into the one before it.
    Positions outside the frame, NaN and infinity count as invalid. latent_size: (w, h), with W = S w and H = S h.
    seed: whatever numpy.random.SeedSequence accepts; the same seed gives the same bytes.
    """
    if not correspondences:
        raise ValueError("no correspondences given: at least one map is needed")
    shape = correspondences[0][1].shape
    scale = elements_per_cell(shape[::-1], latent_size)
    count = shape[0] * shape[1]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    values = rng.standard_normal((count, channels), dtype=np.float32)
    particles = Particles(np.ones(count), np.zeros((2, count)))
    frames = [read_cells(values, particles.mass, latent_size, scale)]
    for positions, valid in correspondences:
        if valid.shape != shape or positions.shape != (*shape, 2):
            raise ValueError(f"positions {positions.shape} and validity {valid.shape} do not fit a map of {shape}")
        step, particles = plan_step(particles, positions, valid)
        values = apply_step(step, values, rng)
        frames.append(read_cells(values, particles.mass, latent_size, scale))
    return np.stack(frames)


def elements_per_cell(map_size: tuple[int, int], latent_size: tuple[int, int]) -> int:
    """S = map width / latent width. Sizes are (width, height); InputError unless S is an integer, equal for both."""
    (width, height), (latent_width, latent_height) = map_size, latent_size
    scale = width // latent_width
    if scale < 1 or (scale * latent_width, scale * latent_height) != (width, height):
        fitting_width, fitting_height = fit_sizes(map_size, map_size)[1]
        raise InputError(
            f"latent size {latent_width}x{latent_height} does not fit the {width}x{height} correspondence maps: "
            f"{width}/{latent_width} and {height}/{latent_height} must be the same whole number; "
            f"{fitting_width}x{fitting_height} does, for a video of {8 * fitting_width}x{8 * fitting_height}"
        )
    return scale


def read_cells(values: np.ndarray, mass: np.ndarray, latent_size: tuple[int, int], scale: int) -> np.ndarray:
    """values: float32 [N, C], mass: [N]. Returns the unit-variance noise of the latent cells, float32 [h, w, C]."""
    width, height = latent_size
    total = values.reshape(height, scale, -1).sum(1).reshape(height, width, scale, -1).sum(2)
    cell_mass = mass.reshape(height, scale, width, scale).sum((1, 3))
    return total / np.sqrt(cell_mass)[..., None].astype(np.float32)


def plan_step(particles: Particles, positions: np.ndarray, valid: np.ndarray) -> tuple[WarpStep, Particles]:
    """Plan how the mass of one frame moves to the next. Independent of the values.

    positions: float [H, W, 2] in elements; valid: bool [H, W]; both on the next frame, as in `warp_noise`.
    """
    shape, count = valid.shape, valid.size
    points = np.array(positions.reshape(count, 2).T, dtype=np.float64, order="C")
    ok = valid.ravel() & _inside(points, shape)
    target, fresh = np.flatnonzero(ok), np.flatnonzero(~ok)
    points[:, fresh] = np.inf  # farther than any element
    place = np.indices(shape)[::-1].reshape(2, count) + 0.5 + particles.offset

    # Every element takes over the one whose mass it sees; those that see the same one share it equally.
    seen = points[:, target]
    source = _claim(seen, particles.offset, shape)
    shares = np.bincount(source, minlength=count)
    mean_seen = np.stack([np.bincount(source, axis, count) for axis in seen]) / np.maximum(shares, 1)
    share = shares[source]
    piece_mass = particles.mass[source] / share
    mass, moment = np.zeros(count), np.zeros((2, count))
    mass[target] = piece_mass
    moment[:, target] = piece_mass * np.clip(place - mean_seen, -MAX_PIECE_OFFSET, MAX_PIECE_OFFSET)[:, source]

    # Elements that none took over join a close one that was; those far from all are hidden, and dropped.
    lone, joined = _join(points, target, source, place, shape)
    lone_mass = particles.mass[lone]
    mass += np.bincount(joined, lone_mass, count)
    moment += np.stack([np.bincount(joined, lone_mass * d, count) for d in place[:, lone] - points[:, joined]])
    mass[fresh] = mass[target].mean() if len(target) else 1.0
    offset = np.clip(moment / mass, -MAX_OFFSET, MAX_OFFSET)

    # Only ratios of masses matter to a cell. Values are rescaled with them, which keeps v ~ N(0, m).
    relaxed = mass**RELAX
    relaxed /= relaxed.mean()
    scale = np.sqrt(relaxed / mass)
    carried, gain, noise_gain = np.zeros(count, np.int64), np.zeros(count), np.zeros(count)
    carried[target], gain[target], noise_gain[target] = source, scale[target] / share, np.sqrt(piece_mass)
    noise_gain *= scale
    noise_gain[fresh] = np.sqrt(relaxed[fresh])
    split, merged = _group(target[share > 1], source[share > 1]), _group(lone, joined)
    gains = (gain, noise_gain[split.members], scale[merged.keys], noise_gain[fresh])
    gain, split_gain, merged_gain, fresh_gain = (g.astype(np.float32)[:, None] for g in gains)
    step = WarpStep(carried, gain, split, split_gain, merged, merged_gain, fresh, fresh_gain)
    return step, Particles(relaxed, offset)


def apply_step(step: WarpStep, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values of the next frame, float32 [N, C] like `values`. Draws noise only for split and fresh elements."""
    channels = values.shape[1]
    moved = values[step.source]
    moved *= step.gain
    # v of mass m splits into n pieces v/n + sqrt(m/n) (z - mean z): independent, of variance m/n each, and with sum v.
    sizes = np.diff(step.split.starts, append=len(step.split.members))
    noise = rng.standard_normal((len(step.split.members), channels), dtype=np.float32)
    noise -= np.repeat(step.split.sums(noise) / sizes[:, None].astype(np.float32), sizes, axis=0)
    moved[step.split.members] += step.split_gain * noise
    moved[step.merged.keys] += step.merged_gain * step.merged.sums(values[step.merged.members])
    moved[step.fresh] = step.fresh_gain * rng.standard_normal((len(step.fresh), channels), dtype=np.float32)
    return moved


def _claim(seen: np.ndarray, offset: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The element each target takes over, int64 [M]: the one whose mass, offset included, is at `seen` [2, M]."""
    source = _element(seen, shape)
    for _ in range(2):
        aim = seen - offset[:, source]
        source = np.where(_inside(aim, shape), _element(aim, shape), source)
    return source


def _join(
    points: np.ndarray, target: np.ndarray, source: np.ndarray, place: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Pair elements that none took over with the closest element of the next frame that took one over.

    points: [2, N], what each element of the next frame sees, inf where nothing; target, source: [M], who took over
    whom; place: [2, N], where the masses are. Returns (elements of the earlier frame, whom each of them joins).
    """
    rank = np.arange(len(place[0]))
    rank[source] = -1
    near, claim = _neighbours(source, BLOCK, shape)
    who = rank[near]
    joined = _closest(who[who >= 0], target[claim[who >= 0]], points, place)
    lone = np.flatnonzero(joined < len(joined))
    # Masses lie off their centres, so a neighbour of the element found may be closer still.
    near, which = _neighbours(joined[lone], CROSS, shape)
    return lone, _closest(lone[which], near, points, place)[lone]


def _closest(who: np.ndarray, candidate: np.ndarray, points: np.ndarray, place: np.ndarray) -> np.ndarray:
    """For each element at `place` [2, N] its closest candidate in `points` [2, N], the first of ties; N if none.

    who, candidate: [P], pairs of elements to consider.
    """
    distance = ((points[:, candidate] - place[:, who]) ** 2).sum(0)
    least = np.full(len(place[0]), REACH**2)
    np.minimum.at(least, who, distance)
    closest = (distance == least[who]) & (distance < REACH**2)
    winner = np.full(len(place[0]), len(place[0]))
    np.minimum.at(winner, who[closest], candidate[closest])
    return winner


def _neighbours(element: np.ndarray, steps: list, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Elements one of `steps` (x, y) away that are on the grid, and which of `element` [K] each is a neighbour of."""
    dx, dy = np.array(steps).T[..., None]
    x, y = element % shape[1] + dx, element // shape[1] + dy
    on_grid = _inside((x, y), shape)
    return (y * shape[1] + x)[on_grid], np.nonzero(on_grid)[1]


def _inside(points: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Whether points (x and y) are inside the grid; NaN and infinity are not."""
    (x, y), (height, width) = points, shape
    return (x >= 0) & (x < width) & (y >= 0) & (y < height)


def _element(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Row-major index of the element under each point [2, M]; meaningful for points inside the frame."""
    x, y = points.astype(np.int64)
    return y * shape[1] + x


def _group(members: np.ndarray, keys: np.ndarray) -> Groups:
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.diff(sorted_keys, prepend=-1))
    return Groups(members[order], starts, sorted_keys[starts])
