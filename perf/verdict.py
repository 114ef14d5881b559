"""What limits a run: one word, the two numbers that show it, and the flags of train.py to try next, in order.

The questions are asked in this order, and the first yes is the verdict:

throttled      does the GPU hold its clock down, for heat or for want of power?
input          is the loader alone slower than the step alone, or does a GPU wait for images?
launch         does the host need about as long to hand out a step as the device to do it?
communication  is the exposed all-reduce a third of the step?  } the larger of the two
optimizer      is the update a third of the step?              }
memory         do most of the step's layers move data for longer, at the hardware's peak, than they compute?
compute        none of these: the time goes into the network's arithmetic
"""

from collections.abc import Callable
from typing import NamedTuple

from perf.ceiling import SHARED_CORES

_CLOCK_HELD_DOWN = ("hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake")
_THROTTLED_SHARE = 0.1  # of the samples
_POWER_CAP_SHARE = 0.5
# A card at its power limit lowers its clock in every large matrix product: that is its speed. Far below, something is wrong.
_POWER_CAP_CLOCK = 0.7
_WAIT_SHARE = 0.05  # of a training step on a GPU, beside which the loader has cores of its own
_HOST_SHARE_ON_GPU = 0.9  # host and device work at the same time
_HOST_SHARE_ON_CPU = 0.5  # there, one after the other
_LARGE_PART = 1 / 3  # of the step: all but the network's own passes is overhead


class _Finding(NamedTuple):
    bound: str
    sentence: str
    evidence: list[tuple[str, float, str]]
    """Two figures: name, value, unit."""
    try_next: list[tuple[str, str]]
    """Flags, and why."""


def judge(report: dict) -> dict:
    """The VERDICT of a report: a function of its other keys alone."""
    questions: tuple[Callable[[dict], _Finding | None], ...] = (_throttled, _input, _launch, _overhead, _memory)
    answers = (question(report) for question in questions)
    finding = next(filter(None, answers), None) or _compute(report)
    return {
        "bound": finding.bound,
        "sentence": finding.sentence,
        "evidence": [{"name": name, "value": value, "unit": unit} for name, value, unit in finding.evidence],
        "try": [{"flags": flags, "why": why} for flags, why in finding.try_next],
    }


# ---- the questions -----------------------------------------------------------------------------------------------


def _throttled(report: dict) -> _Finding | None:
    if not _on_gpu(report):
        return None
    devices = report["telemetry"]["stages"].get("training") or report["telemetry"]["stages"].get("step") or []
    worst: tuple[float, str, float] = (0.0, "", 1.0)
    for device in devices:
        clock = device["fields"].get("sm_clock_mhz")
        relative_clock = clock["median"] / clock["max"] if clock and clock["max"] else 1.0
        shares = device["throttled_fraction"] or {}
        for reason in (*_CLOCK_HELD_DOWN, "sw_power_cap"):
            share = shares.get(reason) or 0.0
            if reason == "sw_power_cap":
                counts = share >= _POWER_CAP_SHARE and relative_clock <= _POWER_CAP_CLOCK
            else:
                counts = share >= _THROTTLED_SHARE
            if counts and share > worst[0]:
                worst = share, reason, relative_clock
    share, reason, relative_clock = worst
    if not reason:
        return None
    cause = "want of power" if "power" in reason else "heat"
    return _Finding(
        "throttled",
        f"Throttled: for {share:.0%} of the time the GPU held its clock down ({reason}). No flag of the training helps "
        f"against {cause}: look at cooling, power limit and neighbours (nvidia-smi -q -d PERFORMANCE,POWER,TEMPERATURE).",
        [(f"time with {reason}", 100 * share, "%"), ("median SM clock, of the highest", 100 * relative_clock, "%")],
        [],
    )


