"""Runs of train.py in processes of their own: resumed, and under torchrun with NCCL."""

import json

import pytest
import torch

from engine.checkpoint import load
from tests.gpu.device import DEVICE
from tests.support.launch import assert_same_weights, results_of, run

pytestmark = pytest.mark.gpu

FLAGS = ["--arch", "A", "--data", "digits", "--schedule", "step", "--log-every", "1", "--deterministic"]
FLAGS += ["--device", DEVICE.type]
STEPS, STOPPED_AFTER = 12, 5


@pytest.mark.parametrize("precision", [["--precision", "bf16"], ["--precision", "fp16", "--no-compile"]])
def test_a_resumed_run_is_bit_identical(tmp_path, precision):
    flags = [*FLAGS, *precision]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*flags, "--steps", str(STEPS), "--out", str(whole))
    run(*flags, "--steps", str(STOPPED_AFTER), "--out", str(parts))
    assert load(parts / "last.pt").steps == STOPPED_AFTER
    results = results_of(run(*flags, "--steps", str(STEPS), "--out", str(parts)))
    assert (results["resumed"], results["device"], results["steps"]) == (True, DEVICE.type, STEPS)
    assert_same_weights(whole / "last.pt", parts / "last.pt")
    assert load(whole / "last.pt").scaler == load(parts / "last.pt").scaler


def test_one_rank_under_torchrun_is_the_plain_run(tmp_path):
    flags = [*FLAGS, "--steps", str(STEPS)]
    run(*flags, "--out", str(tmp_path / "plain"))
    results = results_of(run(*flags, "--out", str(tmp_path / "torchrun"), ranks=1))
    assert results["world_size"] == 1
    assert_same_weights(tmp_path / "plain/last.pt", tmp_path / "torchrun/last.pt")


def test_ddp_over_nccl_gives_the_plain_steps():
    """A single rank has no DDP in a run; here it is made to have it, so that DDP, its hooks and NCCL are at work."""
    if DEVICE.type == "cuda" and not torch.distributed.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    done = run(DEVICE.type, ranks=1, script="tests/gpu/ddp_worker.py")
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences["none"] == 0, differences
    assert 0 < differences["bf16"] < 2**-8, (
        differences
    )  # a unit in the last place of each gradient; half of it is rounding
    assert 0 < differences["fp16"] < 2**-11, differences
    assert differences["compiled"] < 0.002, differences
    assert differences["graphs"] > 0
