"""Mixup and CutMix: each image of a pass is mixed with the one before it, the first with the last.

The images and targets are those of torchvision.transforms.v2.MixUp and CutMix, which draw from torch's generator. Here a draw
is a function of the seed and of the number of the pass's first sample, so it is the same after a resume; and nothing waits for
the device. On another number of ranks, or in passes of another size, images are mixed otherwise.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from pipeline.plan.random_numbers import PURPOSE_MIXING, uniforms


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """mixup (Zhang et al. 2018, arXiv 1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899), or one of them for each pass."""

    mixup: float
    """α of Beta(α, α), of which the share of an image itself is drawn, one for the pass. 0: no mixup."""
    cutmix: float
    """The same of CutMix. If both are above 0, each pass has one of the two, with probability ½."""
    seed: int

    def __call__(self, images: Tensor, first_sample: int) -> tuple[Tensor, float]:
        """The images of a pass mixed, and the share of an image's own label in its target; the rest is the label before it.

        images: [n, channels, height, width], which stay as they are: they are the loader's. first_sample: the number of the
        first one in the training. Returns images of the same type and memory format.
        """
        place = np.zeros(1, dtype=np.int64), np.array([first_sample])
        u_kind, u_share, u_y, u_x = uniforms(self.seed, *place, PURPOSE_MIXING)[:, 0].tolist()
        is_cutmix = self.cutmix > 0 and (self.mixup == 0 or u_kind >= 0.5)
        alpha = self.cutmix if is_cutmix else self.mixup
        own_share = float(betaincinv(alpha, alpha, u_share))  # the inverse of the distribution function
        if not is_cutmix:
            mixed = torch.empty_like(images)
            # Not images.roll(1, 0), which on a GPU copies to another memory format.
            for own, other, out in _pairs(images, mixed):
                torch.lerp(other, own, own_share, out=out)
            return mixed, own_share
        height, width = images.shape[2:]
        rows, columns = _span(u_y, height, own_share), _span(u_x, width, own_share)
        mixed = images.clone()
        for _, other, out in _pairs(images, mixed):
            out[:, :, rows, columns] = other[:, :, rows, columns]
        return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def _pairs(images: Tensor, mixed: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """The images, those before them, and where they are mixed: in two parts, since the first one comes after the last."""
    return (images[1:], images[:-1], mixed[1:]), (images[:1], images[-1:], mixed[:1])


def _span(u: float, side: int, own_share: float) -> slice:
    """Of CutMix's rectangle: its centre is anywhere in the image, its area 1 - own_share of it before it is cut at the border."""
    centre, half = int(u * side), int(0.5 * math.sqrt(1 - own_share) * side)
    return slice(max(0, centre - half), min(side, centre + half))
