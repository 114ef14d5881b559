"""One GPU's samples, taken in a thread."""

import threading
from array import array
from time import perf_counter

from common.nvml_devices import Gpu
from common.nvml_readings import READINGS, GpuGone, Reader
from perf.nvml_summary import Samples, summarise


class GpuThread(threading.Thread):
    """Samples one GPU every interval_seconds until stop(), or until the GPU is gone.

    A thread each, since a reading of the PCIe traffic takes 40 ms, and a GPU about to be lost may take seconds for its answers.
    """

    def __init__(self, gpu: Gpu, interval_seconds: float) -> None:
        # daemon: one that hangs in the driver does not keep the program alive.
        super().__init__(name=f"nvml-{gpu.index}", daemon=True)
        self._gpu = gpu
        self._interval_seconds = interval_seconds
        self._reader = Reader(gpu)
        self._seconds = array("d")
        self._values = {reading.name: array("d") for reading in READINGS}
        self._wake = threading.Event()
        self._sampled = threading.Condition()
        self._stopping = False
        self._gone: tuple[float, str] | None = None

    def run(self) -> None:
        try:
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
        """Samples from start to end in values of time.perf_counter(), and the GPU's part of the report."""
        count = len(self._seconds)
        samples = Samples(self._seconds[:count], {name: values[:count] for name, values in self._values.items()})
        summary = summarise(samples, self._reader.reasons, start, end)
        if self._gone is not None and self._gone[0] < end:
            moment, reason = self._gone
            lost = f"{reason}, {max(0.0, moment - start):.1f} s after the start: nothing was read from then on"
            before = {name: why for name, why in summary["missing"].items() if name in self._reader.reasons}
            summary["missing"] = {reading.name: lost for reading in READINGS} | before
        identity = {"index": self._gpu.index, "uuid": self._gpu.uuid, "name": self._gpu.name}
        return len(samples.between(start, end).seconds), identity | summary
