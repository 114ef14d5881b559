"""Power, utilisation and memory of the GPUs while a run goes on, from NVML, for its dashboards."""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.ranks import Ranks

_INTERVAL_SECONDS = 1.0
_ENERGY = "energy_counter_joules"
_SECONDS_TO_END = 2.0  # for a driver that hangs
# By reading: what its curve is called, and what one of it is in the reading's unit.
_CURVES = {
    "power_watts": ("power_watts", 1),
    "sm_utilisation_percent": ("sm_utilisation_percent", 1),
    "memory_used_bytes": ("memory_used_gib", 2**30),
}


def gpus_of_this_machine(ranks: "Ranks") -> list[str] | None:
    """UUIDs of the GPUs of the ranks on this machine; None for a run on CPUs."""
    if ranks.device.type != "cuda":
        return None
    from torch.cuda import get_device_properties

    return [str(get_device_properties(index).uuid) for index in range(ranks.local_world_size)]


class GpuCurves:
    """A thread that reads the GPUs of this machine once a second, without the device's waiting; silent without a driver."""

    def __init__(self, uuids: Sequence[str] | None, interval_seconds: float = _INTERVAL_SECONDS) -> None:
        """uuids: of the GPUs; None: those that CUDA_VISIBLE_DEVICES leaves."""
        self._uuids, self._interval_seconds = uuids, interval_seconds
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._read: dict[str, list[float]] = defaultdict(list)
        # Of the energy counters: when, and what they said, at the beginning of the time that take_watts() is of, and last.
        self._first: dict[str, tuple[float, float]] = {}
        self._last: dict[str, tuple[float, float]] = {}
        self._metered: set[str] = set()
        # daemon: one that hangs in the driver does not keep the program alive.
        self._thread = threading.Thread(target=self._run, name="gpu-curves", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(_SECONDS_TO_END)

    def take_means(self) -> dict[str, float]:
        """Means since the last call, by "gpu<CUDA's number>/<curve with its unit>"; without what could not be read."""
        with self._lock:
            read, self._read = self._read, defaultdict(list)
        return {name: sum(values) / len(values) for name, values in read.items()}

    def take_watts(self) -> float | None:
        """Mean power of all these GPUs together since the last call or count_anew(), from their energy counters.

        It is of the time from the last reading before that call to the last one so far. None: one of the GPUs has no two
        readings, or no counter; or is a MIG device, whose energy is not told apart from that of its neighbours.
        """
        with self._lock:
            first, last, self._first = self._first, dict(self._last), dict(self._last)
        if not self._metered or self._metered - first.keys():
            return None
        spans = [[end - begin for begin, end in zip(first[gpu], last[gpu], strict=True)] for gpu in self._metered]
        if not all(seconds > 0 and joules > 0 for seconds, joules in spans):
            return None
        return sum(joules / seconds for seconds, joules in spans)

    def count_anew(self) -> None:
        """What the GPUs have drawn until now does not count for take_watts()."""
        with self._lock:
            self._first.clear()
            self._last.clear()

    def _run(self) -> None:
        try:
            import pynvml

            from common.nvml.devices import find_gpus
            from common.nvml.readings import READINGS, GpuGone, Reader

            pynvml.nvmlInit()
            gpus, _ = find_gpus(self._uuids)
            readings = [reading for reading in READINGS if reading.name in (_ENERGY, *_CURVES)]
            readers = {f"gpu{number}": Reader(gpu, readings) for number, gpu in enumerate(gpus)}
            if not any(gpu.is_mig for gpu in gpus) and (self._uuids is None or len(gpus) == len(self._uuids)):
                self._metered = set(readers)
            while readers:
                for name, reader in list(readers.items()):
                    try:
                        self._keep(name, time.perf_counter(), reader.read())
                    except GpuGone:
                        del readers[name]
                if self._stopping.wait(self._interval_seconds):
                    break
            pynvml.nvmlShutdown()
        except Exception:  # no driver, no binding, whatever a driver answers: curves never end a run
            return

    def _keep(self, gpu: str, began: float, values: dict[str, float]) -> None:
        joules = values.pop(_ENERGY)
        with self._lock:
            if not math.isnan(joules):
                self._last[gpu] = began, joules
                self._first.setdefault(gpu, self._last[gpu])
            for name, value in values.items():
                if not math.isnan(value):
                    curve, unit = _CURVES[name]
                    self._read[f"{gpu}/{curve}"].append(value / unit)
