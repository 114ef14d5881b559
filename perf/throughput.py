"""What `python profile/throughput.py` does: measure a run's stages one after the other, and make the report of them."""

import argparse
import json
import shlex
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import torch

from common.errors import UserError
from common.files import replacing, writing_to
from common.flags import FlagParser, above_zero
from common.parent_death import end_with_torchrun
from common.process import run_program, usable_cores
from common.ranks import Ranks, on_rank_0, ranks_of_this_run
from engine.config import Config, default_data, parse_args, to_dict
from engine.monitoring.gpu_curves import gpus_of_this_machine
from engine.training.assembly import too_little_memory
from perf.costs import Job
from perf.laps import BACKWARD, DATA_WAIT, FORWARD, OPTIMIZER
from perf.machine import git_revision, hardware
from perf.peaks import peaks_here
from perf.report import (
    FORMAT,
    PROGRAM,
    REPORT_JSON,
    STAGES,
    AllReduceAlone,
    Costs,
    DeviceMemory,
    Links,
    Peaks,
    Report,
    Stages,
    Telemetry,
    TrainingParts,
    WarmUp,
)
from perf.roofline import roofline
from perf.scaling import add_link_flags, links_from
from perf.show import write_report
from perf.stages import ALL_REDUCE, WITHOUT_ALL_REDUCE, Bench, Findings, open_bench, run_stages
from perf.telemetry import NvmlSampler, mean_watts, telemetry_of
from perf.timing import Limits, rate_of, step_parts, summarise
from perf.tuning import print_tuned, result, tune, write_recipe
from perf.verdict import NO_VERDICT, ceiling, judge
from pipeline.shards.shard_table import ShardTable

TRACE, RECIPE = "trace.json", "recipe.yaml"
_SECONDS_A_STAGE, _SECONDS_A_TRIAL, _SECONDS_OF_TUNING = 12.0, 1.0, 120.0
_NOT_OF_A_PROFILE = ("out", "resume", "lr", "epochs", "steps", "checkpoint_minutes", "keep", "allow_changed_data")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as train.py's."""
    return run_program(lambda: _run(argv), interrupted="interrupted; there are no results")


def _run(argv: list[str] | None) -> int:
    end_with_torchrun()
    config, options = parse(argv)
    # To tune, processes of their own measure: this one leaves the GPU to them.
    with ranks_of_this_run("cpu" if options.tune else config.device) as ranks:
        on_rank_0(ranks, lambda: claim(config.out, RECIPE if options.tune else REPORT_JSON))
        if options.tune:
            command = shlex.join(["python", "profile/throughput.py", *(sys.argv[1:] if argv is None else argv)])
            line = _tune(config, ranks, options, command)
        else:
            report = profile(config, ranks, options)
            line = write(report, config.out) if report else None
        if line:
            print(json.dumps(line), flush=True)
    return 0


