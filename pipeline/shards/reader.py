"""Reads the images of a plan's batches from shards ahead of time: the plan knows the places long before they are needed."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from pipeline.shards.raw import PixelReader, Pixels
from pipeline.shards.shard_table import ShardTable

_PIECE_BYTES = 1 << 20  # of pixels that one thread reads in one go, unless a single image has more: it stays in a cache


class _Batch(Protocol):
    @property
    def source(self) -> np.ndarray:
        """[n, …]: where the images' bytes lie, as the kind of table has it."""

    @property
    def start(self) -> np.ndarray:
        """int [n, 2]: first pixel (y, x) of the window that is needed of each."""

    @property
    def shape(self) -> np.ndarray:
        """int [n, 2]: size of that window."""


B = TypeVar("B", bound=_Batch)  # a plan's Samples, or another batch of images of a table

Fetched = tuple[B, np.ndarray | Pixels]
"""A batch and what DALI reads its images from: the bytes, uint8 [n, W] (W is the largest image's size, other rows end in
whatever was in memory), or their paths; or the windows of images that are kept as pixels."""

Fetch = Callable[[Iterator[B]], Iterator[Fetched[B]]]


def fetched(batches: Iterator[B], fetch: Fetch[B] | None) -> Iterator[Fetched[B]]:
    """The batches with what DALI reads them from: what `fetch` adds or, where it is None, the files' paths."""
    return fetch(batches) if fetch else ((batch, batch.source) for batch in batches)


class ShardReader:
    """Threads that fetch what a plan asks for."""

    def __init__(self, table: ShardTable, *, threads: int | None, batches_ahead: int) -> None:
        """threads: None for as many as suit the storage. batches_ahead: how many batches are under way at a time, at least."""
        self._table, self._batches_ahead = table, batches_ahead
        self._threads = threads or table.storage.threads
        self._pixel_reader = PixelReader(table.storage, table.classes)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="shard reader")

    def fetch(self, batches: Iterator[B], group: Callable[[B], int] | None = None) -> Iterator[Fetched[B]]:
        """The batches with their bytes, in order. When the iterator is closed, what has not begun to be read is not read.

        group: equal for consecutive batches whose bytes are requested together, shard by shard in ascending order; None:
        each batch by itself. Raises TrainingError where a shard cannot be read.
        """
        if group is None:
            groups = ([batch] for batch in batches)
        else:
            groups = (list(members) for _, members in itertools.groupby(batches, key=group))
        under_way: collections.deque[tuple[list[Fetched[B]], list[Future]]] = collections.deque()
        try:
            while True:
                while sum(len(fetched) for fetched, _ in under_way) < self._batches_ahead:
                    members = next(groups, None)
                    if members is None:
                        break
                    under_way.append(self._request(members))
                if not under_way:
                    return
                fetched, requests = under_way.popleft()
                for request in requests:
                    request.result()
                if len(fetched) >= self._batches_ahead and (members := next(groups, None)):
                    under_way.append(self._request(members))  # while this one is used up
                yield from fetched
        finally:  # a whole window may be under way, and would take the storage from whoever reads next
            for _, requests in under_way:
                for request in requests:
                    request.cancel()

    def _request(self, batches: list[B]) -> tuple[list[Fetched[B]], list[Future]]:
        source = np.concatenate([batch.source for batch in batches])
        fetched, read = self._pixels(batches, source) if self._table.is_raw else self._encoded(batches, source)
        ascending = np.lexsort((source[:, 1], source[:, 0]))
        edges = np.flatnonzero(np.diff(source[ascending, 0])) + 1
        by_shard = np.split(ascending, edges)
        a_task = -(-len(by_shard) // self._threads)
        requests = [
            self._pool.submit(self._read, source, by_shard[first : first + a_task], read)
            for first in range(0, len(by_shard), a_task)
        ]
        return fetched, requests

    def _read(self, source: np.ndarray, by_shard: list[np.ndarray], read: Callable[[str, np.ndarray], None]) -> None:
        for indices in by_shard:
            read(self._table.shard_name(int(source[indices[0], 0])), indices)

    def _encoded(
        self, batches: list[B], source: np.ndarray
    ) -> tuple[list[Fetched[B]], Callable[[str, np.ndarray], None]]:
        """The batches with memory for their images' files, and what reads some of these out of a shard."""
        fetched: list[Fetched[B]] = []
        targets: list[memoryview] = []
        for batch in batches:
            lengths = batch.source[:, 2].tolist()
            width = max(lengths)
            encoded = np.empty((len(lengths), width), dtype=np.uint8)
            memory = encoded.reshape(-1).data
            targets += [memory[n * width : n * width + length] for n, length in enumerate(lengths)]
            fetched.append((batch, encoded))

        def read(name: str, indices: np.ndarray) -> None:
            # One system call, or request, for each image or run of neighbours.
            self._table.storage.read(name, source[indices, 1].tolist(), [targets[n] for n in indices.tolist()])

        return fetched, read

    def _pixels(
        self, batches: list[B], source: np.ndarray
    ) -> tuple[list[Fetched[B]], Callable[[str, np.ndarray], None]]:
        """The same of images that are kept as pixels, of which windows are read."""
        start, shape = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("start", "shape"))
        pixels = [self._pixel_reader.batch(batch.shape) for batch in batches]
        targets = [(each, n) for each in pixels for n in range(len(each.windows))]
        read_bytes = 3 * shape[:, 0].astype(np.int64) * source[:, 3]

        def read(name: str, indices: np.ndarray) -> None:
            edges = np.flatnonzero(np.diff(np.cumsum(read_bytes[indices]) // _PIECE_BYTES)) + 1
            for piece in np.split(indices, edges):
                places = [targets[n] for n in piece.tolist()]
                self._pixel_reader.read(name, source[piece], start[piece], places)

        return list(zip(batches, pixels, strict=True)), read
