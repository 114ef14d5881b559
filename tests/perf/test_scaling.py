"""The all-reduce's model against sums by hand and a ring run message by message; buckets against torch's own."""

import math
from collections.abc import Sequence

import msgspec
import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from perf.costs import Work, layer_costs
from perf.report import Links, Peaks
from perf.scaling import (
    ComputeTimes,
    LayerBackward,
    all_reduce_beside,
    all_reduce_seconds,
    buckets,
    fastest,
    floor_seconds,
    floor_times,
    predict,
)

LINKS = Links(peer_bytes_per_second=100e9, network_bytes_per_second=10e9, gpus_per_node=8, latency_seconds=5e-6)
WITH_SWITCH = msgspec.structs.replace(LINKS, in_switch=True)


def ring_message_by_message(ranks: int) -> int:
    """Run a ring over real numbers, one piece a rank; returns how many messages each rank sent until all had every sum."""
    pieces = [[10**rank for _ in range(ranks)] for rank in range(ranks)]
    messages = 0
    for step in range(ranks - 1):  # reduce-scatter: add what the left neighbour sends
        sent = [(rank - step) % ranks for rank in range(ranks)]
        values = [pieces[rank][piece] for rank, piece in enumerate(sent)]
        for rank, (piece, value) in enumerate(zip(sent, values, strict=True)):
            pieces[(rank + 1) % ranks][piece] += value
        messages += 1
    for step in range(ranks - 1):  # all-gather: take over what the left neighbour sends
        sent = [(rank + 1 - step) % ranks for rank in range(ranks)]
        values = [pieces[rank][piece] for rank, piece in enumerate(sent)]
        for rank, (piece, value) in enumerate(zip(sent, values, strict=True)):
            pieces[(rank + 1) % ranks][piece] = value
        messages += 1
    assert pieces == [[sum(10**rank for rank in range(ranks))] * ranks] * ranks
    return messages


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ring_takes_its_messages(ranks):
    expected = ring_message_by_message(ranks) * (5e-6 + 1e9 / ranks / 100e9)
    assert all_reduce_seconds(1e9, ranks=ranks, links=LINKS, algorithm="ring") == pytest.approx(expected)


def test_tree_takes_its_height_and_every_byte_twice():
    for ranks, height in ((2, 1), (3, 2), (4, 2), (8, 3)):
        expected = 2 * (height * 5e-6 + 1e9 / 100e9)
        assert all_reduce_seconds(1e9, ranks=ranks, links=LINKS, algorithm="tree") == pytest.approx(expected)


def through_a_switch_part_by_part(ranks: int) -> tuple[int, int]:
    """Reduce real numbers, one part a rank, in a switch that adds up and sends to all.

    Returns how many parts each rank sent and received."""
    parts = [[10**rank for _ in range(ranks)] for rank in range(ranks)]
    sent, received = [0] * ranks, [0] * ranks
    for owner in range(ranks):
        total = 0
        for rank in range(ranks):  # the switch reads that part of all, the owner's too
            total += parts[rank][owner]
            sent[rank] += 1
        received[owner] += 1
        sent[owner] += 1  # the sum, once, for all
        for rank in range(ranks):
            parts[rank][owner] = total
            received[rank] += 1
    assert parts == [[sum(10**rank for rank in range(ranks))] * ranks] * ranks
    assert len(set(sent)) == len(set(received)) == 1, "all ranks alike"
    return sent[0], received[0]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_in_the_switch_each_rank_sends_and_receives_little_more_than_its_bytes(ranks):
    sent, received = through_a_switch_part_by_part(ranks)
    expected = 2 * 5e-6 + max(sent, received) / ranks * 1e9 / 100e9
    assert all_reduce_seconds(1e9, ranks=ranks, links=WITH_SWITCH, algorithm="in-switch") == pytest.approx(expected)


def test_best_is_in_the_switch_from_four_ranks_on():
    assert [fastest(1e9, ranks=ranks, links=WITH_SWITCH) for ranks in (2, 4, 8)] == ["ring", "in-switch", "in-switch"]
    assert fastest(1e9, ranks=8, links=LINKS) == "ring"
    ring, switch = (
        all_reduce_seconds(1e9, ranks=8, links=WITH_SWITCH, algorithm=name) for name in ("ring", "in-switch")
    )
    assert ring / switch == pytest.approx(1.75 / 1.125, rel=0.01)
    assert all_reduce_seconds(1e9, ranks=8, links=WITH_SWITCH, algorithm="best") == switch
    # between machines, as without
    within = 2 * 5e-6 + 9 / 8 * 1e9 / 100e9
    ring = 6 * 5e-6 + 2 * 3 / 4 * 1e9 / 10e9
    assert all_reduce_seconds(1e9, ranks=32, links=WITH_SWITCH, algorithm="in-switch") == pytest.approx(within + ring)


