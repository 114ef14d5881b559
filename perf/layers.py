"""How long each layer takes, measured within whole passes of the network, to stand beside its floor."""

from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.precision import Precision
from perf.costs import kind_of
from perf.laps import Laps
from pipeline.dali.loader import Batch

_WARM_UP_PASSES = 2  # the search for kernels, and the memory that later passes use again
_SECONDS = 2.0  # at most, but for one pass of each kind
_MOST_PASSES = 20
_LOSS = "loss"


def layer_seconds(network: nn.Module, batch: Batch, *, precision: Precision, device: torch.device) -> dict[str, float]:
    """Mean seconds of each layer, forward and backward of one pass together, by the module's name as in perf/costs.py.

    A layer is what the floors count as one: from its input to the input of the next layer, with its bias, its conversions to
    half precision, and the ReLU and dropout that follow it; backward the other way round, with adding up its gradients. So the
    layers' times and the loss' add up to the pass. It is not compiled: a compiled pass needs less for ReLU and bias.

    Moments are events on the GPU's stream, read after the last pass, or on a CPU readings of the clock; the passes before the
    first that counts are the warm-up. batch: on the device, as large as a pass. The network is left with other running
    statistics than before and without gradients. Empty where such a pass does not fit into the GPU's memory.
    """
    images, labels = batch
    laps, order = Laps(device), list[str]()

    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            laps.mark(name)
            if inputs[0].requires_grad:  # the images do not
                previous = order[-1]
                inputs[0].register_hook(lambda gradient: laps.mark(previous))
            order.append(name)

        return hook

    def run() -> None:
        order.clear()
        network.zero_grad(set_to_none=True)
        laps.begin()
        with precision.autocast():
            logits = network(images)
            laps.mark(_LOSS)
            logits.register_hook(lambda gradient: laps.mark(order[-1]))
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        laps.end_lap()
        laps.pause()

    handles = [
        module.register_forward_pre_hook(before(name)) for name, module in network.named_modules() if kind_of(module)
    ]
    network.train()
    try:
        for _ in range(_WARM_UP_PASSES):
            began = perf_counter()
            run()
            laps.take(wait=True)
            pace = perf_counter() - began
            if pace > _SECONDS:
                break
        for _ in range(min(_MOST_PASSES, max(1, int(_SECONDS / pace)))):
            run()
        taken = laps.take(wait=True)
    except torch.OutOfMemoryError:
        return {}
    finally:
        for handle in handles:
            handle.remove()
        network.zero_grad(set_to_none=True)
    return {name: sum(lap[name] for lap in taken) / len(taken) for name in order}
