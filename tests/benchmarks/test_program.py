"""benchmarks/__init__.py: how every benchmark ends."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from benchmarks import program


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
