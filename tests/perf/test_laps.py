"""Where the marks fall, on a real step whose parts were made slow, and on a GPU's clock that is made up."""

import itertools
import time

import pytest
import torch
from torch import nn

from engine.precision import Precision
from engine.training.step import TrainStep
from perf.laps import Laps, MarkedBatches, MarkedPrecision

CPU = torch.device("cpu")
WAIT, FORWARD, BACKWARD, OPTIMIZER = 0.04, 0.08, 0.12, 0.16


class SlowNetwork(nn.Linear):
    def forward(self, x):
        time.sleep(FORWARD)
        y = super().forward(x)
        y.register_hook(lambda gradient: time.sleep(BACKWARD))
        return y


class SlowOptimizer(torch.optim.SGD):
    def step(self, *arguments, **keywords):
        time.sleep(OPTIMIZER)
        return super().step(*arguments, **keywords)


def slow_batches():
    while True:
        time.sleep(WAIT)
        yield torch.randn(2, 3), torch.tensor([0, 1])


def make_step(laps: Laps, passes: int, name: str = "fp32"):
    network = SlowNetwork(3, 2)
    precision = MarkedPrecision(name, "cpu", laps)
    step = TrainStep(
        network,
        optimizer=SlowOptimizer(network.parameters(), lr=0.1),
        scaler=precision.grad_scaler(),
        precision=precision,
        passes=passes,
    )
    batches = MarkedBatches(slow_batches(), laps)
    return network, lambda: step(batches)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.seconds
def test_each_part_gets_its_own_time(passes):
    laps = Laps(CPU)
    _, step = make_step(laps, passes)
    step()
    laps.begin()
    for _ in range(3):
        step()
        laps.end_lap()
    taken = laps.take()
    assert len(taken) == 3
    for lap in taken:
        assert set(lap) == {"rest", "data_wait", "forward", "backward", "optimizer"}
        for part, planted in (
            ("data_wait", passes * WAIT),
            ("forward", passes * FORWARD),
            ("backward", passes * BACKWARD),
            ("optimizer", OPTIMIZER),
            ("rest", 0),
        ):
            assert planted <= lap[part], part
            # The least of them: in a single lap, other work of the machine may come between.
            assert min(lap[part] for lap in taken) < planted + 0.06 * passes, part
    assert laps.take() == []


def test_what_is_outside_of_laps_is_not_counted():
    laps = Laps(CPU)
    _, step = make_step(laps, 1)
    step()
    laps.begin()
    laps.pause()
    step()
    assert laps.take(wait=True) == []


def test_a_stall_between_two_laps_belongs_to_the_second():
    laps = Laps(CPU)
    laps.begin()
    laps.end_lap()
    time.sleep(0.05)
    laps.end_lap()
    first, second = (sum(lap.values()) for lap in laps.take())
    assert first < 0.05 <= second


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_marking_changes_nothing_of_the_step(name):
    """The same weights after the same steps, loss scaling included."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    weights = []
    for precision in (Precision(name, "cpu"), MarkedPrecision(name, "cpu", Laps(CPU))):
        torch.manual_seed(1)
        network = nn.Linear(3, 2)
        scaler = precision.grad_scaler()
        assert scaler.is_enabled() == (name == "fp16")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        step = TrainStep(network, optimizer=optimizer, scaler=scaler, precision=precision, passes=1)
        for _ in range(3):
            step(itertools.repeat((images, labels)))
        weights.append(network.weight.detach().clone())
    assert torch.equal(*weights)


class FakeEvent:
    """A device that reaches a moment when it is told to."""

    recorded = 0
    reached = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.moment = FakeEvent.recorded

    def query(self) -> bool:
        return self.moment <= FakeEvent.reached

    def synchronize(self) -> None:
        FakeEvent.reached = max(FakeEvent.reached, self.moment)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.query(), "an event that was not reached yet cannot be read"
        return 1000.0 * (end.moment - self.moment)


def test_on_a_gpu_events_are_read_when_the_device_has_passed_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "recorded", 0)
    monkeypatch.setattr(FakeEvent, "reached", 0)
    laps = Laps(torch.device("cuda", 0))
    laps.begin()
    for _ in range(3):
        laps.mark("forward")
        laps.mark("backward")
        laps.end_lap()
    assert laps.take() == [], "nothing is waited for"
    FakeEvent.reached = 6  # one of the second lap is still to come
    assert laps.take() == [{"rest": 1.0, "forward": 1.0, "backward": 1.0}]
    assert len(laps.take(wait=True)) == 2


def test_precision_is_still_the_one_that_was_chosen():
    plain = Precision("bf16", "cpu")
    marked = MarkedPrecision(plain.name, plain.device_type, Laps(CPU))
    assert (marked.half_images, marked.name) == (plain.half_images, plain.name)
