"""A sweep in words: what varies in it, what was measured, a table of both."""

from collections.abc import Sequence

from perf.report_words import name_of, number, text_of
from perf.sweep_point import RECORDS, RESULTS, STAGES, THROUGHPUT, TRAIN
from perf.sweep_table import ERROR, Row

FIGURES = {
    TRAIN: {"best_top1": "best top-1, %", "validation_loss": "validation loss", "images_per_second": "images/s"},
    THROUGHPUT: {f"{stage}_images_per_second": f"{stage}, images/s" for stage in STAGES[:3]},
}
"""What a table and a plot show of each program's results, with their names."""
_PERCENT = ("best_top1",)
_SHORT_REVISION = 8


def by_program(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each program; rows of programs that are not known here are left out."""
    groups = {program: [row for row in rows if row.get("program") == program] for program in FIGURES}
    return {program: group for program, group in groups.items() if group}


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings, ranks, card and revision among them, that have more than one value in these rows."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in (*RESULTS, *RECORDS)]
    return [name for name in columns if len({row.get(name, "") for row in rows}) > 1]


def independent(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Those of some columns that are left when each that the others determine is dropped, as is the batch in weak scaling.

    Of columns that determine each other the first stays, but card and revision only where nothing else tells rows apart.
    """
    left = list(columns)
    first_to_go = [name for name in columns if name in ("card", "git_revision")]
    for name in (*first_to_go, *reversed([name for name in columns if name not in first_to_go])):
        others = [other for other in left if other != name]
        groups: dict[tuple, set[str]] = {}
        for row in rows:
            groups.setdefault(tuple(row.get(other, "") for other in others), set()).add(row.get(name, ""))
        if others and all(len(values) == 1 for values in groups.values()):
            left = others
    return left


def value_of(row: Row, column: str) -> float | None:
    """A figure of a run, in the unit of FIGURES; None: not measured."""
    value = as_number(row.get(column, ""))
    return None if value is None else (100 * value if column in _PERCENT else value)


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def in_order(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Sorted by these columns, numbers by their size."""

    def key(row: Row) -> list[tuple[bool, float, str]]:
        texts = [row.get(name, "") for name in columns]
        return [(as_number(text) is None, as_number(text) or 0.0, text) for text in texts]

    return sorted(rows, key=key)


def sweep_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows in words, of runs of one program: what varies, what was measured, and why a run failed."""
    columns, figures = varying(rows), FIGURES[rows[0]["program"]]
    has_errors = any(row[ERROR] for row in rows)
    header = [*map(name_of, columns), *figures.values(), *(["error"] if has_errors else [])]
    lines = []
    for row in in_order(rows, columns):
        cells = [setting(row, name) for name in columns]
        cells += ["" if row[ERROR] else number(value_of(row, column)) for column in figures]
        lines.append(cells + ([text_of(row[ERROR])] if has_errors else []))
    return header, lines


def setting(row: Row, column: str) -> str:
    """The value of a setting, for people."""
    value = row.get(column, "")
    if column == "git_revision":
        commit, plus, changes = value.partition("+")
        return commit[:_SHORT_REVISION] + plus + changes
    return text_of(value) or "none"
