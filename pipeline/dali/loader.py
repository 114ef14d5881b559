"""Loaders: iterators of (images, labels) on the training device, as long as the plan's.

images: [n, 3, crop, crop], channels_last, float32 or float16: 0–255 grey levels, less the mean, divided by the std; with a
fourth channel, of zeros, where that is asked for. Whole images are [n, 3, height, width], otherwise the same.
labels: int64 [n]; PADDING_LABEL where a validation batch is filled up, LOST_LABEL for an image that cannot be decoded.
"""

import collections
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from common.errors import DataSourceError, TrainingError
from common.progress import say
from pipeline.dali.graph import GraphOptions, first_of, graph_inputs, image_pipeline
from pipeline.dali.recovery import cause_of, is_about_an_image, is_about_reading, undecodable
from pipeline.plan.samples import Samples
from pipeline.shards.reader import Fetch, fetched

Batch = tuple[torch.Tensor, torch.Tensor]

_ATTEMPTS = 5  # at a batch of which a file could not be read, though each can by itself


class DaliLoader:
    """Runs a plan's batches through the DALI graph; DALI reads, decodes and prefetches in its own threads.

    When DALI fails on an image, the loader finds it, has the plan do without it, and goes on at the same batch. When the
    storage fails, no image is lost: the loader waits for it, for a minute, and then raises DataSourceError.
    """

    def __init__(
        self,
        batches_after: Callable[[int], Iterator[Samples]],
        options: GraphOptions,
        *,
        lose: Callable[[Samples, np.ndarray, list[str]], None],
        batch_size: int,
        fetch: Fetch | None = None,
    ) -> None:
        """batches_after: the plan's batches less the first so many, each of `batch_size` samples, or at most so many.

        lose: called with samples that cannot be decoded, whether nothing of their files can be (bool [n]), and the reasons;
        the plan must show others from then on. It may raise to end the run. fetch: adds the images' bytes to batches; None
        where the table is one of files, which DALI reads itself.
        """
        self._batches_after, self._lose, self._fetch = batches_after, lose, fetch
        self._options, self._batch_size = options, batch_size
        self._undecodable = functools.partial(
            undecodable, crop=options.crop, fetch=fetch, whole=options.decoder != "cpu"
        )
        self.delivered: Samples | None = None
        """What the last batch shows; None before the first."""
        self.share = 1.0
        """With decoder "split", the CPU's share of each batch that DALI is given from now on, in [0, 1]. As many batches as it
        prepares in advance have the share from before."""
        self._batches_delivered = self._attempts = 0
        self._start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        images, labels = self._run()
        self._batches_delivered += 1
        self._attempts = 0
        self.delivered = self._in_flight.popleft()
        # NHWC memory permuted to NCHW is what torch calls channels_last: no copy.
        return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())

    def _run(self) -> tuple:
        """DALI's outputs for the next batch, which is the first in flight."""
        while True:
            try:
                if (device := self._options.device_id) is not None:
                    # Given torch's stream, DALI orders its outputs on it: nobody waits on the host, and the memory goes
                    # back to DALI's pool only after the work that torch has queued by then.
                    return self._pipeline.run(torch.cuda.current_stream(device))
                return self._pipeline.run()
            except RuntimeError as error:
                if not is_about_an_image(error):
                    raise
                self._do_without_what_fails(error)
                self._start()

    def _start(self) -> None:
        """Start DALI at the first batch that was not delivered yet."""
        batches = fetched(self._batches_after(self._batches_delivered), self._fetch)
        self._in_flight: collections.deque[Samples] = collections.deque()

        def next_inputs() -> tuple:
            samples, encoded = next(batches)
            self._in_flight.append(samples)
            inputs = graph_inputs(samples, encoded, from_files=self._fetch is None)
            if self._options.decoder == "split":
                return *inputs, first_of(len(samples.labels), self.share)
            return inputs

        self._pipeline = image_pipeline(
            next_inputs, self._options, from_files=self._fetch is None, batch_size=self._batch_size
        )

    def _do_without_what_fails(self, error: RuntimeError) -> None:
        found = False
        for samples in self._in_flight:  # the one that failed is among those that DALI has been given
            reasons = self._undecodable(samples)
            if reasons:
                found = True
                failed = samples.take(list(reasons))
                dead = np.zeros(len(reasons), dtype=bool)
                dead[list(self._undecodable(failed.first_pixels()))] = True
                self._lose(failed, dead, list(reasons.values()))
        if found:
            return
        self._attempts += 1
        if is_about_reading(error) and self._attempts < _ATTEMPTS:
            say(f"warning: a file could not be read ({cause_of(error)}), and now can; going on")
        elif is_about_reading(error):
            raise DataSourceError(
                f"files cannot be read in batches ({cause_of(error)}), though each can by itself; "
                "if too many files are open, raise ulimit -n, or lower --threads"
            ) from error
        else:
            cure = "--decoder cpu" if self._options.decoder != "cpu" else "--threads 1"
            raise TrainingError(
                f"DALI failed on a batch ({cause_of(error)}), though each image of it can be decoded on the CPU; try {cure}"
            ) from error


class SyntheticLoader:
    """One batch of noise that stays on the device, yielded for ever: what the network could do with an infinitely fast loader."""

    def __init__(
        self,
        *,
        batch_size: int,
        crop: int,
        classes: int,
        device: torch.device,
        half: bool,
        pad_channels: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float16 if half else torch.float32
        # In grey levels, about as in photographs.
        images = torch.randn(batch_size, 3, crop, crop, generator=generator) * 64.0
        if pad_channels:
            images = F.pad(images, (0, 0, 0, 0, 0, 1))
        self._batch = (
            images.to(device, dtype, memory_format=torch.channels_last),
            torch.randint(classes, (batch_size,), generator=generator).to(device),
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._batch
