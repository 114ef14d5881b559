"""How long an all-reduce takes: latency and bandwidth of the links, for rings and trees, within a machine and across.

The alpha-beta model: a message of s bytes takes latency + s / bandwidth, and a rank sends and receives at the same time.
For S bytes over n ranks:
- Ring: reduce-scatter, then all-gather, n − 1 messages of S / n each: 2 (n − 1) (latency + S / n / bandwidth). No algorithm
  moves fewer bytes (Patarasuk & Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations).
- Tree: two binary trees, each for half of the bytes, in pieces that follow each other, up and down: 2 ⌈log₂ n⌉ latencies and
  2 S / bandwidth (Sanders, Speck & Träff 2009, Two-tree algorithms for full bandwidth broadcast, reduction and scan).
- Across machines: reduce-scatter within each, all-reduce of each share with the same GPU of the other machines, all-gather
  within each, one after the other. All shares of a machine, S bytes in all, go through its one connection to the network.
"""

import math
from dataclasses import dataclass

from common.errors import UserError

ALGORITHMS = ("ring", "tree")


@dataclass(frozen=True, kw_only=True)
class Links:
    """What joins the ranks."""

    peer_bytes_per_second: float
    """Of one GPU to the others of its machine, in each direction."""
    network_bytes_per_second: float
    """Of one machine to the others, in each direction, for all its GPUs together."""
    gpus_per_node: int
    latency_seconds: float
    """Of one message, however small."""

    def filled_by(self, ranks: int) -> bool:
        """Whether so many GPUs are all on one machine, or all of those on each."""
        return ranks <= self.gpus_per_node or ranks % self.gpus_per_node == 0


def all_reduce_seconds(size_bytes: float, *, ranks: int, links: Links, algorithm: str) -> float:
    """Of so many bytes on every rank. algorithm: ring, tree, or best, which is the faster one at this size.

    Ranks fill machines: all on one, or gpus_per_node on each. Raises UserError where they do not.
    """
    if algorithm == "best":
        return min(all_reduce_seconds(size_bytes, ranks=ranks, links=links, algorithm=known) for known in ALGORITHMS)
    if not links.filled_by(ranks):
        raise UserError(
            f"{ranks} GPUs do not fill machines of {links.gpus_per_node}; give --gpus-per-node a divisor of {ranks}"
        )
    flat = {"ring": _ring, "tree": _tree}[algorithm]
    if ranks <= links.gpus_per_node:
        return flat(size_bytes, ranks, links.peer_bytes_per_second, links.latency_seconds)
    # A ring's two halves are the reduce-scatter and the all-gather.
    within = _ring(size_bytes, links.gpus_per_node, links.peer_bytes_per_second, links.latency_seconds)
    nodes = ranks // links.gpus_per_node
    return within + flat(size_bytes, nodes, links.network_bytes_per_second, links.latency_seconds)


def _ring(size_bytes: float, ranks: int, bytes_per_second: float, latency_seconds: float) -> float:
    return 2 * (ranks - 1) * (latency_seconds + size_bytes / ranks / bytes_per_second)


def _tree(size_bytes: float, ranks: int, bytes_per_second: float, latency_seconds: float) -> float:
    if ranks == 1:
        return 0.0
    return 2 * (math.ceil(math.log2(ranks)) * latency_seconds + size_bytes / bytes_per_second)
