"""Runs of train.py as a user starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from engine.checkpoint import load

ROOT = Path(__file__).parent.parent
# Small enough that a step takes a tenth of a second; momentum, decay and dropout as in the paper.
SMALL = ["--arch", "A", "--data", "digits", "--batch-size", "12", "--schedule", "step", "--log-every", "1"]


def run(*flags: str, ranks: int = 0, script: str = "train.py", check: bool = True) -> subprocess.CompletedProcess:
    """Run train.py (ranks=0) or torchrun train.py, in the repository."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, script, *flags], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results_of(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load(one), load(other)
    assert first.steps == second.steps
    assert first.samples_seen == second.samples_seen
    for name, weight in first.model.items():
        assert torch.equal(weight, second.model[name]), name
    for key, state in first.optimizer["state"].items():
        assert torch.equal(state["momentum_buffer"], second.optimizer["state"][key]["momentum_buffer"])
