"""--decoder split: which share of each batch the CPU's decoder gets, the GPU's having the rest. Found in the training, then kept.

The training loop tries a few shares, each for a few steps, until it does not wait for batches any more, or until what it has
measured says which share is the fastest.
"""

import math
from collections.abc import Callable, Iterator
from time import perf_counter

import numpy as np
import torch

from common.ranks import gather, on_rank_0
from engine.data import TrainingData
from engine.training.clock import TimedBatches, timing_events
from pipeline.dali.loader import Batch, DaliLoader

_GRID = np.linspace(0.0, 1.0, 65)
"""The shares to choose from: finer than a twentieth, which would cost a twentieth of the rate."""
_MOST_SHARES = 6
_NOISE = 0.04
"""Of a measured time: what differs by less is equal."""
_LEAST_WAIT = 0.02
"""Of the time; with less, no other share could make the training much faster."""
_WARM_UP_STEPS = 10  # of the whole training: kernels are chosen, files are not in the page cache yet
_MEASURED_STEPS = 9
_STEPS_A_BATCH_LASTS = 20  # that lies ready, where the loader is slower than the training by a twentieth


class ShareSearch:
    """Finds the share with which a training is the fastest, from how long it takes with a few.

    While the training waits for batches, the time of an image is the longer one of two: that of the CPU's decoder, which grows
    with the share, and that of the GPU's, which falls. Both are taken to be linear. Where they meet is tried, until they meet
    where it was tried before. Hill climbing would compare shares that differ little, which takes long: batches that lie ready
    hide for twenty steps that a decoder is a tenth too slow.
    """

    def __init__(self, start: float) -> None:
        self.share = start
        """What is to be tried now; once it is found, the best one."""
        self.found = False
        self._seconds: dict[float, float] = {}  # of an image, with each share

    def measured(self, images: int, seconds: float, *, waits: bool) -> None:
        """So long it took to train on so many images with `share`. Not to be called once the share is found.

        waits: whether the training had to wait for them; if not, this share is taken.
        """
        self._seconds[self.share] = seconds / images
        if not waits:
            self.found = True
        elif ends := [end for end in (1.0, 0.0) if end not in self._seconds]:
            self.share = ends[0]
        else:
            self.share = self._where_lines_meet()
            self.found = self.share in self._seconds or len(self._seconds) == _MOST_SHARES

    def _where_lines_meet(self) -> float:
        """By the lines that fit best; of those that fit equally well, by those that promise most: a trial of them will tell."""
        shares = np.array(sorted(self._seconds))
        seconds = np.array([self._seconds[share] for share in shares])
        fits = []
        for cut in range(1, len(shares)):  # with so many shares, the GPU's decoder is the slower one
            by_gpu, by_cpu = _by_gpu(shares[:cut], seconds[:cut]), _through_zero(shares[cut:], seconds[cut:])
            error = _error(np.maximum(by_gpu(shares), by_cpu(shares)), seconds)
            expected = np.maximum(by_gpu(_GRID), by_cpu(_GRID))
            fits.append((max(error, _NOISE**2), expected.min(), float(_GRID[expected.argmin()])))
        return min(fits)[2]


def _through_zero(shares: np.ndarray, seconds: np.ndarray, *, zero_at: float = 0.0) -> np.poly1d:
    """The line of a decoder that takes no time for no images."""
    ratios = (shares - zero_at) / seconds
    return np.poly1d(ratios.sum() / (ratios @ ratios) * np.array([1.0, -zero_at]))


def _by_gpu(shares: np.ndarray, seconds: np.ndarray) -> np.poly1d:
    """That of the GPU's: it may have to wait for the step, which then is what it takes for no images."""
    line = _through_zero(shares, seconds, zero_at=1.0)
    if _error(line(shares), seconds) > _NOISE**2:
        falling = np.poly1d(np.polyfit(shares, seconds, 1, w=1 / seconds))
        if falling(0) >= falling(1) >= 0:
            return falling
    return line


