import math

import pytest
import torch

import train
from common.ranks import ranks_of_this_run
from engine.checkpoint import load
from engine.config import parse_args
from engine.data import open_training_data
from engine.evaluation.accuracy import evaluate
from engine.networks import load_network
from engine.precision import Precision
from engine.training.weight_average import WeightAverage
from model.vgg import build
from tests.support.images import photo_folder

CPU = torch.device("cpu")


@pytest.mark.seconds
def test_the_average_is_the_sum_over_all_weights_before():
    """In float64, batch normalisation's statistics included, with the decays 0.1, 2/11, 3/12 … up to the one asked for."""
    model = build("A", classes=2, crop=32, dropout=0.0, init="xavier", device=CPU, batch_norm=True)
    average = WeightAverage(model, 0.25)
    seen = [{name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))
        average.update()
        seen.append({name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()})
    decays = [1 / 10, 2 / 11, 3 / 12, 0.25, 0.25]
    kept = [math.prod(decays[n:]) for n in range(6)]  # of what was there before update n
    shares = [kept[0], *(kept[n + 1] * (1 - decay) for n, decay in enumerate(decays))]
    assert sum(shares) == pytest.approx(1)
    averages = average.model.state_dict()
    assert list(averages) == list(model.state_dict())
    for name in seen[0]:
        expected = sum(share * weights[name] for share, weights in zip(shares, seen, strict=True))
        assert torch.allclose(averages[name].double(), expected, atol=1e-5), name


def test_the_initial_weights_are_soon_forgotten():
    """Without a warm-up they would be 94 % of the average of 0.9999 after 630 steps."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    average = WeightAverage(model, 0.9999)
    torch.nn.init.zeros_(model.weight)
    for _ in range(630):
        average.update()
    assert 0 < float(average.model.state_dict()["weight"]) < 1e-12


@pytest.mark.seconds
def test_the_average_is_validated_and_what_others_take_from_a_checkpoint(tmp_path):
    """Its loss on the validation images is the one in the history, and the plain weights' is another."""
    data = photo_folder(tmp_path / "photos", train=6, val=5)
    flags = ["--arch", "A", "--data", str(data), "--crop", "32", "--train-scale", "32", "--batch-size", "6"]
    flags += ["--schedule", "step", "--epochs", "2", "--lr", "0.001", "--ema", "0.6", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    checkpoint = load(tmp_path / "run/last.pt")
    plain = build("A", classes=2, crop=32, dropout=0.0, init="xavier", device=CPU)
    plain.load_state_dict(checkpoint.model)
    losses = {}
    with ranks_of_this_run("cpu") as ranks:
        opened_data = open_training_data(parse_args(flags), ranks, Precision("fp32", "cpu"))
        opened = opened_data.validation_batches(opened_data.viewing)
        assert opened
        batches, steps = opened
        for name, model in (("plain", plain), ("average", load_network(str(tmp_path / "run/best.pt")).build(CPU))):
            accuracy = evaluate(model, batches, steps, ranks=ranks, precision=Precision("fp32", "cpu"))
            assert accuracy
            losses[name] = accuracy.loss
    best = max(checkpoint.history, key=lambda entry: entry["top1"])
    assert losses["average"] == pytest.approx(best["loss"], rel=1e-5)
    assert losses["plain"] != pytest.approx(best["loss"], rel=1e-3)
