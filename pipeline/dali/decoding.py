"""Whole images out of a table, each decoded with training's own decoder: to check that it can be, or to prepare it anew."""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from nvidia.dali import Pipeline, fn, math, types
from nvidia.dali.data_node import DataNode

from pipeline.dali.graph import read_files
from pipeline.dali.recovery import each_alone, is_about_an_image
from pipeline.dataset.table import FileTable, Table
from pipeline.shards.reader import ShardReader, fetched
from pipeline.shards.shard_table import ShardTable

_ROWS_A_BLOCK = 4096  # read out of the table in one go
# Decoded and resized together: 100 MB. DALI holds a few batches; a larger image has one of its own.
_PIXELS_A_BATCH = 1 << 25
_IMAGES_A_THREAD = 4  # in a batch, so that threads seldom wait for the one with the largest image
_LEAST_IMAGES = 32  # in a batch, so that its fixed costs are small
_PREFETCH = 2
_BYTES_AHEAD = 256 << 20  # of decoded images that wait for a function

T = TypeVar("T")


class _Batch(NamedTuple):
    source: np.ndarray
    """[n, …]: where the images' bytes lie, as the kind of table has it."""
    sizes: np.ndarray
    """int64 [n, 2]: as in the table."""
    windows: np.ndarray
    """int64 [n, 2, 2]: where what is decoded of each begins, and its size."""
    targets: np.ndarray
    """int64 [n, 2]: after the resize."""

    @property
    def start(self) -> np.ndarray:
        return self.windows[:, 0]

    @property
    def shape(self) -> np.ndarray:
        return self.windows[:, 1]


_FetchedBatch = tuple[_Batch, Any]
"""As Fetched in pipeline/shards/reader.py has it: all of a table are of one kind."""


def decode_whole(
    table: FileTable | ShardTable,
    rows: np.ndarray,
    *,
    windows: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
    threads: int,
) -> Iterator[tuple[np.ndarray | None, str]]:
    """Decode the whole images of these rows (int64 [n]), in order, as training does on the CPU.

    windows: int64 [n, 2, 2], the part of each that is decoded, by its first pixel and its size; None: all of it. For most
    formats the decoder holds the whole image meanwhile, but gives out no second copy. sizes: int64 [n, 2], what each is resized
    to, with training's filter; None leaves them as they are. An image that has its size already comes through bit-identically.
    threads: of the decoder; the result does not depend on them. Images that are kept as pixels have nothing to decode.
    Yields (uint8 [height, width, 3], "") or (None, why it cannot be decoded). The arrays are the caller's to keep. Raises
    DataSourceError where the storage of files or shards fails, for a minute.
    """
    fetch = None if isinstance(table, FileTable) else ShardReader(table, threads=None, batches_ahead=_PREFETCH).fetch
    images_a_batch = max(_LEAST_IMAGES, _IMAGES_A_THREAD * threads)
    make_pipeline = functools.partial(_pipeline, from_files=isinstance(table, FileTable), resized=sizes is not None)
    waiting: Iterator[_FetchedBatch] = fetched(_batches(table, rows, windows, sizes, images_a_batch), fetch)
    if isinstance(table, ShardTable) and table.is_raw:
        yield from _read_whole(waiting, resized=sizes is not None, batch_size=images_a_batch, threads=threads)
        return
    in_flight: deque[_FetchedBatch] = deque()
    given_back: deque[_FetchedBatch] = deque()

    def next_inputs() -> tuple:
        in_flight.append(given_back.popleft() if given_back else next(waiting))
        return _inputs(*in_flight[-1], resized=sizes is not None)

    while True:
        pipeline = make_pipeline(next_inputs, batch_size=images_a_batch, threads=threads, prefetch=_PREFETCH)
        try:
            while True:
                outputs = pipeline.run()
                yield from _results(outputs, in_flight.popleft()[0].sizes)
        except StopIteration:
            return
        except RuntimeError as error:
            if not is_about_an_image(error):
                raise
        # The first batch that was not delivered image by image; those behind it go through a new pipeline.
        yield from _one_by_one(*in_flight[0], make_pipeline, from_files=fetch is None, resized=sizes is not None)
        given_back.extendleft(list(in_flight)[:0:-1])
        in_flight.clear()


def each_in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[np.ndarray], tuple[T | None, str]],
    decoded: Iterable[tuple[np.ndarray | None, str]],
    *,
    ahead: int,
) -> Iterator[tuple[T | None, str]]:
    """What a function makes of each decoded image, or why that cannot be decoded, in order.

    The function runs in the pool's threads, on at most `ahead` images at a time, and on less where they are large.
    """
    waiting: deque[tuple[Future | None, str, int]] = deque()
    bytes_ahead = 0
    for image, reason in decoded:
        size = 0 if image is None else image.nbytes
        waiting.append((None if image is None else pool.submit(function, image), reason, size))
        del image  # the function has it, and lets go of it when it is done
        bytes_ahead += size
        while len(waiting) > ahead or (bytes_ahead > _BYTES_AHEAD and waiting):
            future, reason, size = waiting.popleft()
            bytes_ahead -= size
            yield future.result() if future else (None, reason)
    for future, reason, _ in waiting:
        yield future.result() if future else (None, reason)


