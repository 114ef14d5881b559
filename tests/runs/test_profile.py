"""The measuring scripts run and report what they promise; their figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import overhead
from tests.support.images import photo_folder
from tests.support.nvml_stub import compile_stub

ROOT = Path(__file__).parents[2]


def run_script(name: str, settings: str, *flags: str) -> dict:
    """Run a module with some of its constants set to less, so that it is quick; the JSON of its last line."""
    code = f"import sys; import {name} as script; {settings}; sys.exit(script.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_compare_loaders(tmp_path):
    folder = photo_folder(tmp_path, train=10, val=2)
    flags = ["--data", str(folder), "--batch-size", "2", "--rounds", "2", "--batches", "2", "--threads", "1"]
    result = run_script(
        "benchmarks.loaders", "from benchmarks import turns; turns.NOT_COUNTED = 1; script._PAUSE_SECONDS = 0.0", *flags
    )
    assert set(result["scales"]) == {"S=256", "S in [256;512]"}
    assert set(result["scales"]["S=256"]) >= set(result["scales"]["S in [256;512]"])
    for loaders in result["scales"].values():
        assert len(loaders) >= 5
        assert "this project, prepared" in loaders
        for row in loaders.values():
            for title in ("images_per_second", "times this project", "times this project, prepared"):
                median, lowest, highest = row[title]
                assert 0 < lowest <= median <= highest


@pytest.mark.slow
def test_soak():
    """A rank is killed, and torchrun restarts all; torchrun is killed, whose ranks stop by themselves, and started again."""
    flags = ["--faults", "2", "--kinds", "rank", "torchrun", "--epochs", "1", "--batch-size", "48"]
    result = run_script("tests.soak", "pass", *flags)
    assert result["faults"] == {"rank": 1, "torchrun": 1, "stop": 0, "size": 0, "file": 0}
    assert (result["steps"], result["starts_of_torchrun"], result["torchrun_gave_up"]) == (30, 2, 0)
    assert (result["rows_not_used_once"], result["images_changed_in_repeated_steps"], result["exact"]) == (0, 0, True)


@pytest.mark.slow
def test_loader_memory(tmp_path):
    folder = photo_folder(tmp_path / "photos", train=10, val=2)
    flags = ["--data", str(folder), "--epochs", "3", "--batch-size", "5", "--plot", str(tmp_path / "memory.png")]
    result = run_script("benchmarks.memory", "pass", *flags)
    assert len(result["resident_mib"]) == 3
    assert 50 < min(result["resident_mib"]) <= max(result["resident_mib"]) < 10_000
    assert (tmp_path / "memory.png").stat().st_size > 1000


SMALL_STEP = ["--crop", "32", "--train-scale", "32", "--batch-size", "2"]


@pytest.mark.slow
def test_checkpoints():
    result = run_script("benchmarks.checkpoints", "pass", "--arch", "A", "--rounds", "2", *SMALL_STEP)
    assert result["checkpoint_mebibytes"] == 245, "for a thousand classes"
    for name in ("foreground", "background", "step_while_writing", "step_otherwise"):
        median, lowest, highest = result[f"{name}_seconds"]
        assert 0 < lowest <= median <= highest < 60


@pytest.mark.slow
def test_trainer_overhead():
    result = run_script("benchmarks.overhead", "script._STEPS_A_TURN = 2", "trainer", "--rounds", "4", *SMALL_STEP)
    assert result["rounds"] == 4
    (low, high), (median, lowest, highest) = result["seconds_95"], result["seconds_with_to_without"]
    assert 0.2 < lowest <= median <= highest < 5
    assert 0 < low <= high


@pytest.mark.slow
def test_sampler_overhead(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(compile_stub(tmp_path)))
    flags = ["sampler", "--rounds", "9", "--interval-ms", "10", *SMALL_STEP]
    result = run_script("benchmarks.overhead", "script._SECONDS_A_TURN = 0.1", *flags)
    assert result["samples"] >= 10
    (low, high), (median, lowest, highest) = result["seconds_95"], result["seconds_with_to_without"]
    assert 0.2 < lowest <= low <= median <= high <= highest < 5
    assert 0 < result["sampler_core_seconds_a_second"] < 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required"),
        (["trainer", "--rounds", "2"], "--rounds is 2"),
        (["x"], "invalid choice"),
    ],
)
def test_overhead_of_what(flags, message, capsys):
    assert overhead.main(flags) == 2
    assert message in capsys.readouterr().err
