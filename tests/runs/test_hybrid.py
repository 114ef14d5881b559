"""Whole runs with --parallel hybrid: checkpoints that any number of ranks goes on from in either mode, and what ends a run."""

import json
import os
import signal
from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint, load
from tests.support.launch import SMALL, assert_same_weights, one_machine, run, start, wait_for, workers_of

FLAGS = [*SMALL, "--batch-size", "16", "--lr", "0.0001"]  # at this rate, a difference in the last bit stays small
HYBRID = ["--parallel", "hybrid"]


def assert_alike(one: Checkpoint, other: Checkpoint) -> None:
    """Weights, their average and momenta, as far as float32 has them alike: tests/engine/test_shared_layers.py is exact.

    A bias is no more than the sum of its updates, so it differs as they do.
    """

    def momenta(checkpoint: Checkpoint) -> dict:
        return {str(number): entry["momentum_buffer"] for number, entry in checkpoint.optimizer["state"].items()}

    assert one.ema
    assert other.ema
    for mine, theirs in ((one.model, other.model), (one.ema, other.ema), (momenta(one), momenta(other))):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            difference = (tensor.double() - theirs[name].double()).norm()
            share = 1e-3 if "weight" in name else 0.1
            assert difference <= share * theirs[name].double().norm() + 1e-9, name


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory) -> Path:
    """Eight steps of one rank."""
    out = tmp_path_factory.mktemp("one")
    run(*FLAGS, "--ema", "0.9", "--steps", "8", "--out", str(out))
    return out / "last.pt"


@pytest.mark.slow
def test_any_mode_and_number_of_ranks_goes_on_from_any_other(on_one_rank, tmp_path):
    """With dropout, whose masks are those of one rank too."""
    flags = [*FLAGS, "--ema", "0.9", "--out", str(tmp_path)]
    for steps, ranks, mode in ((1, 2, "data"), (3, 4, "hybrid"), (4, 2, "hybrid"), (6, 8, "hybrid"), (7, 0, "auto")):
        done = run(*flags, "--parallel", mode, "--steps", str(steps), ranks=ranks)
        assert (f"FC6 and FC7 shared by {ranks}" in done.stderr) == (mode == "hybrid")
        assert load(tmp_path / "last.pt").model["classifier.3.weight"].shape == (4096, 4096)
    run(*flags, *HYBRID, "--steps", "8", ranks=4)
    assert_alike(load(tmp_path / "last.pt"), load(on_one_rank))


@pytest.mark.slow
def test_what_is_written_in_the_background_is_the_state_of_its_step(tmp_path):
    """Put together from all ranks' parts; the next step is made meanwhile."""
    flags = [*FLAGS, *HYBRID, "--ema", "0.9", "--keep", "9", "--out"]
    run(*flags, str(tmp_path / "two"), "--steps", "2", ranks=2)
    run(*flags, str(tmp_path / "three"), "--steps", "3", "--checkpoint-minutes", "0", ranks=2)
    assert_same_weights(tmp_path / "two/last.pt", tmp_path / "three/step-00000002.pt")
    assert load(tmp_path / "three/last.pt").steps == 3


def test_what_is_shared_is_said_and_three_ranks_share_nothing(tmp_path):
    """4096 does not divide by three."""
    done = run(*SMALL, *HYBRID, "--steps", "1", "--out", str(tmp_path), ranks=3)
    assert "shared by" not in done.stderr
    assert "--parallel hybrid: 4096 units do not divide among 3 ranks: each rank has all of FC6 and FC7" in done.stderr


@pytest.mark.slow
def test_validation_and_the_last_incomplete_batch_are_those_of_one_rank(tmp_path):
    """360 images of validation, in batches that pad the last."""
    results = {}
    for ranks in (0, 4):
        done = run(
            *FLAGS,
            *HYBRID,
            "--epochs",
            "1",
            "--batch-size",
            "64",
            "--lr",
            "0.0001",
            "--out",
            str(tmp_path / str(ranks)),
            ranks=ranks,
        )
        results[ranks] = json.loads(done.stdout.splitlines()[-1])
    assert results[4]["validation_loss"] == pytest.approx(results[0]["validation_loss"], rel=1e-3)
    assert results[4]["top1"] == pytest.approx(results[0]["top1"], abs=1.5 / 360)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extras", [[], ["--batch-norm", "--label-smoothing", "0.1", "--micro-batch", "2"], ["--compile"]]
)
def test_stopped_at_any_step_it_goes_on_bit_exactly(tmp_path, extras):
    flags = [*FLAGS, *HYBRID, *extras]
    run(*flags, "--steps", "4", "--out", str(tmp_path / "whole"), ranks=2)
    for steps in ("1", "4"):
        run(*flags, "--steps", steps, "--out", str(tmp_path / "parts"), ranks=2)
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_it_goes_on_bit_exactly(tmp_path, number):
    """SIGTERM to torchrun, which passes it on; kill -9 of one rank, whose part of the layers is gone with it."""
    flags = [*FLAGS, *HYBRID, "--steps", "8", "--checkpoint-minutes", "0"]
    run(*flags, "--out", str(tmp_path / "whole"), ranks=2)
    process = start(*flags, "--out", str(tmp_path / "parts"), torchrun=one_machine(2))
    wait_for(process, "step 3/8")
    if number == signal.SIGKILL:
        os.kill(workers_of(process)[1], number)
    else:
        process.send_signal(number)
    process.communicate(timeout=120)
    assert 2 <= load(tmp_path / "parts/last.pt").steps < 8, "a step is told before it is saved"
    run(*flags, "--out", str(tmp_path / "parts"), ranks=2)
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


FAILING = """
import os
from common.errors import DataSourceError
from common.process import end
import train
from pipeline.dali.loader import DaliLoader

deliver, asked = DaliLoader.__next__, []

def failing(self):
    asked.append(1)
    if len(asked) == 5 and os.environ["RANK"] == "1":
        raise DataSourceError("the bucket is closed")
    return deliver(self)

DaliLoader.__next__ = failing
end(train.main)
"""


@pytest.mark.slow
def test_a_rank_without_images_has_all_of_them_save(tmp_path):
    """In the first of two passes: before a forward pass in which the others would wait for it."""
    flags = [*FLAGS, *HYBRID, "--steps", "4", "--micro-batch", "4", "--checkpoint-minutes", "100", "--out"]
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = run(*flags, str(tmp_path / "parts"), ranks=2, script=str(script), check=False)
    assert done.returncode == 1
    assert "error: the bucket is closed" in done.stderr
    assert "saved the state after step 2" in done.stderr
    run(*flags, str(tmp_path / "parts"), ranks=2)
    run(*flags, str(tmp_path / "whole"), ranks=2)
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
