"""Things to compare take turns on one machine, round after round, so that what drifts meets all of them.

Every other round goes the other way round, lest one always comes after the same other. Rates are medians over rounds; ratios
are taken within a round.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter, sleep

import numpy as np
import torch
from scipy import stats

from common.flags import FlagParser, whole_above_zero
from common.memory import present_objects_frozen
from common.progress import say

OURS, RATE = "this project", "images_per_second"
NOT_COUNTED = 8
"""Batches of a turn before those that count."""
_LEAST_FOR_QUANTILE = 9
"""With fewer values their whole range is the median's interval."""


def add_turn_flags(parser: FlagParser) -> None:
    parser.add_argument("--rounds", type=whole_above_zero, default=5, help="turns of each competitor")
    parser.add_argument(
        "--batches", type=whole_above_zero, default=20, help="batches or steps that are counted in a turn"
    )


def take_turns(turns: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """What each function returned, round by round."""
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            figures[name].append(turns[name]())
        latest = (f"{name} {of[-1]:,.{0 if of[-1] >= 100 else 2}f}" for name, of in figures.items())
        say(f"round {number + 1} of {rounds}: {', '.join(latest)}")
    return figures


def compare_calls(
    title: str,
    calls: Mapping[str, Callable[[], object]],
    *,
    images: int,
    rounds: int,
    batches: int,
    device: torch.device,
    not_counted: int | None = None,
    pause_seconds: float = 0.0,
    times: Sequence[str] = (),
    of: str | None = None,
) -> dict[str, dict]:
    """Rates of functions that each load or train on a batch of so many images at every call; printed as a table, too.

    batches: calls that are counted in a turn. not_counted: calls before them; None: NOT_COUNTED. pause_seconds: before a turn, in
    which the one before fills its queues and falls silent; what was prefetched meanwhile is in the calls that are not counted.
    times, of: as in summarise(), which makes the rows.
    """

    def turn(call: Callable[[], object]) -> float:
        sleep(pause_seconds)
        for _ in range(NOT_COUNTED if not_counted is None else not_counted):
            call()
        finish(device)
        began = perf_counter()
        for _ in range(batches):
            call()
        finish(device)
        return batches * images / (perf_counter() - began)

    with present_objects_frozen():  # as in training
        turns = {name: functools.partial(turn, call) for name, call in calls.items()}
        rows = summarise(take_turns(turns, rounds=rounds), times=times, of=of)
    print("", *table(title, rows), sep="\n")
    return rows


def finish(device: torch.device) -> None:
    """Wait for what the device was given so far on torch's stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def summarise(
    rates: Mapping[str, Sequence[float]], *, times: Sequence[str] = (), of: str | None = None
) -> dict[str, dict]:
    """By name: RATE, and the ratios of each round, as [median, lowest, highest]; with ", 95 %" a ratio's interval().

    times: names; how many times as fast as this one each of them is. of: a name; this one's rate as a share of that one's.
    """
    rows: dict[str, dict] = {}
    for name, own in rates.items():
        rows[name] = {RATE: spread(own, 1)}
        ratios = {f"times {base}": [b / o for o, b in zip(own, rates[base], strict=True)] for base in times}
        if of:
            ratios[f"of {of}"] = [o / b for o, b in zip(own, rates[of], strict=True)]
        for title, values in ratios.items():
            rows[name] |= {title: spread(values, 3), f"{title}, 95 %": interval(values)}
    return rows


def spread(values: Sequence[float], digits: int) -> list[float]:
    """[median, lowest, highest]"""
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


def interval(ratios: Sequence[float]) -> list[float] | None:
    """[low, high], between which the ratio lies with 95 % confidence, the rounds taken as independent; None for fewer than three.

    From nine rounds on the median's, by order statistics, which a few disturbed rounds do not widen. Fewer are too few for it:
    then Student's, of the logarithms' mean.
    """
    if len(ratios) < 3:  # two values may lie anywhere
        return None
    if len(ratios) >= _LEAST_FOR_QUANTILE:
        low, high = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    else:
        logarithms = np.log(ratios)
        half = stats.t.ppf(0.975, len(ratios) - 1) * stats.sem(logarithms)
        low, high = np.exp(logarithms.mean() + np.array([-half, half]))
    return [round(float(low), 4), round(float(high), 4)]


def table(title: str, rows: Mapping[str, Mapping]) -> list[str]:
    """Lines of Markdown: what summarise() returned."""
    ratios = [key for key in next(iter(rows.values())) if key != RATE and not key.endswith("%")]
    heads = [f"{key.removeprefix('times ')} is … times" if key.startswith("times") else f"{key}'s" for key in ratios]
    lines = [title, "", f"| | images/s | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name, row in rows.items():
        median, lowest, highest = (f"{rate:,.{0 if row[RATE][0] >= 100 else 1}f}" for rate in row[RATE])
        cells = [
            "" if key == f"times {name}" else ratio_text(row, key) for key in ratios
        ]  # as many times as itself: once
        lines.append(f"| {name} | {median} ({lowest}–{highest}) | {' | '.join(cells)} |")
    return lines


def ratio_text(row: Mapping, title: str) -> str:
    """Median (lowest–highest), and the interval where there is one; reports of before have none."""
    digits = 3 if title.startswith("of") else 2
    median, lowest, highest = (f"{value:.{digits}f}" for value in row[title])
    found = row.get(f"{title}, 95 %")
    surely = f", 95 % {found[0]:.{digits}f}–{found[1]:.{digits}f}" if found else ""
    return f"{median} ({lowest}–{highest}{surely})"