def test_no_switch_no_reduction_in_it():
    with pytest.raises(UserError, match="--all-reduce in-switch: no switch between these GPUs adds up"):
        all_reduce_seconds(1e9, ranks=8, links=LINKS, algorithm="in-switch")


def test_across_machines():
    """8 GPUs on each of 4: 7/8 of the bytes out and in within the machine, 3/4 out and in through its network."""
    within = 14 * 5e-6 + 2 * 7 / 8 * 1e9 / 100e9
    ring = 6 * 5e-6 + 2 * 3 / 4 * 1e9 / 10e9
    tree = 4 * 5e-6 + 2 * 1e9 / 10e9
    assert all_reduce_seconds(1e9, ranks=32, links=LINKS, algorithm="ring") == pytest.approx(within + ring)
    assert all_reduce_seconds(1e9, ranks=32, links=LINKS, algorithm="tree") == pytest.approx(within + tree)
    assert all_reduce_seconds(1e9, ranks=32, links=LINKS, algorithm="best") == pytest.approx(within + ring)
    few_bytes_many_machines = all_reduce_seconds(8, ranks=512, links=LINKS, algorithm="best")
    assert few_bytes_many_machines == pytest.approx(14 * 5e-6 + 2 * math.log2(64) * 5e-6, rel=1e-3)


def test_one_rank_reduces_nothing():
    for algorithm in ("ring", "tree", "in-switch", "best"):
        assert all_reduce_seconds(1e9, ranks=1, links=WITH_SWITCH, algorithm=algorithm) == 0.0


def test_ranks_must_fill_their_machines():
    with pytest.raises(UserError, match="12 GPUs do not fill machines of 8; give --gpus-per-node a divisor of 12"):
        all_reduce_seconds(1e9, ranks=12, links=LINKS, algorithm="ring")


@pytest.mark.parametrize("arch", ["A", "D", "E"])
def test_buckets_are_ddps(arch):
    layers = layer_costs(arch, classes=1000, crop=224, batch=1, bytes_per_value=4)
    backward = [LayerBackward(1.0, layer.parameters) for layer in reversed(layers)]
    counts = [count for layer in backward for count in reversed(layer.parameters)]
    gradients = [torch.empty(count) for count in counts]  # the memory is never touched
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 1024 * 1024]
    indices, _ = dist._compute_bucket_assignment_by_size(gradients, limits)
    assert [bucket.parameters for bucket in buckets(backward)] == [sum(counts[i] for i in bucket) for bucket in indices]


def test_buckets_are_ready_with_their_last_gradient():
    megabytes_16 = 4 << 20
    backward = [LayerBackward(1.0, (1 << 18, 10)), LayerBackward(2.0), *[LayerBackward(4.0, (megabytes_16,))] * 3]
    # 1 MiB fills the first; 16 MiB do not fill the second, 32 do; what is left goes at the end
    assert [(bucket.parameters, bucket.ready_seconds) for bucket in buckets(backward)] == [
        ((1 << 18) + 10, 1.0),
        (2 * megabytes_16, 11.0),
        (megabytes_16, 15.0),
    ]


def one_bucket_a_layer(seconds: Sequence[float], megabytes: Sequence[float]) -> list[LayerBackward]:
    return [LayerBackward(s, (int(m * 1e6 / 4),)) for s, m in zip(seconds, megabytes, strict=True)]


def exposed(backward: list[LayerBackward]) -> float:
    """With two GPUs and 1 GB/s between them, without latency: a bucket of so many MB takes as many ms."""
    links = Links(peer_bytes_per_second=1e9, network_bytes_per_second=1e9, gpus_per_node=8, latency_seconds=0.0)
    return all_reduce_beside(backward, ranks=2, links=links, algorithm="ring", bytes_per_gradient=4)[1]


