"""Where a run's time goes: training apart from start-up (compilation included), evaluation and checkpoints."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pipeline.loader import Batch


class Clock:
    """Training time in laps. A lap ends where the device was just synchronised, so that its steps are really done."""

    def __init__(self) -> None:
        self.training_seconds = 0.0
        self.training_steps = 0
        self.evaluation_seconds = 0.0
        self.checkpoint_seconds = 0.0
        self._created = self._lap_started = time.perf_counter()
        self.startup_seconds = 0.0

    def start(self, steps_done: int) -> None:
        """The training begins; what went before was start-up."""
        self._lap_started = time.perf_counter()
        self.startup_seconds = self._lap_started - self._created
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


class TimedBatches:
    """An iterator of batches that adds up how long next() took: the time that the host waited for images."""

    def __init__(self, batches: Iterator[Batch], *, images_to_keep: int = 0) -> None:
        """images_to_keep: of the first batch, for take_images()."""
        self._batches = batches
        self._seconds = 0.0
        self._images_to_keep = images_to_keep
        self._images: Tensor | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
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

    def take_wait_seconds(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
