"""python profile/throughput.py [flags of train.py] [--seconds 12] [--trace] [--out DIR]: what limits a run, and what to change.

Measures in one process, with the trainer's own loader and step: reading, decoding and the loader alone; the step alone on a
batch that stays on the device, part by part; and both together, as in training. Compares them with each other and with the
hardware's limit, and says what the bottleneck is. The same under torchrun, for all ranks together.

Writes report.json, report.html and pictures into DIR, by default a new folder in runs/profile. docs/profiling.md says what
each figure is. With --tune it searches for faster settings instead, and writes a recipe (perf/tuning.py).
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import msgspec
import torch
from torch.profiler import ProfilerActivity, record_function

from common.errors import UserError
from common.files import replacing
from common.flags import FlagParser
from common.orphans import end_with_torchrun
from common.process import run_program
from common.progress import say
from common.ranks import Ranks, first_then_others, ranks_of_this_run
from engine.assembly import too_little_memory
from engine.config import Config, parse_args
from perf.findings import Findings, make_report
from perf.layers import layer_seconds
from perf.peaks import peaks_here
from perf.report import REPORT_JSON, STAGES, Peaks, Report, Trace
from perf.roofline import add_link_flags, links_from
from perf.show import write_report
from perf.stages import (
    Bench,
    all_reduce_alone,
    assemble_step,
    build_model,
    host_seconds,
    open_bench,
    resident,
    time_decoding,
    time_loader,
    time_reading,
    time_step_without_all_reduce,
    time_training,
    training_batches,
    training_step,
)
from perf.telemetry import NvmlSampler, uuids_of
from perf.timing import Limits
from perf.trace import summarise_trace
from perf.tuning import print_tuned, result, tune, write_recipe

TRACE, RECIPE = "trace.json", "recipe.yaml"
_SECONDS_A_STAGE = 12.0
_SECONDS_A_TRIAL = 1.0
_SECONDS_OF_TUNING = 120.0
_TRACED_STEPS = 3


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as train.py's."""
    return run_program(lambda: _run(argv), interrupted="interrupted; there are no results")


def _run(argv: list[str] | None) -> int:
    end_with_torchrun()
    config, options = parse(argv)
    # To tune, processes of their own measure: this one leaves the GPU to them.
    with ranks_of_this_run("cpu" if options.tune else config.device) as ranks:
        first_then_others(ranks, lambda: claim(config.out, RECIPE if options.tune else REPORT_JSON), lambda _: None)
        if options.tune:
            limits = Limits(seconds=options.seconds, steps=config.steps, least_laps=1)
            line: dict | None = tuned_line(config, ranks, limits, options.tune_seconds, argv)
        else:
            limits = Limits(seconds=options.seconds, steps=config.steps)
            report = profile(config, ranks, limits, options)
            line = write(report, config.out) if report else None
        if line:
            print(json.dumps(line), flush=True)
    return 0


