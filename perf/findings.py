"""What was measured of a run, and the report made of it."""

from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from common.process import usable_cores
from common.ranks import Ranks
from engine.config import Config, default_data, parse_args, to_dict
from perf.laps import BACKWARD, DATA_WAIT, FORWARD, OPTIMIZER
from perf.machine import git_revision, hardware
from perf.report import (
    FORMAT,
    PROGRAM,
    STAGES,
    AllReduceAlone,
    Costs,
    DeviceMemory,
    Links,
    Peaks,
    Report,
    Stages,
    StepParts,
    Telemetry,
    Trace,
    TrainingParts,
    WarmUp,
)
from perf.roofline import Job, Measured, roofline
from perf.stages import Bench
from perf.telemetry import NvmlSampler, mean_watts, telemetry_of
from perf.timing import Timing, rate_of, summarise
from perf.verdict import NO_VERDICT, ceiling, judge
from pipeline.tables import ShardTable

_NOT_OF_A_PROFILE = ("out", "resume", "lr", "epochs", "steps", "checkpoint_minutes", "keep", "allow_changed_data")
_MEMORY_USED = "memory_used_bytes"


@dataclass(kw_only=True)
class Findings:
    """Of this rank; None: not measured, or there is no such thing in this run."""

    reading: Timing | None = None
    decoding: Timing | None = None
    loader: Timing | None = None
    step_without_all_reduce: Timing | None = None
    step: Timing | None = None
    all_reduce: Timing | None = None
    training: Timing | None = None
    first_batch_seconds: float | None = None
    """From making the loader to its first batch."""
    compile_seconds: float | None = None
    """Of the first pass, compilation included."""
    host_seconds: float | None = None
    """Of the host, a step."""
    all_reduce_bytes: int | None = None
    """That each rank gives, a step."""
    layer_seconds: dict[str, float] | None = None
    """Of each layer in one pass, forward and backward."""
    reserved_bytes: int | None = None
    """Of the GPU's memory, by torch, at most."""
    trace: Trace | None = None

    @property
    def timings(self) -> list[Timing]:
        """All there are."""
        return [value for value in vars(self).values() if isinstance(value, Timing)]

    @property
    def windows(self) -> dict[str, tuple[float, float]]:
        """perf_counter() at the beginning and the end of each stage of a report."""
        return {name: (timing.began, timing.ended) for name in STAGES if (timing := getattr(self, name))}