def _error(expected: np.ndarray, seconds: np.ndarray) -> float:
    """The mean square, of the seconds."""
    return float(np.mean((expected / seconds - 1) ** 2))


class DecoderShare:
    """Measures in the training loop what a search asks for, and sets the loader's share.

    All ranks have the same share: they wait for each other in every step, so that each measures the rate of all, and if each
    sought its own, none could tell what it changed itself from what the others did. They begin with rank 0's, since another
    machine may have more cores for each rank, or fewer, and compare what they have measured ten times or so in a training.
    """

    def __init__(self, loader: DaliLoader, timed: TimedBatches, data: TrainingData, *, is_found: bool = False) -> None:
        """loader: of the training on `data`, which takes its batches from `timed`.

        is_found: the loader's share stays as it is; else the search begins with it.
        """
        self._loader, self._timed, self._ranks, self._images = loader, timed, data.ranks, data.config.batch_size
        passes = self._images // data.ranks.world_size // data.micro_batch
        self._steps_ahead = math.ceil(data.loading.prefetch / passes)
        self._steps = -max(_WARM_UP_STEPS, self._settling_steps)  # of those that are measured
        self._stock = self._most_stock
        self._began = 0.0, 0.0
        self.found: float | None = loader.share if is_found else None
        """The share that stays; None as long as batches may come that were made with another, as a resumed run would not have."""
        if not is_found:
            self._search = ShareSearch(on_rank_0(data.ranks, lambda: loader.share))
            loader.share = self._search.share

    @property
    def share(self) -> float:
        """Of the batches that are prepared now."""
        return self._loader.share

    @property
    def _settling_steps(self) -> int:
        """Those whose batches were made with the share before, and as many again, which begin with what these have left."""
        return 2 * self._steps_ahead + 1

    @property
    def _most_stock(self) -> int:
        """Steps in which batches that lay ready can hide that the loader is too slow."""
        return _STEPS_A_BATCH_LASTS * self._steps_ahead

    def after_step(self) -> None:
        """To be called after every step, on every rank. Until the share is found, the host waits for the device now and then."""
        if self.found is not None:
            return
        self._steps += 1
        self._stock -= 1
        if self._steps == 0 and self._search.found:
            self.found = self._search.share
        elif self._steps == 0:
            self._began = self._now()
        elif self._steps == _MEASURED_STEPS:
            self._end_window()

    def _end_window(self) -> None:
        (began, waited_before), (now, waited) = self._began, self._now()
        everyone = gather((now - began, waited - waited_before), self._ranks)
        seconds = everyone[0][0]  # rank 0's, to be the same everywhere
        waits = max(waited for _, waited in everyone) > _LEAST_WAIT * seconds
        if not waits and self._stock > 0:
            self._steps, self._began = 0, self._now()
            return
        self._search.measured(_MEASURED_STEPS * self._images, seconds, waits=waits)
        self._loader.share = self._search.share
        self._steps, self._stock = -self._settling_steps, self._most_stock

    def after_pause(self) -> None:
        """To be called where the training has paused, on every rank: meanwhile, batches were made ready."""
        self._steps, self._stock = min(self._steps, -self._settling_steps), self._most_stock

    def _now(self) -> tuple[float, float]:
        """The time, and how much of it the training has waited, in seconds."""
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return perf_counter(), self._timed.wait_seconds()


def find_share(
    loader: DaliLoader, data: TrainingData, make_step: Callable[[Iterator[Batch]], Callable[[], object]]
) -> float:
    """The share that a training would find, which the loader has from then on; every rank must call this.

    make_step: gives a step of the training loop that takes its batches from an iterator.
    """
    timed = TimedBatches(loader, make_event=timing_events(data.ranks.device))
    share, step = DecoderShare(loader, timed, data), make_step(timed)
    while share.found is None:
        step()
        share.after_step()
    return share.found
