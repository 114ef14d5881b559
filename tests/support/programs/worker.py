"""torchrun … worker.py FLAGS: train.py, with what the tests want to know of all ranks added to the results."""

import hashlib
import sys

import torch
import torch.distributed as dist

import train
from engine.training.trainer import Trainer

_fit = Trainer.fit


def fit_and_compare(self: Trainer) -> dict:
    results = _fit(self)
    digest = hashlib.sha256()
    for tensor in (*self._model.state_dict().values(), *(s["momentum_buffer"] for s in self._optimizer.state.values())):
        digest.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    digests: list = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    return {**results, "different_weights": len(set(digests))}


Trainer.fit = fit_and_compare  # type: ignore[method-assign]
sys.exit(train.main())