def parse(argv: list[str] | None) -> tuple[Config, argparse.Namespace]:
    """The configuration, and this program's own options. Raises UserError."""
    parser = FlagParser(
        prog="python profile/throughput.py",
        description="Measure what limits a run. It takes all flags of train.py; --steps limits the steps of each stage.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        type=above_zero,
        help=f"time limit of each stage ({_SECONDS_A_STAGE:g}; with --tune {_SECONDS_A_TRIAL:g}). Not counted in it: three "
        "steps of warm-up, and what lay ready in queues. At least three steps are measured however long they take (one with "
        "--tune), or three windows of shards with --order window",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--trace", action="store_true", help="also write the torch.profiler trace of a few steps")
    either.add_argument("--tune", action="store_true", help=f"search for faster settings, and write them into {RECIPE}")
    limit = "time limit of the search in seconds (%(default)g)"
    parser.add_argument("--tune-seconds", type=above_zero, default=_SECONDS_OF_TUNING, help=limit)
    prices = parser.add_mutually_exclusive_group()
    prices.add_argument(
        "--price-per-hour", type=above_zero, help="of all machines together: gives the cost of an epoch"
    )
    prices.add_argument("--price-per-kwh", type=above_zero, help="of the GPUs' energy: gives the cost of an epoch")
    add_link_flags(parser)
    parser.add_argument("--out", type=Path, help="folder for the report; default: a new one in runs/profile")
    options, flags = parser.parse_known_args(argv)
    options.seconds = options.seconds or (_SECONDS_A_TRIAL if options.tune else _SECONDS_A_STAGE)
    config = parse_args(flags)
    if config.frozen_blocks or config.head_epochs:
        raise UserError("--freeze and --head-epochs: the limits here are those of training all layers; leave both out")
    name = f"{config.arch}-{Path(config.data).resolve().name}-{datetime.now():%Y%m%d-%H%M%S}"
    return replace(config, out=options.out or Path("runs/profile") / name), options


def claim(out: Path, name: str) -> None:
    """Make the folder for a file of this name. Raises UserError: it cannot be written, or holds one."""
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    if (out / name).exists():
        raise UserError(f"--out {out}: holds a {Path(name).stem} already; choose another folder")


def _tune(config: Config, ranks: Ranks, options: argparse.Namespace, command: str) -> dict | None:
    """Every rank must call this. Returns what the last line says on rank 0, None on the others."""
    limits = Limits(seconds=options.seconds, steps=config.steps, least_laps=1)
    if not (found := tune(config, ranks, limits=limits, seconds=options.tune_seconds)):
        return None
    write_recipe(config.out / RECIPE, *found, command)
    print_tuned(found[1])
    return result(config, *found, tune_seconds=options.tune_seconds, recipe=config.out / RECIPE)


def profile(config: Config, ranks: Ranks, options: argparse.Namespace) -> Report | None:
    """Measure everything; every rank must call this. Returns the report on rank 0, None on the others.

    Raises UserError, TrainingError.
    """
    bench = open_bench(config, ranks, Limits(seconds=options.seconds, steps=config.steps))
    peaks = peaks_here(ranks.device, bench.precision.name)  # on all ranks at the same time: they may share a CPU
    machine = ranks.local_world_size
    # Nothing follows from a single rank for more of them.
    ranks_a_machine = None if ranks.world_size == 1 else 1 if ranks.world_size % machine else machine
    links = links_from(options, peaks, ranks_a_machine=ranks_a_machine, ranks=ranks.world_size)
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
    sampler = NvmlSampler(gpus_of_this_machine(ranks)) if ranks.local_rank == 0 else None
    try:
        with sampler or nullcontext():
            found = run_stages(bench, config.out / TRACE if options.trace else None)
    except torch.OutOfMemoryError as error:
        raise too_little_memory(bench.data.micro_batch) from error
    again = peaks_here(ranks.device, bench.precision.name)  # another program may have disturbed the first
    peaks = msgspec.structs.replace(
        peaks,
        flops_per_second=max(peaks.flops_per_second, again.flops_per_second),
        bytes_per_second=max(peaks.bytes_per_second, again.bytes_per_second),
    )
    return _report(config, bench, found, peaks, links, sampler, options)


def _report(
    asked: Config,
    bench: Bench,
    found: Findings,
    peaks: Peaks,
    links: Links | None,
    sampler: NvmlSampler | None,
    options: argparse.Namespace,
) -> Report | None:
    """On rank 0; None on the others, which must call this too. asked: as the flags have it, before what "auto" came to.
    sampler: of the first rank of each machine."""
    ranks, config, data, timings = bench.ranks, bench.config, bench.data, found.timings
    measured = {name: timings[name] for name in STAGES if name in timings}
    rates = {name: rate_of(timing, images=bench.share, ranks=ranks) for name, timing in measured.items()}
    windows = {name: (timing.began, timing.ended) for name, timing in measured.items()}
    telemetry = telemetry_of(sampler, windows, ranks)
    if not ranks.is_main:
        return None
    assert telemetry
    rated = Stages(**{name: rates.get(name) for name in STAGES})  # type: ignore[arg-type]
    whole, busiest = (rated.training, "training") if rated.training else (rated.step, "step")
    watts = mean_watts(telemetry, busiest)
    parts = step_parts(timings["step"], timings.get(WITHOUT_ALL_REDUCE))
    training_parts = all_reduce = None
    if training := timings.get("training"):
        training_parts = TrainingParts(
            step=summarise(training.step_seconds - training.part(DATA_WAIT)),
            **{part: summarise(training.part(part)) for part in (DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER)},
        )
    if alone := timings.get(ALL_REDUCE):
        all_reduce = AllReduceAlone(seconds=summarise(alone.step_seconds), bytes_per_rank=found.all_reduce_bytes)
    limit = roofline(
        replace(Job.of(data), sharing=found.sharing),
        peaks=peaks,
        links=links,
        algorithm=options.all_reduce,
        step_seconds=rated.step.step_seconds.mean,
        # On a CPU they are those of GPUs that had nothing to do.
        step_joules=watts * whole.step_seconds.mean if watts and ranks.device.type == "cuda" else None,
        parts=parts,
        layer_seconds=found.layer_seconds,
    )
    costs = None
    if bench.has_images:
        costs = epoch_costs(
            images=data.train_images,
            epochs=config.epochs,
            images_per_second=whole.images_per_second,
            images_per_joule=limit.images_per_joule,
            price_per_hour=options.price_per_hour,
            price_per_kwh=options.price_per_kwh,
        )
    report = Report(
        program=PROGRAM,
        format=FORMAT,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        git_revision=git_revision(),
        hardware=hardware(ranks),
        config=_resolved(bench, compiled=found.compile_seconds is not None),
        changed=changed(asked),
        warm_up=WarmUp(
            steps=sum(timing.warm_up_steps for timing in timings.values()),
            seconds=sum(timing.warm_up_seconds for timing in timings.values()),
            compile_seconds=found.compile_seconds,
            first_batch_seconds=found.first_batch_seconds,
        ),
        stages=rated,
        step_parts=parts,
        training_parts=training_parts,
        all_reduce=all_reduce,
        host_seconds_per_step=found.host_seconds,
        memory=peak_memory(ranks, found.reserved_bytes, telemetry),
        trace=found.trace,
        ceiling=ceiling(
            rated,
            training_parts,
            batch_size=config.batch_size,
            ranks=ranks.world_size,
            cores_per_rank=usable_cores() / ranks.local_world_size,
        ),
        roofline=limit,
        costs=costs,
        telemetry=telemetry,
        verdict=NO_VERDICT,
    )
    report.verdict = judge(report)
    return report


def epoch_costs(
    *,
    images: int,
    epochs: int,
    images_per_second: float,
    images_per_joule: float | None,
    price_per_hour: float | None = None,
    price_per_kwh: float | None = None,
) -> Costs:
    """What an epoch takes at the rate of all ranks in training. images_per_joule: of the GPUs alone; None: not measured.
    price_per_hour: of all machines together. price_per_kwh: of the GPUs' energy, so the least that the power costs."""
    seconds, joules = images / images_per_second, images / images_per_joule if images_per_joule else None
    price = basis = None
    if price_per_hour is not None:
        price, basis = price_per_hour * seconds / 3600, f"--price-per-hour {price_per_hour:g}"
    elif price_per_kwh is not None:
        price, basis = joules and price_per_kwh * joules / 3.6e6, f"--price-per-kwh {price_per_kwh:g}"
    return Costs(epochs=epochs, seconds=seconds, joules=joules, price=price, price_basis=basis)


def changed(config: Config) -> list[str]:
    """The keys whose values are not the defaults for this data set, in the order of --help."""
    default = to_dict(parse_args(["--data", config.data])) | {"data": default_data()}
    return [key for key, value in to_dict(config).items() if key not in _NOT_OF_A_PROFILE and value != default[key]]


def _resolved(bench: Bench, *, compiled: bool) -> dict:
    """The configuration, with what each "auto" came to."""
    data = bench.data
    kind = "none"
    if data.manifest:
        kind = "shards" if isinstance(data.manifest.train, ShardTable) else "files"
    return {key: value for key, value in to_dict(bench.config).items() if key not in _NOT_OF_A_PROFILE} | {
        "images_in": kind,
        "micro_batch": data.micro_batch,
        "precision": bench.precision.name,
        "compile": compiled,
        "decoder": data.decoder,
        "threads": data.threads,
    }


def peak_memory(ranks: Ranks, reserved: int, telemetry: Telemetry) -> DeviceMemory | None:
    """Of this rank's GPU. NVML's figure has DALI's and the contexts' memory, too, but only at the moments of its readings."""
    if ranks.device.type != "cuda":
        return None
    own = torch.cuda.get_device_properties(ranks.device)
    ours = [each for each in telemetry.devices if each.machine == 0 and each.uuid.endswith(str(own.uuid))]
    used = [round(memory.max) for each in ours if (memory := each.fields.get("memory_used_bytes"))]
    return DeviceMemory(peak_bytes=max([reserved, *used]), total_bytes=own.total_memory)


def write(report: Report, out: Path) -> dict:
    """Write report.json and what shows it, print the tables. Returns what the last line says. Raises UserError."""
    path = out / REPORT_JSON
    with writing_to(path), replacing(path) as file:
        file.write(msgspec.json.encode(report) + b"\n")
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
