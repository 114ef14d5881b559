"""A step on N GPUs: when each gradient is ready, when its bucket has been reduced, and what the backward pass leaves exposed.

DistributedDataParallel puts gradients into buckets in the order in which the backward pass makes them, last layer first. A
bucket is sent when all its gradients are there, one bucket after the other. So the timeline is simulated, bucket by bucket.
Sending and computing are taken not to slow each other down. Each GPU has the same batch, however many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perf.all_reduce import Links, all_reduce_seconds

RANKS = (1, 2, 4, 8, 64, 512)
_FLOAT32_BYTES = 4
_FIRST_BUCKET_BYTES = 1 << 20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES: something to send early
_BUCKET_BYTES = 25 << 20  # DistributedDataParallel's bucket_cap_mb


@dataclass(frozen=True)
class LayerBackward:
    """The backward pass of one layer."""

    seconds: float
    parameters: tuple[int, ...] = ()
    """Elements of its weight and its bias."""


@dataclass(frozen=True)
class Bucket:
    parameters: int
    ready_seconds: float
    """From the beginning of the backward pass on."""


@dataclass(frozen=True, kw_only=True)
class ComputeTimes:
    """A step of one GPU, less the all-reduce."""

    batch: int
    """Images."""
    passes: int
    """Micro-batches whose gradients are accumulated; only the last one's backward pass has an all-reduce beside it."""
    forward_seconds: float
    """Of one pass."""
    backward: Sequence[LayerBackward]
    """Of one pass, from the last layer to the first."""
    optimizer_seconds: float

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
            backward=[replace(layer, seconds=layer.seconds * backward) for layer in self.backward],
            optimizer_seconds=self.optimizer_seconds * optimizer,
        )


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


@dataclass(frozen=True)
class AllReduce:
    """Of all gradients of a step."""

    seconds: float
    """All buckets together."""
    exposed_seconds: float
    """After the end of the backward pass that they run beside."""


def all_reduce_beside(
    backward: Sequence[LayerBackward], *, ranks: int, links: Links, algorithm: str, bytes_per_gradient: int
) -> AllReduce:
    """Send each bucket when it is ready and the one before has been sent."""
    sent, total = 0.0, 0.0
    for bucket in buckets(backward):
        size = bucket.parameters * bytes_per_gradient
        seconds = all_reduce_seconds(size, ranks=ranks, links=links, algorithm=algorithm)
        sent = max(sent, bucket.ready_seconds) + seconds
        total += seconds
    return AllReduce(total, max(0.0, sent - sum(layer.seconds for layer in backward)))


def predict(times: ComputeTimes, *, links: Links, algorithm: str, ranks: Sequence[int] = RANKS) -> list[dict]:
    """For each number of GPUs: images per second in all, with gradients in float32 and compressed to 16 bits, beside the
    backward pass and after it; and the all-reduce's seconds. Numbers that do not fill their machines are left out."""
    return [_row(times, links, algorithm, count) for count in ranks if links.filled_by(count)]


def _row(times: ComputeTimes, links: Links, algorithm: str, ranks: int) -> dict:
    row: dict = {"ranks": ranks}
    for suffix, bytes_per_gradient in (("", _FLOAT32_BYTES), ("_compressed", 2)):
        cost = all_reduce_beside(
            times.backward, ranks=ranks, links=links, algorithm=algorithm, bytes_per_gradient=bytes_per_gradient
        )
        images = ranks * times.batch
        row[f"images_per_second{suffix}"] = images / (times.seconds + cost.exposed_seconds)
        row[f"images_per_second{suffix}_without_overlap"] = images / (times.seconds + cost.seconds)
        row[f"all_reduce_seconds{suffix}"] = cost.seconds
        row[f"exposed_seconds{suffix}"] = cost.exposed_seconds
    row["efficiency"] = row["images_per_second"] / (ranks * times.batch / times.seconds)
    row["efficiency_compressed"] = row["images_per_second_compressed"] / (ranks * times.batch / times.seconds)
    return row
