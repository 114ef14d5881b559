"""What is read of a GPU, each reading by itself: one that fails is told by name and leaves the others alone.

That goes for the driver, which may lack a function, and for nvidia-ml-py, which may be older than a function or a constant.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import pynvml

from common.nvml.devices import Gpu

_ALL_LINKS = 0xFFFFFFFF  # scopeId UINT_MAX: the sum over a GPU's NVLinks (nvml.h, NVLink throughput counters)

# nvml.h, nvmlReturn_t. As numbers: an older binding has not all of the names.
_PERMANENT = {
    2,  # invalid argument
    3,  # not supported
    4,  # no permission
    13,  # function not found
    25,  # version of an argument's struct
    26,  # deprecated
}
_GONE = {
    1,  # NVML is not initialised any more
    15,  # the GPU is lost
    16,  # reset required
    28,  # GPU not found
}

THROTTLE_BITS = {
    "applications_clocks_setting": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
    "display_clock_setting": 0x100,
}
"""nvml.h, nvmlClocksEventReasons. Not here: 0x1, an idle GPU, whose clock nothing holds back."""


class GpuGone(Exception):
    """NVML can say nothing more of this GPU: it fell off the bus, has to be reset, or its driver was unloaded."""


@dataclass(frozen=True)
class Reading:
    """A figure, and how to ask NVML for it."""

    name: str
    """With its unit, as in the report."""
    ways: tuple[Callable[[Gpu], float], ...]
    """In order: the next one is for drivers and bindings that do not know the one before."""
    is_counter: bool = False
    """The ways give a sum over all time; the figure is its growth a second."""


def _field(gpu: Gpu, field: int, scope: int) -> float:
    """A field of type unsigned long long."""
    (answer,) = pynvml.nvmlDeviceGetFieldValues(gpu.whole, [(field, scope)])
    if answer.nvmlReturn != pynvml.NVML_SUCCESS:
        raise pynvml.NVMLError(answer.nvmlReturn)
    return answer.value.ullVal


# Of a MIG device, its own memory and engines are read; power, clocks and links are the whole GPU's, for NVML knows no others.
READINGS = (
    # First, so that the sample's time is theirs: what a slow driver takes for the others does not move the energy.
    Reading("energy_counter_joules", (lambda gpu: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu.whole) / 1e3,)),
    Reading("power_watts", (lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu.whole) / 1e3,)),
    Reading("sm_utilisation_percent", (lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu.handle).gpu,)),
    Reading("memory_utilisation_percent", (lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu.handle).memory,)),
    Reading("memory_used_bytes", (lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu.handle).used,)),
    Reading("sm_clock_mhz", (lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu.whole, pynvml.NVML_CLOCK_SM),)),
    Reading("memory_clock_mhz", (lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu.whole, pynvml.NVML_CLOCK_MEM),)),
    Reading(
        "temperature_celsius",
        (
            lambda gpu: pynvml.nvmlDeviceGetTemperatureV(gpu.whole, pynvml.NVML_TEMPERATURE_GPU),
            lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu.whole, pynvml.NVML_TEMPERATURE_GPU),
        ),
    ),
    Reading(
        "throttle_reasons",
        (
            lambda gpu: pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu.whole),
            lambda gpu: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu.whole),
        ),
    ),
    Reading(
        "nvlink_tx_bytes_per_second",
        (lambda gpu: 1024 * _field(gpu, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _ALL_LINKS),),  # in KiB
        is_counter=True,
    ),
    Reading(
        "nvlink_rx_bytes_per_second",
        (lambda gpu: 1024 * _field(gpu, pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, _ALL_LINKS),),
        is_counter=True,
    ),
    Reading("jpeg_engine_utilisation_percent", (lambda gpu: pynvml.nvmlDeviceGetJpgUtilization(gpu.handle)[0],)),
    Reading("video_decoder_utilisation_percent", (lambda gpu: pynvml.nvmlDeviceGetDecoderUtilization(gpu.handle)[0],)),
    # Last: each of the two measures for 20 ms before it answers.
    Reading(
        "pcie_tx_bytes_per_second",
        (lambda gpu: 1e3 * pynvml.nvmlDeviceGetPcieThroughput(gpu.whole, pynvml.NVML_PCIE_UTIL_TX_BYTES),),
    ),
    Reading(
        "pcie_rx_bytes_per_second",
        (lambda gpu: 1e3 * pynvml.nvmlDeviceGetPcieThroughput(gpu.whole, pynvml.NVML_PCIE_UTIL_RX_BYTES),),
    ),
)

LIMITS = (
    Reading("max_sm_clock_mhz", (lambda gpu: pynvml.nvmlDeviceGetMaxClockInfo(gpu.whole, pynvml.NVML_CLOCK_SM),)),
    # Of all limits that are set, the one that holds.
    Reading("power_limit_watts", (lambda gpu: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu.whole) / 1e3,)),
    Reading(
        "default_power_limit_watts", (lambda gpu: pynvml.nvmlDeviceGetPowerManagementDefaultLimit(gpu.whole) / 1e3,)
    ),
)
"""What a GPU is held to; of a MIG device, the whole GPU. They hardly ever change: read once."""


class Reader:
    """Reads one GPU again and again. A way that can never work is tried once."""

    def __init__(self, gpu: Gpu, readings: Sequence[Reading] = READINGS) -> None:
        self._gpu, self._readings = gpu, readings
        self._ways = {reading.name: list(reading.ways) for reading in readings}
        self._counts: dict[str, tuple[float, float]] = {}
        self.reasons: dict[str, str] = {}
        """By reading: why it failed, the last time it did."""

    def read(self) -> dict[str, float]:
        """The readings by name; NaN for what cannot be read. Raises GpuGone."""
        return {reading.name: self._figure(reading) for reading in self._readings}

    def _figure(self, reading: Reading) -> float:
        value = self._ask(reading.name)
        if not reading.is_counter or math.isnan(value):
            return value
        now = perf_counter()
        before, count = self._counts.get(reading.name, (now, value))
        self._counts[reading.name] = now, value
        return (value - count) / (now - before) if now > before and value >= count else math.nan

    def _ask(self, name: str) -> float:
        ways = self._ways[name]
        while ways:
            try:
                return ways[0](self._gpu)
            except AttributeError as error:  # of the binding, which is older than the function or the constant
                self.reasons[name] = f"nvidia-ml-py is too old: it has no {error.name}"
            except pynvml.NVMLError as error:
                if error.value in _GONE:
                    raise GpuGone(str(error)) from error
                self.reasons[name] = str(error)
                if error.value not in _PERMANENT:
                    break
            ways.pop(0)
        return math.nan
