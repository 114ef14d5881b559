"""Which images of a batch DALI cannot decode. Its own message names a file only sometimes, and its pipeline is then lost."""

import os
from collections.abc import Iterator

from pipeline.graphs import image_pipeline
from pipeline.plan import Samples


def is_about_an_image(error: RuntimeError) -> bool:
    """Whether DALI failed in reading or decoding files, and not for a fault in the program."""
    return "fn.io.file.read" in str(error) or "fn.decoders" in str(error)


def cause_of(error: RuntimeError) -> str:
    """What happened, in one line out of DALI's dozen: the one after "encountered:"."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines()]
    return next(filter(None, lines), str(error)).rstrip(" :")


def undecodable(samples: Samples, crop: int) -> dict[int, str]:
    """Try the samples one by one on the CPU. Returns the indices of those that fail, with DALI's reason."""
    failed: dict[int, str] = {}
    first, count = 0, len(samples.labels)
    while first < count:
        for index, reason in _try_until_one_fails(samples, crop, range(first, count)):
            if reason:
                failed[index] = reason
            first = index + 1
    return failed


def _try_until_one_fails(samples: Samples, crop: int, indices: range) -> Iterator[tuple[int, str]]:
    """Yield each index with the reason for which its sample fails, "" where it does not; the first failure is the last."""
    one_by_one = (samples.take(slice(index, index + 1)).inputs() for index in indices)
    pipeline = image_pipeline(
        lambda: next(one_by_one),
        batch_size=1,
        crop=crop,
        device_id=None,
        decoder="cpu",
        half=False,
        threads=1,
        prefetch=1,
    )
    for index in indices:
        try:
            pipeline.run()
        except RuntimeError as error:
            if not is_about_an_image(error):
                raise
            yield index, cause_of(error)
            return  # the pipeline is of no use any more
        yield index, ""


def path_of(samples: Samples, index: int) -> str:
    """The path of a sample's file."""
    return os.path.normpath(os.fsdecode(samples.source[index].tobytes()))