def make_report(
    bench: Bench,
    found: Findings,
    *,
    peaks: Peaks,
    links: Links | None,
    algorithm: str,
    sampler: NvmlSampler | None,
    price_per_hour: float | None,
    price_per_kwh: float | None,
) -> Report | None:
    """On rank 0; None on the others, which must call this too. algorithm: of the all-reduce, as for roofline(). sampler: of the
    first rank of each machine."""
    ranks, config = bench.ranks, bench.config
    rates = {
        name: rate_of(timing, images=bench.share, ranks=ranks) if (timing := getattr(found, name)) else None
        for name in STAGES
    }
    telemetry = telemetry_of(sampler, found.windows, ranks)
    if not ranks.is_main:
        return None
    assert found.step
    assert telemetry
    assert rates["step"]
    stages = Stages(**rates)  # type: ignore[arg-type]
    whole, busiest = (stages.training, "training") if stages.training else (stages.step, "step")
    watts = mean_watts(telemetry, busiest)
    step_parts, training_parts = _step_parts(found), _training_parts(found)
    limit = roofline(
        Job(
            arch=config.arch,
            batch_norm=config.batch_norm,
            classes=len(bench.data.classes),
            crop=config.crop,
            batch=bench.share,
            micro_batch=bench.data.micro_batch,
            precision=bench.precision.name,
            grad_compression=config.grad_compression,
            ranks=ranks.world_size,
        ),
        peaks=peaks,
        links=links,
        algorithm=algorithm,
        measured=Measured(
            step_seconds=stages.step.step_seconds.mean,
            # On a CPU they are those of GPUs that had nothing to do.
            step_joules=watts * whole.step_seconds.mean if watts and ranks.device.type == "cuda" else None,
            forward_seconds=step_parts.forward.mean,
            backward_seconds=step_parts.backward.mean,
            optimizer_seconds=step_parts.optimizer.mean,
        ),
        layer_seconds=found.layer_seconds,
    )
    report = Report(
        program=PROGRAM,
        format=FORMAT,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        git_revision=git_revision(),
        hardware=hardware(ranks),
        config=_resolved(bench, compiled=found.compile_seconds is not None),
        changed=changed(config),
        warm_up=WarmUp(
            steps=sum(timing.warm_up_steps for timing in found.timings),
            seconds=sum(timing.warm_up_seconds for timing in found.timings),
            compile_seconds=found.compile_seconds,
            first_batch_seconds=found.first_batch_seconds,
        ),
        stages=stages,
        step_parts=step_parts,
        training_parts=training_parts,
        all_reduce=AllReduceAlone(
            seconds=summarise(found.all_reduce.step_seconds), bytes_per_rank=found.all_reduce_bytes or 0
        )
        if found.all_reduce
        else None,
        host_seconds_per_step=found.host_seconds,
        memory=_memory(ranks, found, telemetry),
        trace=found.trace,
        ceiling=ceiling(
            stages,
            training_parts,
            batch_size=config.batch_size,
            ranks=ranks.world_size,
            cores_per_rank=usable_cores() / ranks.local_world_size,
        ),
        roofline=limit,
        costs=epoch_costs(
            images=bench.data.train_images,
            epochs=config.epochs,
            images_per_second=whole.images_per_second,
            images_per_joule=limit.images_per_joule,
            price_per_hour=price_per_hour,
            price_per_kwh=price_per_kwh,
        )
        if bench.has_images
        else None,
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
    """What an epoch of so many images takes at these rates.

    images_per_second: of all ranks, in training. images_per_joule: of the GPUs alone; None where it was not measured.
    price_per_hour: of all machines together. price_per_kwh: of the GPUs' energy, so the least that the power costs.
    """
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
    config, data = to_dict(bench.config), bench.data
    kind = "none"
    if data.manifest:
        kind = "shards" if isinstance(data.manifest.train, ShardTable) else "files"
    return {
        **{key: value for key, value in config.items() if key not in _NOT_OF_A_PROFILE},
        "images_in": kind,
        "micro_batch": data.micro_batch,
        "precision": bench.precision.name,
        "compile": compiled,
        "decoder": data.decoder,
        "threads": data.threads,
    }


def _step_parts(found: Findings) -> StepParts:
    """All-reduce: what the backward pass takes longer than without it, the wait for the slowest rank included."""
    assert found.step
    backward, all_reduce = found.step.part(BACKWARD), None
    if alone := found.step_without_all_reduce:
        without = min(
            (alone.part(BACKWARD), backward), key=lambda seconds: float(seconds.mean())
        )  # noise may have it longer
        backward, all_reduce = without, summarise(backward - without.mean())
    return StepParts(
        forward=summarise(found.step.part(FORWARD)),
        backward=summarise(backward),
        all_reduce=all_reduce,
        optimizer=summarise(found.step.part(OPTIMIZER)),
    )


def _training_parts(found: Findings) -> TrainingParts | None:
    if not (training := found.training):
        return None
    return TrainingParts(
        data_wait=summarise(training.part(DATA_WAIT)),
        forward=summarise(training.part(FORWARD)),
        backward=summarise(training.part(BACKWARD)),
        optimizer=summarise(training.part(OPTIMIZER)),
        step=summarise(training.step_seconds - training.part(DATA_WAIT)),
    )


def _memory(ranks: Ranks, found: Findings, telemetry: Telemetry) -> DeviceMemory | None:
    """NVML's figure holds torch's, DALI's and the contexts' memory, but only at the moments of its readings."""
    if ranks.device.type != "cuda" or found.reserved_bytes is None:
        return None
    own = torch.cuda.get_device_properties(ranks.device)
    uuid, peak = str(own.uuid).removeprefix("GPU-"), found.reserved_bytes
    for device in telemetry.devices:
        used = device.fields.get(_MEMORY_USED)
        if used and device.machine == 0 and device.uuid.removeprefix("GPU-") == uuid:
            peak = max(peak, round(used.max))
    return DeviceMemory(peak_bytes=peak, total_bytes=own.total_memory)
