"""What the pictures of a report have in common: size, colours, a row of labels without overlap, the bytes of a PNG.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind people tell apart. The width is such
that a phone, which shows it at half its size, leaves the text readable.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from common.process import visible
from engine.monitoring.pictures import without_warnings

WIDTH_INCHES = 7.0
_DOTS_PER_INCH = 160
_TITLE_POINTS = 11.5
_TITLE_LETTERS = 65

BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, VERMILION, PURPLE, BLACK = "#E69F00", "#D55E00", "#CC79A7", "#000000"
GREY, PALE = "#767676", "#E9E9E9"
DEVICE_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY)


def new_figure(height_inches: float, title: str) -> Figure:
    """An empty figure that lays itself out. Not one of pyplot's: nothing has to be closed, no display is looked for."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    lines = [textwrap.fill(visible(line), _TITLE_LETTERS, max_lines=2, placeholder=" …") for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=_TITLE_POINTS, x=0.01, ha="left", parse_math=False)
    return figure


@without_warnings()
def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
    return file.getvalue()


def lanes(axes: Axes, labels: Sequence[str]) -> None:
    """One horizontal lane for each label, from top to bottom; lane i is at y = i."""
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def row_above(
    axes: Axes,
    texts: Sequence[str],
    points: Sequence[tuple[float, float]],
    *,
    height: float,
    distance: float,
    **look: Any,
) -> None:
    """A row of texts above the axes, which have their limits already, with a line from each to its point of the data.

    points: x ascends. height of the row and least distance of its texts: in fractions of the axes. look: as Text takes it.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [to_axes.transform(point)[0] for point in points]
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "relpos": (0.5, 0), "shrinkB": 3}
    look |= {"ha": "center", "va": "bottom", "parse_math": False, "arrowprops": line, "textcoords": "axes fraction"}
    places = spread_out(wanted, distance, distance / 2, 1 - distance / 2)
    for text, point, place in zip(texts, points, places, strict=True):
        axes.annotate(text, point, (place, height), **look)


def spread_out(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Positions at least `distance` apart, between low and high, as near as possible (in squares) to the wanted ones.

    The wanted ones ascend. Where they do not all fit, the last ones leave `high`.
    """
    steps = distance * np.arange(len(wanted))
    offsets = isotonic_regression(np.asarray(wanted) - steps).x if len(wanted) else steps
    return (np.maximum(low, np.minimum(offsets, high - steps[-1:])) + steps).tolist()
