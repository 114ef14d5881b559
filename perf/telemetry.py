"""What the GPUs do over time: NVML's readings, sampled in the background, and their summary for windows of time.

    with NvmlSampler() as sampler:
        ...
    sampler.report()

On several machines, telemetry_of puts the samplers' reports together.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from perf.report import Device, Telemetry

if TYPE_CHECKING:
    import torch

    from common.nvml.devices import Gpu
    from common.ranks import Ranks

# How long the driver may take for a sample before we go on without it.
_PATIENCE_SECONDS = 2.0


def uuids_of(device: torch.device) -> list[str] | None:
    """The UUID of torch's device, for NvmlSampler; None for the CPU: then CUDA_VISIBLE_DEVICES says which GPUs there are."""
    if device.type != "cuda":
        return None
    from torch.cuda import get_device_properties

    return [str(get_device_properties(device).uuid)]


class NvmlSampler:
    """Samples GPUs in the background for as long as its context lasts.

    Nothing that NVML does raises or ends the run: what could not be had is in the report, with the reason.
    """

    def __init__(self, uuids: Sequence[str] | None = None, interval_seconds: float = 0.1) -> None:
        """uuids: of GPUs or MIG devices, with their prefix or without; None: the GPUs that CUDA_VISIBLE_DEVICES leaves.

        interval_seconds: from the start of one sample to the next, above 0; a sample takes 40 ms or more where PCIe traffic can
        be read. Raises ValueError.
        """
        if not interval_seconds > 0:
            raise ValueError(f"interval_seconds is {interval_seconds}")
        self._uuids = uuids
        self._interval_seconds = interval_seconds
        self._threads: list[_GpuThread] = []
        self._reason: str | None = "the sampler was never started"
        self.started = self._stopped = perf_counter()  # of the whole context's series
        self._running = False

    def __enter__(self) -> NvmlSampler:
        try:
            threads, self._reason = _open(self._uuids, self._interval_seconds)
            for thread in threads:
                thread.start()
                self._threads.append(thread)
        except Exception as error:  # telemetry never ends a run
            self._reason = f"NVML: {error!r}"
        self._running = True
        self._wait_past(perf_counter())
        self.started = perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped = perf_counter()
        self._wait_past(self._stopped)
        self._running = False
        for thread in self._threads:
            thread.stop()
        deadline = perf_counter() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - perf_counter()))
        if self._threads and not any(thread.is_alive() for thread in self._threads):
            with suppress(Exception):
                import pynvml

                pynvml.nvmlShutdown()

    def report(self, start: float | None = None, end: float | None = None) -> dict:
        """The telemetry between two values of time.perf_counter(), of the whole context by default.

        "available" is False, and "reason" says why, if there is no GPU to sample; otherwise "reason" is None or a remark on the
        choice of GPUs. "samples" counts those of the GPU that has most. Each GPU: "fields" (median, p5, p95, min, max, mean of
        each reading), "energy_joules" and whether it is from the GPU's "counter" or the integral of "power",
        "throttled_fraction" (share of samples in which a reason to lower the clock was set), "max_sm_clock_mhz" (the highest that
        the card has), "power_limit_watts" (that is enforced), "default_power_limit_watts", "is_mig", "missing" (reading: why),
        "series" (the samples; "seconds" since start). Units are in the names; what is not known is None.

        Of a MIG device, memory and utilisation are its own, all else the whole GPU's, shared with its other MIG devices.
        """
        now = perf_counter() if self._running else self._stopped
        end = now if end is None else min(end, now)
        start = min(self.started if start is None else max(start, self.started), end)
        if self._running:
            self._wait_past(end)
        reports = [thread.report(start, end) for thread in self._threads]
        return {
            "available": bool(reports),
            "reason": self._reason,
            "interval_seconds": self._interval_seconds,
            "samples": max((samples for samples, _ in reports), default=0),
            "seconds": round(end - start, 4),
            "devices": [device for _, device in reports],
        }

    def _wait_past(self, moment: float) -> None:
        """Have a sample of each GPU at that moment or later, so that a window up to it has both its ends."""
        deadline = perf_counter() + _PATIENCE_SECONDS
        for thread in self._threads:
            thread.ask()
        for thread in self._threads:
            thread.wait_past(moment, deadline)


def _open(uuids: Sequence[str] | None, interval_seconds: float) -> tuple[list[_GpuThread], str | None]:
    """Start NVML. Returns a thread for each GPU, not started yet, and what to tell about them."""
    try:
        import pynvml

        from common.nvml.devices import find_gpus
    except ImportError as error:
        return [], f"nvidia-ml-py is not installed: {error}"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [], f"no NVIDIA driver at work here: {error}"
    try:
        gpus, remarks = find_gpus(uuids)
    except pynvml.NVMLError as error:
        return [], f"NVML does not tell its GPUs: {error}"
    if not gpus:
        remarks = ["no GPU is left to sample", *remarks]
    return [_GpuThread(gpu, interval_seconds) for gpu in gpus], "; ".join(remarks) or None


