"""The paper's ways of testing (section 3.2): what of an image a network is shown, and how its answers are averaged.

Each protocol is a row of PROTOCOLS: whole images or centre crops, the dense network or the plain one, and the views of an
image whose answers are averaged.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 5
"""Crops along each side of the image: 5×5 crops and their mirror images, 50 in all."""


def whole_image(images: Tensor, crop: int) -> list[Tensor]:
    """One view: the images as they are."""
    return [images]


def grid_crops(images: Tensor, crop: int) -> list[Tensor]:
    """The 25 crops of a regular 5×5 grid, row by row, each a view of [n, 3, crop, crop] into images [n, 3, height, width]."""
    height, width = images.shape[-2:]
    corners = itertools.product(grid_corners(height, crop), grid_corners(width, crop))
    return [images[:, :, y : y + crop, x : x + crop] for y, x in corners]


def grid_corners(length: int, crop: int) -> list[int]:
    """First pixels of the grid's crops along a side of `length` pixels, at least `crop`.

    The first crop begins with the side, the last one ends with it, and the others divide what lies between in four equal
    parts, i·(length − crop)/4 rounded, halves to the even pixel. So the middle one is torchvision's centre crop, and the
    validation's.
    """
    return [round(i * (length - crop) / (GRID - 1)) for i in range(GRID)]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way of testing a network."""

    whole: bool
    """Whether images come whole, rescaled to a shorter side of Q pixels, or as their centre crops."""
    dense: bool
    """Whether the network runs densely (model.dense), or is the plain one, which takes crops."""
    flip: bool
    """Whether the paper averages over each view and its mirror image."""
    views: Callable[[Tensor, int], list[Tensor]]
    """images [n, 3, height, width], crop → the views, each [n, 3, …]."""


PROTOCOLS = {
    "center": Protocol(whole=False, dense=False, flip=False, views=whole_image),
    "dense": Protocol(whole=True, dense=True, flip=True, views=whole_image),
    "multicrop": Protocol(whole=True, dense=False, flip=True, views=grid_crops),
}


def parts_of(name: str) -> list[str]:
    """The protocols that a protocol's posteriors are the mean of: "multicrop+dense" is both."""
    return name.split("+")


@torch.no_grad()
def mean_over_views(compute: Callable[[Tensor], Tensor], views: list[Tensor], *, flip: bool, pixels: int) -> Tensor:
    """The mean of what `compute` gives for each view, and with `flip` for its horizontal mirror image too.

    compute: [m, 3, height, width] → [m, values]. views: [n, 3, height, width] each. pixels: of views that are computed
    together, at most, unless a single one has more. Returns float32 [n, values].
    """
    images, _, height, width = views[0].shape
    all_views = itertools.chain(views, (view.flip(3) for view in views) if flip else ())
    total: Tensor | float = 0.0
    for together in _groups(all_views, max(1, pixels // (images * height * width))):
        batch = torch.cat(together) if len(together) > 1 else together[0]
        answers = compute(batch.contiguous(memory_format=torch.channels_last))
        total = total + answers.float().unflatten(0, (len(together), images)).sum(dim=0)
    assert isinstance(total, Tensor)
    return total / (len(views) * (1 + flip))


def _groups(views: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    while group := list(itertools.islice(views, size)):
        yield group
