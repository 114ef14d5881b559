"""Which images of a batch DALI cannot decode. Its own message names a file only sometimes, and its pipeline is then lost."""

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Iterator, Sequence

from nvidia.dali import Pipeline

from common import patience
from common.files import is_storage_trouble
from common.patience import StorageTrouble, patiently, unreadable
from pipeline.dali.graph import DamagedImage, GraphOptions, graph_inputs, image_pipeline
from pipeline.plan.samples import Samples
from pipeline.shards.raw import Pixels
from pipeline.shards.reader import Fetch, fetched

_ATTEMPTS = 3  # at an image whose file could not be read, and now can
_BLOCK_BYTES = 1 << 20


def is_about_reading(error: RuntimeError) -> bool:
    """Whether reading an image failed, before DALI looked at what is in it."""
    return isinstance(error, DamagedImage) or "fn.io.file.read" in str(error)


def is_about_an_image(error: RuntimeError) -> bool:
    """Whether DALI failed in reading or decoding files, and not for a fault in the program."""
    return is_about_reading(error) or any(operator in str(error) for operator in ("fn.decoders", "fn.peek_image_shape"))


def cause_of(error: RuntimeError) -> str:
    """What happened, in one line out of DALI's dozen: the one after "encountered:"."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines()]
    cause = next(filter(None, lines), str(error)).rstrip(" :")
    if cause.startswith(("Failed to decode sample", "nvImageCodec failure")):
        return "corrupt image data"  # DALI's word is a number that nobody outside can read
    return cause


def undecodable(samples: Samples, crop: int | None, fetch: Fetch | None, *, whole: bool = False) -> dict[int, str]:
    """Try the samples one by one on the CPU. Returns the indices of those that fail, with DALI's reason.

    whole: decode the whole images, and not only the windows. Raises DataSourceError: see each_alone.
    """
    one_by_one = (samples.take(slice(index, index + 1)) for index in range(len(samples.labels)))
    alone, reasons = [], {}
    for index, (one, encoded) in enumerate(fetched(one_by_one, fetch)):
        if not isinstance(encoded, Pixels):
            alone.append(graph_inputs(one, encoded, from_files=fetch is None))
        elif encoded.damaged:
            reasons[index] = encoded.damaged[0]
    make_pipeline = functools.partial(
        image_pipeline,
        options=GraphOptions(crop=crop, prefetch=1),
        from_files=fetch is None,
        batch_size=1,
        whole=whole,
    )
    results = each_alone(alone, make_pipeline, from_files=fetch is None)
    return reasons | {index: reason for index, (_, reason) in enumerate(results) if reason}


def each_alone(
    inputs: Sequence[tuple], make_pipeline: Callable[[Callable[[], tuple]], Pipeline], *, from_files: bool
) -> Iterator[tuple[tuple | None, str]]:
    """Run inputs, each of one sample, through a DALI pipeline of batch size 1, and through a new one after each failure.

    make_pipeline: builds a pipeline over a source. from_files: the inputs begin with the path of a file, uint8 [1, W].
    Yields each sample's outputs and "", or None and why DALI failed. Raises DataSourceError where it failed because the
    storage of the files fails, and does so for a minute: whether the image is good is not known then.
    """
    done = attempts = 0
    while done < len(inputs):
        pipeline, reason = _pipeline_over(inputs[done:], make_pipeline), ""
        while done < len(inputs) and not reason:
            try:
                outputs = pipeline.run()
            except RuntimeError as error:
                if not is_about_an_image(error):
                    raise
                outputs, reason = None, cause_of(error)  # the pipeline is of no use any more
                attempts += 1
                if from_files and attempts < _ATTEMPTS:
                    path = os.path.normpath(os.fsdecode(inputs[done][0].tobytes()))  # a table pads paths with "/"
                    if had_to_wait_for(path) or (is_about_reading(error) and attempts == 1):
                        continue  # the file can be read: once more
            attempts = 0
            done += 1
            yield outputs, reason


def had_to_wait_for(path: str) -> bool:
    """Whether the storage of a file failed, and it can be read, or fails for itself, only now. Raises DataSourceError."""
    troubles: list[StorageTrouble] = []

    def attempt() -> None:
        if trouble := _trouble_with(path):
            troubles.append(trouble)
            raise trouble

    try:
        patiently(path, patience.PATIENCE_SECONDS, attempt)
    except StorageTrouble as trouble:
        raise unreadable(path, trouble) from trouble
    return bool(troubles)


def _trouble_with(path: str) -> StorageTrouble | None:
    """Why a file cannot be read, if not for itself: a disk or a network that fails, the folder of all images gone."""
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0 or not stat.S_ISREG(status.st_mode):
                return None  # a device that never ends or a file of /proc has taken the image's place
            while file.read(_BLOCK_BYTES):
                pass
    except OSError as error:
        if os.path.exists(path) and not os.path.isfile(path):
            return None  # a socket, say
        if is_storage_trouble(error) or not _fails_alone(path):
            return StorageTrouble(error.strerror or str(error), may_pass=True)
    return None


def _fails_alone(path: str) -> bool:
    """Whether a file is gone or shut by itself or with its class, as somebody removes them, and not with the disk of many.

    An unmounted disk takes the folder above the class with it or, where it was mounted lower, leaves an empty folder. A link
    that leads to it stays, without what it leads to.
    """
    folder = os.path.dirname(path)
    above = os.path.dirname(folder)
    if not os.path.lexists(folder):
        folder = above
    elif os.path.islink(path):
        folder = os.path.dirname(os.path.realpath(path))
    if not all(os.access(needed, os.X_OK) for needed in (above, folder)):
        return False
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:  # it may be entered, but not listed
        return any(True for _ in entries)
    return True


def _pipeline_over(inputs: Sequence[tuple], make_pipeline: Callable[[Callable[[], tuple]], Pipeline]) -> Pipeline:
    remaining = iter(inputs)
    return make_pipeline(lambda: next(remaining))
