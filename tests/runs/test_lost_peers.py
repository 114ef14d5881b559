"""A machine whose link goes down in mid-run: the others notice, save and end, long before a collective operation's time limit."""

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.allreduce import INTERFACE, Machine, limited_machines
from engine.checkpoint import load
from tests.benchmarks.test_allreduce import skip_without_rights
from tests.support.launch import ROOT, SMALL, assert_same_weights, environment, wait_for

LOST_SECONDS = 6


def start_ranks(machines: list[Machine], *flags: str) -> list[subprocess.Popen]:
    variables = {**environment(), "WORLD_SIZE": str(len(machines)), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    variables |= {"MASTER_ADDR": machines[0].address, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": INTERFACE}
    return [
        subprocess.Popen(
            machine.command(sys.executable, "train.py", *SMALL, *flags),
            cwd=ROOT,
            env={**variables, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, machine in enumerate(machines)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", "hybrid"])
def test_a_link_that_goes_down_ends_the_run_soon_and_costs_nothing(tmp_path, mode):
    skip_without_rights()
    flags = [
        "--parallel",
        mode,
        "--steps",
        "40",
        "--lost-seconds",
        str(LOST_SECONDS),
        "--checkpoint-minutes",
        "0.02",
        "--out",
    ]
    with limited_machines(2, mbits_per_second=None) as machines:
        ranks = start_ranks(machines, *flags, str(tmp_path / "parts"))
        wait_for(ranks[0], "step 8/40")
        subprocess.run(["ip", "-n", machines[1].namespace, "link", "set", INTERFACE, "down"], check=True)
        began = time.monotonic()
        said = [rank.communicate(timeout=60)[1] for rank in ranks]
        assert time.monotonic() - began < 4 * LOST_SECONDS
        for rank, text in zip(ranks, said, strict=True):
            assert rank.returncode == 1
            assert "Traceback" not in text
            assert "error: the ranks have lost each other" in text
    steps = load(tmp_path / "parts/last.pt").steps
    assert 1 <= steps < 40
    with limited_machines(2, mbits_per_second=None) as machines:
        for out in ("parts", "whole"):
            for rank in start_ranks(machines, *flags, str(tmp_path / out)):
                text = rank.communicate(timeout=200)
                assert rank.returncode == 0, text
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.slow
def test_a_rank_that_only_takes_its_time_is_not_lost(tmp_path):
    """It is stopped for three times the limit: its kernel goes on answering, though nobody reads what comes."""
    skip_without_rights()
    flags = ["--steps", "12", "--lost-seconds", "2", "--out", str(tmp_path)]
    with limited_machines(2, mbits_per_second=None) as machines:
        ranks = start_ranks(machines, *flags)
        wait_for(ranks[0], "step 4/12")
        os.kill(ranks[1].pid, signal.SIGSTOP)
        time.sleep(6)
        os.kill(ranks[1].pid, signal.SIGCONT)
        for rank in ranks:
            _, text = rank.communicate(timeout=120)
            assert rank.returncode == 0, text
            assert "lost" not in text
    assert load(tmp_path / "last.pt").steps == 12
