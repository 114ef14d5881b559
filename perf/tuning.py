"""python profile/throughput.py --tune [flags of train.py] [--tune-seconds 120] [--out DIR]: the fastest settings, as a recipe.

Searches, setting by setting, with short measurements by the stages of throughput.py, each in a process that may fail: those of
the loader by the loader alone, those of the step by the step alone, and the decoder, which may share the GPU with the step, in
the training loop. What won there is measured against the configuration as it
was given, in turns, in the training loop; only if it wins there, too, by more than the spread, it goes into DIR/recipe.yaml.

What changes the result is never touched: batch size, precision, learning rate and so on. All that is tuned leaves a step what it
is, but for rounding: the GPU's decoder differs from the CPU's by a few grey levels, compiled code and accumulated gradients
add up in another order, and compressed gradients, tried on several ranks only, are rounded to 16 bits on their way.
"""

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common.errors import TrainingError
from common.progress import say
from common.ranks import Ranks
from engine.config import Config
from engine.data import default_threads
from perf.coordinate_search import Coordinate, Measure, Settings, TimeUp, beats_spread, climb, paired_gains
from perf.timing import Limits
from perf.trials import Job, Outcome, Trials

_PREFETCH = (1, 2, 4)
_HW_DECODER_LOADS = (0.0, 0.5, 0.65, 0.8, 1.0)
# Shares of the time after which a search begins no trial; the rest is for training.
_LOADER_UNTIL, _STEP_UNTIL, _DECODER_UNTIL = 0.3, 0.65, 0.8
LEAST_LOADER_SHARE = 0.01
"""Of the time of training. If nothing of the loader were hidden behind the step, the best of loaders would gain no more."""
_GRACE = 0.1  # of the time: so much longer may the last trial of each of them go on

Run = Callable[[str, Settings, float], Outcome]
"""(stage, changes, limit in seconds) → how it went."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One measurement."""

    stage: str
    changes: Settings
    """Of the configuration as it was given."""
    images_per_second: float | None
    """Median, of all ranks together; None: it failed."""
    failure: str | None
    seconds: float
    """Until it was over, start of a process and warm-up included."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The best settings against those that were given, measured in turns."""

    pairs: list[float]
    """best / given − 1, in images a second."""
    given_images_per_second: float
    best_images_per_second: float
    """Medians."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of a search."""

    stage: str
    """In which the gain was measured: training, or step where there are no images."""
    loader_share: float | None
    """Training's images a second over the loader's, as given; None: not measured."""
    best: Settings
    """Changes to the configuration as it was given that won in their own stages."""
    gain: Gain | None
    """None: nothing won, or not a single pair could be measured."""
    needed: Settings
    """Changes without which the memory does not suffice; the gain is over the configuration with them."""
    kept: Settings
    """The best, if they won in `stage`, too; else only what is needed."""
    trials: list[Trial]
    not_reached: list[str]
    """Settings for which the time was up."""
    seconds: float


def tune(config: Config, ranks: Ranks, *, limits: Limits, seconds: float) -> tuple[Job, Tuned] | None:
    """Search; every rank must call this. Returns what came of it on rank 0, None on the others.

    ranks: of this process, on the CPU; the trials have the GPU. limits: of each trial. seconds: after which no trial begins,
    from when the data set is open.
    Raises UserError, TrainingError: the configuration as it was given does not run.
    """
    trials = Trials(config, ranks, limits)
    if not ranks.is_main:
        trials.follow()
        return None
    try:
        job = trials.describe()
        return job, Search(job, trials.run, seconds=seconds).run(coordinates(job, config))
    finally:
        trials.close()


