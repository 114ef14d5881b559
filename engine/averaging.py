"""An exponential moving average of a network's weights."""

import copy

from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """A copy of a model, which follows it: average ← decay · average + (1 - decay) · weights, from the weights at hand on.

    Batch normalisation's statistics are averaged with the weights that they belong to. It takes torch's update, but not
    torch's AveragedModel, which copies its counter to the GPU in every step, and has the host wait for that.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """decay: in [0, 1)."""
        self.model = copy.deepcopy(model)
        """The averaged network."""
        self._weights, self._averages = _floating(model), _floating(self.model)
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """To be called after every step, on every rank."""
        self._update(self._averages, self._weights, None)


def _floating(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers but batch normalisation's counters, which nothing depends on."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
