"""What was measured of a run, and the report made of it."""

from dataclasses import dataclass
from datetime import datetime, timezone

from common.process import usable_cores
from common.progress import say
from common.ranks import Ranks
from engine.config import to_dict
from perf.adaptive import Timing, rate
from perf.ceiling import ceiling
from perf.communication import exposed
from perf.floor import Job
from perf.laps import BACKWARD, DATA_WAIT, FORWARD, OPTIMIZER
from perf.machine import git_revision, hardware
from perf.order_statistics import summarise
from perf.peaks import Peaks
from perf.roofline import Measured, links_of, roofline
from perf.stages import Bench
from perf.telemetry import NvmlSampler
from perf.verdict import judge
from pipeline.tables import ShardTable

_STAGES = ("reading", "decoding", "loader", "step", "training")
_MANY_OTHERS = 0.1  # of the cores
_NOT_OF_A_PROFILE = ("out", "resume", "lr", "epochs", "steps", "checkpoint_minutes", "keep", "allow_changed_data")


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

    @property
    def timings(self) -> list[Timing]:
        """All there are."""
        return [value for value in vars(self).values() if isinstance(value, Timing)]


def make_report(bench: Bench, found: Findings, peaks: Peaks, sampler: NvmlSampler) -> dict | None:
    """The content of report.json, on rank 0; None on the others, which must call this too."""
    ranks = bench.ranks
    stages: dict = dict.fromkeys(_STAGES)
    for name in _STAGES:
        if timing := getattr(found, name):
            stages[name] = rate(timing, images=bench.share, ranks=ranks)
    if not ranks.is_main:
        return None
    telemetry = {
        name: sampler.report(getattr(found, name).began, getattr(found, name).ended) for name in stages if stages[name]
    }
    training_parts = _training_parts(found)
    report = {
        "program": "throughput",
        "format": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "hardware": hardware(ranks),
        "config": _resolved(bench, compiled=found.compile_seconds is not None),
        "warm_up": {
            "steps": sum(timing.warm_up_steps for timing in found.timings),
            "seconds": sum(timing.warm_up_seconds for timing in found.timings),
            "compile_seconds": found.compile_seconds,
            "first_batch_seconds": found.first_batch_seconds,
        },
        "stages": stages,
        "step_parts": _step_parts(found),
        "training_parts": training_parts,
        "all_reduce": _all_reduce(found),
        "host_seconds_per_step": found.host_seconds,
        "ceiling": ceiling(
            stages,
            training_parts,
            batch_size=bench.config.batch_size,
            ranks=ranks.world_size,
            cores_per_rank=usable_cores() / ranks.local_world_size,
        ),
        "telemetry": {
            **sampler.report(),
            "stages": {name: part["devices"] for name, part in telemetry.items()},
            "stage_seconds": {
                name: [moment - sampler.started for moment in (getattr(found, name).began, getattr(found, name).ended)]
                for name in telemetry
            },
        },
    }
    busiest = "training" if stages["training"] else "step"
    joules = None
    if ranks.device.type == "cuda":  # otherwise they are those of GPUs that had nothing to do
        joules = _joules_a_step(telemetry[busiest], stages[busiest]["seconds_per_step"]["median"])
    report["roofline"] = _roofline(bench, peaks, report, joules)
    report["verdict"] = judge(report)
    _warn_of_others(report)
    return report


def _warn_of_others(report: dict) -> None:
    others = max(stage["cores_of_others"] for stage in report["stages"].values() if stage)
    if others > _MANY_OTHERS * report["hardware"]["cores"]:
        say(
            f"warning: other programs kept up to {others:.1f} of the {report['hardware']['cores']} cores busy meanwhile; "
            "measure again on a quiet machine"
        )


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


def _step_parts(found: Findings) -> dict:
    """Seconds of rank 0 that add up to the step. With several ranks, all_reduce is what the backward pass leaves exposed, and
    backward what it takes without."""
    assert found.step
    alone = found.step_without_all_reduce
    return {
        FORWARD: _part(found.step, FORWARD),
        BACKWARD: _part(alone or found.step, BACKWARD),
        "all_reduce": exposed(found.step, alone) if alone else None,
        OPTIMIZER: _part(found.step, OPTIMIZER),
    }


def _training_parts(found: Findings) -> dict | None:
    if not found.training:
        return None
    work = [sum(lap.values()) - lap[DATA_WAIT] for lap in found.training.laps]
    return {DATA_WAIT: _part(found.training, DATA_WAIT), "step": summarise(work)}


def _part(timing: Timing, part: str) -> dict:
    return summarise([lap[part] for lap in timing.laps])


def _all_reduce(found: Findings) -> dict | None:
    """By itself, with nothing beside it; None for a single rank."""
    if not found.all_reduce:
        return None
    return {"seconds": summarise(found.all_reduce.step_seconds), "bytes_per_rank": found.all_reduce_bytes}


def _joules_a_step(telemetry: dict, step_seconds: float) -> float | None:
    """Of one GPU, on average over those of this machine. telemetry: of a stage whose steps take so long."""
    joules = [device["energy_joules"] for device in telemetry["devices"]]
    if not joules or None in joules:
        return None
    return sum(joules) / len(joules) / telemetry["seconds"] * step_seconds


def _roofline(bench: Bench, peaks: Peaks, report: dict, joules: float | None) -> dict:
    config, parts = bench.config, report["step_parts"]
    job = Job(
        arch=config.arch,
        classes=len(bench.data.classes),
        crop=config.crop,
        batch=bench.share,
        micro_batch=bench.data.micro_batch,
        precision=bench.precision.name,
        grad_compression=config.grad_compression,
        ranks=bench.ranks.world_size,
    )
    measured = Measured(
        step_seconds=report["stages"]["step"]["seconds_per_step"]["median"],
        step_joules=joules,
        forward_seconds=parts[FORWARD]["median"],
        backward_seconds=parts[BACKWARD]["median"],
        optimizer_seconds=parts[OPTIMIZER]["median"],
    )
    return roofline(
        job, peaks=peaks, links=links_of(peaks, gpus_per_node=_ranks_a_machine(bench.ranks)), measured=measured
    )


def _ranks_a_machine(ranks: Ranks) -> int | None:
    """As they are in this run; None for a single rank, from which nothing follows for more of them."""
    if ranks.world_size == 1:
        return None
    return ranks.local_world_size if ranks.world_size % ranks.local_world_size == 0 else 1
