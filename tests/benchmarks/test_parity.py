"""benchmarks/parity.py: what it reports, what it keeps, what it refuses."""

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks import parity
from benchmarks.parity import OURS, PLAIN, compare, difference_interval, main
from benchmarks.plain import mixing_transform, sgd
from common.flat_yaml import read_flat_yaml
from engine.config import Config
from engine.training.assembly import network_of
from tests.support.images import photo_folder


def test_what_others_would_write_is_not_slowed_down():
    """torch chooses how its optimizer updates: fused=False would have each tensor of the peers' networks updated by itself."""
    (group,) = sgd(nn.Linear(1, 1), Config()).param_groups
    assert (group["fused"], group["foreach"]) == (None, None)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (Config.lr, Config.momentum, Config.weight_decay)


def test_plain_loop_leaves_out_the_decay_that_the_recipe_leaves_out():
    config = Config(arch="A", crop=32, batch_norm=True, weight_decay=0.1, weight_decay_on="weights")
    model = network_of(config, classes=10, device=torch.device("cpu"))
    decaying, others = sgd(model, config).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(weight.ndim > 1 for weight in decaying["params"])
    assert all(weight.ndim == 1 for weight in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ({}, "labels"),
        ({"mixup": 0.2}, "shares"),
        ({"cutmix": 1.0}, "shares"),
        ({"mixup": 0.2, "cutmix": 1.0}, "shares"),
    ],
)
def test_plain_loop_mixes_what_the_recipe_mixes(flags, targets):
    samples = [(torch.rand(3, 32, 32), label) for label in range(4)]
    images, labels = mixing_transform(Config(**flags), classes=10)(samples)
    assert images.shape == (4, 3, 32, 32)
    if targets == "labels":
        assert torch.equal(images, torch.stack([image for image, _ in samples]))
        assert labels.tolist() == [0, 1, 2, 3]
    else:
        assert labels.shape == (4, 10)
        assert torch.allclose(labels.sum(dim=1), torch.ones(4))


def test_welch_interval_is_scipys():
    generator = np.random.default_rng(0)
    one, other = generator.normal(0.5, 0.02, 3).tolist(), generator.normal(0.49, 0.01, 5).tolist()
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    assert difference_interval(one, other) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("ours", "equal"), [([0.50, 0.51, 0.52], True), ([0.60, 0.61, 0.62], False)])
def test_equal_within_the_spread(ours, equal):
    def runs(values):
        return [[{"epoch": 1, "top1": 0.1, "loss": 2.3}, {"epoch": 2, "top1": value, "loss": 1.0}] for value in values]

    result = compare({OURS: runs(ours), PLAIN: runs([0.505, 0.515, 0.510])})
    assert result["top1"]["equal_within_spread"] is equal
    assert result["top1"][OURS]["mean"] == pytest.approx(np.mean(ours))
    assert result["top1"][OURS]["standard_deviation"] == pytest.approx(np.std(ours, ddof=1))
    assert result["top1"]["difference"] == pytest.approx(np.mean(ours) - 0.51)
    assert result["loss"]["equal_within_spread"]  # all the same
    assert result["top1_by_epoch"][OURS] == [[0.1, value] for value in ours]


def test_whoever_stops_it_does_not_wait_for_the_training(tmp_path, monkeypatch):
    """The training is stopped, too, and goes on when it is started again."""
    program = "import os, sys, time\nprint(os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(100)\n"
    (tmp_path / "train.py").write_text(program)
    monkeypatch.setattr(parity, "ROOT", tmp_path)
    told = []

    def stop(line):
        told.append(int(line))
        raise SystemExit(143)

    monkeypatch.setattr(parity.sys, "stderr", SimpleNamespace(write=stop))
    began = time.monotonic()
    with pytest.raises(SystemExit):
        parity.run_trainer(tmp_path / "out", [])
    assert time.monotonic() - began < 50
    with pytest.raises(ProcessLookupError):
        os.kill(told[0], 0)


@pytest.mark.slow
def test_modern_recipe(tmp_path, capsys):
    data = photo_folder(tmp_path / "photos", train=24, val=8)
    flags = ["--modern", "--data", str(data), "--out", str(tmp_path / "out"), "--seeds", "2", "--batch-size", "8"]
    flags += ["--epochs", "2", "--mixup", "0.2", "--cutmix", "1"]
    assert main(flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(math.isfinite(value) for name in (OURS, PLAIN) for value in result["loss"][name]["runs"])
    written = read_flat_yaml(tmp_path / "out/ours-0/config.yaml")
    asked_for = {"batch_norm": True, "crop_mode": "random-resized", "weight_decay_on": "weights", "ema": 0.99}
    assert {name: written[name].value for name in asked_for} == asked_for


@pytest.mark.slow
def test_parity_run_is_kept(tmp_path, capsys):
    data = photo_folder(tmp_path / "photos", train=8, val=4)
    flags = ["--data", str(data), "--out", str(tmp_path / "out"), "--seeds", "2"]
    flags += ["--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0"]
    assert main(flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in (OURS, PLAIN):
        assert len(result["top1"][name]["runs"]) == 2
        assert all(0 <= value <= 1 for value in result["top1"][name]["runs"])
    assert Path(result["plot"]).read_bytes().startswith(b"\x89PNG")

    (tmp_path / "out/plain-1/result.json").unlink()  # as if it had been killed in the last run
    assert main(flags) == 0
    again = capsys.readouterr()
    assert "plain loop, epoch 1" in again.err
    assert "step" not in again.err, "train.py ran again"
    assert json.loads(again.out.splitlines()[-1]) == result, "the plain loop is a function of its seed"

    assert main([*flags, "--lr", "0.5"]) == 2
    assert "other flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds 1: must be"),
        (["--nonsense"], "nonsense"),
        (["--lr", "x"], "--lr"),
        (["--steps", "20"], "--steps: the plain loop"),
        (["--micro-batch", "10"], "--micro-batch: the plain loop"),
        (["--head-lr-factor", "10"], "--head-lr-factor: the plain loop"),
        (["--schedule", "step"], "--schedule: the benchmark chooses it"),
        (["--precision", "bf16"], "--precision: the benchmark chooses it"),
        (["--compile"], "--compile: the benchmark chooses it"),
        (["--seed", "3"], "--seed: the benchmark chooses it"),
        (["--modern", "--train-scale", "36"], "--train-scale 36: --crop-mode random-resized"),
    ],
)
def test_wrong_flags_are_said_at_once(flags, message, tmp_path, capsys):
    assert main(["--data", "x", "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
