"""The paper's augmentation as everyone writes it with torchvision; what this project's own is measured against."""

from collections.abc import Sequence

import torch
from torchvision.transforms import v2

Matrix = Sequence[Sequence[float]]
COLOUR_SHIFT_SIGMA = 0.1  # section 3.1 of the paper, after AlexNet


class ColourShift(torch.nn.Module):
    """AlexNet's colour shift as the transform that everyone writes for it: one vector added to a [3, height, width] image."""

    def __init__(self, shift_of_alpha: Matrix) -> None:
        """shift_of_alpha: [3, 3], the eigenvectors times their eigenvalues, in 0–255 pixels."""
        super().__init__()
        self._shift_of_alpha = torch.tensor(shift_of_alpha)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + (self._shift_of_alpha @ (torch.randn(3) * COLOUR_SHIFT_SIGMA))[:, None, None]


def training_transform(
    scale: tuple[int, int], crop: int, mean_rgb: Sequence[float], colour_shift: Matrix
) -> v2.Compose:
    """A PIL image, or a uint8 tensor [3, h, w], → float32 [3, crop, crop] (section 3.1): rescaled, cropped, flipped, shifted.

    scale: lowest and highest S in pixels, drawn per image. mean_rgb: subtracted, in 0–255. colour_shift: ColourShift's matrix.
    Draws from torch's generator.
    """
    lowest, highest = scale
    return v2.Compose(
        [
            v2.Resize(lowest) if lowest == highest else v2.RandomShortestSize(list(range(lowest, highest + 1))),
            v2.RandomCrop(crop),
            v2.RandomHorizontalFlip(),
            *_less_the_mean(mean_rgb),
            ColourShift(colour_shift),
        ]
    )


def validation_transform(scale: int, crop: int, mean_rgb: Sequence[float]) -> v2.Compose:
    """The same without anything random: rescaled to `scale`, the centre crop, the mean subtracted."""
    return v2.Compose([v2.Resize(scale), v2.CenterCrop(crop), *_less_the_mean(mean_rgb)])


def _less_the_mean(mean_rgb: Sequence[float]) -> list[torch.nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32), v2.Normalize(mean=list(mean_rgb), std=[1.0] * 3)]
