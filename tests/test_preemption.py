"""SIGTERM and SIGUSR1: the run saves, leaves, and goes on bit-exactly."""

import functools
import os
import signal
import time
from pathlib import Path

import pytest

import train
from engine.checkpoint import load
from engine.preemption import StopRequests
from tests.images import photo_folder
from tests.runs import SMALL, assert_same_weights, one_machine, run, start, wait_for, workers_of


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function: the folder of a run of eight steps on so many ranks, 0 for one process without torchrun."""

    @functools.cache
    def run_once(ranks: int) -> Path:
        out = tmp_path_factory.mktemp("whole")
        run(*SMALL, "--steps", "8", "--out", str(out), ranks=ranks)
        return out

    return run_once


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_the_same_command_goes_on_bit_exactly(uninterrupted, tmp_path, ranks):
    flags = [*SMALL, "--steps", "8", "--out", str(tmp_path)]
    process = start(*flags, torchrun=one_machine(ranks) if ranks else None)
    wait_for(process, "step 2/8")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    if not ranks:
        process.send_signal(signal.SIGUSR1)  # a second one changes nothing
    output, _ = process.communicate(timeout=60)
    assert '"stopped": true' in output
    assert process.returncode == (1 if ranks else 75), "torchrun itself always says 1"
    assert 2 <= load(tmp_path / "last.pt").steps < 8
    run(*flags, ranks=ranks)
    assert_same_weights(uninterrupted(ranks) / "last.pt", tmp_path / "last.pt")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGUSR1, marks=pytest.mark.slow), signal.SIGKILL])
def test_torchrun_restarts_ranks_that_stopped_or_were_killed(uninterrupted, tmp_path, number):
    flags = [*SMALL, "--steps", "8", "--checkpoint-minutes", "0", "--out", str(tmp_path)]
    process = start(*flags, torchrun=one_machine(2, restarts=1))
    wait_for(process, "step 3/8")
    workers = workers_of(process)
    assert len(workers) == 2
    os.kill(workers[1], number)
    wait_for(process, "going on from")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert '"resumed": true' in output
    assert_same_weights(uninterrupted(2) / "last.pt", tmp_path / "last.pt")


def test_a_stop_during_validation_is_followed_by_that_validation(tmp_path, monkeypatch, capsys):
    """Two epochs of 12 images in batches of 6; the validation set takes four batches; stopped in the middle of the first."""
    folder = photo_folder(tmp_path / "data", train=12, val=23)
    flags = ["--arch", "A", "--data", str(folder), "--crop", "32", "--train-scale", "32", "--batch-size", "6"]
    flags += ["--epochs", "2", "--schedule", "step", "--lr", "0.001"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0

    calls = 0

    def agreed_at_the_fourth_call(self) -> bool:
        nonlocal calls
        calls += 1
        return calls == 4  # two steps, then two validation batches

    monkeypatch.setattr(StopRequests, "agreed", agreed_at_the_fourth_call)
    assert train.main([*flags, "--out", str(tmp_path / "parts")]) == 75
    stopped = load(tmp_path / "parts/last.pt")
    assert (stopped.steps, stopped.history) == (2, [])
    monkeypatch.undo()
    assert train.main([*flags, "--out", str(tmp_path / "parts")]) == 0
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    assert load(tmp_path / "parts/last.pt").history == load(tmp_path / "whole/last.pt").history


def test_signals_mean_what_they_did_before_once_the_run_is_over():
    from tests.test_evaluation import RANKS

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with StopRequests(RANKS) as requests:
        assert not requests.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.agreed()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.parametrize("moment", ["at the start", "in training"])
def test_ranks_do_not_outlive_a_torchrun_that_is_killed(tmp_path, moment):
    """While ranks find each other they end at once; in training they save first."""
    process = start(*SMALL, "--steps", "500", "--out", str(tmp_path), torchrun=one_machine(2))
    if moment == "in training":
        wait_for(process, "step 2/")
    while len(workers := workers_of(process)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    if moment == "at the start":
        time.sleep(0.5)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers):
        assert time.monotonic() < deadline, "a rank outlives its torchrun"
        time.sleep(0.1)
    if moment == "in training":
        assert load(tmp_path / "last.pt").steps >= 2
