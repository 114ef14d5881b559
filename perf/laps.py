"""Seconds of the parts of a step, lap by lap, by the device's own clock.

On a GPU a moment is an event on torch's stream: the device writes it down when it gets there, and the host never waits for
it. On a CPU it is a reading of the clock. Each lap begins where the one before it ended, so that the laps add up to all of
the time: a stall between two of them belongs to the second.
"""

import collections
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from engine.precision import Precision
from pipeline.dali.loader import Batch

DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER = "data_wait", "forward", "backward", "optimizer"
_REST = "rest"

Moment = Any
"""float seconds, or torch.cuda.Event."""
Lap = dict[str, float]
"""Seconds of each part."""


class Laps:
    """Collects marks within laps; what is marked outside of them is dropped."""

    def __init__(self, device: torch.device) -> None:
        """device: whose clock counts."""
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Moment]] | None = None
        self._unread: collections.deque[list[tuple[str, Moment]]] = collections.deque()

    def begin(self) -> None:
        """The first lap begins: with what the device is given to do from here on."""
        self._marks = [(_REST, self._now())]

    def end_lap(self) -> None:
        """A lap ends, and the next one begins at the same moment."""
        assert self._marks
        now = self._now()
        self._unread.append([*self._marks, (_REST, now)])
        self._marks = [(_REST, now)]

    def pause(self) -> None:
        """What comes now is in no lap, until the next begin()."""
        self._marks = None

    def mark(self, part: str) -> None:
        """What the device is given to do from here on belongs to this part."""
        if self._marks is not None:
            self._marks.append((part, self._now()))

    def take(self, *, wait: bool = False) -> list[Lap]:
        """The laps since the last call that the device has come to the end of; wait: all laps."""
        taken = []
        while self._unread and (wait or not self._on_gpu or self._unread[0][-1][1].query()):
            taken.append(self._read(self._unread.popleft()))
        return taken

    def _now(self) -> Moment:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, marks: list[tuple[str, Moment]]) -> Lap:
        if self._on_gpu:
            marks[-1][1].synchronize()
        lap: Lap = collections.defaultdict(float)
        for (part, begin), (_, end) in itertools.pairwise(marks):
            lap[part] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        return dict(lap)


class MarkedBatches:
    """An iterator of batches that marks when the step asks for one, and when it has it."""

    def __init__(self, batches: Iterator[Batch], laps: Laps) -> None:
        self._batches, self._laps = batches, laps

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._laps.mark(DATA_WAIT)
        batch = next(self._batches)
        self._laps.mark(FORWARD)
        return batch


class _MarkingScaler(torch.amp.GradScaler):
    """The step hands its loss to the scaler when forward is over, and its optimizer when backward is over."""

    def __init__(self, laps: Laps, device_type: str, *, enabled: bool) -> None:
        super().__init__(device_type, enabled=enabled)
        self._laps = laps

    def scale(self, outputs):
        scaled = super().scale(outputs)
        self._laps.mark(BACKWARD)
        return scaled

    def step(self, optimizer, *args, **kwargs):
        self._laps.mark(OPTIMIZER)
        return super().step(optimizer, *args, **kwargs)


@dataclass(frozen=True)
class MarkedPrecision(Precision):
    """A precision whose scaler marks the parts of the training step, which knows nothing of it."""

    laps: Laps

    def grad_scaler(self) -> torch.amp.GradScaler:
        return _MarkingScaler(self.laps, self.device_type, enabled=super().grad_scaler().is_enabled())
