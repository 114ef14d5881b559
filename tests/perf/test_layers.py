"""Measured layers add up to the pass that they are of, and a layer that is slow on purpose is the one that is found slow."""

import time

import pytest
import torch
import torch.nn.functional as F

from engine.precision import Precision
from model.vgg import build
from perf import layers as layers_module
from perf.costs import layer_costs
from perf.layers import layer_seconds

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")


def network_and_batch(arch: str, *, crop: int, batch: int, batch_norm: bool = False):
    network = build(arch, classes=10, crop=crop, dropout=0.5, init="xavier", device=CPU, batch_norm=batch_norm)
    images = torch.randn(batch, 3, crop, crop).to(memory_format=torch.channels_last)
    return network, (images, torch.zeros(batch, dtype=torch.int64))


@pytest.mark.parametrize(("arch", "batch_norm"), [("A-LRN", False), ("B", True)])
@pytest.mark.seconds
def test_layers_are_those_of_the_floor(arch, batch_norm):
    network, batch = network_and_batch(arch, crop=32, batch=2, batch_norm=batch_norm)
    measured = layer_seconds(network, batch, precision=FP32, device=CPU)
    costs = layer_costs(arch, classes=10, crop=32, batch=2, bytes_per_value=4, batch_norm=batch_norm)
    assert list(measured) == [layer.name for layer in costs]
    assert min(measured.values()) > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    monkeypatch.setattr(layers_module, "_SECONDS", 0.5)


@pytest.fixture
def one_thread(monkeypatch):
    """The clock is the processor time of this process, which computes in one thread: other programs' work hardly lengthens it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("perf.laps.perf_counter", time.process_time)
    yield
    torch.set_num_threads(threads)


@pytest.mark.seconds
def test_layers_add_up_to_a_pass(one_thread):
    """Convolutions and FC7 both count here. The shortest of a few, in turns: memory is shared with other programs."""
    network, (images, labels) = network_and_batch("A", crop=32, batch=2)
    sums, wholes = [], []
    for _ in range(3):
        sums.append(sum(layer_seconds(network, (images, labels), precision=FP32, device=CPU).values()))
        for _ in range(3):
            network.zero_grad(set_to_none=True)
            began = time.process_time()
            F.cross_entropy(network(images), labels).backward()
            wholes.append(time.process_time() - began)
    assert min(sums) > 0.75 * min(wholes)
    assert min(wholes) < 1.25 * min(sums)


def compute(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


class Slow(torch.autograd.Function):
    """The identity, for which forward and backward take their time."""

    @staticmethod
    def forward(ctx, x):
        compute(0.2)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        compute(0.4)
        return gradient


@pytest.mark.parametrize("name", ["features.0", "features.8", "features.9", "classifier.6"])
@pytest.mark.seconds
def test_a_slow_layer_shows(one_thread, monkeypatch, name):
    """The first one, one in the middle, a pooling, and the last one."""
    network, batch = network_and_batch("A", crop=32, batch=1)
    module = network.get_submodule(name)
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda x: Slow.apply(forward(x)))
    measured = layer_seconds(network, batch, precision=FP32, device=CPU)
    assert measured.pop(name) > 0.6
    assert max(measured.values()) < 0.2, "neither the layer before nor the one after"


def test_half_precision():
    network, batch = network_and_batch("A", crop=32, batch=1)
    measured = layer_seconds(network, batch, precision=Precision("bf16", "cpu"), device=CPU)
    assert min(measured.values()) > 0


def test_what_does_not_fit_is_not_measured(monkeypatch):
    network, batch = network_and_batch("A", crop=32, batch=1)

    def full(x):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(network.classifier, "forward", full)
    assert layer_seconds(network, batch, precision=FP32, device=CPU) == {}
    assert not any(module._forward_pre_hooks for module in network.modules())
