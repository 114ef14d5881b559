"""What feeds the stages of a profile: where in the epoch each begins; and the loader's first two operators by themselves, which
are what reading alone and decoding alone would allow."""

import bisect
import gc
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from common.errors import UserError
from engine.data import TrainingData
from perf.timing import SETTLING_STEPS
from pipeline.dali.graph import decode_windows, first_of, graph_inputs, read_files
from pipeline.dali.recovery import cause_of, is_about_an_image
from pipeline.plan.samples import Samples
from pipeline.shards.index import Prepared
from pipeline.shards.reader import fetched
from pipeline.shards.shard_table import ShardTable

_STAGES_WITH_DATA = 4
READING, DECODING, LOADER, TRAINING = range(_STAGES_WITH_DATA)
_FEW_WINDOWS = 10  # of an epoch
_MOST_RESIDENT_BYTES = 256 << 20
_MOST_RESIDENT_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Feed:
    """How a loader feeds a stage."""

    start: int = 0
    """The first sample."""
    queue: int = 0
    """Steps that may lie ready; with windows, steps until the middle of the second."""
    period: int = 1
    """Steps after which a window of shards ends at the same place of a step again; 1 where each batch is read by itself."""
    windows: int = 1
    """In a period."""


NO_FEED = Feed()


def feed_of(data: TrainingData, stage: int) -> Feed:
    """Of one of the stages with data.

    Each begins elsewhere in the epoch, so that of a data set that is larger than the memory none finds in the page cache what
    the one before it has read; with windows of shards, one step before a window's end.
    """
    gc.collect()  # ends the loader of an earlier stage, which is in cycles of references and would read on
    loading, plan, images, batch = data.loading, data.train_plan(), data.train_images, data.config.batch_size
    passes = batch // data.ranks.world_size // data.micro_batch
    queue = math.ceil(loading.prefetch / passes)
    read_ahead = math.ceil(loading.read_ahead / passes) if isinstance(plan.table, ShardTable) else 0
    if (group := plan.read_group) is None:
        return Feed(start=stage * images // _STAGES_WITH_DATA, queue=queue + read_ahead)

    def window(number: int) -> int:
        return group(plan.samples(np.array([number])))

    def begin(window_number: int) -> int:
        return bisect.bisect_left(range(2 * images), window_number, key=window)

    windows = window(images) - window(0)  # of an epoch
    size = begin(windows - 1) / (windows - 1) if windows > 1 else images  # of all but the last, on average
    if windows < _FEW_WINDOWS and abs(images - begin(windows - 1) - size) > 0.05 * size:
        number, period = windows, round(images / batch)  # the last window is another one: whole epochs are alike
    else:
        near = max(0.1, size / batch / 50)  # so little of a window that many periods later it still is the middle
        fits = (count for count in range(1, 9) if abs(count * size / batch - round(count * size / batch)) <= near)
        number = next(fits, 1)
        period = max(1, round(number * size / batch))
    # Three windows and more lie between the first one and the epoch's last, where there are that many.
    first = stage * (windows - 6 if windows >= _FEW_WINDOWS else windows) // _STAGES_WITH_DATA
    to_the_middle = 1 + round(size / batch / 2) - (SETTLING_STEPS + 1)  # which measure() adds
    if size < read_ahead * batch:  # windows so small that several are under way at a time
        to_the_middle += read_ahead
    return Feed(start=max(0, begin(first + 1) - batch), queue=max(queue, to_the_middle), period=period, windows=number)


def reading_alone(data: TrainingData, start: int) -> Callable[[], tuple]:
    """Reads the images of this rank's next micro-batch at each call, from sample number `start` on, as the loader reads them.

    Files are read by as many DALI threads, prepared data by the same reader.
    """
    batches = _batches(data, start)
    if fetch := data.fetch(data.train_plan()):
        return fetch(batches).__next__

    @_pipeline(data, device_id=None)
    def reading():
        return read_files(fn.external_source(lambda: next(batches).source, batch=True, dtype=types.UINT8))

    return reading().run


def decoding_alone(data: TrainingData, start: int) -> Callable[[], tuple]:
    """Decodes the windows of a micro-batch at each call, out of bytes that lie in memory; a few batches, again and again.

    The batches are those from sample number `start` on. Raises UserError: a file cannot be read; where it is called, too:
    an image cannot be decoded.
    """
    inputs = itertools.cycle(_resident(data, start))
    device = data.ranks.device
    on_gpu = device.type == "cuda"

    @_pipeline(data, device_id=device.index if on_gpu else None)
    def decoding():
        is_split = data.train_options.decoder == "split"
        dtypes = [types.UINT8, types.INT32, types.INT32, *[types.BOOL] * is_split]  # DALI warns of what nobody uses
        encoded, begin, shape, *by_cpu = fn.external_source(
            lambda: next(inputs)[: len(dtypes)], num_outputs=len(dtypes), batch=True, dtype=dtypes, no_copy=True
        )
        return decode_windows(encoded, begin, shape, data.train_options, by_cpu=by_cpu[0] if is_split else None)

    pipeline = decoding()

    def decode() -> tuple:
        try:
            # As the loader has it: nobody waits on the host, and torch's stream waits for the GPU's decoder.
            return pipeline.run(torch.cuda.current_stream()) if on_gpu else pipeline.run()
        except RuntimeError as error:
            if not is_about_an_image(error):
                raise
            raise UserError(
                f"an image cannot be decoded ({cause_of(error)}): training goes on without it, but decoding alone cannot "
                f"be measured; {_without_it(data)}, or give another --seed"
            ) from error

    return decode


def _without_it(data: TrainingData) -> str:
    """How training is rid of an image."""
    assert data.manifest
    if isinstance(data.manifest, Prepared):
        return "prepare the data set anew"
    return f"have python -m pipeline.manifest {data.manifest.root} --verify decode leave it out"


def _pipeline(data: TrainingData, *, device_id: int | None) -> Callable:
    return pipeline_def(
        batch_size=data.micro_batch,
        num_threads=data.threads,
        device_id=device_id,
        prefetch_queue_depth=data.loading.prefetch,
        exec_dynamic=True,
        enable_conditionals=True,
    )


def _batches(data: TrainingData, start: int) -> Iterator[Samples]:
    rank, world_size = data.ranks.rank, data.ranks.world_size
    return data.train_plan().batches(start=start, rank=rank, world_size=world_size, micro_batch=data.micro_batch)


def _resident(data: TrainingData, start: int) -> list[tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]:
    """What the decoder takes: the bytes of each image, start and shape of each window, and which the CPU's decoder has at first
    where two share them."""
    plan, resident, resident_bytes = data.train_plan(), [], 0
    fetch = data.fetch(plan)
    for samples, encoded in fetched(_batches(data, start), fetch):
        encoded, begin, shape = graph_inputs(samples, encoded, from_files=fetch is None)[:3]
        images = list(encoded) if fetch else [_read(plan.table.name(source), data) for source in samples.source]
        resident.append((images, begin, shape, first_of(len(images), data.first_share)))
        resident_bytes += sum(len(image) for image in images)
        if resident_bytes >= _MOST_RESIDENT_BYTES or len(resident) == _MOST_RESIDENT_BATCHES:
            break
    return resident


def _read(path: str, data: TrainingData) -> np.ndarray:
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        folder = data.manifest.root if data.manifest else "DIR"
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); restore it, or have python -m pipeline.manifest {folder} --rescan "
            "leave it out"
        ) from error
