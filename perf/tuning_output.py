"""What a search for the fastest settings found, for people and as a recipe for train.py."""

import dataclasses
import statistics
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import UserError
from common.files import replacing
from common.progress import printable
from engine.config import Config
from perf.coordinate_search import beats_spread
from perf.machine import git_revision
from perf.trials import Job
from perf.tuning import LEAST_LOADER_SHARE, Trial, Tuned, in_words


def write_recipe(path: Path, job: Job, tuned: Tuned, command: str) -> None:
    """Write what is kept, with how it was found. Raises UserError: it cannot be written."""
    hardware = job.hardware
    lines = [
        f"{date.today()}, {hardware['name']}, {hardware['ranks']} rank(s), torch {hardware['torch']}, DALI "
        f"{hardware['dali']}, revision {git_revision() or 'unknown'}",
        command,
        *sentences(tuned),
        "To be used with the same flags of train.py and --recipe; a flag overrides what is in here.",
    ]
    text = "".join(f"# {printable(line)}\n" for line in lines) + yaml.safe_dump(tuned.kept, sort_keys=False)
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def print_tuned(tuned: Tuned) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "settings", "images/s", "lowest–highest", "trials"):
        table.add_column(name, justify="left" if name in ("stage", "settings") else "right")
    for (stage, words), trials in _grouped(tuned.trials).items():
        rates = [trial.images_per_second for trial in trials if trial.images_per_second]
        failures = [trial.failure for trial in trials if trial.failure]
        median = f"{statistics.median(rates):,.1f}" if rates else "failed"
        spread = f"{min(rates):,.1f}–{max(rates):,.1f}" if len(rates) > 1 else ""
        table.add_row(*map(Text, (stage, words, median, spread or "".join(failures[:1]), str(len(trials)))))
    console = Console()
    console.print(table)
    for sentence in sentences(tuned):
        console.print(Text(sentence))


def result(config: Config, job: Job, tuned: Tuned, *, tune_seconds: float, recipe: Path) -> dict:
    """What the last line says."""
    gain = tuned.gain and {**dataclasses.asdict(tuned.gain), "median": statistics.median(tuned.gain.pairs)}
    return {
        "program": "tune",
        "arch": config.arch,
        "data": config.data,
        "batch_size": config.batch_size,
        "hardware": job.hardware,
        "given": job.settings,
        **dataclasses.asdict(tuned),
        "gain": gain,
        "tune_seconds": tune_seconds,
        "recipe": str(recipe),
    }


def sentences(tuned: Tuned) -> list[str]:
    """The gain, what is kept and what is not."""
    said = []
    gain, needed, best = tuned.gain, in_words(tuned.needed), in_words(tuned.best)
    if tuned.needed:
        said.append(f"The memory does not suffice for the configuration as given; {needed} is kept.")
    if gain:
        median, low, high = (f"{100 * of(gain.pairs):+.1f} %" for of in (statistics.median, min, max))
        said.append(
            f"{tuned.stage}: {gain.given_images_per_second:,.1f} images/s {needed}, {gain.best_images_per_second:,.1f} "
            f"with {best}: {median} (median; {low} to {high} in {len(gain.pairs)} pairs of measurements)."
        )
    if tuned.loader_share is not None and tuned.loader_share < LEAST_LOADER_SHARE:
        said.append(
            f"The loader takes {100 * tuned.loader_share:.2g} % of the time of training: its settings are not searched."
        )
    if gain and beats_spread(gain.pairs):
        said.append("The gain is above the spread: it is kept.")
    elif gain:
        said.append("The gain is not above the spread of at least three pairs: it is not kept.")
    elif tuned.best != tuned.needed:
        said.append(f"{best} won by itself, but {tuned.stage} with it could not be measured: it is not kept.")
    else:
        said.append("No change won by more than the spread: none is kept.")
    if tuned.not_reached:
        said.append(
            f"Not searched to the end, the time was up: {', '.join(tuned.not_reached)}; give more with --tune-seconds."
        )
    return said


def _grouped(trials: Iterable[Trial]) -> dict[tuple[str, str], list[Trial]]:
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.stage, in_words(trial.changes)), []).append(trial)
    return groups
