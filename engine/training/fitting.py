"""Passes that a GPU's memory suffices for: where it does not for a rank's share of the batch, they are halved until it does.

Each rank tries a pass as if it were alone, eagerly. So one that runs out of memory leaves no other waiting in an all-reduce, and
no size is compiled that does not fit. What training needs besides is not tried: the loader's memory, DDP's buckets, and what
torch.compile may need more than the eager network. Where that is too much, the run ends, and says which --micro-batch to give.
"""

import gc
from dataclasses import replace

import torch

from common.errors import TrainingError, UserError
from common.progress import say
from common.ranks import sum_over_ranks
from engine.data import TrainingData
from engine.training.assembly import assemble, too_little_memory
from model.vgg import VGG

TRIED_ON = ("cuda",)
"""Kinds of devices. On a CPU nothing is raised where memory runs out: the kernel ends processes."""


def halve_until_it_fits(data: TrainingData, model: VGG) -> TrainingData:
    """The data in the largest micro-batches that fit on every rank, halving them; every rank must call this.

    model: whole, as network_of makes it; it stays as it is. Raises TrainingError: not even one image fits.
    """
    ranks, asked = data.ranks, data.micro_batch
    if ranks.device.type not in TRIED_ON:
        return data
    while True:
        does_not_fit = torch.tensor(0 if _fits(data, model) else 1)
        _give_back(ranks.device)
        if not sum_over_ranks(does_not_fit, ranks):
            break
        if data.micro_batch == 1:
            raise too_little_memory(1)
        try:
            data = data.halved()
        except UserError as error:
            raise TrainingError(
                f"the GPU's memory is too small for {data.micro_batch} images at a time, and --mixup and --cutmix need two or "
                "more; leave them out, or take a smaller --crop or another GPU"
            ) from error
    size = data.micro_batch
    if size < asked and ranks.is_main:
        say(
            f"the memory does not suffice for {asked} images at a time: going on as with --micro-batch {size}, which "
            f"accumulates gradients over {data.config.batch_size // ranks.world_size // size} passes"
        )
    return data


def _fits(data: TrainingData, model: VGG) -> bool:
    """Whether this rank has memory for a pass forward and backward, with the optimizer's state and the weights' average."""
    # With --parallel hybrid, too: its forward pass would wait for other ranks. Of D, all weights with gradients and momentum are
    # up to 1.4 GB more than a rank's part.
    config = replace(data.config, compile="off", parallel="data")
    alone = replace(data.ranks, rank=0, world_size=1, local_rank=0, local_world_size=1)
    try:
        parts = assemble(config, ranks=alone, precision=data.precision, micro_batch=data.micro_batch, model=model)
        parts.step.warm_up(*data.blank_batch())
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return False
    return True


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of torch's allocator; of the driver; of cuBLAS and cuDNN, which need some memory of their own."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED")
    )


def _give_back(device: torch.device) -> None:
    """What a trial has left in torch's cache, where DALI does not find it, and in the most that the log says torch has held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
