"""What travels where ranks share FC6 and FC7, against sums by hand; and when --parallel auto takes it."""

import dataclasses

import msgspec
import pytest
import torch

import perf.hybrid
from common.ranks import Ranks
from engine.config import parse_args
from perf.costs import Job, layer_costs
from perf.hybrid import (
    activation_bytes,
    choose_parallel,
    communication_seconds,
    gather_seconds,
    possible_sharing,
    predict_hybrid,
)
from perf.peaks import peaks_of
from perf.report import Links, Peaks
from perf.roofline import roofline
from perf.scaling import all_reduce_seconds, floor_times

PEAKS = Peaks(name="it", source="table", flops_per_second=989.4e12, bytes_per_second=3.35e12, watts=700)
LINKS = Links(peer_bytes_per_second=100e9, network_bytes_per_second=10e9, gpus_per_node=8, latency_seconds=5e-6)
D = Job(arch="D", classes=1000, crop=224, batch=32, precision="bf16", ranks=8)
FC6, FC7, FC8 = 25088 * 4096 + 4096, 4096 * 4096 + 4096, 4096 * 1000 + 1000
REST = 138_357_544 - FC6 - FC7


def times(job: Job, sharing: int):
    layers = dataclasses.replace(job, sharing=sharing).layers()
    return floor_times(layers, PEAKS, batch=job.batch, passes=job.passes, precision=job.precision)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_gather_is_half_of_an_all_reduce(ranks):
    assert 2 * gather_seconds(1e9, ranks=ranks, links=LINKS) == pytest.approx(
        all_reduce_seconds(1e9, ranks=ranks, links=LINKS, algorithm="ring")
    )


def test_a_gather_over_machines_goes_through_their_connections_first():
    """Two machines of eight: each sends the other its half of the bytes; then each of eight GPUs has an eighth of all."""
    expected = 5e-6 + 0.5e9 / 10e9 + 7 * (5e-6 + 1e9 / 8 / 100e9)
    assert gather_seconds(1e9, ranks=16, links=LINKS) == pytest.approx(expected)


@pytest.mark.parametrize(("batch", "megabytes"), [(32, 30), (256, 239)])
def test_activations_that_travel_for_eight_gpus(batch, megabytes):
    """As the arithmetic has it: D at 224 pixels in bf16, forward and backward; 30 MB of 256 images, and 314 − 75 of 2,048."""
    sizes = activation_bytes(dataclasses.replace(D, batch=batch), 8)
    assert sizes == (8 * batch * 25088 * 2, 8 * batch * 4096 * 2)
    assert 2 * sum(sizes) / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_a_rank_computes_as_much_and_has_an_nth_of_the_weights():
    whole = {layer.name: layer for layer in layer_costs("D", classes=1000, crop=224, batch=32, bytes_per_value=2)}
    part = {
        layer.name: layer for layer in layer_costs("D", classes=1000, crop=224, batch=32, bytes_per_value=2, sharing=8)
    }
    for name, layer in part.items():
        assert layer.forward.flops == whole[name].forward.flops
        assert layer.is_shared == (name in ("classifier.0", "classifier.3"))
        if not layer.is_shared:
            assert layer == whole[name]
    assert part["classifier.0"].parameters == (25088 * 512, 512)
    assert part["classifier.3"].parameters == (4096 * 512, 4096)
    # Read: the inputs of all 256 images and the part's weights; a copy of them is written and read in half precision.
    weights = 25088 * 512 + 512
    assert part["classifier.0"].forward.bytes == 2 * 256 * 25088 + (2 + 2 + 4) * weights + 2 * 256 * 512


def test_no_gradient_of_a_shared_layer_is_sent():
    alone, shared = times(D, 1), times(D, 8)
    assert sum(sum(layer.parameters) for layer in alone.backward) == 138_357_544
    assert sum(sum(layer.parameters) for layer in shared.backward) == REST
    assert shared.shared_parameters == 25088 * 512 + 512 + 4096 * 512 + 4096
    assert shared.optimizer_seconds < 0.3 * alone.optimizer_seconds


def test_what_travels_is_waited_for_but_for_what_the_convolutions_hide():
    slow = msgspec.structs.replace(LINKS, peer_bytes_per_second=1e9)
    waiting = 2 * sum(gather_seconds(size, ranks=8, links=slow) for size in activation_bytes(D, 8))
    shared = times(D, 8)
    total, exposed = communication_seconds(D, shared, sharing=8, links=slow, algorithm="ring")
    beside = communication_seconds(dataclasses.replace(D), shared, sharing=1, links=slow, algorithm="ring")
    assert total == pytest.approx(waiting + beside[0])
    assert exposed == pytest.approx(waiting + beside[1])
    two_passes = dataclasses.replace(D, micro_batch=16)
    same_bytes, _ = communication_seconds(two_passes, shared, sharing=8, links=slow, algorithm="ring")
    assert same_bytes - total == pytest.approx(4 * 7 * 5e-6), "as many bytes, in twice as many messages"


