"""From one device to many: the least time of a step's parts, how long an all-reduce takes, and how much of it is exposed.

Each kernel takes as long as its FLOPs at the peak rate or its bytes at the memory's, whichever is longer, and they follow one
another, so that their times add up. The optimizer takes its bytes.

An all-reduce is the alpha-beta model: a message of s bytes takes latency + s / bandwidth, and a rank sends and receives at the
same time. For S bytes over n ranks:
- Ring: reduce-scatter, then all-gather, n − 1 messages of S / n each: 2 (n − 1) (latency + S / n / bandwidth). Of the
  algorithms in which ranks add up, none moves fewer bytes (Patarasuk & Yuan 2009, Bandwidth optimal all-reduce algorithms for
  clusters of workstations).
- Tree: two binary trees, each for half of the bytes, in pieces that follow each other, up and down: 2 ⌈log₂ n⌉ latencies and
  2 S / bandwidth (Sanders, Speck & Träff 2009, Two-tree algorithms for full bandwidth broadcast, reduction and scan).
- In the switch (NVLink SHARP, NCCL's NVLS): each rank asks the switch for the sum of its n-th part, which the switch reads
  from all and adds up on the way, then hands that sum to the switch, which sends it to all. Each rank so sends its S bytes and
  a sum of S / n, and receives as many: two latencies and (n + 1) / n · S / bandwidth, parts following each other (NVIDIA's
  blog, Upgrading Multi-GPU Interconnectivity with the Third-Generation NVIDIA NVSwitch). Less than a ring's from four ranks on.
- Across machines: reduce-scatter within each, all-reduce of each share with the same GPU of the other machines, all-gather
  within each, one after the other. All shares of a machine, S bytes in all, go through its one connection to the network. In
  the switch, what is within each machine goes through its switch; between the machines the faster one of ring and tree.
What NCCL reaches of the links' rate is not in the model: of the 450 GB/s of each of eight H100, 82 % in a ring and 68 % in the
switch, for 211 and 274 GB of gradients a second (NCCL's issue 1455).

DistributedDataParallel puts gradients into buckets in the order in which the backward pass makes them, last layer first. A
bucket is sent when all its gradients are there, one bucket after the other. So the timeline is simulated, bucket by bucket.
Sending and computing are taken not to slow each other down. Each GPU has the same batch, however many there are.
"""

import argparse
import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from common.errors import UserError
from common.flags import above_zero, whole_above_zero
from perf.costs import LayerCost, Work, optimizer_bytes
from perf.peaks import find_card
from perf.report import Links, Peaks, Prediction, Scaled

ALGORITHMS = ("ring", "tree", "in-switch")
RANKS = (1, 2, 4, 8, 64, 512)
_FLOAT32_BYTES = 4
_FIRST_BUCKET_BYTES = 1 << 20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES: something to send early
_BUCKET_BYTES = 25 << 20  # DistributedDataParallel's bucket_cap_mb
_NETWORK_GBITS_PER_SECOND = 400.0
_LATENCY_MICROSECONDS = 10.0


# ---- one device ----------------------------------------------------------------------------------------------------


class LayerBackward(NamedTuple):
    """The backward pass of one layer, and the elements of its weight and its bias whose gradients are sent."""

    seconds: float
    parameters: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ComputeTimes:
    """A step of one GPU, less the all-reduce."""

    batch: int  # images
    passes: int  # micro-batches whose gradients are accumulated; only the last one's backward pass has an all-reduce beside it
    forward_seconds: float  # of one pass
    backward: Sequence[LayerBackward]  # of one pass, from the last layer to the first
    optimizer_seconds: float
    shared_parameters: int = 0  # of this rank's parts of layers that ranks share

    @property
    def backward_seconds(self) -> float:
        """Of one pass."""
        return sum(layer.seconds for layer in self.backward)

    @property
    def seconds(self) -> float:
        return self.passes * (self.forward_seconds + self.backward_seconds) + self.optimizer_seconds

    def stretched(self, *, forward: float, backward: float, optimizer: float) -> "ComputeTimes":
        """Each part so many times as long, the layers of the backward pass all alike."""
        return replace(
            self,
            forward_seconds=self.forward_seconds * forward,
            backward=[layer._replace(seconds=layer.seconds * backward) for layer in self.backward],
            optimizer_seconds=self.optimizer_seconds * optimizer,
        )


def floor_times(
    layers: Sequence[LayerCost], peaks: Peaks, *, batch: int, passes: int, precision: str, fused: bool = True
) -> ComputeTimes:
    """The least time of a step of one GPU. layers: of one pass. fused: as costs.py has it; False: each operation a kernel."""
    forward = [floor_seconds([layer.forward] if fused else layer.forward_kernels, peaks) for layer in layers]
    backward = [floor_seconds([layer.backward] if fused else layer.backward_kernels, peaks) for layer in layers]
    sent = [() if layer.is_shared else layer.parameters for layer in layers]
    of_each = [sum(layer.parameters) for layer in layers]
    return ComputeTimes(
        batch=batch,
        passes=passes,
        forward_seconds=sum(forward),
        backward=list(map(LayerBackward, reversed(backward), reversed(sent))),
        optimizer_seconds=optimizer_bytes(sum(of_each), precision) / peaks.bytes_per_second,
        shared_parameters=sum(count for count, layer in zip(of_each, layers, strict=True) if layer.is_shared),
    )


