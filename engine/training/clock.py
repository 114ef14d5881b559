"""Where a run's time goes: training apart from start-up (compilation included), evaluation and checkpoints."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.dali.loader import Batch


class Clock:
    """Training time in laps. A lap ends where the device was just synchronised, so that its steps are really done."""

    def __init__(self) -> None:
        self.training_seconds = 0.0
        self.training_steps = 0
        self.evaluation_seconds = 0.0
        self.checkpoint_seconds = 0.0
        self._lap_started = time.perf_counter()
        self.startup_seconds = 0.0

    def start(self, steps_done: int) -> None:
        """The training begins; what the process did before was start-up: imports, the data set's scan, the model, compilation."""
        self._lap_started = time.perf_counter()
        self.startup_seconds = process_seconds()
        self._lap_first_step = self._first_step = steps_done

    def lap(self, steps_done: int) -> tuple[int, float]:
        """End a lap. Returns its steps and its seconds, pauses left out."""
        now = time.perf_counter()
        steps, seconds = steps_done - self._lap_first_step, now - self._lap_started
        self._lap_first_step, self._lap_started = steps_done, now
        self.training_steps += steps
        self.training_seconds += seconds
        return steps, seconds

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Time spent inside is evaluation, not training."""
        started = time.perf_counter()
        yield
        self.evaluation_seconds += self._shift_lap(started)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time spent inside is for checkpoints, not training."""
        started = time.perf_counter()
        yield
        self.checkpoint_seconds += self._shift_lap(started)

    def _shift_lap(self, pause_started: float) -> float:
        pause = time.perf_counter() - pause_started
        self._lap_started += pause
        return pause


def process_seconds() -> float:
    """Seconds since this process was started, to a hundredth."""
    # Ticks since the machine's start: proc(5).
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")


class TimedBatches:
    """An iterator of batches that adds up how long the training waited for them.

    On a CPU that is the time that next() took. On a GPU the host runs ahead, so that its time hides the wait: there it is what
    passes on the GPU between the end of the work before and the batch's being there.
    """

    def __init__(
        self, batches: Iterator[Batch], *, images_to_keep: int = 0, make_event: Callable[[], Any] | None = None
    ) -> None:
        """images_to_keep: of the first batch, for take_images(). make_event: of CUDA, with timing; None on a CPU."""
        self._batches = batches
        self._seconds = 0.0
        self._images_to_keep = images_to_keep
        self._images: Tensor | None = None
        self._make_event = make_event
        self._seconds_taken = 0.0
        self._waits: list[tuple[Any, Any]] = []
        self._unused: list[tuple[Any, Any]] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._make_event:
            before, after = self._unused.pop() if self._unused else (self._make_event(), self._make_event())
            before.record()
            batch = next(self._batches)  # has the stream wait for the images
            after.record()
            self._waits.append((before, after))
        else:
            started = time.perf_counter()
            batch = next(self._batches)
            self._seconds += time.perf_counter() - started
        if self._images_to_keep:  # a copy on the device, so that the loader's buffer is free again: nobody waits for it
            self._images, self._images_to_keep = batch[0][: self._images_to_keep].clone(), 0
        return batch

    def take_images(self) -> Tensor | None:
        """The first images of the first batch, once: a copy on the device."""
        images, self._images = self._images, None
        return images

    def wait_seconds(self) -> float:
        """Seconds since the beginning. To be called where the device was just synchronised: its events are read here."""
        self._seconds += sum(before.elapsed_time(after) for before, after in self._waits) / 1e3
        self._unused += self._waits
        self._waits = []
        return self._seconds

    def take_wait_seconds(self) -> float:
        """Seconds since the last call of this. Otherwise as wait_seconds()."""
        before, self._seconds_taken = self._seconds_taken, self.wait_seconds()
        return self._seconds_taken - before


def timing_events(device: torch.device) -> Callable[[], Any] | None:
    """What makes the events of TimedBatches; None on a CPU."""
    return functools.partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else None
