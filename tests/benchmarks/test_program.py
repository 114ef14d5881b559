"""benchmarks/__init__.py: what every benchmark takes, and how it ends."""

import importlib
import os
import signal
import tempfile
from pathlib import Path

import pytest

from benchmarks import program, train_config


def test_a_signal_leaves_nothing_behind():
    """Of copies of data sets and network namespaces, that is; and the exit code is that of a process which SIGTERM has ended."""
    folders = []
    before = signal.getsignal(signal.SIGTERM)

    @program
    def main(argv):
        with tempfile.TemporaryDirectory() as folder:
            folders.append(Path(folder))
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 128 + signal.SIGTERM
    assert not folders[0].exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_figures_are_the_last_line(capsys):
    @program
    def main(argv):
        print("measured")
        return {"flags": argv}

    assert main(["--rounds", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == ["measured", '{"flags": ["--rounds", "3"]}']


@pytest.mark.parametrize(
    ("name", "flags", "chosen"),
    [
        ("checkpoints", ["--data", "digits"], "--data"),
        ("steps", ["--data", "digits"], "--data"),
        ("steps", ["--deterministic"], "--deterministic"),
        ("overhead", ["trainer", "--steps", "3"], "--steps"),
        ("overhead", ["trainer", "--out", "x"], "--out"),
        ("memory", ["--device", "cuda"], "--device"),
        ("loaders", ["--data", "digits", "--precision", "bf16"], "--precision"),
        ("loaders", ["--data", "digits", "--train-scale", "300"], "--train-scale"),
    ],
)
def test_what_a_benchmark_chooses_is_refused_as_a_flag(name, flags, chosen, capsys):
    """Else it would measure another thing than the one asked for, without a word."""
    assert importlib.import_module(f"benchmarks.{name}").main(flags) == 2
    assert capsys.readouterr().err == f"error: {chosen}: the benchmark chooses it; leave it out\n"


def test_a_flag_that_asks_for_what_is_chosen_is_taken():
    config = train_config(["--arch", "B", "--lr", "0.5"], defaults=["--arch=D", "--keep=2"], chosen=["--lr=0.5"])
    assert (config.arch, config.keep, config.lr) == ("B", 2, 0.5)
