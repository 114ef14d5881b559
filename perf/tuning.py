"""python profile/throughput.py --tune [flags of train.py] [--tune-seconds 120] [--out DIR]: the fastest settings, as a recipe.

Searches, setting by setting, with short measurements by the stages of throughput.py, each in a process that may fail: those of
the loader by the loader alone, those of the step by the step alone, and the decoder, which may share the GPU with the step, in
the training loop. What won there is measured against the configuration as it was given, in turns, in the training loop; only
if it wins there, too, by more than the spread, it goes into DIR/recipe.yaml.

What changes the result is never touched: batch size, precision, learning rate and so on. All that is tuned leaves a step what it
is, but for rounding: the GPU's decoder differs from the CPU's by a few grey levels, compiled code, joined kernels and
accumulated gradients add up in another order, and compressed gradients, tried on several ranks only, are rounded to 16 bits on
their way.
"""

import collections
import dataclasses
import statistics
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any, get_args, get_type_hints

import msgspec
import yaml
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from common.files import replacing, writing_to
from common.progress import printable, say
from common.ranks import Ranks, on_rank_0
from engine.config import Config
from perf.machine import git_revision
from perf.search import LEAST_GAIN, Coordinate, Search, Trial, Tuned
from perf.timing import Limits
from perf.trials import Job, Outcome, Settings, Trials
from pipeline.dali.opening import default_threads

_PREFETCH = (1, 2, 4)
_HW_DECODER_LOADS = (0.0, 0.5, 0.65, 0.8, 1.0)


def tune(config: Config, ranks: Ranks, *, limits: Limits, seconds: float) -> tuple[Job, Tuned] | None:
    """Search; every rank must call this. Returns what came of it on rank 0, None on the others.

    ranks: of this process, on the CPU; the trials have the GPU. limits: of each trial. seconds: after which no trial begins,
    from when the data set is open.
    Raises UserError, TrainingError: the configuration as it was given does not run.
    """

    def clock() -> float:
        return on_rank_0(ranks, perf_counter)  # all ranks search, and must decide alike

    def run(stage: str, changes: Settings, limit_seconds: float) -> Outcome:
        outcome = trials.run(stage, changes, limit_seconds)
        if ranks.is_main:
            rate = outcome.images_per_second
            told = f"{rate:,.1f} images/s" if rate else f"failed: {outcome.failure}"
            say(f"{perf_counter() - began:4.0f} s  {stage}, {in_words(changes)}: {told}")
        return outcome

    trials = Trials(config, ranks, limits)
    try:
        job = trials.describe()
        began = perf_counter()
        tuned = Search(job, run, seconds=seconds, clock=clock).run(coordinates(job, config))
    finally:
        trials.close()
    return (job, tuned) if ranks.is_main else None