class _GpuThread(threading.Thread):
    """Samples one GPU every interval_seconds until stop(), or until the GPU is gone.

    A thread each, since a reading of the PCIe traffic takes 40 ms, and a GPU about to be lost may take seconds for its answers.
    """

    def __init__(self, gpu: Gpu, interval_seconds: float) -> None:
        from common.nvml.readings import LIMITS, READINGS, Reader

        # daemon: one that hangs in the driver does not keep the program alive.
        super().__init__(name=f"nvml-{gpu.index}", daemon=True)
        self._gpu = gpu
        self._interval_seconds = interval_seconds
        self._reader, self._limits_reader = Reader(gpu), Reader(gpu, LIMITS)
        self._limits = {limit.name: float("nan") for limit in LIMITS}
        self._seconds = array("d")
        self._values = {reading.name: array("d") for reading in READINGS}
        self._wake = threading.Event()
        self._sampled = threading.Condition()
        self._stopping = False
        self._gone: tuple[float, str] | None = None

    def run(self) -> None:
        from common.nvml.readings import GpuGone

        try:
            self._limits = self._limits_reader.read()
            while not self._stopping:
                started = perf_counter()
                self._sample(started)
                self._wake.wait(max(0.0, started + self._interval_seconds - perf_counter()))
                self._wake.clear()
        except GpuGone as error:
            self._end(str(error))
        except Exception as error:  # whatever a driver answers: telemetry never ends a run
            self._end(repr(error))

    def _sample(self, moment: float) -> None:
        for name, value in self._reader.read().items():
            self._values[name].append(value)
        with self._sampled:
            self._seconds.append(moment)  # last: whoever reads meanwhile goes by its length
            self._sampled.notify_all()

    def _end(self, reason: str) -> None:
        with self._sampled:
            self._gone = perf_counter(), reason
            self._sampled.notify_all()

    def ask(self) -> None:
        """Have a sample taken now."""
        self._wake.set()

    def wait_past(self, moment: float, deadline: float) -> None:
        """Return when there is a sample of that moment or later, or can be none, or at the deadline.

        Both are values of time.perf_counter().
        """

        def there() -> bool:
            return self._gone is not None or (len(self._seconds) > 0 and self._seconds[-1] >= moment)

        with self._sampled:
            self._sampled.wait_for(there, max(0.0, deadline - perf_counter()))

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def report(self, start: float, end: float) -> tuple[int, dict]:
        """Number of samples from start to end in values of time.perf_counter(), and the GPU's part of the report."""
        # Here: without nvidia-ml-py, which it needs, there is no thread; and numpy starts threads of its own, which would take
        # the signals that nvml_sampler.py holds back, had they begun before.
        import numpy as np

        from perf.samples import rounded, summarise

        count = len(self._seconds)
        series = {"seconds": self._seconds, **self._values}
        samples = {name: np.array(values[:count]) for name, values in series.items()}
        inside, summary = summarise(samples, self._reader.reasons, start, end)
        if self._gone is not None and self._gone[0] < end:
            moment, reason = self._gone
            lost = f"{reason}, {max(0.0, moment - start):.1f} s after the start: nothing was read from then on"
            before = {name: why for name, why in summary["missing"].items() if name in self._reader.reasons}
            summary["missing"] = dict.fromkeys(self._values, lost) | before
        summary["missing"] |= self._limits_reader.reasons
        gpu = self._gpu
        return inside, {
            "index": gpu.index,
            "uuid": gpu.uuid,
            "name": gpu.name,
            "is_mig": gpu.is_mig,
            **{name: rounded(value) for name, value in self._limits.items()},
            **summary,
        }


# ---- of a measurement on all machines ---------------------------------------------------------------------------------


def telemetry_of(
    sampler: NvmlSampler | None, windows: Mapping[str, tuple[float, float]], ranks: Ranks
) -> Telemetry | None:
    """The telemetry of every machine on rank 0, None on the other ranks; every rank must call this.

    sampler: of the local rank 0 of each machine, for all of its GPUs; None on its other ranks. windows: by stage, from when to
    when in this rank's values of time.perf_counter(). All ranks begin a stage at the same time, by which the machines' clocks
    are put together: seconds are those since the sampling began on rank 0's machine.
    """
    from common.ranks import from_each_machine

    own = None
    if sampler is not None:
        first = min((start for start, _ in windows.values()), default=sampler.started) - sampler.started
        own = first, sampler.report(), {name: sampler.report(*window) for name, window in windows.items()}
    machines = [each for each in from_each_machine(own, ranks) if each is not None]
    if not machines:
        return None
    assert sampler is not None, "rank 0 is the local rank 0 of its machine"
    main_first = machines[0][0]
    devices: list[Device] = []
    stages: dict[str, list[Device]] = {name: [] for name in windows}
    reasons = []
    for machine, (first, whole, parts) in enumerate(machines):
        if whole["reason"]:
            reasons.append(f"machine {machine}: {whole['reason']}" if len(machines) > 1 else whole["reason"])
        for device in whole["devices"]:
            series = device["series"]
            series["seconds"] = [round(second - first + main_first, 4) for second in series["seconds"]]
        devices += msgspec.convert([{**each, "machine": machine} for each in whole["devices"]], list[Device])
        for name, part in parts.items():
            own_devices = [{**each, "machine": machine, "series": {}} for each in part["devices"]]
            stages[name] += msgspec.convert(own_devices, list[Device])
    return Telemetry(
        reason="; ".join(reasons) or None,
        devices=devices,
        stages=stages,
        stage_seconds={
            name: (start - sampler.started, end - sampler.started) for name, (start, end) in windows.items()
        },
    )


def mean_watts(telemetry: Telemetry, stage: str) -> float | None:
    """Of one GPU, on average over all, in a stage.

    None where the energy of one is not known, and of a part of a GPU (MIG), since the energy is that of the whole GPU, which
    others use too.
    """
    devices = telemetry.stages.get(stage) or []
    start, end = telemetry.stage_seconds.get(stage, (0.0, 0.0))
    joules = [None if device.is_mig else device.energy_joules for device in devices]
    known = [each for each in joules if each is not None]
    if not known or len(known) < len(joules) or end <= start:
        return None
    return sum(known) / len(known) / (end - start)
