"""The loader's first two operators by themselves: what reading alone and decoding alone would allow."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from common.errors import UserError
from engine.data import Data
from pipeline.graphs import decode_windows, read_files
from pipeline.plan import Samples
from pipeline.prepared import Prepared
from pipeline.reader import fetched, graph_inputs
from pipeline.recovery import cause_of, is_about_an_image

_MOST_RESIDENT_BYTES = 256 << 20
_MOST_RESIDENT_BATCHES = 16


def reading_alone(data: Data, start: int) -> Callable[[], tuple]:
    """Reads the images of this rank's next micro-batch at each call, from sample number `start` on, as the loader reads them.

    Files are read by as many DALI threads, prepared data by the same reader.
    """
    batches = _batches(data, start)
    if fetch := data.fetch(data.train_plan()):
        read = fetch(batches)
        return lambda: next(read)

    @_pipeline(data, device_id=None)
    def reading():
        return read_files(fn.external_source(lambda: next(batches).source, batch=True, dtype=types.UINT8))

    return reading().run


def decoding_alone(data: Data, start: int) -> Callable[[], tuple]:
    """Decodes the windows of a micro-batch at each call, out of bytes that lie in memory; a few batches, again and again.

    The batches are those from sample number `start` on. Raises UserError: a file cannot be read; where it is called, too:
    an image cannot be decoded.
    """
    inputs = itertools.cycle(_resident(data, start))
    on_gpu = data.ranks.device.type == "cuda"

    @_pipeline(data, device_id=data.ranks.device.index if on_gpu else None)
    def decoding():
        encoded, begin, shape = fn.external_source(
            lambda: next(inputs), num_outputs=3, batch=True, dtype=[types.UINT8, types.INT32, types.INT32], no_copy=True
        )
        return decode_windows(encoded, begin, shape, decoder=data.decoder, hw_decoder_load=data.config.hw_decoder_load)

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


def _without_it(data: Data) -> str:
    if isinstance(data.manifest, Prepared):
        return "prepare the data set anew"
    folder = data.manifest.root if data.manifest else "DIR"
    return f"have python -m pipeline.manifest {folder} --verify decode leave it out"


def _pipeline(data: Data, *, device_id: int | None) -> Callable:
    return pipeline_def(
        batch_size=data.micro_batch,
        num_threads=data.threads,
        device_id=device_id,
        prefetch_queue_depth=data.config.prefetch,
        exec_dynamic=True,
    )


def _batches(data: Data, start: int) -> Iterator[Samples]:
    ranks = data.ranks
    return data.train_plan().batches(
        start=start, rank=ranks.rank, world_size=ranks.world_size, micro_batch=data.micro_batch
    )


def _resident(data: Data, start: int) -> list[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
    """What the decoder takes: the bytes of each image, start and shape of each window."""
    plan, resident, resident_bytes = data.train_plan(), [], 0
    fetch = data.fetch(plan)
    for samples, encoded in fetched(_batches(data, start), fetch):
        encoded, begin, shape = graph_inputs(samples, encoded, from_files=fetch is None)[:3]
        images = list(encoded) if fetch else [_read(plan.table.name(source), data) for source in samples.source]
        resident.append((images, begin, shape))
        resident_bytes += sum(len(image) for image in images)
        if resident_bytes >= _MOST_RESIDENT_BYTES or len(resident) == _MOST_RESIDENT_BATCHES:
            break
    return resident


def _read(path: str, data: Data) -> np.ndarray:
    try:
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        folder = data.manifest.root if data.manifest else "DIR"
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); restore it, or have python -m pipeline.manifest {folder} --rescan "
            "leave it out"
        ) from error