def _input(report: dict) -> _Finding | None:
    loader, step, parts = report["stages"]["loader"], report["stages"]["step"], report["training_parts"]
    if loader is None or parts is None:
        return None
    loader_rate, step_rate = (_images_per_second(stage, report) for stage in (loader, step))
    wait, work = parts["data_wait"]["median"], parts["step"]["median"]
    wait_share = wait / (wait + work)
    if loader_rate < step_rate:
        evidence = [("loader alone", loader_rate, "images/s"), ("step alone", step_rate, "images/s")]
        begin = (
            f"Input-bound: the loader alone makes {loader_rate:,.0f} images/s, the step alone takes {step_rate:,.0f}"
        )
    elif _on_gpu(report) and wait_share > _WAIT_SHARE:
        evidence = [("data wait, of a training step", 100 * wait_share, "%"), ("loader alone", loader_rate, "images/s")]
        begin = f"Input-bound: {wait_share:.0%} of each training step the GPU waits for images"
    else:
        return None
    if loader_rate >= step_rate and report["config"]["decoder"] == "gpu":
        return _Finding(
            "input",
            f"{begin}, though the loader alone makes more than the step takes: its decoder shares the GPU with the step.",
            evidence,
            _for_a_shared_gpu(report),
        )
    part = _slow_part_of_the_loader(report)
    rate = _images_per_second(report["stages"][part], report)
    return _Finding(
        "input",
        f"{begin}. Its slower part is {part}, {rate:,.0f} images/s by itself.",
        evidence,
        _for_input(report, part),
    )


def _launch(report: dict) -> _Finding | None:
    host = report["host_seconds_per_step"]
    if host is None:
        return None
    step = report["stages"]["step"]["seconds_per_step"]["median"]
    if host < (_HOST_SHARE_ON_GPU if _on_gpu(report) else _HOST_SHARE_ON_CPU) * step:
        return None
    return _Finding(
        "launch",
        f"Launch-bound: the host needs {_ms(host)} to hand out a step, which takes {_ms(step)}: the kernels are too short.",
        [("host, a step", 1e3 * host, "ms"), ("step alone", 1e3 * step, "ms")],
        _for_launch(report),
    )


def _overhead(report: dict) -> _Finding | None:
    parts, step = report["step_parts"], report["stages"]["step"]["seconds_per_step"]["median"]
    seconds = {name: parts[name]["median"] for name in ("all_reduce", "optimizer") if parts[name]}
    largest = max(seconds, key=lambda name: seconds[name])
    share = seconds[largest] / step
    if share < _LARGE_PART:
        return None
    if largest == "optimizer":
        return _Finding(
            "optimizer",
            f"Optimizer-bound: the update takes {share:.0%} of the step, whatever its number of images.",
            [("optimizer", 1e3 * seconds[largest], "ms"), ("step alone", 1e3 * step, "ms")],
            _larger_batches(report, "one update for more images"),
        )
    return _Finding(
        "communication",
        f"Communication-bound: the all-reduce adds {_ms(seconds[largest])} to the backward pass, {share:.0%} of the step.",
        [("all-reduce, exposed", 1e3 * seconds[largest], "ms"), ("step alone", 1e3 * step, "ms")],
        _for_communication(report),
    )


def _memory(report: dict) -> _Finding | None:
    share = _share_that_memory_limits(report)
    if share <= 0.5:
        return None
    return _Finding(
        "memory",
        f"Memory-bound: at the hardware's peaks, layers that wait for memory take {share:.0%} of forward and backward.",
        [
            ("layers that memory limits, of the floor", 100 * share, "%"),
            ("forward and backward, of the step alone", 100 * _share_of_passes(report), "%"),
        ],
        _for_memory(report),
    )


def _compute(report: dict) -> _Finding:
    share, mfu = _share_of_passes(report), report["roofline"]["mfu"]
    return _Finding(
        "compute",
        f"Compute-bound: forward and backward take {share:.0%} of the step, at {mfu:.0%} of the hardware's peak FLOP/s.",
        [("forward and backward, of the step alone", 100 * share, "%"), ("MFU of the step alone", 100 * mfu, "%")],
        _for_compute(report),
    )


# ---- the figures -------------------------------------------------------------------------------------------------


def _on_gpu(report: dict) -> bool:
    return report["hardware"]["device"] == "cuda"


def _images_per_second(stage: dict, report: dict) -> float:
    """Of all ranks, if each is as slow as the slowest: they wait for each other."""
    return stage["images_per_second_per_rank"] * report["hardware"]["ranks"]


def _slow_part_of_the_loader(report: dict) -> str:
    return min(("reading", "decoding"), key=lambda name: _images_per_second(report["stages"][name], report))


def _share_that_memory_limits(report: dict) -> float:
    """Of the floor of all layers, the part of those whose bytes take longer than their FLOPs."""
    peaks, layers = report["roofline"]["peaks"], report["roofline"]["layers"]
    seconds = [
        (
            layer["floor_seconds"],
            layer["bytes"] / peaks["bytes_per_second"] > layer["flops"] / peaks["flops_per_second"],
        )
        for layer in layers
    ]
    return sum(floor for floor, by_memory in seconds if by_memory) / sum(floor for floor, _ in seconds)


def _share_of_passes(report: dict) -> float:
    """Of the step alone: forward and backward."""
    parts, step = report["step_parts"], report["stages"]["step"]["seconds_per_step"]["median"]
    return (parts["forward"]["median"] + parts["backward"]["median"]) / step


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


# ---- the flags ---------------------------------------------------------------------------------------------------


def _for_input(report: dict, part: str) -> list[tuple[str, str]]:
    config, cores = report["config"], report["hardware"]["cores"]
    shards = config["images_in"] == "shards"
    flags = []
    if part == "reading":
        if shards:
            threads = config["read_threads"]
            flags.append((f"--read-threads {2 * threads if threads else 64}", "more requests to the storage at a time"))
            flags.append((f"--read-ahead {2 * config['read_ahead']}", "evens out slow requests"))
            if config["order"] == "global":
                flags.append(("--order window", "reads shards from end to end"))
        else:
            flags.append((f"--threads {2 * config['threads']}", "more files are read at a time; waiting costs no core"))
            flags.append((f"--prefetch {2 * config['prefetch']}", "evens out slow files"))
    else:
        if _on_gpu(report) and config["decoder"] == "cpu":
            flags.append(("--decoder gpu", "the GPU decodes JPEGs, some with an engine of their own"))
        elif config["threads"] < cores + 1 and report["hardware"]["ranks"] == 1:
            flags.append((f"--threads {cores + 1}", f"there are {cores} cores, and one thread waits at times"))
    if not shards:
        flags.append(("--data PREPARED", "what pipeline.prepare makes: smaller images in few large files"))
    return flags


def _for_a_shared_gpu(report: dict) -> list[tuple[str, str]]:
    cores = report["hardware"]["cores"]
    flags = [("--decoder cpu", f"leaves the GPU to the step; this machine has {cores} cores for all of its GPUs")]
    if report["config"]["images_in"] == "files":
        flags.append(("--data PREPARED", "what pipeline.prepare makes: less to decode"))
    return flags


def _for_launch(report: dict) -> list[tuple[str, str]]:
    compiled = [] if report["config"]["compile"] else [("--compile", "fewer and longer kernels")]
    return [*_larger_passes(report), *compiled, *_larger_batches(report, "the same kernels for more images")]


def _for_communication(report: dict) -> list[tuple[str, str]]:
    flags = [("--grad-compression bf16", "half the bytes")] if report["config"]["grad_compression"] == "none" else []
    return [*flags, *_larger_batches(report, "one all-reduce for more images")]


def _for_memory(report: dict) -> list[tuple[str, str]]:
    config, flags = report["config"], []
    if not config["compile"]:
        flags.append(("--compile", "fuses operators, so that activations are read and written less often"))
    if _on_gpu(report) and config["precision"] == "fp32":
        flags.append(("--precision bf16", "half the bytes of every activation"))
    return [*flags, *_larger_passes(report), *_larger_batches(report, "the weights are read once for more images")]


def _for_compute(report: dict) -> list[tuple[str, str]]:
    config, flags = report["config"], []
    if _on_gpu(report) and config["precision"] == "fp32":
        flags.append(("--precision bf16", "tensor cores compute it many times faster"))
    if not _on_gpu(report) and config["precision"] != "fp32":
        flags.append(("--precision fp32", "most CPUs compute the others many times slower"))
    if not config["compile"]:
        flags.append(("--compile", "fuses what lies between the convolutions"))
    elif _on_gpu(report) and config["compile_mode"] == "default":
        flags.append(("--compile-mode max-autotune-no-cudagraphs", "tries more kernels for each layer"))
    flags += _larger_passes(report)
    if report["ceiling"]["set_by"] == SHARED_CORES and config["threads"] > 1:
        flags.append((f"--threads {config['threads'] - 1}", "leaves more of the shared cores to the step"))
    return flags


def _larger_passes(report: dict) -> list[tuple[str, str]]:
    share, micro_batch = report["config"]["batch_size"] // report["hardware"]["ranks"], report["config"]["micro_batch"]
    return [(f"--micro-batch {min(share, 2 * micro_batch)}", "fewer, larger passes")] if micro_batch < share else []


def _larger_batches(report: dict, why: str) -> list[tuple[str, str]]:
    return [(f"--batch-size {2 * report['config']['batch_size']}", f"{why}; --lr has to grow with it")]
