"""Draw curves with intervals, without a plotting library."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from synthetic.measuring.intervals import Estimate

PANEL, MARGIN = (420, 280), 46  # width and height of a panel; room around its axes, pixels
LINE, BAND = "black", "lightgray"


def draw_curves(
    label: str, places: Sequence[float], panels: Sequence[tuple[str, Sequence[Estimate]]], columns: int = 2
) -> np.ndarray:
    """Panels of means with their intervals against `places`: uint8 [H, W, 3].

    label: of the horizontal axis. panels: title and one estimate per place; places without one are left out.
    """
    order = np.argsort(places)
    pictures = [
        _panel(f"{title} against {label}", [(places[i], found[i]) for i in order if found[i].count])
        for title, found in panels
    ]
    blank = np.full_like(pictures[0], 255)
    pictures += [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows)


def _panel(title: str, points: Sequence[tuple[float, Estimate]]) -> np.ndarray:
    (width, height), image = PANEL, Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 12), _ascii(title), fill="black")
    draw.rectangle((MARGIN, MARGIN, width - MARGIN, height - MARGIN), outline="gray")
    if not points:
        return np.asarray(image)
    left, right = points[0][0], points[-1][0]
    low, high = _padded(min(e.low for _, e in points), max(e.high for _, e in points))

    def at(place: float, value: float) -> tuple[float, float]:
        x = MARGIN + 12 + (width - 2 * MARGIN - 24) * (place - left) / max(right - left, 1e-12)
        return x, height - MARGIN - (height - 2 * MARGIN) * (value - low) / (high - low)

    band = [at(p, e.low) for p, e in points] + [at(p, e.high) for p, e in reversed(points)]
    if len(points) > 1:
        draw.polygon(band, fill=BAND)
        draw.line([at(p, e.mean) for p, e in points], fill=LINE, width=2)
    for place, found in points:
        x, y = at(place, found.mean)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=LINE)
        draw.line((x, height - MARGIN, x, height - MARGIN + 4), fill="gray")
        draw.text((x, height - MARGIN + 6), f"{place:g}", fill="black", anchor="ma")
    for value in (low, (low + high) / 2, high):
        draw.text((MARGIN - 5, at(left, value)[1]), f"{value:.3g}", fill="black", anchor="rm")
    return np.asarray(image)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range a little wider than [low, high], never empty."""
    room = 0.08 * (high - low) or max(abs(low), 1.0) * 0.05
    return (low - room, high + room) if math.isfinite(room) else (0.0, 1.0)


def _ascii(text: str) -> str:
    """Replace arrows by words: the default font has none."""
    for arrow, word in (("↑", "(higher is better)"), ("↓", "(lower is better)"), ("→1", "(1 is best)")):
        text = text.replace(arrow, word)
    return text