def parse(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """The configuration, and this program's own options. Raises UserError."""
    parser = FlagParser(
        prog="python profile/throughput.py",
        description="Measure what limits a run. It takes all flags of train.py; --steps is the most of each stage.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"time limit of each stage, warm-up apart ({_SECONDS_A_STAGE:g}; with --tune {_SECONDS_A_TRIAL:g}); with "
        "--order window three windows of shards are read in any case",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--trace", action="store_true", help="write a torch.profiler trace of a few steps, too")
    either.add_argument("--tune", action="store_true", help=f"search for faster settings, and write them into {RECIPE}")
    parser.add_argument(
        "--tune-seconds", type=float, default=_SECONDS_OF_TUNING, help="time limit of the search (%(default)g)"
    )
    prices = parser.add_mutually_exclusive_group()
    prices.add_argument("--price-per-hour", type=float, help="of all machines together: gives what an epoch costs")
    prices.add_argument("--price-per-kwh", type=float, help="of the GPUs' energy: gives what an epoch costs")
    add_link_flags(parser)
    parser.add_argument("--out", type=Path, help="folder for the report; default: a new one in runs/profile")
    options, flags = parser.parse_known_args(argv)
    if options.seconds is None:
        options.seconds = _SECONDS_A_TRIAL if options.tune else _SECONDS_A_STAGE
    for flag, seconds in (("--seconds", options.seconds), ("--tune-seconds", options.tune_seconds)):
        if not 0 < seconds < math.inf:
            raise UserError(f"{flag} {seconds:g}: must be above 0, and a finite number")
    for flag, price in (("--price-per-hour", options.price_per_hour), ("--price-per-kwh", options.price_per_kwh)):
        if price is not None and not 0 <= price < math.inf:
            raise UserError(f"{flag} {price:g}: must be a finite number, 0 or more")
    config = parse_args(flags)
    name = f"{config.arch}-{Path(config.data).resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"
    return replace(config, out=options.out or Path("runs/profile") / name), options


def claim(out: Path, name: str) -> None:
    """Make the folder for a file of this name. Raises UserError: it cannot be written, or holds one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    if (out / name).exists():
        raise UserError(f"--out {out}: holds a {Path(name).stem} already; choose another folder")


def profile(config: Config, ranks: Ranks, limits: Limits, options: argparse.Namespace) -> Report | None:
    """Measure everything; every rank must call this. Returns the report on rank 0, None on the others.

    Raises UserError, TrainingError.
    """
    bench = open_bench(config, ranks, limits)
    peaks = [peaks_here(ranks.device, bench.precision.name)]  # on all ranks at the same time: they may share a CPU
    links = links_from(options, peaks[0], ranks_a_machine=_ranks_a_machine(ranks), ranks=ranks.world_size)
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
    sampler = NvmlSampler(_uuids(ranks)) if ranks.local_rank == 0 else None
    try:
        with sampler or nullcontext():
            found = run_stages(bench, config.out / TRACE if options.trace else None)
    except torch.OutOfMemoryError as error:
        raise too_little_memory(bench.data.micro_batch) from error
    peaks.append(peaks_here(ranks.device, bench.precision.name))  # another program may have disturbed the first
    return make_report(
        bench,
        found,
        peaks=best_of(peaks),
        links=links,
        algorithm=options.all_reduce,
        sampler=sampler,
        price_per_hour=options.price_per_hour,
        price_per_kwh=options.price_per_kwh,
    )


def best_of(peaks: Sequence[Peaks]) -> Peaks:
    """Of the same device, measured several times."""
    return msgspec.structs.replace(
        peaks[0],
        flops_per_second=max(each.flops_per_second for each in peaks),
        bytes_per_second=max(each.bytes_per_second for each in peaks),
    )


def run_stages(bench: Bench, trace: Path | None) -> Findings:
    """Measure one stage after the other; every rank must call this. trace: the file to write one to."""
    ranks, found = bench.ranks, Findings()
    windows = ", or three windows of shards" if bench.config.order == "window" else ""

    def begin(stage: str) -> None:
        if ranks.is_main:
            fed = windows if stage in ("reading", "the loader", "training") else ""
            say(f"measuring {stage}, for up to {bench.limits.seconds:g} s{fed}")

    if bench.has_images:
        begin("reading")
        found.reading = time_reading(bench)
        begin("decoding")
        found.decoding = time_decoding(bench)
        begin("the loader")
        found.loader, found.first_batch_seconds = time_loader(bench)
    model = build_model(bench)
    if ranks.world_size > 1:
        begin("the step without its all-reduce")
        found.step_without_all_reduce = time_step_without_all_reduce(bench, model)
    begin("the step")
    assembly, first_pass_seconds = assemble_step(bench, model)
    found.compile_seconds = first_pass_seconds if assembly.compiled else None
    step = training_step(bench, assembly, resident(bench.data))
    found.step = bench.time(step)
    found.host_seconds = host_seconds(bench, assembly, step)
    if ranks.world_size > 1:
        begin("the all-reduce")
        reduce, found.all_reduce_bytes = all_reduce_alone(assembly.network, bench.config.grad_compression)
        found.all_reduce = bench.time(reduce)
    if bench.has_images:
        begin("training")
        step = training_step(bench, assembly, training_batches(bench))
        found.training = time_training(bench, step)
    if ranks.device.type == "cuda":
        found.reserved_bytes = torch.cuda.max_memory_reserved(ranks.device)
    found.trace = traced(step, ranks, trace)
    del step, assembly, model  # their memory is the next network's
    # Eager, one layer after the other, of a network of its own: DDP's and the compiler's hooks are of the whole.
    found.layer_seconds = layer_seconds(
        build_model(bench), next(resident(bench.data)), precision=bench.precision, device=ranks.device
    )
    return found


def traced(step: Callable[[], object], ranks: Ranks, path: Path | None) -> Trace | None:
    """A few steps of rank 0 under torch.profiler; every rank must call this. path: of a file for ui.perfetto.dev.

    None on the other ranks, and where the profiler sees no kernels: on some machines only root may.
    """
    on_gpu = ranks.device.type == "cuda"
    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu])
    with profiler if ranks.is_main else nullcontext():
        for _ in range(_TRACED_STEPS):
            with record_function("step"):  # else the trace would begin after the first wait for a batch
                step()
        if on_gpu:
            torch.cuda.synchronize(ranks.device)
    if not ranks.is_main:
        return None
    if path:
        profiler.export_chrome_trace(str(path))
    try:
        return summarise_trace(profiler, steps=_TRACED_STEPS, on_gpu=on_gpu)
    except ValueError as error:
        say(f"warning: no kernels in the report: {error}")
        return None


def tuned_line(
    config: Config, ranks: Ranks, limits: Limits, tune_seconds: float, argv: list[str] | None
) -> dict | None:
    """Search for faster settings, write the recipe, print the tables; every rank must call this.

    Returns what the last line says on rank 0, None on the others. Raises UserError, TrainingError.
    """
    found = tune(config, ranks, limits=limits, seconds=tune_seconds)
    if not found:
        return None
    job, tuned = found
    command = shlex.join(["python", "profile/throughput.py", *(sys.argv[1:] if argv is None else argv)])
    write_recipe(config.out / RECIPE, job, tuned, command)
    print_tuned(tuned)
    return result(config, job, tuned, tune_seconds=tune_seconds, recipe=config.out / RECIPE)


def write(report: Report, out: Path) -> dict:
    """Write report.json and what shows it, print the tables. Returns what the last line says. Raises UserError."""
    path = out / REPORT_JSON
    try:
        with replacing(path) as file:
            file.write(msgspec.json.encode(report) + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    shown = write_report(report, out)
    rates = {name: getattr(report.stages, name) for name in STAGES}
    return {
        "program": report.program,
        "arch": report.config["arch"],
        "data": report.config["data"],
        "images_per_second": {name: rate and round(rate.images_per_second, 2) for name, rate in rates.items()},
        "ceiling": msgspec.to_builtins(report.ceiling),
        "verdict": msgspec.to_builtins(report.verdict),
        "report": str(path),
        **shown,
    }


def _uuids(ranks: Ranks) -> list[str] | None:
    """Of the GPUs of all ranks of this machine."""
    if ranks.device.type != "cuda":
        return None
    return [uuid for rank in range(ranks.local_world_size) for uuid in uuids_of(torch.device("cuda", rank)) or []]


def _ranks_a_machine(ranks: Ranks) -> int | None:
    """As they are in this run; None for a single rank, from which nothing follows for more of them."""
    if ranks.world_size == 1:
        return None
    return ranks.local_world_size if ranks.world_size % ranks.local_world_size == 0 else 1
