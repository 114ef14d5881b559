"""What a few steps under torch.profiler say: the costliest kernels, how long the device was busy, and its idle gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from common.progress import say
from common.ranks import Ranks
from perf.report import Kernel, Trace

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent
    from torch.profiler import profile

_MOST = 10
_TRACED_STEPS = 3
_MICRO = 1e-6  # torch.profiler counts microseconds


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


def summarise_trace(profiler: profile, *, steps: int, on_gpu: bool) -> Trace:
    """Of a profiler that has ended, and saw so many whole steps and nothing else.

    The trace lasts from its first event to its last one: what precedes the first event of the first step, such as waiting for a
    batch, is in it only if the caller has put an annotation round each step (torch.profiler.record_function).

    On a GPU, kernels are what ran on the device, copies included; a kernel's time is that of all its calls, side by side or
    not. On a CPU, they are operators, each less what it calls; gaps are the spans in which no operator ran, on no thread.
    Annotations are neither. Raises ValueError: the profiler saw nothing.
    """
    # Without what CUPTI itself took, which no step has.
    events = [event for event in profiler.events() or [] if getattr(event, "activity_type", "") != "overhead"]
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    work = [event for event in events if event.device_type == device and not event.is_user_annotation]
    if not work:
        raise ValueError("the trace has no kernels")
    first = min(event.time_range.start for event in events)
    last = max(event.time_range.end for event in events)
    busy, gaps = _busy_and_gaps(work, first)
    seconds: Counter[str] = Counter()
    calls = Counter(event.name for event in work)
    for event in work:
        seconds[event.name] += _MICRO * (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)
    return Trace(
        steps=steps,
        step_seconds=_MICRO * (last - first) / steps,
        busy_seconds_per_step=busy / steps,
        kernels=[
            Kernel(name=name, seconds_per_step=total / steps, calls_per_step=calls[name] / steps)
            for name, total in seconds.most_common(_MOST)
        ],
        gaps=sorted(gaps, reverse=True)[:_MOST],
    )


def _busy_and_gaps(work: list[FunctionEvent], first: float) -> tuple[float, list[tuple[float, str]]]:
    """Seconds in which at least one event ran, and the spans after `first` (microseconds) and between them in which none did."""
    busy, end = 0.0, first
    gaps: list[tuple[float, str]] = []
    for event in sorted(work, key=lambda event: event.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        if start > end:
            gaps.append((_MICRO * (start - end), event.name))
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return _MICRO * busy, gaps
