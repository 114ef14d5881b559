"""The all-reduce's model against gloo over links that tc limits: machines are network namespaces."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import allreduce as allreduce_check
from benchmarks.allreduce import limited_machines
from common.errors import UserError

ROOT = Path(__file__).parents[2]


def skip_without_rights() -> None:
    try:
        with limited_machines(1, mbits_per_second=100):
            pass
    except UserError as error:
        pytest.skip(str(error))


def test_namespaces_go_again():
    skip_without_rights()
    with limited_machines(2, mbits_per_second=100) as machines:
        there = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
        assert all(machine.namespace in there for machine in machines)
        limit = subprocess.run(
            machines[1].command("tc", "qdisc", "show"), check=True, capture_output=True, text=True
        ).stdout
        assert "tbf" in limit
        assert "rate 100Mbit" in limit
        knock = f"import socket; print(socket.socket().connect_ex(({machines[1].address!r}, 9)))"
        answer = subprocess.run(
            machines[0].command(sys.executable, "-c", knock), check=True, capture_output=True, text=True, timeout=20
        ).stdout
        assert int(answer) == errno.ECONNREFUSED, "the other machine is there, and nothing listens"
    there = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert not any(machine.namespace in there for machine in machines)


def test_without_the_right_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.allreduce.shutil.which", lambda name: None)
    assert allreduce_check.main([]) == 2
    assert capsys.readouterr().err == "error: needs ip and tc: install iproute2\n"


@pytest.mark.parametrize("flags", [["--ranks", "1"], ["--megabytes", "0"], ["--mbits-per-second", "0"]])
def test_numbers_that_make_no_sense(flags, capsys):
    assert allreduce_check.main(flags) == 2
    assert "give --ranks of 2 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_predicted_within_a_fifth_of_measured():
    skip_without_rights()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.allreduce", "--ranks", "2", "3", "--megabytes", "1", "4", "16"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["ranks"], row["bytes"]) for row in rows] == [
        (ranks, size) for ranks in (2, 3) for size in (1_000_000, 4_000_000, 16_000_000)
    ]
    for row in rows:
        assert row["measured_over_predicted"] == pytest.approx(1, abs=0.2), row
