"""Networks that tell how they were asked."""

import torch
from torch import Tensor, nn


class Noting(nn.Linear):
    """[n, 4] → [n, 5]; notes in which format it computes."""

    def __init__(self) -> None:
        super().__init__(4, 5)
        self.dtypes: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        self.dtypes.append(logits.dtype)
        return logits
