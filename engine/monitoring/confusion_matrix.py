"""Which classes a network takes for which, as a picture."""

from collections.abc import Sequence

import numpy as np

from common.progress import printable
from engine.monitoring.pictures import without_warnings

MOST_CLASSES = 50
"""Of more, the matrix cannot be read as a picture."""
_MOST_WITH_NUMBERS = 20
_LETTERS = 16


@without_warnings()
def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """counts: int64 [classes, classes], images of each class (row) that were taken for each class (column).

    Colours are shares of the row. Returns uint8 [height, width, 3].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: a start does not wait for it
    from matplotlib.figure import Figure

    side = 2.5 + 0.42 * min(len(classes), 24)
    figure = Figure(figsize=(side + 0.8, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = [printable(name) for name in classes]
    names = [name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…" for name in shown]
    size = 9 if len(classes) <= 24 else 6
    turned = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(range(len(names)), names, rotation=turned, fontsize=size, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_title(f"{np.trace(counts):,} of {counts.sum():,} right", fontsize=11)
    if len(classes) <= _MOST_WITH_NUMBERS:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