def floor_seconds(kernels: Sequence[Work], peaks: Peaks) -> float:
    """Of kernels that follow one another."""
    return sum(max(work.flops / peaks.flops_per_second, work.bytes / peaks.bytes_per_second) for work in kernels)


# ---- the all-reduce ------------------------------------------------------------------------------------------------


def all_reduce_seconds(size_bytes: float, *, ranks: int, links: Links, algorithm: str) -> float:
    """Of so many bytes on every rank. algorithm: one of ALGORITHMS, or best, which is the fastest of them at this size.

    Ranks fill machines: all on one, or gpus_per_node on each. Raises UserError where they do not; in-switch without such a
    switch.
    """
    if not fills_machines(ranks, links):
        raise UserError(
            f"{ranks} GPUs do not fill machines of {links.gpus_per_node}; give --gpus-per-node a divisor of {ranks}"
        )
    if algorithm == "best":
        algorithm = fastest(size_bytes, ranks=ranks, links=links)
    local = min(ranks, links.gpus_per_node)
    peers = local, links.peer_bytes_per_second, links.latency_seconds
    between = ranks // local, links.network_bytes_per_second, links.latency_seconds
    if algorithm == "in-switch":
        if not links.in_switch:
            raise UserError("--all-reduce in-switch: no switch between these GPUs adds up (NVLink SHARP); take best")
        return _in_switch(size_bytes, *peers) + min(_ring(size_bytes, *between), _tree(size_bytes, *between))
    flat = {"ring": _ring, "tree": _tree}[algorithm]
    if ranks <= links.gpus_per_node:
        return flat(size_bytes, *peers)
    # A ring's two halves are the reduce-scatter and the all-gather.
    return _ring(size_bytes, *peers) + flat(size_bytes, *between)


def fills_machines(ranks: int, links: Links) -> bool:
    """Whether so many devices are all on one machine, or all of those on each."""
    return ranks <= links.gpus_per_node or ranks % links.gpus_per_node == 0


def fastest(size_bytes: float, *, ranks: int, links: Links) -> str:
    """Of the ALGORITHMS that these links have."""
    known = ALGORITHMS if links.in_switch else ("ring", "tree")
    return min(known, key=lambda name: all_reduce_seconds(size_bytes, ranks=ranks, links=links, algorithm=name))


def _ring(size_bytes: float, ranks: int, bytes_per_second: float, latency_seconds: float) -> float:
    return 2 * (ranks - 1) * (latency_seconds + size_bytes / ranks / bytes_per_second)


def _tree(size_bytes: float, ranks: int, bytes_per_second: float, latency_seconds: float) -> float:
    if ranks == 1:
        return 0.0
    return 2 * (math.ceil(math.log2(ranks)) * latency_seconds + size_bytes / bytes_per_second)


def _in_switch(size_bytes: float, ranks: int, bytes_per_second: float, latency_seconds: float) -> float:
    if ranks == 1:
        return 0.0
    return 2 * latency_seconds + (ranks + 1) / ranks * size_bytes / bytes_per_second


# ---- beside the backward pass --------------------------------------------------------------------------------------


class Bucket(NamedTuple):
    parameters: int
    ready_seconds: float  # from the beginning of the backward pass on


def buckets(backward: Sequence[LayerBackward]) -> list[Bucket]:
    """Gradients in DDP's buckets: a bucket is full once it holds its limit or more, so that a large gradient ends it."""
    full, parameters, now, limit = [], 0, 0.0, _FIRST_BUCKET_BYTES
    for layer in backward:
        now += layer.seconds
        for count in reversed(layer.parameters):
            parameters += count
            if parameters * _FLOAT32_BYTES >= limit:
                full.append(Bucket(parameters, now))
                parameters, limit = 0, _BUCKET_BYTES
    return [*full, Bucket(parameters, now)] if parameters else full


def all_reduce_beside(
    backward: Sequence[LayerBackward],
    *,
    ranks: int,
    links: Links,
    algorithm: str,
    bytes_per_gradient: int,
    busy_until: float = 0.0,
) -> tuple[float, float]:
    """Send each bucket when it is ready and the one before has been sent. busy_until: when the links are free for the first.

    Returns the seconds of all buckets together, and those after the end of the backward pass that they run beside.
    """
    sent, total = busy_until, 0.0
    for bucket in buckets(backward):
        size = bucket.parameters * bytes_per_gradient
        seconds = all_reduce_seconds(size, ranks=ranks, links=links, algorithm=algorithm)
        sent = max(sent, bucket.ready_seconds) + seconds
        total += seconds
    return total, max(0.0, sent - sum(layer.seconds for layer in backward))


