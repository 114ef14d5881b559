"""Arrays of one row for each image of a table, in .npy files that all ranks fill and that are written whole."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from common.errors import UserError
from common.files import DAMAGED_FILE, replacing
from common.ranks import Ranks


class Block(NamedTuple):
    """Some rows of an array."""

    rows: np.ndarray
    """int64 [n]: their numbers."""
    values: np.ndarray
    """[n, width]"""


def open_rows(path: Path, shape: tuple[int, int], dtype: type) -> np.ndarray | None:
    """An array that was written before, memory-mapped; None where there is none of this shape and dtype."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # not np.load, which opens archives too
    except DAMAGED_FILE:  # not there, or not what write_rows has written
        return None
    return array if array.shape == shape and array.dtype == dtype else None


def write_rows(
    path: Path,
    shape: tuple[int, int],
    dtype: type,
    blocks: Iterable[Block],
    ranks: Ranks | None,
    *,
    missing: float,
) -> None:
    """Write the blocks of all ranks into one .npy file, on rank 0; every rank must call this with its own.

    ranks: None where this process has all blocks. missing: what fills the rows that are in no block.
    The place on the disk is taken before the first block is asked for: computing them
    may take long. Raises UserError where the file cannot be written.
    """
    if ranks and not ranks.is_main:
        _send(blocks, shape[1], dtype, ranks)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            start, length = file.tell(), int(np.prod(shape)) * np.dtype(dtype).itemsize
            os.posix_fallocate(file.fileno(), 0, start + length)  # else a full disk would end the process by SIGBUS
            array = np.memmap(file, dtype=dtype, mode="r+", offset=start, shape=shape)
            absent = np.ones(len(array), dtype=bool)
            for block in _of_all_ranks(blocks, shape[1], dtype, ranks) if ranks else blocks:
                array[block.rows] = block.values
                absent[block.rows] = False
            array[absent] = missing
            array.flush()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def _of_all_ranks(own: Iterable[Block], width: int, dtype: type, ranks: Ranks) -> Iterator[Block]:
    yield from own
    for rank in range(1, ranks.world_size):
        count = torch.empty(1, dtype=torch.int64)
        dist.recv(count, src=rank, group=ranks.patient_group)
        block = _empty(int(count), width, dtype)
        for array in block:
            dist.recv(torch.from_numpy(array.view(np.uint8)), src=rank, group=ranks.patient_group)
        yield block


def _send(blocks: Iterable[Block], width: int, dtype: type, ranks: Ranks) -> None:
    """Give all blocks to rank 0 in one piece, when they are done: it is computing its own meanwhile."""
    own = [_empty(0, width, dtype), *blocks]
    together = Block(*(np.concatenate(arrays) for arrays in zip(*own, strict=True)))
    dist.send(torch.tensor([len(together.rows)]), dst=0, group=ranks.patient_group)
    for array in together:
        dist.send(torch.from_numpy(array.view(np.uint8)), dst=0, group=ranks.patient_group)


def _empty(count: int, width: int, dtype: type) -> Block:
    return Block(np.empty(count, dtype=np.int64), np.empty((count, width), dtype=dtype))
