"""Network inputs as pictures that people can look at, and what all pictures here have in common."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor


def as_pictures(images: Tensor, mean_rgb: Sequence[float], std_rgb: Sequence[float]) -> np.ndarray:
    """Images as a loader gives them ([n, 3 or 4, height, width], on any device) → uint8 [n, height, width, 3].

    They are multiplied by the std, and the mean (0–255) is added again; a colour shift stays, as the network sees it. Waits for
    the device.
    """
    pixels = images[:, :3].float().cpu().permute(0, 2, 3, 1).numpy() * np.asarray(std_rgb, dtype=np.float32)
    pixels += np.asarray(mean_rgb, dtype=np.float32)
    return pixels.round().clip(0, 255).astype(np.uint8)


def grid(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures (uint8 [n, height, width, 3]) side by side, two pixels of white between them; empty places are white."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * (height + 2), index % columns * (width + 2)
        sheet[y : y + height, x : x + width] = picture
    return sheet


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Around drawing, also as a decorator: what matplotlib warns of can be seen in the picture, and not in lines of its source
    between those of a training. A letter that its font lacks is a box; zeros have no place on a logarithmic axis.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