def coordinates(job: Job, config: Config) -> dict[str, list[Coordinate]]:
    """What is searched, by stage, the most promising first."""
    cores = job.cpu_share
    threads = sorted({1, max(1, cores // 2), cores, cores + 1, cores + cores // 2, 2 * cores})
    loader, decoder = [_choice("threads", threads), _choice("prefetch", _PREFETCH)], []
    # With --deterministic, none whose kernels are chosen by their speed: the next time they may be others, which round otherwise.
    modes = [mode for mode in offered("compile_mode") if not (config.deterministic and "autotune" in mode)]
    compilations = [{"compile": "off"}, *({"compile": "on", "compile_mode": mode} for mode in modes)]
    step = [Coordinate("compile", lambda _: compilations)]
    if not config.batch_norm:
        step.append(_choice("fuse", offered("fuse")))

    def other_decoders(now: Settings) -> list[Settings]:
        """Each with as many threads as it has by default: those that are best for the one are not for the other."""
        if now["decoder"] == "none":
            return []
        decoders = ("cpu", "gpu") if config.deterministic else ("cpu", "gpu", "split")
        return [
            {"decoder": other, "threads": default_threads(cores, other)}
            for other in decoders
            if other != now["decoder"]
        ]

    def micro_batches_beside(now: Settings) -> list[Settings]:
        """The next larger and the next smaller divisor of the rank's share: the far ones take long to try, and win seldom."""
        divisors = [size for size in range(1, job.share + 1) if job.share % size == 0]
        place = divisors.index(now["micro_batch"])
        return [{"micro_batch": size} for size in divisors[place + 1 : place + 2] + divisors[max(0, place - 1) : place]]

    if job.hardware.device == "cuda":
        loads = [{"hw_decoder_load": load} for load in _HW_DECODER_LOADS]
        decoder.append(Coordinate("decoder", other_decoders))
        step.append(_choice("pad_channels", (False, True)))
        loader.append(Coordinate("hw_decoder_load", lambda now: loads if now["decoder"] == "gpu" else []))
    elif (
        not config.mixes
    ):  # whose images are mixed with those of their pass. On a GPU, the largest that fits is the fastest
        step.insert(0, Coordinate("micro_batch", micro_batches_beside))
    if job.hardware.ranks > 1:
        step.insert(0, _choice("grad_compression", offered("grad_compression")))
    if not job.has_images:
        return {"loader": [], "step": step, "training": []}
    return {"loader": loader, "step": step, "training": decoder}


def offered(flag: str) -> tuple[Any, ...]:
    """The values that a flag of train.py can have, of one whose values are named."""
    return get_args(get_type_hints(Config)[flag])


def _choice(name: str, values) -> Coordinate:
    return Coordinate(name, lambda _: [{name: value} for value in values])


def in_words(changes: Settings) -> str:
    """As flags of train.py."""
    flags = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        flags.append(("--" if value else "--no-") + flag if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(flags) or "as given"


def sentences(tuned: Tuned) -> list[str]:
    """The gain, what is kept and what is not."""
    said = []
    gain, needed, best = tuned.gain, in_words(tuned.needed), in_words(tuned.best)
    if tuned.needed:
        said.append(f"The memory does not suffice for the configuration as given; {needed} is kept.")
    if gain:
        low, high = gain.interval
        said.append(
            f"{tuned.stage}: {gain.given_images_per_second:,.1f} images/s {needed}, {gain.best_images_per_second:,.1f} "
            f"with {best}: {100 * gain.median:+.1f} % (median of {len(gain.pairs)} pairs of measurements; "
            f"{100 * gain.confidence:.0f} % confidence: {100 * low:+.1f} to {100 * high:+.1f} %)."
        )
    if tuned.loader_share is not None and tuned.loader_share < LEAST_GAIN:
        said.append(
            f"The loader takes {100 * tuned.loader_share:.2g} % of the time of training: its settings are not searched."
        )
    if gain and tuned.kept == tuned.best:
        said.append("The gain is above the spread: it is kept.")
    elif gain:
        said.append("The gain is not above the spread of at least three pairs: it is not kept.")
    elif tuned.best != tuned.needed:
        said.append(f"{best} won by itself, but {tuned.stage} with it could not be measured: it is not kept.")
    else:
        said.append(f"No change won by {100 * LEAST_GAIN:g} %: none is kept.")
    if tuned.not_reached:
        said.append(
            f"Not searched to the end, the time was up: {', '.join(tuned.not_reached)}; give more with --tune-seconds."
        )
    return said


def print_tuned(tuned: Tuned) -> None:
    figures = (Column(name, justify="right") for name in ("images/s", "lowest–highest", "trials"))
    table = Table("stage", "settings", *figures, box=None, pad_edge=False)
    groups: dict[tuple[str, str], list[Trial]] = collections.defaultdict(list)
    for trial in tuned.trials:
        groups[trial.stage, in_words(trial.changes)].append(trial)
    for (stage, words), trials in groups.items():
        rates = [trial.images_per_second for trial in trials if trial.images_per_second]
        failures = [trial.failure for trial in trials if trial.failure]
        median = f"{statistics.median(rates):,.1f}" if rates else "failed"
        spread = f"{min(rates):,.1f}–{max(rates):,.1f}" if len(rates) > 1 else "".join(failures[:1])
        table.add_row(*map(Text, (stage, words, median, spread, str(len(trials)))))
    Console().print(table, *map(Text, sentences(tuned)), sep="\n")


def write_recipe(path: Path, job: Job, tuned: Tuned, command: str) -> None:
    """Write what is kept, with how it was found. Raises UserError: it cannot be written."""
    hardware = job.hardware
    lines = [
        f"{date.today()}, {hardware.name}, {hardware.ranks} rank(s), torch {hardware.torch}, DALI {hardware.dali}, "
        f"revision {git_revision() or 'unknown'}",
        command,
        *sentences(tuned),
        "To be used with the same flags of train.py and --recipe; a flag overrides what is in here.",
    ]
    text = "".join(f"# {printable(line)}\n" for line in lines) + yaml.safe_dump(tuned.kept, sort_keys=False)
    with writing_to(path), replacing(path) as file:
        file.write(text.encode())


def result(config: Config, job: Job, tuned: Tuned, *, tune_seconds: float, recipe: Path) -> dict:
    """What the last line says."""
    return {
        "program": "tune",
        "arch": config.arch,
        "data": config.data,
        "batch_size": config.batch_size,
        "hardware": msgspec.to_builtins(job.hardware),
        "given": job.settings,
        **dataclasses.asdict(tuned),
        "tune_seconds": tune_seconds,
        "recipe": str(recipe),
    }
