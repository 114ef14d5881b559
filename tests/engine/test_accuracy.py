import numpy as np
import pytest
import torch
from torch import nn

from common.ranks import Ranks
from engine.evaluation.accuracy import evaluate
from engine.precision import Precision
from tests.support.networks import Noting

RANKS = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"), patient_group=None)


class Lookup(nn.Module):
    """Gives the logits that were put in, in order; counts its calls in each mode."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.modes = iter(logits), []

    def forward(self, images):
        self.modes.append(self.training)
        return next(self.logits)


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_counts_equal_numpys_with_padding_left_out(classes):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(6, 16, classes)).astype(np.float32)
    labels = generator.integers(classes, size=(6, 16))
    labels[5, 9:] = -1
    model = Lookup(torch.from_numpy(logits))
    batches = ((torch.zeros(16, 1), torch.from_numpy(row)) for row in labels)
    accuracy = evaluate(model, batches, 6, ranks=RANKS, precision=Precision("fp32", "cpu"))
    assert accuracy

    flat, wanted = logits.reshape(-1, classes).astype(float)[:89], labels.ravel()[:89]
    own = flat[np.arange(89), wanted][:, None]
    better = (flat > own).sum(axis=1)
    losses = np.log(np.exp(flat).sum(axis=1)) - own[:, 0]
    assert accuracy.images == 89
    assert accuracy.top1 == pytest.approx(np.mean(better < 1), abs=1e-12)
    assert accuracy.top5 == pytest.approx(np.mean(better < 5), abs=1e-12)
    assert accuracy.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert model.modes == [False] * 6
    assert model.training


def test_a_network_that_says_the_same_of_every_class_is_not_right_every_time():
    labels = torch.arange(10)
    accuracy = evaluate(
        Lookup([torch.zeros(10, 10)]),
        iter([(torch.zeros(10, 1), labels)]),
        1,
        ranks=RANKS,
        precision=Precision("fp32", "cpu"),
    )
    assert accuracy
    assert accuracy.top1 == pytest.approx(0.1)
    assert accuracy.top5 == pytest.approx(0.5)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_images_lost_before_count_as_wrong_once_whatever_the_number_of_ranks(rank):
    ranks = Ranks(
        rank=rank, world_size=3, local_rank=rank, local_world_size=3, device=torch.device("cpu"), patient_group=None
    )
    batches = iter([(torch.zeros(4, 1), torch.tensor([0, 0, -2, -1]))])
    accuracy = evaluate(
        Lookup([torch.tensor([[1.0, 0.0]] * 4)]),
        batches,
        1,
        ranks=ranks,
        precision=Precision("fp32", "cpu"),
        lost_before=5,
    )
    assert accuracy
    own = 5 if rank == 0 else 0  # without a group, nothing is added up
    assert (accuracy.images, accuracy.lost) == (3 + own, 1 + own)
    assert accuracy.top1 == pytest.approx(2 / (3 + own))
    assert accuracy.loss == pytest.approx(np.log(1 + np.exp(-1)))


def test_an_evaluation_that_is_stopped_has_no_result():
    model, asked = Lookup(torch.zeros(9, 4, 3)), []
    batches = ((torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)) for _ in range(9))

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    assert evaluate(model, batches, 9, ranks=RANKS, precision=Precision("fp32", "cpu"), stop=stop) is None
    assert len(model.modes) == 3
    assert model.training


def test_an_answer_that_is_not_finite_is_wrong_and_shows_in_the_loss():
    """Of NaN, topk takes whichever class it likes: it would be right for some."""
    logits = torch.full((10, 10), torch.nan)
    logits[9] = torch.arange(10)
    accuracy = evaluate(
        Lookup([logits]),
        iter([(torch.zeros(10, 1), torch.arange(10))]),
        1,
        ranks=RANKS,
        precision=Precision("fp32", "cpu"),
    )
    assert accuracy
    assert (accuracy.top1, accuracy.top5, accuracy.lost) == (0.1, 0.1, 0)
    assert np.isnan(accuracy.loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_spoils_an_answer(value):
    """Though the label's logit is the largest of those that are."""
    logits = torch.arange(60.0).reshape(6, 10)
    logits[2, 0] = value
    accuracy = evaluate(
        Lookup([logits]),
        iter([(torch.zeros(6, 1), torch.full((6,), 9))]),
        1,
        ranks=RANKS,
        precision=Precision("fp32", "cpu"),
    )
    assert accuracy
    assert accuracy.top1 == pytest.approx(5 / 6)
    assert accuracy.top5 == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_validation_computes_in_the_format_of_the_training(name, dtype):
    network, batches = Noting(), iter([(torch.ones(3, 4), torch.zeros(3, dtype=torch.int64))])
    assert evaluate(network, batches, 1, ranks=RANKS, precision=Precision(name, "cpu"))
    assert network.dtypes == [dtype]


def test_the_confusion_counts_each_class_against_the_likeliest():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(3, 20, 4)).astype(np.float32)
    labels = generator.integers(4, size=(3, 20))
    labels[1, 3], labels[2, 15:] = -2, -1
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    batches = ((torch.zeros(20, 1), torch.from_numpy(row)) for row in labels)
    evaluate(
        Lookup(torch.from_numpy(logits)),
        batches,
        3,
        ranks=RANKS,
        precision=Precision("fp32", "cpu"),
        confusion=confusion,
    )
    expected = np.zeros((4, 4), dtype=int)
    for answer, label in zip(logits.reshape(-1, 4), labels.ravel(), strict=True):
        if label >= 0:
            expected[label, answer.argmax()] += 1
    assert np.array_equal(confusion.numpy(), expected)


def test_sums_and_confusion_are_those_of_all_ranks(monkeypatch):
    """Of three that have the same images."""
    monkeypatch.setattr("engine.evaluation.accuracy.sum_over_ranks", lambda values, ranks: values.mul_(3))
    logits = torch.eye(4)[None, [0, 1, 2, 2]]  # the last is wrong
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    batches = iter([(torch.zeros(4, 1), torch.arange(4))])
    result = evaluate(Lookup(logits), batches, 1, ranks=RANKS, precision=Precision("fp32", "cpu"), confusion=confusion)
    assert result
    assert (result.images, result.top1) == (12, 0.75)
    assert confusion.tolist() == [[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 3, 0]]
