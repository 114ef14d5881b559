"""Short measurements of one configuration with changed settings, in a process of their own.

The process is kept from trial to trial: to start one takes longer than to measure. After a trial that fails, whatever it did
(out of memory, killed by the kernel, too slow), it is ended and the next trial gets a new one. With several ranks each has such
a process, and together they are the ranks that measure; if one fails, all are ended, since the others would wait for it.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from time import perf_counter

import torch
from nvidia.dali import backend

from common.errors import TrainingError, UserError
from common.orphans import end_with_torchrun
from common.ranks import Ranks, first_then_others, gather, ranks_of_this_run
from engine.assembly import Assembly
from engine.config import Config
from perf.coordinate_search import Settings
from perf.machine import hardware
from perf.stages import (
    Bench,
    assemble_step,
    build_model,
    open_bench,
    resident,
    time_loader,
    training_batches,
    training_step,
)
from perf.timing import Limits, Timing, rate_of

_POLL_SECONDS = 0.2
_SECONDS_TO_END = 10.0
_KILLED = "the process was killed, as the kernel does where the machine's memory is used up"


@dataclass(frozen=True, kw_only=True)
class Job:
    """The configuration as it is without changes, and where it runs."""

    hardware: dict
    """HARDWARE of a report."""
    cpu_share: int
    """Cores for each rank."""
    share: int
    """Images of each rank in a step."""
    has_images: bool
    """False for synthetic data."""
    settings: Settings
    """What can be tuned, each "auto" as it came out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one trial, of all ranks together."""

    images_per_second: float | None = None
    """Median; None: it failed."""
    failure: str | None = None
    out_of_memory: bool = False


class Trials:
    """What the process is told, and what comes of it. Every rank makes one; only rank 0 calls run(), the others follow()."""

    def __init__(self, config: Config, ranks: Ranks, limits: Limits) -> None:
        """ranks: of this process, on the CPU: the GPU is left to the trials."""
        self._config, self._ranks, self._limits = config, ranks, limits
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._number = 0

    def describe(self) -> Job:
        """Open the data set, however long that takes. Raises UserError and TrainingError as a run of train.py does."""
        answer = self._ask(("describe", {}, 0), math.inf)
        if isinstance(answer, Outcome):
            raise TrainingError(f"nothing could be measured: {answer.failure}")
        assert isinstance(answer, Job)
        return answer

    def run(self, stage: str, changes: Settings, limit_seconds: float) -> Outcome:
        """Measure a stage: loader, step or training. changes: of the configuration."""
        self._number += 1
        answer = self._ask((stage, changes, self._number), limit_seconds)
        assert isinstance(answer, Outcome)
        return answer

    def follow(self) -> None:
        """Do as rank 0 does, until it closes."""
        while order := first_then_others(self._ranks, lambda: None, lambda order: order):
            with contextlib.suppress(UserError, TrainingError):  # rank 0 raises it
                self._together(*order)
        self._end()

    def close(self) -> None:
        first_then_others(self._ranks, lambda: None, lambda order: order)
        self._end()

    def _ask(self, question: tuple, limit_seconds: float) -> Job | Outcome:
        order = first_then_others(self._ranks, lambda: (question, limit_seconds), lambda order: order)
        return self._together(*order)

    def _together(self, question: tuple, limit_seconds: float) -> Job | Outcome:
        """The own process's answer, or the failure of another rank's; every rank must call this at the same time."""
        deadline = perf_counter() + limit_seconds
        try:
            if not self._process:
                self._start()
            assert self._connection
            self._connection.send(question)
        except OSError:
            pass  # it has died: no answer comes
        own = None
        while True:
            own = own or self._answer(deadline)
            everyone = gather(own, self._ranks)
            for answer in everyone:
                if isinstance(answer, (UserError, TrainingError)):
                    self._end()
                    raise answer
            failures = [answer for answer in everyone if isinstance(answer, Outcome) and answer.failure]
            if failures:
                self._end()
                return max(failures, key=lambda failure: failure.out_of_memory)  # others may only have lost the rank
            if None not in everyone:
                assert isinstance(own, (Job, Outcome))
                return own

    def _answer(self, deadline: float) -> Job | Outcome | UserError | TrainingError | None:
        """What the process says within a moment; None: nothing yet."""
        assert self._process
        assert self._connection
        try:
            if self._connection.poll(_POLL_SECONDS):
                return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(_SECONDS_TO_END)
            if self._process.exitcode == -signal.SIGKILL:
                return Outcome(failure=_KILLED, out_of_memory=True)
            return Outcome(failure=f"the process ended with exit code {self._process.exitcode}")
        return Outcome(failure="the time was up before it ended") if perf_counter() > deadline else None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA, nor OpenMP's threads
        self._connection, other_end = spawn.Pipe()
        self._process = spawn.Process(
            target=serve, args=(other_end, self._config, self._limits), name="trials", daemon=True
        )
        self._process.start()
        other_end.close()  # else the end of the process would not be the end of the pipe

    def _end(self) -> None:
        if self._process and self._connection:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None


def serve(connection: Connection, config: Config, limits: Limits) -> None:
    """Answer questions until the pipe is closed."""
    end_with_torchrun()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, too, which ends this process
    os.dup2(2, 1)  # the last line on stdout is the parent's
    try:
        with ranks_of_this_run(config.device) as ranks:
            bench = open_bench(config, ranks, limits)
            for stage, changes, number in _questions(connection):
                connection.send(_describe(bench) if stage == "describe" else _trial(bench, stage, changes, number))
    except (UserError, TrainingError) as error:
        connection.send(error)


def _questions(connection: Connection) -> Iterator[tuple[str, Settings, int]]:
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            yield connection.recv()


def _describe(bench: Bench) -> Job:
    config, data = bench.config, bench.data
    on_gpu = bench.ranks.device.type == "cuda"
    return Job(
        hardware=hardware(bench.ranks),
        cpu_share=bench.ranks.cpu_share,
        share=bench.share,
        has_images=bench.has_images,
        settings={
            "threads": data.threads,
            "prefetch": config.prefetch,
            "decoder": data.decoder,
            "hw_decoder_load": config.hw_decoder_load,
            "micro_batch": data.micro_batch,
            "compile": ("on" if on_gpu else "off") if config.compile == "auto" else config.compile,
            "compile_mode": config.compile_mode,
            "grad_compression": config.grad_compression,
            "pad_channels": config.pad_channels,
        },
    )


def _trial(bench: Bench, stage: str, changes: Settings, number: int) -> Outcome:
    try:
        rate = _MEASURE[stage](_changed(bench, changes, number))
    except Exception as error:  # whatever it is, it must not end the search
        reason = " ".join(str(error).split()) or type(error).__name__
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in reason.lower()  # DALI's
        return Outcome(failure=reason[:300], out_of_memory=out_of_memory)
    torch._dynamo.reset()
    gc.collect()
    if bench.ranks.device.type == "cuda":  # the next one begins with all of the memory
        torch.cuda.empty_cache()
        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]
    return Outcome(images_per_second=rate)


def _changed(bench: Bench, changes: Settings, number: int) -> Bench:
    """The same with other settings; its own seed has each trial read other images, not those that are cached by now."""
    config = replace(bench.config, **changes, seed=(bench.config.seed + number) % 2**63)
    micro_batch = changes.get("micro_batch", bench.data.micro_batch)
    return replace(bench, config=config, data=replace(bench.data, config=config, micro_batch=micro_batch))


def _loader(bench: Bench) -> float:
    timing, _ = time_loader(bench)
    return _median_rate(bench, timing)


def _step(bench: Bench) -> float:
    return _median_rate(bench, bench.time(training_step(bench, _assembled(bench), resident(bench.data))))


def _training(bench: Bench) -> float:
    step = training_step(bench, _assembled(bench), training_batches(bench))
    return _median_rate(bench, bench.time(step, queue=bench.config.prefetch))


_MEASURE: dict[str, Callable[[Bench], float]] = {"loader": _loader, "step": _step, "training": _training}


def _assembled(bench: Bench) -> Assembly:
    assembly, _ = assemble_step(bench, build_model(bench))
    if bench.config.compile == "on" and not assembly.compiled:
        raise UserError("torch.compile finds no compiler")
    return assembly


def _median_rate(bench: Bench, timing: Timing) -> float:
    return rate_of(timing, images=bench.share, ranks=bench.ranks).images_per_second
