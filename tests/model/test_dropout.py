"""Dropout whose masks are a function of the sample: it is random as torch's is, and the same however a batch is shared out."""

import copy

import pytest
import torch

from model.dropout import Dropout

CPU = torch.device("cpu")
IMAGES, UNITS = 256, 4096


def dropout(key: str = "0 0", p: float = 0.5, **places) -> Dropout:
    layer = Dropout(p)
    layer.number_samples(key, device=CPU, **places)
    return layer


def mask(layer: Dropout, first: int, images: int = IMAGES, units: int = UNITS) -> torch.Tensor:
    """Of ones: 1 / (1 - p) where they are kept."""
    layer.at_sample(first)
    return layer(torch.ones(images, units))


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_each_activation_is_dropped_with_probability_p_or_scaled(p):
    found = mask(dropout(p=p), 7)
    assert found.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    dropped = (found == 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 5 * deviation / (IMAGES * UNITS) ** 0.5
    # Of one unit over images, and of one image over units: as far from p as chance has them, neither more nor less.
    for axis, count in ((0, IMAGES), (1, UNITS)):
        assert dropped.mean(dim=axis).std() == pytest.approx(deviation / count**0.5, rel=0.15)


def test_images_units_layers_steps_and_seeds_have_nothing_to_do_with_each_other():
    found = mask(dropout(), 0).double() - 1
    of_images, of_units = found @ found.T / UNITS, found.T @ found / IMAGES
    for products, count in ((of_images, UNITS), (of_units, IMAGES)):
        others = products[~torch.eye(len(products), dtype=torch.bool)]
        assert others.std() == pytest.approx(1 / count**0.5, rel=0.05)
        assert others.abs().max() < 7 / count**0.5
    limit = 5 / (IMAGES * UNITS) ** 0.5
    for other in (mask(dropout(), IMAGES), mask(dropout("0 1"), 0), mask(dropout("1 0"), 0), mask(dropout(), 2**32)):
        assert abs(correlation(found, other)) < limit
    assert abs(correlation(found[:, 1:], found[:, :-1])) < limit
    assert abs(correlation(found[1:], found[:-1])) < limit


def test_a_sample_has_its_mask_in_whatever_pass_it_comes():
    whole = mask(dropout(), 1000)
    layer = dropout()
    assert torch.equal(torch.cat([mask(layer, 1000 + first, 8) for first in range(0, IMAGES, 8)]), whole)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_units_have_the_parts_of_one_mask(ranks):
    """Each rank's images of a pass are together, in the order of the ranks, and there are two passes."""
    whole, share = mask(dropout(), 1000), IMAGES // ranks
    for rank in range(ranks):
        layer = dropout(ranks=ranks, rank=rank, share=share, units=UNITS)
        for number in range(2):
            own = 1000 + rank * share + number * share // 2
            found = mask(layer, own, IMAGES // 2, UNITS // ranks)
            rows = torch.arange(IMAGES).reshape(ranks, 2, share // 2)[:, number].flatten()
            assert torch.equal(found, whole[rows].chunk(ranks, dim=1)[rank])


def test_gradients_pass_where_activations_do():
    layer = dropout()
    x = torch.randn(8, UNITS, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, mask(layer, 0, 8))


def test_half_precision_stays_so():
    assert dropout()(torch.ones(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_without_numbers_it_is_torchs_and_in_evaluation_it_does_nothing():
    x = torch.randn(8, 16)
    plain = Dropout(0.5)
    torch.manual_seed(3)
    found = plain(x)
    torch.manual_seed(3)
    assert torch.equal(found, torch.nn.Dropout(0.5)(x))
    numbered = dropout().eval()
    assert torch.equal(numbered(x), x)
    assert not numbered.state_dict()
    assert torch.equal(mask(copy.deepcopy(dropout()), 5), mask(dropout(), 5))


@pytest.mark.seconds
def test_compiled_it_draws_the_same():
    layer = dropout()
    x = torch.randn(8, UNITS)
    layer.at_sample(40)
    eager = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), eager)
    layer.at_sample(41)
    eager = layer(x)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(compiled(x), eager), "another sample: the number is no constant of the graph"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
