"""Mixup and CutMix against torchvision's, whose draws are replaced by ours, and against scipy's Beta distribution."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms import v2

from common.ranks import Ranks
from engine.config import Config
from engine.precision import Precision
from engine.training.assembly import assemble
from engine.training.mixing import Mixing
from engine.training.step import TrainStep, compile_model
from model.vgg import build
from pipeline.plan.random_numbers import PURPOSE_MIXING, uniforms

CPU = torch.device("cpu")
FP32 = Precision("fp32", "cpu")
SEED, CLASSES = 5, 7
HEIGHT, WIDTH = 20, 33
SIGNIFICANCE = 1e-3


def make_batch(count: int = 5, channels: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, channels, HEIGHT, WIDTH, generator=generator) * 50
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return images.to(dtype).to(memory_format=torch.channels_last), labels


def draws(first_sample: int) -> list[float]:
    """Which of the two, the quantile of the share, and the centre of the rectangle, y before x."""
    return uniforms(SEED, np.array([0]), np.array([first_sample]), PURPOSE_MIXING)[:, 0].tolist()


def of_torchvision(transform, alpha: float, images: Tensor, labels: Tensor, first_sample: int, monkeypatch):
    """Its images and targets, for our draws."""
    _, u_share, u_y, u_x = draws(first_sample)
    share = torch.tensor(stats.beta.ppf(u_share, alpha, alpha), dtype=torch.float64)
    corner = iter([(WIDTH, u_x), (HEIGHT, u_y)])

    def randint(side: int, **_) -> Tensor:
        expected, u = next(corner)
        assert side == expected
        return torch.tensor([int(u * side)])

    mixing = transform(alpha=alpha, num_classes=CLASSES)
    mixing._dist = SimpleNamespace(sample=lambda _: share)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", randint)
        return mixing(images, labels)


def targets(labels: Tensor, own_share: float) -> Tensor:
    own = F.one_hot(labels, CLASSES).float()
    return own_share * own + (1 - own_share) * own.roll(1, 0)


@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.float32), (4, torch.float16)])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_is_torchvisions(monkeypatch, alpha, channels, dtype):
    images, labels = make_batch(channels=channels, dtype=dtype)
    for first_sample in range(0, 40, 5):
        mixed, own_share = Mixing(mixup=alpha, cutmix=0, seed=SEED)(images, first_sample)
        expected = of_torchvision(v2.MixUp, alpha, images.float(), labels, first_sample, monkeypatch)
        rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (1e-3, 0.1)
        assert torch.allclose(mixed.float(), expected[0], rtol=rtol, atol=atol)
        assert torch.allclose(targets(labels, own_share), expected[1], atol=1e-6)


@pytest.mark.parametrize(("channels", "dtype"), [(3, torch.float32), (4, torch.float16)])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_cutmix_is_torchvisions(monkeypatch, alpha, channels, dtype):
    images, labels = make_batch(channels=channels, dtype=dtype)
    shares = []
    for first_sample in range(0, 200, 5):
        mixed, own_share = Mixing(mixup=0, cutmix=alpha, seed=SEED)(images, first_sample)
        expected = of_torchvision(v2.CutMix, alpha, images, labels, first_sample, monkeypatch)
        assert torch.equal(mixed, expected[0])
        assert torch.allclose(targets(labels, own_share), expected[1], atol=1e-6)
        own_pixels = (mixed == images).all(dim=1).float().mean().item()
        assert own_pixels == pytest.approx(own_share, abs=1e-6), "the share is that of what is seen"
        shares.append(own_share)
    assert len(set(shares)) > 10


@pytest.mark.parametrize("alphas", [(0.2, 0), (0, 1), (0.2, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_loaders_images_stay_as_they_are_and_the_memory_format_too(alphas, dtype):
    """The synthetic loader gives the same tensor every time, and pictures for the log are drawn from it."""
    images, _ = make_batch(dtype=dtype)
    before = images.clone()
    for first_sample in range(8):
        mixed, _ = Mixing(mixup=alphas[0], cutmix=alphas[1], seed=SEED)(images, first_sample)
        assert torch.equal(images, before)
        assert mixed.data_ptr() != images.data_ptr()
        assert (mixed.dtype, mixed.stride()) == (images.dtype, images.stride())


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_have_the_beta_distribution(alpha):
    images, _ = make_batch(2)
    shares = [Mixing(mixup=alpha, cutmix=0, seed=SEED)(images, 2 * number)[1] for number in range(3000)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > SIGNIFICANCE
    assert abs(np.corrcoef(shares[:-1], shares[1:])[0, 1]) < 0.06, "one pass tells nothing of the next"


def test_cutmix_shares_have_the_distribution_of_torchvisions():
    images, _ = make_batch(2)
    shares = [Mixing(mixup=0, cutmix=1, seed=SEED)(images, 2 * number)[1] for number in range(3000)]
    theirs = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    expected = [theirs.make_params([images])["lam_adjusted"] for _ in range(3000)]
    assert stats.ks_2samp(shares, expected).pvalue > SIGNIFICANCE


def test_of_the_two_each_pass_has_one_with_equal_probability():
    images, _ = make_batch(2)
    cut = 0
    for number in range(1000):
        mixed, own_share = Mixing(mixup=0.2, cutmix=1, seed=SEED)(images, 2 * number)
        is_cutmix = draws(2 * number)[0] >= 0.5
        alone = Mixing(mixup=0 if is_cutmix else 0.2, cutmix=1 if is_cutmix else 0, seed=SEED)(images, 2 * number)
        assert own_share == alone[1]
        assert torch.equal(mixed, alone[0])
        cut += is_cutmix
    assert stats.binomtest(cut, 1000).pvalue > SIGNIFICANCE


def test_mixing_is_a_function_of_the_seed_and_the_sample_alone():
    """Not of torch's or NumPy's generators, which it leaves as they are."""
    images, _ = make_batch()
    mixing = Mixing(mixup=1, cutmix=1, seed=SEED)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        states.append([mixing(images, first_sample) for first_sample in (0, 10, 2**40)])
        assert torch.equal(torch.get_rng_state(), before)
    for (mixed, own_share), (again, same_share) in zip(*states, strict=True):
        assert own_share == same_share
        assert torch.equal(mixed, again)
    others = [Mixing(mixup=1, cutmix=1, seed=6)(images, 0)[1], *(own_share for _, own_share in states[0])]
    assert len(set(others)) == len(others)


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("alphas", [(1.0, 0), (0, 1.0), (1.0, 1.0)])
def test_the_loss_is_that_of_torchvisions_targets(monkeypatch, label_smoothing, alphas):
    """Cross-entropy with probabilities, pass by pass, with the samples' numbers that the second of two ranks has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * HEIGHT * WIDTH, CLASSES))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = Config(
        data="synthetic", batch_size=10, mixup=alphas[0], cutmix=alphas[1], seed=SEED, label_smoothing=label_smoothing,
        lr=1e-3, weight_decay=0.0,
    )  # fmt: skip
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU, patient_group=None)
    parts = assemble(config, ranks=ranks, precision=FP32, micro_batch=5, model=model)
    images, labels = make_batch()
    parts.step.warm_up(images, labels)
    loss = parts.step(iter([(images, labels), (images, labels)]), first_sample=30)
    reference = nn.Sequential(nn.Flatten(), nn.Linear(3 * HEIGHT * WIDTH, CLASSES)).double()
    reference.load_state_dict(before)
    expected = torch.zeros((), dtype=torch.float64)
    for first_sample in (30, 35):
        is_cutmix = not alphas[0] or bool(alphas[1] and draws(first_sample)[0] >= 0.5)
        transform = v2.CutMix if is_cutmix else v2.MixUp
        mixed, probabilities = of_torchvision(transform, 1.0, images, labels, first_sample, monkeypatch)
        logits = reference(mixed.double())
        expected = expected + F.cross_entropy(logits, probabilities.double(), label_smoothing=label_smoothing) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, weight), exact in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert exact.grad is not None
        assert torch.allclose(weight, before[name] - 1e-3 * exact.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flag", ["mixup", "cutmix"])
def test_each_flag_is_taken_and_none_mixes_nothing(flag):
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU, patient_group=None)
    losses = {}
    images, labels = make_batch()
    for alpha in (0.0, 1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * HEIGHT * WIDTH, CLASSES))
        config = Config(data="synthetic", batch_size=5, seed=SEED, **{flag: alpha})  # type: ignore[arg-type]
        parts = assemble(config, ranks=ranks, precision=FP32, micro_batch=5, model=model)
        unmixed = F.cross_entropy(model(images), labels).item()
        losses[alpha] = parts.step(iter([(images, labels)])).item()
    assert losses[0.0] == unmixed
    assert not math.isclose(losses[1.0], unmixed, rel_tol=1e-3)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_once_for_all_shares_and_rectangles():
    model = build("A", classes=10, crop=32, dropout=0.0, init="xavier", device=CPU, seed=3)
    images = (torch.randn(4, 3, 32, 32) * 50).to(memory_format=torch.channels_last)
    step = TrainStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        scaler=FP32.grad_scaler(),
        precision=FP32,
        passes=1,
        mixing=Mixing(mixup=0.2, cutmix=1.0, seed=SEED),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_model(model, choice="on", mode="default", device=CPU, is_main=True)
    step.warm_up(images, torch.arange(4))
    for number in range(6):
        step(iter([(images, torch.arange(4))]), first_sample=4 * number)
    kinds = {draws(4 * number)[0] >= 0.5 for number in range(6)}
    assert kinds == {False, True}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
