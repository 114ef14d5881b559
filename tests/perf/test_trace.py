"""What perf/trace.py makes of a profile: of a real one on the CPU, and of made-up ones of a GPU."""

import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from perf.trace import summarise_trace

PAUSE_SECONDS = 0.1  # longer than a busy machine makes a thread wait


def test_a_real_profile_of_a_cpu():
    """Each step pauses, then multiplies two large matrices: the pause is the longest gap, the product the costliest operator."""
    large, small = torch.randn(1200, 1200), torch.randn(8)
    torch.sin(torch.mm(large, large)[0])  # what is called first takes longer
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(3):
            with torch.profiler.record_function("step"):
                time.sleep(PAUSE_SECONDS)
                torch.mm(large, large)
                torch.sin(small)
        seconds = time.perf_counter() - began
    trace = summarise_trace(profiler, steps=3, on_gpu=False)
    assert trace.steps == 3
    assert trace.step_seconds == pytest.approx(seconds / 3, rel=0.1)
    costliest = trace.kernels[0]
    assert (costliest.name, costliest.calls_per_step) == ("aten::mm", 1)
    averages = {average.key: average for average in profiler.key_averages()}
    assert costliest.seconds_per_step == pytest.approx(averages["aten::mm"].self_cpu_time_total / 3e6)
    assert "step" not in {kernel.name for kernel in trace.kernels}
    pauses = trace.gaps[:3]
    assert all(seconds >= PAUSE_SECONDS and before == "aten::mm" for seconds, before in pauses)
    assert trace.busy_seconds_per_step <= trace.step_seconds - PAUSE_SECONDS
    assert trace.busy_seconds_per_step == pytest.approx(
        sum(average.self_cpu_time_total for average in averages.values() if average.key != "step") / 3e6, rel=0.02
    )


def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA, **more) -> FunctionEvent:
    return FunctionEvent(id=0, name=name, thread=1, start_us=start, end_us=end, device_type=device, **more)


def profiler_of(events: list[FunctionEvent]):
    return SimpleNamespace(events=lambda: events)


def test_gaps_and_busy_time_of_a_gpu():
    """One step of 100 µs: the host launches from 0 on; two streams overlap; annotations and the host are no work."""
    trace = summarise_trace(
        profiler_of(
            [
                event("launch", 0, 90, DeviceType.CPU),
                event("step", 0, 100, DeviceType.CPU, is_user_annotation=True),
                event("step", 10, 100, is_user_annotation=True),
                event("conv", 10, 30),
                event("all-reduce", 20, 50),
                event("copy", 25, 28),
                event("conv", 60, 80),
                event("sgd", 81, 100),
            ]
        ),
        steps=1,
        on_gpu=True,
    )
    assert trace.step_seconds == pytest.approx(100e-6)
    assert trace.busy_seconds_per_step == pytest.approx((40 + 20 + 19) * 1e-6)
    assert [(kernel.name, round(1e6 * kernel.seconds_per_step), kernel.calls_per_step) for kernel in trace.kernels] == [
        ("conv", 40, 2),
        ("all-reduce", 30, 1),
        ("sgd", 19, 1),
        ("copy", 3, 1),
    ]
    assert [(round(1e6 * seconds), before) for seconds, before in trace.gaps] == [
        (10, "conv"),
        (10, "conv"),
        (1, "sgd"),
    ]


def random_kernels() -> Iterator[FunctionEvent]:
    generator = np.random.default_rng(0)
    for number in range(200):
        start = int(generator.integers(0, 20_000))
        yield event(f"kernel{number % 14}", start, start + int(generator.integers(1, 150)))


def test_busy_time_is_that_of_a_count_by_microseconds():
    events = list(random_kernels())
    busy = np.zeros(25_000, dtype=bool)
    for each in events:
        busy[int(each.time_range.start) : int(each.time_range.end)] = True
    first, last = np.flatnonzero(busy)[[0, -1]]
    idle = np.diff(np.flatnonzero(np.diff(np.concatenate([[1], busy[first : last + 1], [1]]))))[::2]
    trace = summarise_trace(profiler_of(events), steps=4, on_gpu=True)
    assert trace.busy_seconds_per_step == pytest.approx(busy.sum() * 1e-6 / 4)
    assert trace.step_seconds == pytest.approx((last + 1 - first) * 1e-6 / 4)
    assert len(trace.kernels) == len(trace.gaps) == 10
    assert [round(1e6 * seconds) for seconds, _ in trace.gaps] == sorted(idle.tolist(), reverse=True)[:10]
    durations: dict[str, float] = {}
    for each in events:
        durations[each.name] = durations.get(each.name, 0) + each.time_range.end - each.time_range.start
    costliest = sorted(durations.values(), reverse=True)[:10]
    np.testing.assert_allclose([kernel.seconds_per_step for kernel in trace.kernels], np.array(costliest) * 1e-6 / 4)


def test_a_trace_without_kernels_is_refused():
    with pytest.raises(ValueError, match="no kernels"):
        summarise_trace(profiler_of([event("launch", 0, 90, DeviceType.CPU)]), steps=1, on_gpu=True)
