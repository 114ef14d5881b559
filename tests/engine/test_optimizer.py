"""What is trained of a network, at which rate and with which decay; and what a checkpoint keeps of it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from engine.config import Config
from engine.precision import Precision
from engine.training.assembly import assemble, network_of
from engine.training.optimizer import load_momenta, sgd, state_of
from tests.engine.test_accuracy import RANKS
from tests.engine.test_step import make_batch

CPU = torch.device("cpu")
LR, MOMENTUM, DECAY = 0.01, 0.9, 0.05
FROZEN = ("features.0.", "features.1.", "features.4.", "features.5.")
"""The convolutions and batch normalisations of A's first two blocks, in torchvision's numbering."""


def config_of(**flags) -> Config:
    common = {"arch": "A", "data": "synthetic", "crop": 32, "train_scale": "32", "batch_size": 4, "dropout": 0.0}
    return Config(**{**common, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "weights": "given", **flags})


def decayed(name: str) -> bool:
    """Whether --weight-decay-on weights is on it: convolutions' and fully-connected layers' weights, by A's numbers."""
    convolutions = (
        "features.0",
        "features.4",
        "features.8",
        "features.11",
        "features.15",
        "features.18",
        "features.22",
    )
    layer, _, what = name.rpartition(".")
    return what == "weight" and (layer in (*convolutions, "features.25") or layer.startswith("classifier"))


@pytest.mark.parametrize(
    ("flags", "steps_of_the_head"),
    [
        ({"freeze": "block2", "head_lr_factor": 10.0, "weight_decay_on": "weights"}, 0),
        ({"freeze": "block2", "head_epochs": 1.0, "weight_decay_on": "weights"}, 1),
        ({"head_epochs": 1.0, "head_lr_factor": 0.1}, 1),
        ({"weight_decay_on": "weights", "momentum": 0.0}, 0),
    ],
    ids=["frozen, head faster", "frozen, head first", "head first", "decay of weights"],
)
@pytest.mark.seconds
def test_steps_are_the_update_of_each_parameter_by_itself(flags, steps_of_the_head):
    """v ← momentum·v + (gradient + decay·w); w ← w − rate·v, by hand on a copy, all in float64 but for the loss."""
    config = config_of(batch_norm=True, **flags)
    model = network_of(config, classes=10, device=CPU).double()
    exact = copy.deepcopy(model)
    exact.keep_statistics(0)  # what is kept is said below, layer by layer
    for weight in exact.parameters():
        weight.requires_grad_(True)
    parts = assemble(config, ranks=RANKS, precision=Precision("fp32", "cpu"), micro_batch=4, model=model)
    waiting = [weight for group in parts.optimizer.param_groups if group["waits"] for weight in group["params"]]
    velocities = {name: torch.zeros_like(weight) for name, weight in exact.named_parameters()}
    images, labels = make_batch(4)
    for step in range(3):
        head_alone = step < steps_of_the_head
        parts.step.left_alone = waiting if head_alone else ()
        model.keep_statistics(5 if head_alone else config.frozen_blocks)
        parts.step(iter([(images.double(), labels)]))

        frozen = FROZEN if config.freeze == "block2" else ()
        exact.train()
        for name, layer in exact.named_modules():
            if isinstance(layer, torch.nn.BatchNorm2d) and (head_alone or f"{name}." in frozen):
                layer.eval()
        loss = F.cross_entropy(exact(images.double()).float(), labels)
        gradients = torch.autograd.grad(loss, list(exact.parameters()))
        with torch.no_grad():
            for (name, weight), gradient in zip(exact.named_parameters(), gradients, strict=True):
                is_last = name.startswith("classifier.6.")
                if name.startswith(frozen) or (head_alone and not is_last):
                    continue
                decay = DECAY if config.weight_decay_on == "all" or decayed(name) else 0.0
                velocities[name].mul_(config.momentum).add_(gradient + decay * weight)
                weight.sub_(LR * (config.head_lr_factor if is_last else 1.0) * velocities[name])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, exact.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_papers_training_has_one_group():
    model = network_of(config_of(weights=None), classes=10, device=CPU)
    (group,) = sgd(model, config_of(weights=None)).param_groups
    assert group["params"] == list(model.parameters())
    assert (group["lr"], group["weight_decay"], group["lr_factor"], group["waits"]) == (LR, DECAY, 1.0, False)


def numbered(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, float]:
    """Makes each momentum a number of its own; returns them by their parameters' names."""
    numbers = {}
    for number, (name, weight) in enumerate(model.named_parameters(), 1):
        if weight in optimizer.state:
            optimizer.state[weight]["momentum_buffer"].fill_(number)
            numbers[name] = float(number)
    return numbers


def momenta(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, float]:
    return {
        name: optimizer.state[weight]["momentum_buffer"].mean().item()
        for name, weight in model.named_parameters()
        if weight in optimizer.state
    }


GROUPED = {"freeze": "block2", "head_lr_factor": 10.0, "weight_decay_on": "weights", "head_epochs": 1.0}


@pytest.mark.parametrize(("before", "after"), [({}, GROUPED), (GROUPED, {}), (GROUPED, GROUPED)])
def test_momenta_go_to_their_parameters_however_these_are_grouped(before, after):
    """What was frozen begins at zero."""
    first, second = (network_of(config_of(**flags), classes=10, device=CPU) for flags in (before, after))
    saved, loaded = (sgd(model, config_of(**flags)) for model, flags in ((first, before), (second, after)))
    numbers = numbered(saved, first)
    load_momenta(loaded, second, state_of(saved, first))
    trained = [name for name, weight in second.named_parameters() if weight.requires_grad]
    assert momenta(loaded, second) == {name: numbers.get(name, 0.0) for name in trained}
    assert ("features.0.weight" in trained) == (after == {})


def test_a_checkpoint_from_before_there_were_groups():
    """Torch's own state dict of an optimizer with one group; and one of a training without momentum."""
    model, config = network_of(config_of(), classes=10, device=CPU), config_of(**GROUPED)
    plain = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for weight in model.parameters():
        plain.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    numbers = numbered(plain, model)
    target = network_of(config, classes=10, device=CPU)
    optimizer = sgd(target, config)
    load_momenta(optimizer, target, plain.state_dict())
    found = momenta(optimizer, target)
    assert found == {name: numbers[name] for name in found}
    assert state_of(optimizer, target)["param_groups"][0].keys() == plain.state_dict()["param_groups"][0].keys()
    load_momenta(optimizer, target, {"state": {0: None, 20: {"momentum_buffer": None}}})
    assert momenta(optimizer, target) == found
