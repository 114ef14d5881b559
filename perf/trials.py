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
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import perf_counter
from typing import Any

import torch
from nvidia.dali import backend

from common.errors import TrainingError, UserError
from common.parent_death import end_with_torchrun
from common.ranks import Ranks, gather, ranks_of_this_run
from engine.config import Config
from perf.machine import hardware
from perf.report import Hardware
from perf.stages import (
    Bench,
    assemble_step,
    build_model,
    fed_step,
    open_bench,
    time_loader,
    time_training,
    training_step,
)
from perf.timing import Limits, rate_of

_POLL_SECONDS = 0.2
_SECONDS_TO_END = 10.0
_KILLED = "the process was killed, as the kernel does where the machine's memory is used up"

Settings = dict[str, Any]
"""Flag of train.py, as it is named in its Config → value."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The configuration as it is without changes, and where it runs."""

    hardware: Hardware
    cpu_share: int
    """Cores for each rank."""
    share: int
    """Images of each rank in a step."""
    has_images: bool
    """False for synthetic data."""
    least_micro_batch: int = 1
    """Images that a pass must have: mixed images need another one in theirs."""
    settings: Settings
    """What can be tuned, each "auto" as it came out."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one trial, of all ranks together."""

    images_per_second: float | None = None
    """None: it failed."""
    failure: str | None = None
    out_of_memory: bool = False


class Trials:
    """What the process is told, and what comes of it. Every rank makes one, and they make all calls together."""

    def __init__(self, config: Config, ranks: Ranks, limits: Limits) -> None:
        """ranks: of this process, on the CPU: the GPU is left to the trials."""
        self._config, self._ranks, self._limits = config, ranks, limits
        self._worker: tuple[BaseProcess, Connection] | None = None
        self._number = 0

    def describe(self) -> Job:
        """Open the data set, however long that takes. Raises UserError and TrainingError as a run of train.py does."""
        answer: Job | Outcome = self.run("describe", {}, math.inf)
        if isinstance(answer, Outcome):
            raise TrainingError(f"nothing could be measured: {answer.failure}")
        return answer

    def close(self) -> None:
        """End the process; the next call has a new one."""
        if self._worker:
            process, connection = self._worker
            process.kill()
            process.join()
            connection.close()
        self._worker = None

    def run(self, stage: str, changes: Settings, limit_seconds: float) -> Any:
        """Measure a stage, loader, step or training, with changes of the configuration: rank 0's Outcome, or a failed rank's."""
        deadline = perf_counter() + limit_seconds
        process, connection = self._worker = self._worker or self._start()
        with contextlib.suppress(OSError):  # it has died: no answer comes
            connection.send((stage, changes, self._number))
        self._number += 1
        own = None
        while True:
            own = own or _answer(process, connection, deadline)
            everyone = gather(own, self._ranks)
            failures = [answer for answer in everyone if isinstance(answer, Outcome) and answer.failure]
            errors = [answer for answer in everyone if isinstance(answer, (UserError, TrainingError))]
            if failures or errors:
                self.close()
                if errors:
                    raise errors[0]
                return max(failures, key=lambda failure: failure.out_of_memory)  # others may only have lost the rank
            if None not in everyone:
                return everyone[0]

    def _start(self) -> tuple[BaseProcess, Connection]:
        spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA, nor OpenMP's threads
        connection, other_end = spawn.Pipe()
        process = spawn.Process(target=serve, args=(other_end, self._config, self._limits), daemon=True)
        process.start()
        other_end.close()  # else the end of the process would not be the end of the pipe
        return process, connection


def _answer(
    process: BaseProcess, connection: Connection, deadline: float
) -> Job | Outcome | UserError | TrainingError | None:
    """What the process says within a moment; None: nothing yet."""
    try:
        if connection.poll(_POLL_SECONDS):
            return connection.recv()
    except (EOFError, OSError):
        process.join(_SECONDS_TO_END)
        if process.exitcode == -signal.SIGKILL:
            return Outcome(failure=_KILLED, out_of_memory=True)
        return Outcome(failure=f"the process ended with exit code {process.exitcode}")
    return Outcome(failure="the time was up before it ended") if perf_counter() > deadline else None


def serve(connection: Connection, config: Config, limits: Limits) -> None:
    """Answer questions until the pipe is closed."""
    end_with_torchrun()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, too, which ends this process
    os.dup2(2, 1)  # the last line on stdout is the parent's
    if "MASTER_PORT" in os.environ:  # torchrun, or else the parent of rank 0, has a store there: a second cannot listen
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        with ranks_of_this_run(config.device) as ranks:
            bench = open_bench(config, ranks, limits)
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    stage, changes, number = connection.recv()
                    connection.send(_describe(bench) if stage == "describe" else _trial(bench, stage, changes, number))
    except (UserError, TrainingError) as error:
        connection.send(error)


def _describe(bench: Bench) -> Job:
    config, data = bench.config, bench.data
    on_gpu = bench.ranks.device.type == "cuda"
    names = ("prefetch", "hw_decoder_load", "compile_mode", "fuse", "grad_compression", "pad_channels")
    return Job(
        hardware=hardware(bench.ranks),
        cpu_share=bench.ranks.cpu_share,
        share=bench.share,
        has_images=bench.has_images,
        least_micro_batch=2 if config.mixes else 1,
        settings={name: getattr(data, name) for name in ("threads", "decoder", "micro_batch")}
        | {"compile": ("on" if on_gpu else "off") if config.compile == "auto" else config.compile}
        | {name: getattr(config, name) for name in names},
    )


def _trial(bench: Bench, stage: str, changes: Settings, number: int) -> Outcome:
    # Its own seed has each trial read other images, not those that are cached by now.
    config = replace(bench.config, **changes, seed=(bench.config.seed + number) % 2**63)
    micro_batch = changes.get("micro_batch", bench.data.micro_batch)
    data = replace(bench.data, config=config, loading=config, micro_batch=micro_batch)
    try:
        rate = _measure(replace(bench, config=config, data=data), stage)
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


def _measure(bench: Bench, stage: str) -> float:
    """Images a second of all ranks."""
    if stage == "loader":
        timing, _ = time_loader(bench)
    else:
        assembly, _ = assemble_step(bench, build_model(bench))
        if bench.config.compile == "on" and not assembly.compiled:
            raise UserError("torch.compile finds no compiler")
        if stage == "step":
            timing = bench.time(training_step(bench, assembly, bench.data.resident_batches()))
        else:
            timing = time_training(bench, fed_step(bench, assembly))
    return rate_of(timing, images=bench.share, ranks=bench.ranks).images_per_second
