"""train.py --profile-memory: what torch has allocated on the GPU, when, and by which line of the code."""

import pickle
from pathlib import Path

import torch

from common.errors import UserError
from common.files import replacing
from common.ranks import Ranks

PROFILE = "memory.pickle"
STEPS = 3
"""After so many the record is written: the first ones differ, since DDP makes its buckets anew, and kernels are chosen."""
_MOST_EVENTS = 100_000


def record_memory(ranks: Ranks) -> None:
    """From now on, on rank 0; what was allocated before has no place in the code. Raises UserError for a CPU."""
    if ranks.device.type != "cuda":
        raise UserError(
            "--profile-memory: torch records the memory of GPUs only, and this run is on a CPU; leave it out"
        )
    if ranks.is_main:  # which alone writes it, and then records no more
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=_MOST_EVENTS)


def write_memory(path: Path) -> None:
    """Write what was recorded, for https://pytorch.org/memory_viz, and record no more. Nobody waits for the device."""
    with replacing(path) as file:
        pickle.dump(torch.cuda.memory._snapshot(), file)
    torch.cuda.memory._record_memory_history(enabled=None)
