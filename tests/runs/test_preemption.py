"""Signals: the run saves, leaves, and goes on bit-exactly."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from engine.checkpoint import load
from engine.training import preemption
from engine.training.preemption import StopRequests
from tests.engine.test_accuracy import RANKS
from tests.support.images import photo_folder
from tests.support.launch import ROOT, SMALL, assert_same_weights, one_machine, run, start, wait_for, workers_of


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function: the folder of a run of eight steps on so many ranks, 0 for one process without torchrun."""

    @functools.cache
    def run_once(ranks: int) -> Path:
        out = tmp_path_factory.mktemp("whole")
        run(*SMALL, "--steps", "8", "--out", str(out), ranks=ranks)
        return out

    return run_once


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
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


@pytest.mark.slow
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


SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP, signal.SIGINT]


def test_signals_mean_what_they_did_before_once_the_run_is_over(capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with StopRequests() as requests, requests.training(RANKS):
            assert not requests.agreed()
            os.kill(os.getpid(), number)
            assert requests.agreed()
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.agreed()
            assert requests.interrupted == (number == signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert capfd.readouterr().err == "Ctrl-C: saves after this step and ends; once more ends at once, without saving\n"


@pytest.mark.parametrize("of_torchrun", [False, True])
def test_under_nohup_a_closed_terminal_is_ignored_unless_torchrun_passes_it_on(monkeypatch, of_torchrun):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if of_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests, requests.training(RANKS):
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.agreed() == of_torchrun
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_with_75_and_one_line(tmp_path, number):
    """While torch is being imported; nothing is left in --out."""
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, the program would rightly ignore SIGHUP
    process = start(*SMALL, "--steps", "8", "--out", str(tmp_path / "out"))
    signal.signal(number, before)
    mask = 1 << (number - 1)
    while not int(Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0], 16) & mask:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert output == ""
    name = number.name
    assert error == f"stopped by {name} before the first step: nothing to save; start the same command again\n"
    assert not (tmp_path / "out").exists()


def test_a_rank_that_waits_for_another_in_c_answers_a_signal_too():
    """Where no handler of Python's can run: in the lock of a thread that never ends."""
    code = """
import ctypes, os, threading
from engine.training.preemption import StopRequests
with StopRequests():
    threading.Timer(0.5, os.kill, (os.getpid(), 15)).start()
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(60)
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 75
    assert done.stderr.count("stopped by SIGTERM before the first step") == 1
    assert time.monotonic() - began < 30


def test_a_second_ctrl_c_ends_at_once_or_after_the_checkpoint(monkeypatch):
    with StopRequests() as requests, requests.training(RANKS):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's, of the same key
        monkeypatch.setattr(preemption, "_SECONDS_OF_ONE_INTERRUPT", 0)
        written = []

        def write() -> None:
            with requests.writing():
                os.kill(os.getpid(), signal.SIGINT)
                written.append("all of it")

        with pytest.raises(KeyboardInterrupt):
            write()
        assert written
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("moment", ["at the start", pytest.param("in training", marks=pytest.mark.slow)])
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
