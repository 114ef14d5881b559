"""An exponential moving average of a network's weights."""

import copy

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """A copy of a model, which follows it: average ← d · average + (1 - d) · weights, with d = min(decay, (1 + t) / (10 + t))
    after t steps of the training, so that the initial weights are soon forgotten.

    Batch normalisation's statistics are averaged with the weights that they belong to. It takes torch's update, but not
    torch's AveragedModel, which copies its counter to the GPU in every step, and has the host wait for that.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """decay: in [0, 1)."""
        self.model = copy.deepcopy(model)
        """The averaged network."""
        self.steps = 0
        """Steps of the training so far, which a resumed run has from its checkpoint."""
        self._decay = decay
        self._weights, self._averages = _floating(model), _floating(self.model)

    def update(self) -> None:
        """To be called after every step, on every rank."""
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        get_ema_multi_avg_fn(decay)(self._averages, self._weights, None)
        self.steps += 1


def _floating(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers but batch normalisation's counters, which nothing depends on."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