def predict(times: ComputeTimes, *, links: Links, algorithm: str, ranks: Sequence[int] = RANKS) -> list[Prediction]:
    """For each number of GPUs, beside the backward pass and after it, with gradients in float32 and in 16 bits. Numbers that do
    not fill their machines are left out. With "best", the algorithm that is named is the one of the largest bucket."""
    largest = max(bucket.parameters for bucket in buckets(times.backward)) * _FLOAT32_BYTES

    def scaled(count: int, bytes_per_gradient: int) -> Scaled:
        total, exposed = all_reduce_beside(
            times.backward, ranks=count, links=links, algorithm=algorithm, bytes_per_gradient=bytes_per_gradient
        )
        return Scaled(
            images_per_second=count * times.batch / (times.seconds + exposed),
            efficiency=times.seconds / (times.seconds + exposed),
            all_reduce_seconds=total,
            exposed_seconds=exposed,
            images_per_second_without_overlap=count * times.batch / (times.seconds + total),
        )

    return [
        Prediction(
            ranks=count,
            algorithm=fastest(largest, ranks=count, links=links) if algorithm == "best" else algorithm,
            plain=scaled(count, _FLOAT32_BYTES),
            compressed=scaled(count, 2),
        )
        for count in ranks
        if fills_machines(count, links)
    ]


# ---- links ---------------------------------------------------------------------------------------------------------


def add_link_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what joins the GPUs; links_from() reads them."""
    add = parser.add_argument
    add("--all-reduce", choices=(*ALGORITHMS, "best"), default="best", help="algorithm; best: the fastest at each size")
    usual = "GPUs in a machine; default: as in this run, else 8, or 1 for CPUs"
    add("--gpus-per-node", type=whole_above_zero, help=usual)
    peers = "rate from a GPU to the others of its machine, in each direction; default: the table's NVLink, or PCIe"
    add("--nvlink-gbytes-per-second", type=above_zero, help=peers)
    network = (
        "rate of a machine's network, in each direction, for all its GPUs together; default for GPUs of the table: 400"
    )
    add("--network-gbits-per-second", type=above_zero, help=network)
    add("--latency-us", type=above_zero, help="latency of one message in microseconds; default: 10")


def no_link_flags() -> argparse.Namespace:
    """As of a command line that has none of them."""
    parser = argparse.ArgumentParser()
    add_link_flags(parser)
    return parser.parse_args([])


def links_from(
    arguments: argparse.Namespace, peaks: Peaks, *, ranks_a_machine: int | None, ranks: int = 1
) -> Links | None:
    """Links between devices like this one: as the flags say, then as the table does; None where neither gives a rate.

    ranks_a_machine: of this run, None for a single rank. ranks: that will train. Raises UserError, before anything is measured:
    --all-reduce in-switch without such a switch, ranks that do not fill their machines.
    """
    card, network, peer = find_card(peaks.name), arguments.network_gbits_per_second, arguments.nvlink_gbytes_per_second
    if not (card or network or peer):
        return None
    origins: dict[str, list[str]] = collections.defaultdict(list)

    def noted(words: str, **values: float | None) -> float:
        """The first value that there is, by where it comes from, which is noted."""
        origin, value = next((origin, value) for origin, value in values.items() if value)
        origins[origin.replace("_", " ")].append(words.format(value))
        return value

    usual = card.machine_gpus if card else 1
    gpus = noted("machines of {:g}", from_flags=arguments.gpus_per_node, as_in_this_run=ranks_a_machine, assumed=usual)
    gbits = noted("network {:g} Gbit/s", from_flags=network, assumed=_NETWORK_GBITS_PER_SECOND)
    latency = noted("latency {:g} µs", from_flags=arguments.latency_us, assumed=_LATENCY_MICROSECONDS)
    joined = card is not None and card.joined_by_nvlink(int(gpus))
    if gpus == 1 and not peer:  # nothing goes over it
        bytes_per_second = card.bytes_per_second_to_peers(1) if card else gbits * 1e9 / 8
    elif card and not peer:
        fabric = "Infinity Fabric" if card.source.startswith("AMD") else "NVLink"
        words = f"{card.name}'s {fabric if joined else 'PCIe'}"
        bytes_per_second = noted(words, from_the_table=card.bytes_per_second_to_peers(int(gpus)))
    else:
        bytes_per_second = 1e9 * noted("{:g} GB/s within a machine", from_flags=peer, assumed=gbits / 8)
    links = Links(
        peer_bytes_per_second=bytes_per_second,
        network_bytes_per_second=gbits * 1e9 / 8,
        gpus_per_node=int(gpus),
        latency_seconds=latency / 1e6,
        in_switch=card.in_switch and joined if card else arguments.all_reduce == "in-switch",
        source="; ".join(f"{', '.join(words)} {origin}" for origin, words in sorted(origins.items(), reverse=True)),
    )
    all_reduce_seconds(0, ranks=ranks, links=links, algorithm=arguments.all_reduce)
    return links
