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
    # pytest gives a slow test an hour, and any other five minutes.
    run(str(folder), ranks=ranks, script=WORKER, limit_seconds=3000)
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
    "two machines of two": job(steps=2, machines=[2, 2]),
    "a machine of two, two of one": job(steps=2, machines=[2, 1, 1]),
    "frozen, in groups": job(
        *("--weights", "given", "--freeze", "features", "--head-lr-factor", "10", "--weight-decay-on", "weights"),
        steps=2,
    ),
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


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "ranks"), [("A", 2), ("D", 4), ("A", 8)])
def test_twenty_steps_are_those_of_one_rank(tmp_path, arch, ranks):
    """24 images a batch, in one pass and in three; with an average of the weights."""
    flags = ["--arch", arch, "--batch-size", "24", "--ema", "0.9", "--lr", "0.001"]
    passes = [job(*flags, *extra, steps=20) for extra in ([], ["--micro-batch", str(24 // ranks // 3)])]
    alone, _ = train(tmp_path / "alone", passes, 0)
    for found in train(tmp_path / "hybrid", [{**each, "flags": [*each["flags"], *HYBRID]} for each in passes], ranks):
        assert found["sharing"] == ranks
        check_equal(found, alone, 1e-4)  # the loss is computed in float32


@pytest.mark.slow
def test_half_precision_compilation_batch_norm_and_compressed_gradients(tmp_path):
    """Against data parallel training on as many ranks, whose rounding is another one."""
    variants = {
        "bf16": job("--precision", "bf16", precise=False),
        "compiled": job("--compile", precise=False),
        "bf16, compiled": job("--precision", "bf16", "--compile", precise=False),
        "batch norm": job("--batch-norm", "--label-smoothing", "0.1"),
        "mixed": job("--mixup", "0.2", "--cutmix", "1", "--micro-batch", "2"),
        "compressed": job("--grad-compression", "bf16", machines=[1, 1]),
        "compressed, two machines": job("--grad-compression", "bf16", "--fc-ranks", "1", steps=2),
    }
    data = train(
        tmp_path / "data", [{**each, "flags": [*each["flags"], "--parallel", "data"]} for each in variants.values()], 2
    )
    hybrid = train(tmp_path / "hybrid", [{**each, "flags": [*each["flags"], *HYBRID]} for each in variants.values()], 2)
    for name, expected, found in zip(variants, data, hybrid, strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=0.05 if "bf16" in name else 1e-3), name
        for weight, tensor in found["model"].items():
            if tensor.is_floating_point() and "bias" not in weight:
                difference = (tensor.double() - expected["model"][weight].double()).norm()
                assert difference <= 0.02 * expected["model"][weight].double().norm(), f"{name} {weight}"


@pytest.mark.slow
def test_an_overflow_on_one_rank_skips_the_step_on_all(tmp_path):
    """Of fp16: had the others taken it, their parts of the layers would be of another step than its own."""
    overflow = job("--precision", "fp16", "--lr", "0.0001", steps=3, overflow=1, precise=False)
    (data,) = train(tmp_path / "data", [{**overflow, "flags": [*overflow["flags"], "--parallel", "data"]}], 2)
    (hybrid,) = train(tmp_path / "hybrid", [{**overflow, "flags": [*overflow["flags"], *HYBRID]}], 2)
    assert hybrid["scale"] == data["scale"] < 65536
    assert hybrid["losses"][::2] == pytest.approx(data["losses"][::2], rel=0.02)
    for name, tensor in hybrid["model"].items():
        assert (tensor - data["model"][name]).norm() <= 0.01 * data["model"][name].norm() + 1e-4, name
        assert tensor.isfinite().all()