def _read_whole(
    waiting: Iterator[_FetchedBatch], *, resized: bool, batch_size: int, threads: int
) -> Iterator[tuple[np.ndarray | None, str]]:
    """The same of images that are kept as pixels: what has been read is resized at most."""
    in_flight: deque[dict[int, str]] = deque()

    def next_inputs() -> tuple:
        batch, pixels = next(waiting)
        in_flight.append(pixels.damaged)
        return pixels.windows, batch.targets.astype(np.float32)

    pipeline = _empty_pipeline(batch_size=batch_size, threads=threads, prefetch=_PREFETCH)
    with pipeline:
        images, targets = fn.external_source(next_inputs, num_outputs=2, batch=True, dtype=[types.UINT8, types.FLOAT])
        pipeline.set_outputs(_resized(fn.reshape(images, layout="HWC"), targets))

    def batches() -> Iterator[Sequence[np.ndarray]]:
        with contextlib.suppress(StopIteration):
            while True:
                if resized:
                    (images,) = pipeline.run()
                    yield [images.at(index) for index in range(len(images))]
                else:
                    yield next_inputs()[0]

    for images in batches():
        damaged = in_flight.popleft()
        for index, image in enumerate(images):
            yield (None, damaged[index]) if index in damaged else (image, "")


def _inputs(batch: _Batch, encoded: np.ndarray, which: slice = slice(None), *, resized: bool) -> tuple[np.ndarray, ...]:
    """What the DALI graph takes."""
    windows = batch.windows[which].astype(np.int32)
    inputs = encoded[which], windows[:, 0].copy(), windows[:, 1].copy(), batch.targets[which].astype(np.float32)
    return inputs if resized else inputs[:3]


def _one_by_one(
    batch: _Batch, encoded: np.ndarray, make_pipeline: Callable[..., Pipeline], *, from_files: bool, resized: bool
) -> Iterator[tuple[np.ndarray | None, str]]:
    alone = [_inputs(batch, encoded, slice(index, index + 1), resized=resized) for index in range(len(batch.sizes))]
    make_pipeline = functools.partial(make_pipeline, batch_size=1, threads=1, prefetch=1)
    results = each_alone(alone, make_pipeline, from_files=from_files)
    for index, (outputs, reason) in enumerate(results):
        if outputs is None:
            yield None, reason
        else:
            yield from _results(outputs, batch.sizes[index : index + 1])


def _batches(
    table: Table, rows: np.ndarray, windows: np.ndarray | None, sizes: np.ndarray | None, most: int
) -> Iterator[_Batch]:
    """The rows in batches of at most so many images and, unless it is one, of at most _PIXELS_A_BATCH."""
    for block in range(0, len(rows), _ROWS_A_BLOCK):
        chosen = slice(block, block + _ROWS_A_BLOCK)
        source, _, own_sizes = table.read(rows[chosen])
        parts = np.stack((np.zeros_like(own_sizes), own_sizes), axis=1) if windows is None else windows[chosen]
        whole = _Batch(source, own_sizes, parts, parts[:, 1] if sizes is None else sizes[chosen])
        pixels = np.cumsum(whole.sizes.prod(axis=1) + whole.targets.prod(axis=1))
        first = before = 0
        while first < len(pixels):
            fitting = int(np.searchsorted(pixels, before + _PIXELS_A_BATCH, side="right"))
            stop = min(max(fitting, first + 1), first + most)
            yield _Batch(*(field[first:stop] for field in whole))
            first, before = stop, pixels[stop - 1]


def _pipeline(
    source: Callable[[], tuple], *, from_files: bool, resized: bool, batch_size: int, threads: int, prefetch: int
) -> Pipeline:
    """Build the pipeline read → decode and, if asked for, resize, which takes the memory of five more images.

    Outputs: images [height, width, 3] and what their headers say now."""
    pipeline = _empty_pipeline(batch_size=batch_size, threads=threads, prefetch=prefetch)
    with pipeline:
        dtypes = [types.UINT8, types.INT32, types.INT32, types.FLOAT][: 4 if resized else 3]
        encoded, starts, sizes, *targets = fn.external_source(source, num_outputs=len(dtypes), batch=True, dtype=dtypes)
        files = read_files(encoded) if from_files else encoded
        shapes = fn.peek_image_shape(files, adjust_orientation=False, dtype=types.INT32)
        # A file that was replaced by a far larger image is not decoded beyond the size that is in the table, nor beyond its own.
        starts = math.min(starts, shapes[:2] - 1)
        images = fn.decoders.image_slice(
            files,
            start=starts,
            shape=math.min(sizes, shapes[:2] - starts),
            axes=[0, 1],
            output_type=types.RGB,
            adjust_orientation=False,  # these as in training: see graphs.py
            jpeg_fancy_upsampling=True,
        )
        if resized:
            images = _resized(images, targets[0])
        pipeline.set_outputs(images, shapes)
    return pipeline


def _empty_pipeline(*, batch_size: int, threads: int, prefetch: int) -> Pipeline:
    return Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )


def _resized(images: DataNode, targets: DataNode) -> DataNode:
    return fn.resize(images, size=targets, subpixel_scale=False, antialias=True)


_CHANGED = "changed to another size since the scan; python -m pipeline.manifest DIR --rescan scans anew"


def _results(outputs: tuple, sizes: np.ndarray) -> Iterator[tuple[np.ndarray | None, str]]:
    images, shapes = outputs
    for index, (height, width) in enumerate(sizes.tolist()):
        is_as_scanned = shapes.at(index)[:2].tolist() == [height, width]
        yield (images.at(index), "") if is_as_scanned else (None, _CHANGED)
