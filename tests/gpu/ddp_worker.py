"""torchrun --nproc_per_node 1 tests/gpu/ddp_worker.py DEVICE: how far a step through DDP is from a plain one.

Prints, by gradient compression and for the compiled network, the norm of the difference between the weights' ways over the
norm of the plain way; and the number of compiled graphs. A single step: the network makes more of the differences of the first.
"""

import json
import sys
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common.ranks import Ranks, ranks_of_this_run
from engine.config import Config
from engine.precision import Precision, set_numerics
from engine.training.assembly import assemble
from model.vgg import build
from pipeline.dali.loader import SyntheticLoader

IMAGES, CROP, CLASSES = 8, 64, 10


def way(ranks: Ranks, **settings) -> Tensor:
    """What the weights have moved by after a step in float32, as one vector."""
    model = build("A", classes=CLASSES, crop=CROP, dropout=0.0, init="xavier", device=ranks.device, seed=3)
    before = torch.cat([weight.detach().flatten().clone() for weight in model.parameters()])
    config = Config(
        data="synthetic",
        crop=CROP,
        train_scale=str(CROP),
        batch_size=IMAGES * ranks.world_size,
        lr=1e-3,
        **{"compile": "off", **settings},
    )
    precision = Precision("fp32", ranks.device.type)
    parts = assemble(config, ranks=ranks, precision=precision, micro_batch=IMAGES, model=model)
    assert isinstance(parts.network, DistributedDataParallel) == (ranks.world_size > 1)
    batches = SyntheticLoader(batch_size=IMAGES, crop=CROP, classes=CLASSES, device=ranks.device, half=False)
    parts.step.warm_up(*next(batches))
    parts.step(batches)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]) - before


def main() -> None:
    with ranks_of_this_run(sys.argv[1]) as ranks:
        set_numerics(deterministic=True)
        wrapped = replace(ranks, world_size=2)  # so that there is DDP; its group still has one rank
        plain = way(ranks)

        def difference(**settings) -> float:
            return ((way(wrapped, **settings) - plain).norm() / plain.norm()).item()

        result = {name: difference(grad_compression=name) for name in ("none", "bf16", "fp16")}
        torch._dynamo.utils.counters.clear()
        result["compiled"] = difference(compile="on")
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