def test_what_the_backward_pass_hides():
    """Timelines of three buckets (40, 30, 50 ms to send) worked out by hand."""
    megabytes = [40, 30, 50]
    # ready at 10, 20, 30; sent 10–50, 50–80, 80–130: the sender is never idle
    assert exposed(one_bucket_a_layer([0.010, 0.010, 0.010], megabytes)) == pytest.approx(0.100)
    # ready at 100, 200, 300; sent 100–140, 200–230, 300–350: only the last is exposed
    assert exposed(one_bucket_a_layer([0.100, 0.100, 0.100], megabytes)) == pytest.approx(0.050)
    # and a last layer without gradients of its own hides that one too
    assert exposed([*one_bucket_a_layer([0.1, 0.1, 0.1], megabytes), LayerBackward(0.060)]) == 0.0


def test_predictions():
    times = ComputeTimes(
        batch=32,
        passes=2,
        forward_seconds=0.010,
        backward=one_bucket_a_layer([0.010, 0.010], [40, 400]),
        optimizer_seconds=0.005,
    )
    assert times.seconds == pytest.approx(2 * 0.030 + 0.005)
    links = Links(peer_bytes_per_second=100e9, network_bytes_per_second=10e9, gpus_per_node=4, latency_seconds=0.0)
    rows = {row.ranks: row for row in predict(times, links=links, algorithm="ring")}
    assert list(rows) == [1, 2, 4, 8, 64, 512]
    assert rows[1].plain.images_per_second == pytest.approx(32 / 0.065)
    assert rows[1].plain.images_per_second_without_overlap == rows[1].plain.images_per_second
    assert rows[1].plain.exposed_seconds == rows[1].plain.all_reduce_seconds == 0.0
    # 8 on 2 machines: 1.5 · S / 100 GB/s + 1 · S / 10 GB/s = 0.115 ms a MB: 4.6 ms, then 46 ms at the end of the pass
    assert rows[8].plain.all_reduce_seconds == pytest.approx(0.0506)
    assert rows[8].plain.exposed_seconds == pytest.approx(0.046)
    assert rows[8].plain.images_per_second == pytest.approx(8 * 32 / (0.065 + 0.046))
    assert rows[8].compressed.images_per_second == pytest.approx(8 * 32 / (0.065 + 0.023))
    assert rows[8].plain.images_per_second_without_overlap == pytest.approx(8 * 32 / (0.065 + 0.0506))
    assert rows[8].compressed.images_per_second_without_overlap == pytest.approx(8 * 32 / (0.065 + 0.0253))
    assert rows[8].plain.efficiency == pytest.approx(0.065 / (0.065 + 0.046))
    three = Links(peer_bytes_per_second=1e9, network_bytes_per_second=1e9, gpus_per_node=3, latency_seconds=0.0)
    assert [row.ranks for row in predict(times, links=three, algorithm="ring")] == [1, 2]


def test_predictions_name_their_algorithm():
    times = ComputeTimes(
        batch=32, passes=1, forward_seconds=0.01, backward=one_bucket_a_layer([0.01], [400]), optimizer_seconds=0.0
    )
    rows = predict(times, links=WITH_SWITCH, algorithm="best")
    assert {row.ranks: row.algorithm for row in rows if 1 < row.ranks < 64} == {
        2: "ring",
        4: "in-switch",
        8: "in-switch",
    }
    assert {row.algorithm for row in predict(times, links=WITH_SWITCH, algorithm="tree")} == {"tree"}


def test_kernels_follow_one_another():
    peaks = Peaks(name="it", source="table", flops_per_second=1e12, bytes_per_second=1e9, watts=None)
    kernels = [Work(flops=3 * 10**12, bytes=10**9), Work(flops=10**12, bytes=5 * 10**9), Work(flops=0, bytes=10**9)]
    assert floor_seconds(kernels, peaks) == pytest.approx(3 + 5 + 1)
    assert floor_seconds([Work(flops=4 * 10**12, bytes=7 * 10**9)], peaks) == pytest.approx(7), "as one kernel"


def test_the_floors_backward_pass_goes_from_the_last_layer_to_the_first():
    layers = layer_costs("A", classes=10, crop=32, batch=2, bytes_per_value=4)
    peaks = Peaks(name="it", source="table", flops_per_second=1e12, bytes_per_second=1e9, watts=None)
    for fused in (True, False):
        times = floor_times(layers, peaks, batch=2, passes=1, precision="fp32", fused=fused)
        first, last = times.backward[-1], times.backward[0]
        assert (first.parameters, last.parameters) == ((64 * 27, 64), (10 * 4096, 10))
        assert last.seconds < first.seconds, "ten classes, and 64 channels of 32 × 32 pixels"
