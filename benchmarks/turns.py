"""Things to compare take turns on one machine, round after round, so that what drifts meets all of them.

Every other round goes the other way round, lest one always comes after the same other. Rates are medians over rounds; ratios
are taken within a round.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter, sleep

import numpy as np
import torch
from scipy import stats

from common.flags import FlagParser
from common.memory import present_objects_frozen
from common.progress import say

OURS, RATE = "this project", "images_per_second"
NOT_COUNTED = 8
"""Batches of a stream before those that count."""
_LEAST_FOR_QUANTILE = 9
"""With fewer values their whole range is the median's interval."""


def add_turn_flags(parser: FlagParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="turns of each competitor")
    parser.add_argument("--batches", type=int, default=20, help="batches or steps that are counted in a turn")


def take_turns(turns: Mapping[str, Callable[[], float]], *, rounds: int, warm_up: int = 0) -> dict[str, list[float]]:
    """What each function returned, round by round. warm_up: rounds before them, of which nothing is kept."""
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(-warm_up, rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            figure = turns[name]()
            if number >= 0:
                figures[name].append(figure)
        if number >= 0:
            latest = (f"{name} {of[-1]:,.{0 if of[-1] >= 100 else 2}f}" for name, of in figures.items())
            say(f"round {number + 1} of {rounds}: {', '.join(latest)}")
    return figures


def compare_streams(
    title: str,
    streams: Mapping[str, Iterator],
    *,
    images: int,
    rounds: int,
    batches: int,
    device: torch.device,
    pause_seconds: float = 0.0,
    times: Sequence[str] = (),
    of: str | None = None,
) -> dict[str, dict]:
    """Rates of endless iterators of batches of so many images, or of what takes a step at each batch; printed as a table, too.

    pause_seconds: before a turn, in which the one before fills its queues and falls silent. What was prefetched meanwhile is
    in the batches that are NOT_COUNTED. times, of: as in summarise(), which makes the rows.
    """

    def turn(stream: Iterator) -> float:
        sleep(pause_seconds)
        for _ in range(NOT_COUNTED):
            next(stream)
        finish(device)
        began = perf_counter()
        for _ in range(batches):
            next(stream)
        finish(device)
        return batches * images / (perf_counter() - began)

    with present_objects_frozen():  # as in training
        turns = {name: functools.partial(turn, stream) for name, stream in streams.items()}
        rows = summarise(take_turns(turns, rounds=rounds), times=times, of=of)
    print_table(title, rows)
    return rows


def finish(device: torch.device) -> None:
    """Wait for what the device was given so far on torch's stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def forever(step: Callable[[], object]) -> Iterator:
    """An iterator that takes a step each time."""
    while True:
        yield step()


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


def rate_text(row: Mapping) -> str:
    median, lowest, highest = row[RATE]
    digits = 0 if median >= 100 else 1
    return f"{median:,.{digits}f} ({lowest:,.{digits}f}–{highest:,.{digits}f})"


def ratio_text(row: Mapping, title: str, digits: int = 2) -> str:
    """Median (lowest–highest), and the interval where there is one; reports of before have none."""
    median, lowest, highest = (f"{value:.{digits}f}" for value in row[title])
    found = row.get(f"{title}, 95 %")
    surely = f", 95 % {found[0]:.{digits}f}–{found[1]:.{digits}f}" if found else ""
    return f"{median} ({lowest}–{highest}{surely})"


def print_table(title: str, rows: Mapping[str, Mapping]) -> None:
    """What summarise() returned."""
    titles = [key for key in next(iter(rows.values())) if key != RATE and not key.endswith("%")]
    heads = [key.removeprefix("times ") + " is … times" if key.startswith("times") else key for key in titles]
    print(f"\n{title:28}{'images/s':>24}" + "".join(f"{head:>38}" for head in heads))
    for name, row in rows.items():
        print(f"{name:28}{rate_text(row):>24}" + "".join(f"{ratio_text(row, key):>38}" for key in titles))
