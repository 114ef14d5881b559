"""Runs of train.py as a user starts them."""

import atexit
import contextlib
import functools
import json
import os
import random
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.checkpoint import load

ROOT = Path(__file__).parents[2]
_LIMIT_SECONDS = 280
# Small enough that a step takes a tenth of a second; momentum, decay and dropout as in the paper.
SMALL = ["--arch", "A", "--data", "digits", "--batch-size", "12", "--schedule", "step", "--log-every", "1"]


def run(
    *flags: str, ranks: int = 0, script: str = "train.py", check: bool = True, limit_seconds: float = _LIMIT_SECONDS
) -> subprocess.CompletedProcess:
    """Run train.py in the repository: as python does (ranks=0), or as so many ranks on this machine."""
    environments = [environment()]
    if Path("/dev/nvidiactl").exists():  # CUDA does not survive a fork
        launcher = [sys.executable, *(one_machine(ranks) if ranks else [])]
        command = [*launcher, script, *flags]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environments[0], timeout=limit_seconds, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done
    if ranks:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environments = [
            {**environment(), **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)
        ]
    done = _warm().run(script, flags, environments, limit_seconds)
    assert not check or done.returncode == 0, done.stderr
    return done


class _Warm:
    """tests/support/warm.py, which starts programs without their imports."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "tests/support/warm.py"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def run(
        self, program: str, flags: Sequence[str], environments: Sequence[dict[str, str]], limit_seconds: float
    ) -> subprocess.CompletedProcess:
        assert self._process.stdin
        assert self._process.stdout
        with tempfile.NamedTemporaryFile("r") as stdout, tempfile.NamedTemporaryFile("r") as stderr:
            request = {
                "program": program,
                "flags": flags,
                "folder": str(ROOT),
                "environments": environments,
                "stdout": stdout.name,
                "stderr": stderr.name,
            }
            print(json.dumps(request), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], limit_seconds)[0]:
                self._end()
                _warm.cache_clear()
                raise AssertionError(f"not done after {limit_seconds:.0f} s:\n{stderr.read()}")
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess([program, *flags], code, stdout.read(), stderr.read())

    def _end(self) -> None:
        """Its programs end with it."""
        self._process.kill()
        self._process.communicate()


@functools.cache
def _warm() -> _Warm:
    """One for all tests of this process."""
    return _Warm()


def start(*flags: str, torchrun: list[str] | None = None, script: str = "train.py") -> subprocess.Popen:
    """Start train.py, or torchrun with those flags, without waiting for it."""
    return subprocess.Popen(
        [sys.executable, *(torchrun or []), script, *flags],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_machine(ranks: int, *, restarts: int = 0) -> list[str]:
    """torchrun's flags for so many ranks on this machine."""
    flags = ["--nproc_per_node", str(ranks), "--max-restarts", str(restarts), "--master_port", str(free_port())]
    return ["-m", "torch.distributed.run", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def signal_before(command: str, signal_name: str, folder: Path) -> dict[str, str]:
    """Variables with which bash sends itself a signal just before a command of a script, which is given as it stands there."""
    code, sent = folder / "signal_before", folder / "signal_sent"
    code.write_text(
        f"""set -T
before() {{
    [ "$1" = {shlex.quote(command)} ] && [ ! -e {shlex.quote(str(sent))} ] || return 0
    touch {shlex.quote(str(sent))}
    kill -{signal_name} $$
}}
trap 'before "$BASH_COMMAND"' DEBUG
"""
    )
    return {"BASH_ENV": str(code)}


def wait_for(process: subprocess.Popen, beginning: str) -> None:
    """Read what a process says until a line begins like that; AssertionError if none does, or none in time."""
    assert process.stderr
    seen = []
    deadline = threading.Timer(_LIMIT_SECONDS, _send_kill, [process])  # which ends the stream
    deadline.start()
    try:
        for line in process.stderr:
            seen.append(line)
            if line.strip().startswith(beginning):
                return
    finally:
        deadline.cancel()
    raise AssertionError(f"ended without a line that begins with {beginning}:\n{''.join(seen)}")


def workers_of(launcher: subprocess.Popen) -> list[int]:
    """Process ids of the ranks that a torchrun has started."""
    workers = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if parent == launcher.pid and b"--arch" in command:
            workers.append(int(process.name))
    return sorted(workers)


def kill_all(launcher: subprocess.Popen) -> None:
    """kill -9 of a torchrun, if it still runs, and of its ranks: nothing is left to say goodbye."""
    if launcher.poll() is None:
        _send_kill(launcher)
        launcher.communicate()


def _send_kill(launcher: subprocess.Popen) -> None:
    for process in (*workers_of(launcher), launcher.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def free_port() -> int:
    """Not one of those that the kernel gives to connections: it could be taken before the program under test has it."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


def results_of(done: subprocess.CompletedProcess) -> dict:
    return results_of_output(done.stdout)


def results_of_output(output: str) -> dict:
    return json.loads(output.splitlines()[-1])


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load(one), load(other)
    assert first.steps == second.steps
    assert first.samples_seen == second.samples_seen
    for name, weight in first.model.items():
        assert torch.equal(weight, second.model[name]), name
    assert (first.ema is None) == (second.ema is None)
    for name, weight in (first.ema or {}).items():
        assert second.ema
        assert torch.equal(weight, second.ema[name]), name
    for key, state in first.optimizer["state"].items():
        assert torch.equal(state["momentum_buffer"], second.optimizer["state"][key]["momentum_buffer"])