def test_parts_are_added_up_over_machines():
    """Two machines of eight: all of FC6 and FC7 goes through each one's connection, and nothing hides the latest of it."""
    of_sixteen = dataclasses.replace(D, ranks=16)
    shared = times(D, 8)
    total, _ = communication_seconds(of_sixteen, shared, sharing=8, links=LINKS, algorithm="ring")
    alone, _ = communication_seconds(of_sixteen, shared, sharing=1, links=LINKS, algorithm="ring")
    activations = 2 * sum(gather_seconds(size, ranks=8, links=LINKS) for size in activation_bytes(D, 8))
    between = 2 * (5e-6 + 8 * shared.shared_parameters * 4 / 2 / 10e9)
    assert total == pytest.approx(alone + activations + between)


@pytest.mark.parametrize(
    ("ranks", "gpus_per_node", "sharing"),
    [
        (1, 8, []),
        (2, 1, [2]),
        (2, 8, [2]),
        (8, 8, [8]),
        (64, 8, [8, 64]),
        (4, 1, [4]),
        (3, 1, []),
        (6, 3, []),
        (24, 8, [8]),
    ],
)
def test_the_ranks_of_a_machine_share_or_all(ranks, gpus_per_node, sharing):
    assert possible_sharing(ranks, gpus_per_node) == sharing


def test_predictions_have_it_where_the_layers_divide():
    result = roofline(D, peaks=PEAKS, links=LINKS)
    assert {row.ranks: row.hybrid is not None for row in result.scaling} == {
        1: False, 2: True, 4: True, 8: True, 64: True, 512: True,
    }  # fmt: skip
    of_eight = next(row for row in result.scaling if row.ranks == 8)
    assert of_eight.hybrid
    shared = times(D, 8)
    _, exposed = communication_seconds(D, shared, sharing=8, links=LINKS, algorithm="best")
    assert of_eight.hybrid.images_per_second == pytest.approx(256 / (shared.seconds + exposed))
    assert of_eight.hybrid.sharing == 8


def test_small_batches_are_shared_over_machines_and_large_ones_within():
    """16 GPUs: 478 MB of gradients over the network, or the activations of all images."""
    found = {}
    for images in (4, 2048):
        of_sixteen = dataclasses.replace(D, ranks=16, batch=images)

        def times_of(sharing: int, job: Job = of_sixteen):
            return times(job, sharing)

        found[images] = predict_hybrid(of_sixteen, times_of, links=LINKS, algorithm="best")
    assert {images: scaled and scaled.sharing for images, scaled in found.items()} == {4: 16, 2048: 8}


RANKS = Ranks(
    rank=0, world_size=8, local_rank=0, local_world_size=8, device=torch.device("cuda", 0), patient_group=None
)


@pytest.mark.parametrize(
    ("card", "batch_size", "world_size", "choice"),
    [
        ("H100", 256, 8, "hybrid"),
        ("H100", 4096, 8, "data"),
        ("H100", 252, 6, "data"),  # 4096 does not divide
        ("H100", 32, 1, "data"),
        ("an unknown card", 256, 8, "data"),
    ],
)
def test_auto_shares_where_it_is_faster_by_a_tenth(monkeypatch, capsys, card, batch_size, world_size, choice):
    monkeypatch.setattr(perf.hybrid.torch.cuda, "get_device_name", lambda _: card)
    ranks = dataclasses.replace(RANKS, world_size=world_size, local_world_size=world_size)
    config = parse_args(["--data", "synthetic", "--batch-size", str(batch_size)])
    job = dataclasses.replace(D, batch=batch_size // world_size, ranks=world_size)
    chosen = choose_parallel(config, ranks, job)
    assert chosen == dataclasses.replace(config, parallel=choice, fc_ranks=8 if choice == "hybrid" else None)
    said = capsys.readouterr().err
    if world_size == 1:
        assert not said
    else:
        other = {"data": "hybrid", "hybrid": "data"}[choice]
        assert said.startswith(f"--parallel auto is {choice}{' over 8 ranks' * (choice == 'hybrid')} here: ")
        assert said.endswith(f"; --parallel {other} is the other way\n")
    if peaks_of(card, "bf16") and world_size == 8:
        assert "NVLink" in said
    for asked in ("data", "hybrid"):
        given = dataclasses.replace(config, parallel=asked)
        assert choose_parallel(given, ranks, job) is given


def test_auto_is_on_all_ranks_what_it_is_on_rank_0(monkeypatch):
    """On another machine, with another card, the model would say something else."""
    monkeypatch.setattr(perf.hybrid.torch.cuda, "get_device_name", lambda _: "an unknown card")
    monkeypatch.setattr(perf.hybrid, "on_rank_0", lambda ranks, call: (8, "why"))
    config = parse_args(["--data", "synthetic"])
    chosen = choose_parallel(config, dataclasses.replace(RANKS, rank=3), dataclasses.replace(D, ranks=8))
    assert (chosen.parallel, chosen.fc_ranks) == ("hybrid", 8)
