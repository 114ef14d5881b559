"""The CSV of a sweep: one row a run, written by many processes at a time, on one machine or several.

Each change reads the whole file and replaces it under a lock, so that no reader ever sees half a row, columns that a later
revision brings find their place, and a process that is killed leaves the file as it was.

A spreadsheet runs a cell that begins with = + - or @. So a text that does, and is no number, stands in the file behind an
apostrophe, which reading takes away again.
"""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from common.files import replacing
from common.lock import FolderLock

Row = dict[str, str]
"""Column → text. A column that is missing is the same as an empty one."""

ERROR = "error"
"""The column with what a failed run said last; empty where it did not fail."""

_FORMULA = r"[=+\-@\t\r\n]"
_RUN = rf"(?![+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\Z)'*{_FORMULA}"
"""What gets an apostrophe before it: what would be run, and is no number, or has apostrophes before that already."""
_BYTES_OF_A_PATH = "surrogateescape"
"""A path need not be UTF-8, and comes back as it was."""


def read_rows(path: Path) -> list[Row]:
    """The rows in a file; none where there is no file. Raises UserError: it cannot be read, or is not such a table."""
    try:
        text = path.read_bytes().decode("utf-8-sig", _BYTES_OF_A_PATH)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the CSV file of a sweep") from error
    try:
        lines = [[_text(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error:
        lines = [[]]
    columns, *rows = lines or [[ERROR]]
    if ERROR not in columns or not len(set(columns)) == len(columns) >= max(map(len, rows), default=0):
        raise UserError(f"{path}: is not a table that a sweep wrote; mend it, or name another CSV file")
    return [dict(itertools.zip_longest(columns, row, fillvalue="")) for row in rows]


def find_row(rows: list[Row], identity: Row) -> Row | None:
    """The row of the run that this identity means: the one whose columns have all of its values."""
    return next((row for row in rows if all(row.get(name, "") == value for name, value in identity.items())), None)


def add_row(path: Path, row: Row, identity: Row) -> bool:
    """Add a run's row, unless the run has one; one that failed gives way. Returns whether the row is in the file now.

    Raises UserError: the file cannot be read or written, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FolderLock(path.parent, f".{path.name}.lock") as lock:
            lock.take(patience_seconds=math.inf, required=True)  # without one, rows would be lost
            rows = read_rows(path)
            earlier = find_row(rows, identity)
            if earlier is None:
                rows.append(row)
            elif earlier[ERROR]:
                rows[rows.index(earlier)] = row
            else:
                return False
            columns = _merged(rows)
            with replacing(path) as file:
                for cells in (columns, *([row.get(column, "") for column in columns] for row in rows)):
                    file.write(_line(cells).encode(errors=_BYTES_OF_A_PATH))
            return True
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); name another CSV file") from error


def _line(cells: Iterable[str]) -> str:
    """A row as it stands in the file."""
    texts = [f"'{cell}" if re.match(_RUN, cell, re.ASCII | re.IGNORECASE) else cell for cell in cells]
    quoted = ('"' + text.replace('"', '""') + '"' if re.search(r'[,"\r\n]', text) else text for text in texts)
    return ",".join(quoted) + "\n"


def _text(cell: str) -> str:
    """What a cell says."""
    return cell[1:] if re.match(f"'+{_FORMULA}", cell) else cell


def _merged(headers: Iterable[Iterable[str]]) -> list[str]:
    """All names once; a name that only a later list has stands behind the one that precedes it there."""
    merged: list[str] = []
    for header in headers:
        place = 0
        for name in header:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged
