"""What limits a run: the questions that perf/verdict.py asks a report, each with its two figures and the flags to try next.

The first yes is the answer:

throttled      does the GPU hold its clock down, for heat or for want of power?
input          is the loader alone slower than the step alone, or does a GPU wait for images?
launch         does the host need about as long to hand out a step as the device to do it?
communication  is the exposed all-reduce a third of the step?  } the larger of the two
optimizer      is the update a third of the step?              }

What is left is forward and backward. Their time is divided into arithmetic at the hardware's peak rate, the traffic of memory
that does not fit beside it at the memory's peak rate (perf/costs.py; with bias and ReLU as kernels of their own), and what
neither explains:

kernels        is more left unexplained than a good implementation leaves?
memory         is the traffic more than the arithmetic?
compute        neither: the time goes into the network's arithmetic
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from perf import advice
from perf.advice import on_gpu
from perf.report import Advice, Device, Report, TrainingParts

_THROTTLED_SHARE = 0.1  # of the samples
_POWER_CAP_SHARE = 0.5
# A card at its power limit lowers its clock in every large matrix product: that is its speed. Far below, something is wrong.
_POWER_CAP_CLOCK = 0.7
_LOWERED_LIMIT = 0.95  # of the card's default limit
_HELD_DOWN = {
    "hw_thermal": "heat (look at the cooling)",
    "sw_thermal": "heat (look at the cooling)",
    "hw_power_brake": "a power brake (the machine's power supply asked for it: look at that, and at the rack's)",
}
_WAIT_SHARE = 0.05  # of a training step on a GPU, beside which the loader has cores of its own
_HOST_SHARE_ON_GPU = 0.9  # host and device work at the same time
_HOST_SHARE_ON_CPU = 0.5  # there, one after the other
_LARGE_PART = 1 / 3  # of the step: all but the network's own passes is overhead
# How much of forward and backward the floor explains. On an H100, D in bf16 (docs/gpu/nvidia-h100-80gb-hbm3.json): 0.76
# compiled (256 images: 40.8 of 53.7 ms), 0.60 of torchvision's, not compiled (128 images: 24.0 of 40.2 ms, an update of 1.0 ms
# taken off). On two cores of an AMD EPYC it was 1 / 2.1 at most (docs/profiling.md), by the fused floor of the whole step.
_EXPLAINED_ON_GPU = 0.5
_EXPLAINED_ON_CPU = 0.25
# What torch.compile leaves of the traffic that fusing everything would save. Of a convolution's 9 passes over its output (bias 2,
# ReLU 2; backward ReLU 3, the bias's gradient 1, the output's gradient once more 1) it joins two pairs, which saves 3.
_LEFT_BY_COMPILING = 2 / 3


class Finding(NamedTuple):
    bound: str
    sentence: str
    evidence: list[tuple[str, float, str]]  # two figures: name, value, unit
    tries: Sequence[Advice] = ()  # empty: those of its bound


class Scale(NamedTuple):
    """Where in its interval each rate is assumed to be, as a factor; of the wait for images, a share of the training step that is
    added."""

    loader: float = 1.0
    step: float = 1.0
    wait: float = 0.0


def answer(report: Report, scale: Scale) -> Finding:
    return _input(report, scale) or _launch(report, scale) or _overhead(report) or _forward_and_backward(report, scale)


# ---- the questions ----------------------------------------------------------------------------------------------------


def throttled(report: Report) -> Finding | None:
    stages = report.telemetry.stages
    devices = stages.get("training") or stages.get("step") or []
    if not on_gpu(report) or not devices:
        return None
    share, reason, cause, gpu = max((_held_down(device) for device in devices), key=lambda found: found[0])
    if not share:
        return None
    name = f"GPU {gpu.index}" + (f" of machine {gpu.machine}" if report.hardware.machines > 1 else "")
    evidence = [(f"time with {reason}", 100 * share, "%")]
    if clock := _relative_clock(gpu):
        evidence.append(("median SM clock, of the card's highest", 100 * clock, "%"))
    elif gpu.power_limit_watts:
        evidence.append(("power limit", gpu.power_limit_watts, "W"))
    at = f", its clock at {clock:.0%} of the card's highest" if clock else ""
    return Finding(
        "throttled",
        f"Throttled: {cause} held {name} down for {share:.0%} of the time ({reason}){at}. No flag of the training helps.",
        evidence,
    )


def _held_down(gpu: Device) -> tuple[float, str, str, Device]:
    """For what share of the time a GPU's clock was held down, NVML's reason and the cause in words; 0 if it was not."""
    share = defaultdict(float, gpu.throttled_fraction or {})
    found = [(share[name], name, cause) for name, cause in _HELD_DOWN.items() if share[name] >= _THROTTLED_SHARE]
    # NVML sets this one for heat and for a power brake, too; where it does, those say more.
    unnamed = share["hw_slowdown"] - max(share["hw_thermal"], share["hw_power_brake"])
    if unnamed >= _THROTTLED_SHARE:
        found.append((unnamed, "hw_slowdown", "the hardware's protection (for heat or current: NVML does not tell)"))
    limit, default = gpu.power_limit_watts, gpu.default_power_limit_watts
    clock = _relative_clock(gpu) or 1.0
    capped = share["sw_power_cap"]
    if capped >= _POWER_CAP_SHARE and limit and default and limit < _LOWERED_LIMIT * default:
        cause = f"a constant power cap, {limit:g} W where the card's default is {default:g} W (nvidia-smi -pl sets it),"
        found.append((capped, "sw_power_cap", cause))
    elif capped >= _POWER_CAP_SHARE and clock <= _POWER_CAP_CLOCK:
        found.append((capped, "sw_power_cap", "the card's power limit (more than of a card that is cool and well)"))
    setting = share["applications_clocks_setting"]
    if setting >= _POWER_CAP_SHARE and clock <= _POWER_CAP_CLOCK:
        found.append((setting, "applications_clocks_setting", "a fixed clock (nvidia-smi -rac and -rgc lift it)"))
    return (*max(found, default=(0.0, "", "")), gpu)


def _relative_clock(gpu: Device) -> float | None:
    """The median SM clock, of the highest that the card has."""
    clock = gpu.fields.get("sm_clock_mhz")
    return clock.median / gpu.max_sm_clock_mhz if clock and gpu.max_sm_clock_mhz else None


def _input(report: Report, scale: Scale) -> Finding | None:
    stages, parts = report.stages, report.training_parts
    if not stages.loader or not parts:
        return None
    # Of all ranks, if each is as slow as the slowest: in training they wait for each other.
    loader = scale.loader * stages.loader.images_per_second_of_slowest
    step = scale.step * stages.step.images_per_second_of_slowest
    wait = wait_share(parts) + scale.wait
    if loader < step:
        evidence = [("loader alone", loader, "images/s"), ("step alone", step, "images/s")]
        begin = f"Input-bound: the loader alone makes {loader:,.0f} images/s, the step alone takes {step:,.0f}"
    elif on_gpu(report) and wait > _WAIT_SHARE:
        evidence = [("data wait, of a training step", 100 * wait, "%"), ("loader alone", loader, "images/s")]
        begin = f"Input-bound: {wait:.0%} of each training step the GPU waits for images"
    else:
        return None
    if loader >= step and report.config["decoder"] == "gpu":
        return Finding(
            "input",
            f"{begin}, though the loader alone makes more than the step takes: its decoder shares the GPU with the step.",
            evidence,
            advice.for_the_step(report, advice.SHARED_GPU),
        )
    rates = {name: rate for name in ("reading", "decoding") if (rate := getattr(stages, name))}
    part = min(rates, key=lambda name: rates[name].images_per_second_of_slowest)
    return Finding(
        "input",
        f"{begin}. Its slower part is {part}, {rates[part].images_per_second_of_slowest:,.0f} images/s by itself.",
        evidence,
        advice.for_input(report, part),
    )


def _launch(report: Report, scale: Scale) -> Finding | None:
    host, step = report.host_seconds_per_step, _step_seconds(report, scale)
    if host is None or host < (_HOST_SHARE_ON_GPU if on_gpu(report) else _HOST_SHARE_ON_CPU) * step:
        return None
    return Finding(
        "launch",
        f"Launch-bound: the host needs {ms(host)} to hand out a step, which takes {ms(step)}: the kernels are too short.",
        [("host, a step", 1e3 * host, "ms"), ("step alone", 1e3 * step, "ms")],
    )


def _overhead(report: Report) -> Finding | None:
    # Parts of the same steps, as fast or as slow as they were: nothing to scale.
    parts, step = report.step_parts, report.stages.step.step_seconds.mean
    all_reduce = parts.all_reduce.mean if parts.all_reduce else 0.0
    if max(all_reduce, parts.optimizer.mean) < _LARGE_PART * step:
        return None
    if parts.optimizer.mean >= all_reduce:
        return Finding(
            "optimizer",
            f"Optimizer-bound: the update takes {parts.optimizer.mean / step:.0%} of the step, whatever its number of images.",
            [("optimizer", 1e3 * parts.optimizer.mean, "ms"), ("step alone", 1e3 * step, "ms")],
        )
    return Finding(
        "communication",
        f"Communication-bound: the all-reduce adds {ms(all_reduce)} to the backward pass, {all_reduce / step:.0%} of the step.",
        [("all-reduce, exposed", 1e3 * all_reduce, "ms"), ("step alone", 1e3 * step, "ms")],
    )


def _forward_and_backward(report: Report, scale: Scale) -> Finding:
    roofline = report.roofline
    measured = passes_seconds(report) / scale.step
    explained = floor_of_passes(report) / measured
    arithmetic = sum(layer.flops for layer in roofline.layers) / roofline.peaks.flops_per_second / measured
    traffic = explained - arithmetic
    mfu = ("MFU of the step alone", 100 * (roofline.mfu or 0.0), "%")
    if explained < (_EXPLAINED_ON_GPU if on_gpu(report) else _EXPLAINED_ON_CPU):
        return Finding(
            "kernels",
            f"Inefficient kernels: of the {ms(measured)} of forward and backward, arithmetic and memory traffic at "
            f"the hardware's peaks explain {explained:.0%}.{_costliest_layer(report)}",
            [mfu, ("floor, of forward and backward", 100 * explained, "%")],
        )
    if traffic > arithmetic:
        return Finding(
            "memory",
            f"Memory-bound: of forward and backward, reading and writing memory takes {traffic:.0%} at the hardware's peak, "
            f"arithmetic {arithmetic:.0%}.",
            [("memory traffic, of forward and backward", 100 * traffic, "%"), ("arithmetic", 100 * arithmetic, "%")],
        )
    share = measured / _step_seconds(report, scale)
    return Finding(
        "compute",
        f"Compute-bound: forward and backward take {share:.0%} of the step, at {mfu[1]:.0f}% of the hardware's peak FLOP/s; of "
        f"their time, arithmetic takes {arithmetic:.0%} at that peak, memory traffic {traffic:.0%} at its own.",
        [("forward and backward, of the step alone", 100 * share, "%"), mfu],
    )


def _costliest_layer(report: Report) -> str:
    """A sentence about the layer that loses most time, where layers were measured."""
    both = [(seconds, each) for each in report.roofline.layers if (seconds := each.measured_seconds)]
    if not both:
        return ""
    seconds, layer = max(both, key=lambda pair: pair[0] - pair[1].floor_seconds_unfused)
    return f" {layer.name} loses most: {ms(seconds)}, its floor {ms(layer.floor_seconds_unfused)}."


# ---- the figures ------------------------------------------------------------------------------------------------------


def _step_seconds(report: Report, scale: Scale) -> float:
    return report.stages.step.step_seconds.mean / scale.step


def wait_share(parts: TrainingParts) -> float:
    """Of a step of training: waiting for images."""
    return parts.data_wait.mean / (parts.data_wait.mean + parts.step.mean)


def passes_seconds(report: Report) -> float:
    """Of forward and backward, without the all-reduce."""
    return report.step_parts.forward.mean + report.step_parts.backward.mean


def floor_of_passes(report: Report) -> float:
    """Of forward and backward, with what this step fuses: nothing, or what torch.compile does."""
    floors = report.roofline.floor_seconds, report.roofline.floor_seconds_unfused
    fused, unfused = (floor.forward + floor.backward for floor in floors)
    return fused + (unfused - fused) * (_LEFT_BY_COMPILING if report.config["compile"] else 1)


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
