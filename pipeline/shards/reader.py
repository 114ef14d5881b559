"""Reads the images of a plan's batches from shards ahead of time: the plan knows the places long before they are needed."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from pipeline.shards.shard_table import ShardTable


class _Batch(Protocol):
    @property
    def source(self) -> np.ndarray:
        """[n, …]: where the images' bytes lie, as the kind of table has it."""


B = TypeVar("B", bound=_Batch)  # a plan's Samples, or another batch of images of a table

Fetched = tuple[B, np.ndarray]
"""A batch and what DALI reads its images from: the bytes, uint8 [n, W] (W is the largest image's size, other rows end in
whatever was in memory), or their paths."""

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
        fetched, targets = [], []
        for batch in batches:
            lengths = batch.source[:, 2].tolist()
            width = max(lengths)
            encoded = np.empty((len(lengths), width), dtype=np.uint8)
            memory = encoded.reshape(-1).data
            targets += [memory[n * width : n * width + length] for n, length in enumerate(lengths)]
            fetched.append((batch, encoded))
        source = np.concatenate([batch.source for batch in batches])
        ascending = np.lexsort((source[:, 1], source[:, 0]))
        edges = np.flatnonzero(np.diff(source[ascending, 0])) + 1
        by_shard = np.split(ascending, edges)
        a_task = -(-len(by_shard) // self._threads)
        requests = [
            self._pool.submit(self._read, source, by_shard[first : first + a_task], targets)
            for first in range(0, len(by_shard), a_task)
        ]
        return fetched, requests

    def _read(self, source: np.ndarray, by_shard: list[np.ndarray], targets: list[memoryview]) -> None:
        for indices in by_shard:  # one system call, or request, for each image or run of neighbours
            shard = int(source[indices[0], 0])
            offsets = source[indices, 1].tolist()
            self._table.storage.read(self._table.shard_name(shard), offsets, [targets[n] for n in indices.tolist()])
