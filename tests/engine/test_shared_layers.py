"""FC6 and FC7 shared among ranks: the same training as on one rank, to rounding."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.launch import run

WORKER = "tests/support/programs/steps_worker.py"
SMALL = ["--arch", "A", "--batch-size", "8"]  # dropout, momentum and decay as in the paper
HYBRID = ["--parallel", "hybrid"]


def train(folder: Path, jobs: list[dict], ranks: int) -> list[dict]:
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run(str(folder), ranks=ranks, script=WORKER)
    return [torch.load(folder / f"{number}.pt") for number in range(len(jobs))]


def job(*flags: str, steps: int = 4, **others) -> dict:
    return {"flags": [*SMALL, *flags], "steps": steps, **others}


def check_equal(found: dict, expected: dict, tolerance: float) -> None:
    """tolerance: of the losses, and of each tensor's difference, in parts of it."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    for state in ("model", "ema", "momenta"):
        assert found[state].keys() == expected[state].keys()
        for name, tensor in found[state].items():
            other = expected[state][name].double()
            assert tensor.shape == other.shape, name
            assert (tensor.double() - other).norm() <= tolerance * other.norm() + 1e-9, f"{state} {name}"


JOBS = {
    "plain": job(),
    "in two passes, with an average": job("--micro-batch", "2", "--ema", "0.9", steps=2),
    "among two": job("--fc-ranks", "2", steps=2),
    "two machines of two": job(steps=2, ranks_a_machine=2),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    """On one rank, which has all the layers."""
    return dict(zip(JOBS, train(tmp_path_factory.mktemp("alone") / "1", list(JOBS.values()), 0), strict=True))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory) -> dict[str, dict]:
    jobs = [{**each, "flags": [*each["flags"], *HYBRID]} for each in JOBS.values()]
    return dict(zip(JOBS, train(tmp_path_factory.mktemp("hybrid") / "4", jobs, 4), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_ranks_that_share_layers_train_as_one_does(alone, of_four, name):
    """Dropout's masks too are those of one rank. In float64, but for the loss: in float32, a sum that is rounded differently can
    move an activation over ReLU's kink, and with it a thousandth of the gradients.
    """
    check_equal(of_four[name], alone[name], 1e-6)
    assert of_four[name]["sharing"] == (2 if "two" in name and "passes" not in name else 4)


def test_a_rank_has_its_part_of_the_weights(alone, of_four):
    fc6_and_fc7 = 512 * 4096 + 4096 + 4096 * 4096
    for name in ("plain", "among two"):
        rest = alone[name]["own_parameters"] - fc6_and_fc7
        assert of_four[name]["own_parameters"] == rest + fc6_and_fc7 // of_four[name]["sharing"]
