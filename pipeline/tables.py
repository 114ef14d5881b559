"""Tables of images: one row each, memory-mapped, shared by all ranks."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np


class FileTable:
    """The images of one split, each a file: nothing is read until rows are asked for, and then only those rows.

    root: the data folder. rows: structured array with the fields path (uint8, relative to root, padded on its left with
    "/"), label, height, width (int32; pixels, as in the file's header, EXIF rotation not applied) and bytes (int64).
    """

    def __init__(self, root: Path, rows: np.ndarray) -> None:
        self._rows = rows.view(np.ndarray)  # a memmap subclass would make every small slice slower
        self._prefix = np.frombuffer(os.fsencode(os.path.abspath(root)) + b"/", dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, rows: np.ndarray) -> "TableRows":
        """Copy these rows (int64 [n]) out of the table."""
        chosen = self._rows[rows]
        names = np.empty((len(rows), len(self._prefix) + chosen["path"].shape[1]), dtype=np.uint8)
        names[:, : len(self._prefix)] = self._prefix
        names[:, len(self._prefix) :] = chosen["path"]
        return TableRows(
            source=names,
            labels=chosen["label"].astype(np.int64),
            sizes=np.stack((chosen["height"], chosen["width"]), axis=1).astype(np.int64),
        )


class TableRows(NamedTuple):
    """Some rows of a Table."""

    source: np.ndarray
    """Where the bytes lie. uint8 [n, W]: absolute paths; "/" pads on the left of the relative part, and a//b is a/b."""
    labels: np.ndarray
    """int64 [n]"""
    sizes: np.ndarray
    """int64 [n, 2]: height and width of the source in pixels."""
