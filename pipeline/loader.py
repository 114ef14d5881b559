"""Loaders: endless iterators of (images, labels) on the training device.

images: [n, 3, crop, crop], channels_last, float32 or float16, mean subtracted, otherwise in units of 0–255 grey levels.
labels: int64 [n]; PADDING_LABEL where a validation batch is filled up.
"""

from collections.abc import Iterator

import torch

from common.errors import TrainingError
from pipeline.graphs import image_pipeline
from pipeline.plan import Samples

Batch = tuple[torch.Tensor, torch.Tensor]


class DaliLoader:
    """Runs a plan's batches through the DALI graph; DALI reads, decodes and prefetches in its own threads."""

    def __init__(
        self,
        batches: Iterator[Samples],
        *,
        batch_size: int,
        crop: int,
        device: torch.device,
        decoder: str,
        half: bool,
        threads: int,
        prefetch: int,
    ) -> None:
        """batches: endless, each of `batch_size` samples. The other arguments as in image_pipeline."""
        self._device = device
        self._pipeline = image_pipeline(
            lambda: tuple(next(batches)),
            batch_size=batch_size,
            crop=crop,
            device_id=device.index if device.type == "cuda" else None,
            decoder=decoder,
            half=half,
            threads=threads,
            prefetch=prefetch,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            if self._device.type == "cuda":
                # Given torch's stream, DALI orders its outputs on it: nobody waits on the host, and the memory goes
                # back to DALI's pool only after the work that torch has queued by then.
                images, labels = self._pipeline.run(torch.cuda.current_stream(self._device))
            else:
                images, labels = self._pipeline.run()
        except RuntimeError as error:
            if "fn.io.file.read" in str(error) or "fn.decoders" in str(error):
                raise TrainingError(_explain(error)) from error
            raise
        # NHWC memory permuted to NCHW is what torch calls channels_last: no copy.
        return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())


class SyntheticLoader:
    """One batch of noise that stays on the device, yielded for ever: what the network could do with an infinitely fast loader."""

    def __init__(
        self, *, batch_size: int, crop: int, classes: int, device: torch.device, half: bool, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.float16 if half else torch.float32
        images = (
            torch.randn(batch_size, 3, crop, crop, generator=generator) * 64.0
        )  # grey levels, about as in photographs
        self._batch = (
            images.to(device, dtype, memory_format=torch.channels_last),
            torch.randint(classes, (batch_size,), generator=generator).to(device),
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._batch


def _explain(error: RuntimeError) -> str:
    """DALI's message is a dozen lines; the one after "encountered:" tells what happened."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines()]
    cause = next(filter(None, lines), str(error)).rstrip(" :")
    return (
        f"DALI could not read or decode a batch ({cause}); if files changed since the scan, "
        "run: python -m pipeline.manifest DATA --rescan"
    )
