"""python profile/nvml_sampler.py [--interval-ms 100] [--out FILE.json] -- COMMAND…: what the GPUs do while a command runs.

COMMAND runs as it would without this: same stdin, stdout and stderr, its exit code is passed on, and the signals that ask a
program to stop reach it. The GPUs are those that CUDA_VISIBLE_DEVICES leaves it. Afterwards there is a table on stderr, and
the report as one line of JSON, last on stdout or in FILE.json. Without a driver the report says so. From Python:

    with NvmlSampler() as sampler:
        ...
    sampler.report()
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import replacing
from common.flags import FlagParser
from common.process import run_program
from common.progress import say
from perf.nvml_command import held_signals, run_command
from perf.nvml_table import table

if TYPE_CHECKING:
    import torch

    from perf.nvml_thread import GpuThread

# How long the driver may take for a sample before we go on without it.
_PATIENCE_SECONDS = 2.0


def uuids_of(device: "torch.device") -> list[str] | None:
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
        self._threads: list[GpuThread] = []
        self._reason: str | None = "the sampler was never started"
        self._started = self._stopped = perf_counter()
        self._running = False

    def __enter__(self) -> "NvmlSampler":
        try:
            threads, self._reason = _open(self._uuids, self._interval_seconds)
            for thread in threads:
                thread.start()
                self._threads.append(thread)
        except Exception as error:  # telemetry never ends a run
            self._reason = f"NVML: {error!r}"
        self._running = True
        self._wait_past(perf_counter())
        self._started = perf_counter()
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

    @property
    def started(self) -> float:
        """The value of time.perf_counter() at which the whole context's series begin."""
        return self._started

    def report(self, start: float | None = None, end: float | None = None) -> dict:
        """The telemetry between two values of time.perf_counter(), of the whole context by default.

        "available" is False, and "reason" says why, if there is no GPU to sample; otherwise "reason" is None or a remark on the
        choice of GPUs. "samples" counts those of the GPU that has most. Each GPU: "fields" (median, p5, p95, min, max, mean of
        each reading), "energy_joules" and whether it is from the GPU's "counter" or the integral of "power",
        "throttled_fraction" (share of samples in which a reason to lower the clock was set), "missing" (reading: why),
        "series" (the samples; "seconds" since start). Units are in the names; what is not known is None.

        Of a MIG device, memory and utilisation are its own, all else the whole GPU's, shared with its other MIG devices.
        """
        now = perf_counter() if self._running else self._stopped
        end = now if end is None else min(end, now)
        start = min(self._started if start is None else max(start, self._started), end)
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


def _open(uuids: Sequence[str] | None, interval_seconds: float) -> tuple[list["GpuThread"], str | None]:
    """Start NVML. Returns a thread for each GPU, not started yet, and what to tell about them."""
    try:
        import pynvml

        from common.nvml_devices import find_gpus
        from perf.nvml_thread import GpuThread
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
    return [GpuThread(gpu, interval_seconds) for gpu in gpus], "; ".join(remarks) or None


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    options, command = parse_args(sys.argv[1:] if argv is None else argv)
    with held_signals() as mask:
        with NvmlSampler(interval_seconds=options.interval_ms / 1e3) as sampler:
            exit_code = run_command(command, mask)
        telemetry = sampler.report()
        for line in table(telemetry):
            say(line)
        report = {"program": "nvml_sampler", "command": command, "exit_code": exit_code, **telemetry}
        _write(json.dumps(report), options.out)
    return exit_code


def _write(report: str, out: Path | None) -> None:
    if out is None:
        print(report, flush=True)
        return
    try:
        with replacing(out) as file:
            file.write(report.encode() + b"\n")
    except OSError as error:  # after what may have been a long run
        say(f"{out} cannot be written ({error.strerror}). The report: {report}")


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command behind "--". Raises UserError."""
    parser = FlagParser(
        prog="python profile/nvml_sampler.py",
        usage="%(prog)s [--interval-ms MS] [--out FILE.json] -- COMMAND…",
        description="Sample the GPUs while a command runs.",
    )
    parser.add_argument("--interval-ms", type=float, default=100.0, help="milliseconds between two samples of a GPU")
    parser.add_argument("--out", type=Path, help="file for the report, instead of the last line of stdout")
    split = argv.index("--") if "--" in argv else len(argv)
    options, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not command:
        raise UserError("there is no command: give it behind --, as in -- python train.py")
    if not 1 <= options.interval_ms <= 3_600_000:
        raise UserError(f"--interval-ms is {options.interval_ms:g}: give it at least 1 and at most an hour")
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise UserError(f"--out {options.out} cannot be written: give a file in a folder that is there")
    return options, command
