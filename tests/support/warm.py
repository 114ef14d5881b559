"""Programs that start at once: python tests/support/warm.py has imported what they need, and forks for each that it is asked for.

To import torch and DALI takes a program longer than what most tests have it do. It reads one line of JSON for each start, and
answers with the exit code: of the process or, of several ranks, of the first one that failed, after which the others are ended.
The ranks find each other by the environment that they are given.
"""

import contextlib
import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

_IMPORTS = (
    "engine.training.trainer", "engine.evaluation.trials", "engine.evaluation.report", "engine.evaluation.features",
    "engine.evaluation.prediction", "engine.monitoring.inspection",
    "matplotlib.backends.backend_agg", "nvidia.dali", "sklearn.datasets", "sklearn.model_selection", "tyro", "yaml",
)  # fmt: skip
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_TO_LEAVE = 30.0  # as torchrun gives the others when one has failed


def serve() -> tuple[str, list[str]] | None:
    """Answer requests until there are no more; None. In a process that was forked: the program to be, and its flags."""
    for name in _IMPORTS:
        import_module(name)
    gc.collect()
    gc.freeze()  # what is shared with the processes stays shared
    for line in sys.stdin:
        request = json.loads(line)
        processes = {}
        for rank, environment in enumerate(request["environments"]):
            process = os.fork()
            if not process:
                _take_place(request, environment)
                return request["program"], request["flags"]
            processes[process] = rank
        print(_exit_code(list(processes)), flush=True)
    return None


def _take_place(request: dict, environment: dict[str, str]) -> None:
    """What a new process has: its environment, folder and streams; it ends with the tests."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["folder"])
    for descriptor, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [request["program"], *request["flags"]]
    sys.path[0] = str(Path(request["folder"], request["program"]).parent)


def _exit_code(processes: Sequence[int]) -> int:
    """Wait for all; end the others when one fails."""
    running, failed, deadline = set(processes), 0, float("inf")
    while running:
        for process in tuple(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if not done:
                continue
            running.remove(process)
            if code := os.waitstatus_to_exitcode(status):
                failed = failed or code
                deadline = time.monotonic() + _SECONDS_TO_LEAVE
                _send(signal.SIGTERM, running)
        if time.monotonic() > deadline:
            _send(signal.SIGKILL, running)
        time.sleep(0.01)
    return failed


def _send(number: int, processes: set[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


if __name__ == "__main__":
    if program := serve():
        runpy.run_path(program[0], run_name="__main__")
