"""SGD over what is trained of a network: each parameter at its rate and with its decay; and its momenta in checkpoints.

A checkpoint has the momenta by their parameters' places in the network, as if all were in one group. So a run goes on with other
groups than it had, and with files from before there were any.
"""

from typing import Any

import torch
from torch import nn

from engine.config import Config
from model.vgg import LAST


def sgd(model: nn.Module, config: Config) -> torch.optim.SGD:
    """An optimizer of the parameters that have gradients, with momenta of zero.

    Beside torch's entries, its groups have lr_factor, which the schedule's rate is to be multiplied by, and waits: whether the
    group is left alone while --head-epochs trains the last layer.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_last = name.startswith(f"{LAST}.")
            is_vector = weight.ndim == 1  # a bias, or what batch normalisation multiplies by
            decays = config.weight_decay_on == "all" or not is_vector
            settings = (
                config.head_lr_factor if is_last else 1.0,
                config.weight_decay if decays else 0.0,
                config.head_epochs > 0 and not is_last,
            )
            groups.setdefault(settings, []).append(weight)
    optimizer = torch.optim.SGD(
        [
            {"params": weights, "lr": config.lr * factor, "weight_decay": decay, "lr_factor": factor, "waits": waits}
            for (factor, decay, waits), weights in groups.items()
        ],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum:
        # torch's fused SGD takes its first velocities from memory that nobody has written to, and leaves them so where the
        # scaler skips that step for a gradient that is not finite: usual in fp16. From zeros, the update is the same.
        for group in optimizer.param_groups:
            for weight in group["params"]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """For a checkpoint: the state dict of such an optimizer of all the model's parameters in one group. What is not trained has
    no state."""
    parameters = list(model.parameters())
    state = {place: optimizer.state[weight] for place, weight in enumerate(parameters) if weight in optimizer.state}
    return {"state": state, "param_groups": [{**optimizer.defaults, "params": list(range(len(parameters)))}]}


def load_momenta(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> None:
    """Give what is trained the momenta that it has in a state_of(); without one there, it keeps its own."""
    for place, weight in enumerate(model.parameters()):
        momentum = (state["state"].get(place) or {}).get("momentum_buffer")
        if momentum is not None and weight in optimizer.state:
            optimizer.state[weight]["momentum_buffer"].copy_(momentum)
