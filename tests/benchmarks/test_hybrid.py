"""What a step sends, in data parallel and in hybrid training: arithmetic, and, in network namespaces, counted."""

import json
import subprocess
import sys

import pytest

from benchmarks import hybrid
from benchmarks.hybrid import bytes_sent, predictions
from perf.costs import Job
from tests.benchmarks.test_allreduce import ROOT, skip_without_rights

D = Job(arch="D", classes=1000, crop=224, batch=2, precision="fp32", ranks=2)
PARAMETERS, FC6, FC7 = 138_357_544, 25088 * 4096 + 4096, 4096 * 4096 + 4096


def test_a_step_sends_gradients_or_activations():
    """Of two ranks each sends half of what is added up, and receives half: an all-reduce is that twice."""
    assert bytes_sent(D, 1) == 4 * PARAMETERS
    activations = 4 * (25088 + 4096) * 4  # of four images, in float32
    assert bytes_sent(D, 2) == 4 * (PARAMETERS - FC6 - FC7) + activations


def test_predictions_are_drawn_and_those_of_large_batches_differ_little(tmp_path, capsys):
    rows = predictions("H100", tmp_path / "hybrid.png")
    assert (tmp_path / "hybrid.png").read_bytes().startswith(b"\x89PNG")
    rates = {(row["batch"], row["gpus"]): row["images_per_second"] for row in rows}
    assert rates[256, 16]["hybrid"] > 2 * rates[256, 16]["data"]
    assert rates[4096, 8]["hybrid"] == pytest.approx(rates[4096, 8]["data"], rel=0.02)
    assert capsys.readouterr().out.count("\n| ") == 1 + len(rows)


@pytest.mark.parametrize("flags", [["--ranks", "1"], ["--images", "0"], ["--predict", "--gpu", "none"]])
def test_numbers_that_make_no_sense(flags, capsys):
    assert hybrid.main(flags) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_bytes_at_the_interface_are_those_of_the_arithmetic():
    """And over 1 Gbit/s a step that shares takes less time than one that sends all gradients."""
    skip_without_rights()
    command = [
        sys.executable,
        "-m",
        "benchmarks.hybrid",
        "--arch",
        "A",
        "--images",
        "1",
        "--steps",
        "2",
        "--rounds",
        "1",
    ]
    done = subprocess.run(
        [*command, "--gbits-per-second", "1"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=600
    )
    data, shared = json.loads(done.stdout.splitlines()[-1])["rows"]
    for row in (data, shared):
        assert row["bytes_sent"] == pytest.approx(row["predicted_bytes"], rel=0.05)
    assert shared["seconds"] < 0.7 * data["seconds"]
