"""PLANT=… [torchrun …] planted.py FLAGS: profile/throughput.py on a machine with a bottleneck of the test's choice."""

import itertools
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from engine.training.step import TrainStep
from pipeline.shards.storage import FolderStorage

IMAGES_PER_SECOND = 8.0  # less than a step on one thread trains
STALLING, OF, STALL_SECONDS = 8, 40, 0.1


def slow_disk() -> None:
    """Each image takes 0.1 s longer."""
    read = FolderStorage.read

    def slowly(self, name, offsets, targets) -> set[int]:
        time.sleep(0.1 * len(offsets))
        return read(self, name, offsets, targets)

    FolderStorage.read = slowly  # type: ignore[method-assign]


def limited(images_per_second: float = IMAGES_PER_SECOND):
    """A read of FolderStorage that gives so many images a second to all threads together: each waits for its turn."""
    read, lock, free = FolderStorage.read, threading.Lock(), 0.0

    def in_turn(self, name, offsets, targets) -> set[int]:
        nonlocal free
        with lock:
            free = max(free, time.perf_counter()) + len(offsets) / images_per_second
            own = free
        beyond = read(self, name, offsets, targets)
        time.sleep(max(0.0, own - time.perf_counter()))
        return beyond

    return in_turn


def limited_storage() -> None:
    FolderStorage.read = limited()  # type: ignore[method-assign]


def stalling_steps() -> None:
    """8 of 40 steps stall."""
    step, numbers = TrainStep.__call__, itertools.count()

    def stalling(self, batches, **keywords):
        if next(numbers) % OF < STALLING:
            time.sleep(STALL_SECONDS)
        return step(self, batches, **keywords)

    TrainStep.__call__ = stalling  # type: ignore[method-assign]


def slow_host() -> None:
    """The host needs 20 ms more for each layer."""
    torch.nn.modules.module.register_module_forward_hook(lambda *_: time.sleep(0.02))


def nothing() -> None:
    """The flags are bottleneck enough."""


if __name__ == "__main__":
    from perf import throughput

    plants = (slow_disk, limited_storage, stalling_steps, slow_host, nothing)
    {plant.__name__: plant for plant in plants}[os.environ["PLANT"]]()
    sys.exit(throughput.main())
