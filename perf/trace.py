"""What a few steps under torch.profiler say: the costliest kernels, how long the device was busy, and its idle gaps."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch.autograd import DeviceType

from perf.report import Kernel, Trace

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent
    from torch.profiler import profile

_MOST = 10
_MICRO = 1e-6  # torch.profiler counts microseconds


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
