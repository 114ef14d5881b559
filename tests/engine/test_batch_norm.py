"""Batch normalisation in whole runs on several ranks."""

from pathlib import Path

import pytest
import torch

from engine.checkpoint import load
from tests.support.launch import SMALL, results_of, run

# One step, without dropout, whose masks differ between numbers of ranks.
ONE_STEP = [*SMALL, "--batch-norm", "--dropout", "0", "--steps", "1"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    done = run(*ONE_STEP, "--out", str(out), ranks=2, script="tests/support/programs/worker.py")
    assert results_of(done)["different_weights"] == 1, "statistics included"
    return out


def test_running_statistics_are_those_of_all_ranks_images(two_ranks, tmp_path):
    """The first layer's mean is linear in the images: on two ranks of six it is what one rank of twelve finds."""
    run(*ONE_STEP, "--out", str(tmp_path))
    alone, shared = load(tmp_path / "last.pt").model, load(two_ranks / "last.pt").model
    assert alone["features.1.running_mean"].abs().max() > 0.1
    assert torch.allclose(alone["features.1.running_mean"], shared["features.1.running_mean"], atol=1e-4)
    # The variance of half the images is about that of all.
    assert torch.allclose(alone["features.1.running_var"], shared["features.1.running_var"], rtol=0.1)
    assert shared["features.1.num_batches_tracked"] == 1, "the warm-up does not count"


@pytest.mark.slow
def test_compiled_on_two_ranks_follows_eager(two_ranks, tmp_path):
    done = run(*ONE_STEP, "--compile", "--out", str(tmp_path), ranks=2, script="tests/support/programs/worker.py")
    assert results_of(done)["compiled"]
    assert results_of(done)["different_weights"] == 1
    eager, compiled = load(two_ranks / "last.pt").model, load(tmp_path / "last.pt").model
    for name, value in eager.items():
        assert (value - compiled[name]).float().norm() / value.float().norm().clamp(min=1e-2) < 1e-3, name
