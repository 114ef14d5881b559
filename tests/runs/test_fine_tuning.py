"""Whole runs that begin with another network's weights: what they leave as it is, and how they go on."""

from pathlib import Path

import pytest
import torch

import model.vgg
import train
from engine.checkpoint import Checkpoint, load
from tests.support.launch import SMALL, assert_same_weights, run

NARROW = ((4,), (4,), (4, 4), (4, 4), (4, 512))
"""Blocks of a configuration A whose steps take milliseconds."""
PROGRAM = f"""
import model.vgg
model.vgg.CONFIGURATIONS["A"], model.vgg.FC_WIDTH = {NARROW}, 16
import train
from common.process import end
end(train.main)
"""
FLAGS = [*SMALL, "--batch-norm", "--checkpoint-minutes", "100", "--lr", "0.001", "--ema", "0.5"]
HEAD_FIRST = ["--head-epochs", "0.0165"]
"""Of 1,437 images, those with which the first two batches of twelve begin."""
LAST = "classifier.6."


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setitem(model.vgg.CONFIGURATIONS, "A", NARROW)
    monkeypatch.setattr(model.vgg, "FC_WIDTH", 16)


@pytest.fixture
def source(tmp_path) -> Path:
    """A network whose statistics of batch normalisation are no initial ones."""
    out = tmp_path / "source"
    assert train.main([*SMALL, "--batch-norm", "--steps", "2", "--seed", "1", "--out", str(out)]) == 0
    return out / "last.pt"


def start(tmp_path: Path, *flags: str, ranks: int) -> None:
    if not ranks:
        assert train.main(list(flags)) == 0
        return
    script = tmp_path / "narrow.py"
    script.write_text(PROGRAM)
    run(*flags, ranks=ranks, script=str(script))


def moved(checkpoint: Checkpoint, source: Path) -> set[str]:
    """What of the model differs from the source in any bit; of its average, the same does."""
    before, average = load(source).model, checkpoint.ema
    assert average
    found = {name for name, value in checkpoint.model.items() if not torch.equal(value, before[name])}
    for name, value in average.items():
        if value.is_floating_point():
            assert torch.equal(value, before[name]) == (name not in found)
    return found


def momenta(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    weights = [name for name in checkpoint.model if name.endswith(("weight", "bias"))]
    return {weights[place]: state["momentum_buffer"] for place, state in checkpoint.optimizer["state"].items()}


@pytest.mark.parametrize(
    ("ranks", "extras"),
    [
        (0, []),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(3, ["--micro-batch", "2"], marks=pytest.mark.slow),
        pytest.param(2, ["--compile"], marks=pytest.mark.slow),
        pytest.param(2, ["--parallel", "hybrid", "--freeze", "block1"], marks=pytest.mark.slow),
    ],
)
def test_the_head_first_then_all(source, tmp_path, ranks, extras):
    """Before the switch all else is the source's to the last bit, statistics too, and has no momentum; a run that is stopped
    right before the switch, at it, or after it goes on as one that is not."""
    flags = [*FLAGS, *HEAD_FIRST, *extras, "--weights", str(source), "--out"]
    start(tmp_path, *flags, str(tmp_path / "whole"), "--steps", "4", ranks=ranks)
    for steps in ("1", "2", "3", "4"):
        start(tmp_path, *flags, str(tmp_path / "parts"), "--steps", steps, ranks=ranks)
        checkpoint = load(tmp_path / "parts/last.pt")
        waiting = [momentum for name, momentum in momenta(checkpoint).items() if not name.startswith(LAST)]
        if steps in "12":
            assert moved(checkpoint, source) == {f"{LAST}weight", f"{LAST}bias"}
            assert not any(momentum.any() for momentum in waiting)
        else:
            frozen = {name for name in checkpoint.model if name.startswith(("features.0.", "features.1."))}
            assert moved(checkpoint, source) == set(checkpoint.model) - (frozen if "--freeze" in extras else set())
            assert all(momentum.any() for momentum in waiting)
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.parametrize("ranks", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_frozen_blocks_stay_and_may_be_trained_later(source, tmp_path, capfd, ranks):
    """On three ranks, a mean of equal statistics would be rounded."""
    flags = [*FLAGS, "--weights", str(source), "--out", str(tmp_path / "run")]
    start(tmp_path, *flags, "--freeze", "block3", "--steps", "2", ranks=ranks)
    checkpoint = load(tmp_path / "run/last.pt")
    kept = {name for name in checkpoint.model if name.startswith("features.") and int(name.split(".")[1]) < 15}
    trained = set(checkpoint.model) - kept
    assert moved(checkpoint, source) == trained
    assert set(momenta(checkpoint)) == {name for name in trained if name.endswith(("weight", "bias"))}
    capfd.readouterr()
    start(tmp_path, *flags, "--steps", "3", ranks=0)
    assert "note: freeze was block3 until now and is none from here on" in capfd.readouterr().err
    assert moved(load(tmp_path / "run/last.pt"), source) == set(checkpoint.model)


def test_the_heads_rate_follows_the_schedule(source, tmp_path, monkeypatch):
    """Which divides both rates by ten at the end of the first epoch."""
    rates, step = [], torch.optim.SGD.step

    def noting(self, *args, **kwargs):
        rates.append({len(group["params"]): group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    flags = [*FLAGS, "--schedule", "step", "--step-epochs", "1", "--head-lr-factor", "10", "--weights", str(source)]
    start(tmp_path, *flags, "--steps", "121", "--log-every", "100", "--out", str(tmp_path / "run"), ranks=0)
    # A weight and a bias, and as many of the other ten layers, of which eight have batch normalisation.
    assert rates[0] == pytest.approx({2: 0.01, 36: 0.001})
    assert rates[-1] == pytest.approx({2: 0.001, 36: 0.0001})
    assert len(rates) == 121


def test_what_is_frozen_is_said(source, tmp_path, capfd):
    start(
        tmp_path,
        *FLAGS,
        "--weights",
        str(source),
        "--freeze",
        "features",
        "--steps",
        "1",
        "--out",
        str(tmp_path),
        ranks=0,
    )
    assert "A with batch norm (0.0 M parameters, 0.0 M of them frozen) on digits" in capfd.readouterr().err