def coordinates(job: Job, config: Config) -> dict[str, list[Coordinate]]:
    """What is searched, by stage, the most promising first."""
    cores, on_gpu = job.cpu_share, job.hardware["device"] == "cuda"
    threads = sorted({1, max(1, cores // 2), cores, cores + 1, cores + cores // 2, 2 * cores})
    loader = [_choice("threads", threads), _choice("prefetch", _PREFETCH)]
    step = [Coordinate("compile", lambda _: _compilations(deterministic=config.deterministic))]
    decoder = []
    if on_gpu:
        loads = [{"hw_decoder_load": load} for load in _HW_DECODER_LOADS]
        decoder.append(Coordinate("decoder", lambda now: _other_decoder(now["decoder"], cores)))
        step.append(_choice("pad_channels", (False, True)))
        loader.append(Coordinate("hw_decoder_load", lambda now: loads if now["decoder"] == "gpu" else []))
    else:  # on a GPU, the largest that fits is the fastest
        step.insert(0, Coordinate("micro_batch", lambda now: _micro_batches_beside(now["micro_batch"], job.share)))
    if job.hardware["ranks"] > 1:
        step.insert(0, _choice("grad_compression", offered("grad_compression")))
    if not job.has_images:
        return {"loader": [], "step": step, "training": []}
    return {"loader": loader, "step": step, "training": decoder}


def offered(flag: str) -> tuple[Any, ...]:
    """The values that a flag of train.py can have, less "auto"; none for one whose values are not named."""
    hint = get_type_hints(Config)[flag]
    return tuple(value for value in get_args(hint) if value != "auto") if get_origin(hint) is Literal else ()


class Search:
    """One search, against the clock."""

    def __init__(self, job: Job, run: Run, *, seconds: float, clock: Callable[[], float] = perf_counter) -> None:
        """The time begins now."""
        self._given, self._share = job.settings, job.share
        self._whole = "training" if job.has_images else "step"
        self._run, self._seconds, self._began, self._clock = run, seconds, clock(), clock
        self._trials: list[Trial] = []

    def run(self, coordinates: dict[str, list[Coordinate]]) -> Tuned:
        """Raises TrainingError: the configuration as it was given does not run."""
        fitting = self._make_fit()
        best, not_reached = fitting, []
        loader_share = self._loader_share(fitting) if coordinates["loader"] else None
        parts = [("loader", _LOADER_UNTIL), ("step", _STEP_UNTIL), ("training", _DECODER_UNTIL)]
        if loader_share is not None and loader_share < LEAST_LOADER_SHARE:
            parts = [("step", _STEP_UNTIL)]
        for stage, until in parts:
            best, missed = climb(best, coordinates[stage], self._measure(stage, until))
            not_reached += missed
        gain = self._gain(fitting, best) if best != fitting else None
        kept = best if gain and beats_spread(gain.pairs) else fitting
        return Tuned(
            stage=self._whole,
            loader_share=loader_share,
            best=self._changes(best),
            gain=gain,
            needed=self._changes(fitting),
            kept=self._changes(kept),
            trials=self._trials,
            not_reached=not_reached,
            seconds=self._passed(),
        )

    def _make_fit(self) -> Settings:
        """The settings as given or, if memory is too small for them, with the micro-batch halved until it suffices."""
        settings = self._given
        while True:
            outcome = self._try(self._whole, settings, math.inf)  # without it there is nothing to compare with
            if outcome.images_per_second:
                return settings
            if not outcome.out_of_memory or settings["micro_batch"] == 1:
                raise TrainingError(f"the configuration as it was given does not run: {outcome.failure}")
            half = settings["micro_batch"] // 2
            smaller = next(size for size in range(half, 0, -1) if self._share % size == 0)
            settings = {**settings, "micro_batch": smaller}

    def _loader_share(self, settings: Settings) -> float | None:
        training, loader = self._trials[-1].images_per_second, None
        with contextlib.suppress(TimeUp):
            loader = self._measure("loader", _LOADER_UNTIL)(settings)
        return training / loader if training and loader else None

    def _gain(self, given: Settings, best: Settings) -> Gain | None:
        pairs: list[float] = []
        rates: dict[str, list[float]] = {"given": [], "best": []}
        measure = self._measure(self._whole, 1.0)

        def noted(settings: Settings) -> float | None:
            rate = measure(settings)
            rates["best" if settings == best else "given"] += [rate] if rate else []
            return rate

        try:
            for gain in paired_gains(given, best, noted):
                if gain is None:
                    return None
                pairs.append(gain)
        except TimeUp:
            pass
        if not pairs:
            return None
        return Gain(
            pairs=pairs,
            given_images_per_second=statistics.median(rates["given"]),
            best_images_per_second=statistics.median(rates["best"]),
        )

    def _measure(self, stage: str, until: float) -> Measure:
        """until: share of the time after which none is begun."""

        def measure(settings: Settings) -> float | None:
            if self._passed() >= until * self._seconds:
                raise TimeUp
            limit_seconds = (until + _GRACE) * self._seconds - self._passed()
            return self._try(stage, settings, limit_seconds).images_per_second

        return measure

    def _try(self, stage: str, settings: Settings, limit_seconds: float) -> Outcome:
        began, changes = self._passed(), self._changes(settings)
        outcome = self._run(stage, changes, limit_seconds)
        trial = Trial(
            stage=stage,
            changes=changes,
            images_per_second=outcome.images_per_second,
            failure=outcome.failure,
            seconds=self._passed() - began,
        )
        self._trials.append(trial)
        rate = f"{trial.images_per_second:,.1f} images/s" if trial.images_per_second else f"failed: {trial.failure}"
        say(f"{self._passed():4.0f} s  {stage}, {in_words(changes)}: {rate}")
        return outcome

    def _changes(self, settings: Settings) -> Settings:
        return {name: value for name, value in settings.items() if value != self._given[name]}

    def _passed(self) -> float:
        return self._clock() - self._began


def in_words(changes: Settings) -> str:
    """As flags of train.py."""
    flags = {name.replace("_", "-"): value for name, value in changes.items()}
    words = [
        f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
        for flag, value in flags.items()
    ]
    return " ".join(words) or "as given"


def _choice(name: str, values) -> Coordinate:
    return Coordinate(name, lambda _: [{name: value} for value in values])


def _other_decoder(decoder: str, cores: int) -> list[Settings]:
    """With as many threads as it has by default: those that are best for the one are not for the other."""
    other = "cpu" if decoder == "gpu" else "gpu"
    return [{"decoder": other, "threads": default_threads(cores, other)}]


def _micro_batches_beside(micro_batch: int, share: int) -> list[Settings]:
    """The next larger and the next smaller divisor of the rank's share: the far ones take long to try, and win seldom."""
    smaller = [size for size in range(micro_batch - 1, 0, -1) if share % size == 0][:1]
    larger = [size for size in range(micro_batch + 1, share + 1) if share % size == 0][:1]
    return [{"micro_batch": size} for size in larger + smaller]


def _compilations(*, deterministic: bool) -> list[Settings]:
    # What is chosen by its speed may be something else the next time, and then it rounds otherwise.
    modes = [mode for mode in offered("compile_mode") if not (deterministic and "autotune" in mode)]
    return [{"compile": "off"}, *({"compile": "on", "compile_mode": mode} for mode in modes)]
