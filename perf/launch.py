"""What the host needs to give the device one step: Python, autograd and the framework's dispatch."""

import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from engine.assembly import Assembly
from engine.precision import Precision
from engine.step import TrainStep
from model.vgg import VGG
from perf.stages import Bench
from pipeline.loader import SyntheticLoader

_STEPS = 5


def host_seconds(bench: Bench, assembly: Assembly, step: Callable[[], object]) -> float | None:
    """Median seconds of the host for one step; None where it cannot be told from the device's. Every rank must call this.

    On a GPU, of steps that are each given to an idle device. On a CPU, where host and device are one, of the same step on
    tensors without data; that is an upper bound, since torch works out the shapes of some of them in Python. Compiled code
    cannot be run so.
    """
    device = bench.ranks.device
    if device.type == "cpu":
        if assembly.compiled:
            return None
        step = _step_without_data(bench)
    seconds = []
    for _ in range(_STEPS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = perf_counter()
        step()
        seconds.append(perf_counter() - began)
    return statistics.median(seconds)


def _step_without_data(bench: Bench) -> Callable[[], object]:
    config, meta, precision = bench.config, torch.device("meta"), Precision("fp32", "cpu")
    classes = len(bench.data.classes)
    with meta:
        model = VGG(
            config.arch,
            classes=classes,
            crop=config.crop,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
        )
    step = TrainStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, foreach=True),
        scaler=precision.grad_scaler(),
        precision=precision,
        passes=bench.passes,
    )
    batches = SyntheticLoader(
        batch_size=bench.data.micro_batch, crop=config.crop, classes=classes, device=meta, half=False
    )
    step(batches)  # makes the optimizer's state
    return lambda: step(batches)
