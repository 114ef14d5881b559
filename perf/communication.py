"""The all-reduce by itself, and what of it the backward pass does not hide."""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from perf.adaptive import Timing
from perf.laps import BACKWARD
from perf.order_statistics import summarise

_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def all_reduce_alone(network: nn.Module, grad_compression: str) -> tuple[Callable[[], None], int]:
    """Adds up buckets as large as those of DDP over all ranks, at each call; and how many bytes each rank gives.

    network: the DDP module, after three backward passes at least: its final buckets follow the order of the gradients.
    """
    assert isinstance(network, DistributedDataParallel)
    sizes = [int(size) for size in network._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]
    device = next(network.parameters()).device
    buckets = [
        torch.zeros(size // torch.float32.itemsize, dtype=_DTYPES[grad_compression], device=device) for size in sizes
    ]

    def reduce() -> None:
        under_way = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
        for work in under_way:
            work.wait()  # on a GPU it is torch's stream that waits

    return reduce, sum(bucket.nbytes for bucket in buckets)


def exposed(with_all_reduce: Timing, without: Timing) -> dict:
    """SUMMARY of the seconds by which the all-reduce makes the backward pass of a step longer.

    It holds the wait for the slowest rank, too. Each lap's backward pass is compared with the median of those without.
    """
    alone = statistics.median(lap[BACKWARD] for lap in without.laps)
    return summarise([max(0.0, lap[BACKWARD] - alone) for lap in with_all_reduce.laps])
