"""DistributedDataParallel as this trainer uses it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from common.ranks import Ranks

GRADIENT_DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What --grad-compression has gradients sent as."""


def data_parallel(model: nn.Module, ranks: Ranks, *, accumulates: bool, grad_compression: str) -> nn.Module:
    """Wrap a model (already compiled, so that its backward overlaps with the all-reduce) in DDP; alone, leave it be.

    grad_compression: "none", "bf16" or "fp16".
    """
    if ranks.world_size == 1:
        return model
    parallel = DistributedDataParallel(
        model,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        # With no_sync, a static graph fails in the first backward pass (pytorch issue 143580), or silently stops
        # reducing (pull request 187732).
        static_graph=not accumulates,
    )
    # Buffers are sent at the construction, and averaged after each step: there is nothing more to send. And a forward pass in
    # which no rank waits for another lets one that has no images give the step up (engine/training/preemption.py). Set here,
    # since the argument has other names in other versions of torch.
    parallel.broadcast_buffers = False
    if grad_compression == "bf16":
        parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif grad_compression == "fp16":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return parallel


@torch.no_grad()
def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor, of one dtype all, by its mean over the ranks, in place; every rank must call this."""
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    means = joined.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)])
