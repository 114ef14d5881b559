"""RANK=… steps_worker.py FOLDER: training steps, the network assembled as each of FOLDER/jobs.json asks; what comes of it, whole.

A job: flags of train.py, steps, and how many ranks each machine has. FOLDER/0.pt, 1.pt … get the mean loss of each step and the
states as a checkpoint has them.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from common.ranks import Ranks, ranks_of_this_run, sum_over_ranks
from engine.config import parse_args
from engine.precision import choose_precision
from engine.training.assembly import assemble, network_of
from engine.training.optimizer import state_of
from pipeline.dali.loader import Batch

CLASSES = 10


def batches(first: int, share: int, micro_batch: int, crop: int) -> Iterator[Batch]:
    """Noise, as a function of the samples' numbers, in float64."""
    for start in range(first, first + share, micro_batch):
        generators = [torch.Generator().manual_seed(number) for number in range(start, start + micro_batch)]
        images = torch.stack(
            [torch.randn(3, crop, crop, generator=generator).double() * 50 for generator in generators]
        )
        labels = torch.tensor([number * 7 % CLASSES for number in range(start, start + micro_batch)])
        yield images.to(memory_format=torch.channels_last), labels


def run(ranks: Ranks, flags: list[str], steps: int, overflow: int | None, *, precise: bool) -> dict:
    """overflow: a step whose images are, on the last rank, so large that its gradients are not finite. precise: in float64."""
    config = parse_args(["--data", "synthetic", "--crop", "32", "--train-scale", "32", "--lr", "0.01", *flags])
    precision = choose_precision(config.precision, ranks)
    dtype = torch.float64 if precise else torch.float32
    model = network_of(config, classes=CLASSES, device=ranks.device).to(dtype)
    share = config.batch_size // ranks.world_size
    micro_batch = min(config.micro_batch or share, share)
    parts = assemble(config, ranks=ranks, precision=precision, micro_batch=micro_batch, model=model)
    images, labels = next(batches(0, micro_batch, micro_batch, config.crop))
    parts.step.warm_up(images.to(dtype), labels)
    losses = []
    for step in range(steps):
        first = step * config.batch_size + ranks.rank * share
        scale = 1e4 if step == overflow and ranks.rank == ranks.world_size - 1 else 1.0
        own = ((images.to(dtype) * scale, labels) for images, labels in batches(first, share, micro_batch, config.crop))
        losses.append(float(sum_over_ranks(parts.step(own, first_sample=first), ranks)) / ranks.world_size)
    states = {"model": model.state_dict(), "ema": parts.average.model.state_dict() if parts.average else {}}
    optimizer = state_of(parts.optimizer, model)
    if parts.shared:
        states = {name: parts.shared.whole(state) for name, state in states.items()}
        optimizer = parts.shared.whole_optimizer(optimizer)
    momenta = {str(number): entry["momentum_buffer"] for number, entry in optimizer["state"].items()}
    return {
        "losses": losses,
        **states,
        "momenta": momenta,
        "scale": parts.scaler.get_scale(),
        "sharing": parts.shared.sharing if parts.shared else 1,
        "own_parameters": sum(weight.numel() for weight in model.parameters()),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    with ranks_of_this_run("cpu") as ranks:
        for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
            # As if the ranks were on machines of so many.
            of_machines = [size for size in job.get("machines", ()) for _ in range(size)] or [ranks.world_size]
            machines = replace(ranks, local_world_size=of_machines[ranks.rank % len(of_machines)])
            found = run(machines, job["flags"], job["steps"], job.get("overflow"), precise=job.get("precise", True))
            if ranks.is_main:
                torch.save(found, folder / f"{number}.pt")
            torch._dynamo.reset()
            if dist.is_initialized():
                dist.barrier()


if __name__ == "__main__":
    main()
