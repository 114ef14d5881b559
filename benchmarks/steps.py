"""python -m benchmarks.steps [--arch D --precision bf16 --batch-size 128]: this project's training step against others'.

Ours is the trainer's own, as the flags of train.py have it (compiled on a GPU). The others are torchvision's and, where it is
installed, timm's network of the same configuration in channels_last under autocast, with torch's SGD, in the loop that
everyone writes, eager and compiled. All take the same batch of noise, which stays on the device, and the same dropout. They
take turns in one process (benchmarks/turns.py).
"""

import argparse
import functools
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from benchmarks import flag_parser, program
from benchmarks.plain import usual_step
from benchmarks.turns import OURS, add_turn_flags, compare_streams, forever
from common.errors import TrainingError, UserError
from common.process import end
from common.progress import say
from common.ranks import Ranks, ranks_of_this_run
from engine.config import SYNTHETIC, Config, parse_args
from engine.data import open_training_data
from engine.precision import Precision, choose_precision, set_numerics
from engine.training.assembly import assemble, network_of

_NAMES = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}
"""Configurations that torchvision and timm have, too."""


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("steps", "Compare training steps: images per second. It takes all flags of train.py.")
    add_turn_flags(parser)
    try:
        options, flags = parser.parse_known_args(argv)
        config = parse_args(["--batch-size", "128", *flags, "--data", SYNTHETIC])
        if config.arch not in _NAMES:
            raise UserError(f"--arch {config.arch}: nobody else has it; take one of {', '.join(_NAMES)}")
        with ranks_of_this_run(config.device) as ranks:
            return compare(config, ranks, options)
    except torch.OutOfMemoryError as error:
        cure = "a smaller --batch-size" if config.batch_size > 1 else "a smaller --crop, or another GPU"
        raise TrainingError(f"the GPU's memory is too small for all networks; take {cure}") from error


def compare(config: Config, ranks: Ranks, options: argparse.Namespace) -> dict:
    """Measure, print the table, return the figures."""
    set_numerics(deterministic=False)
    precision = choose_precision(config.precision, ranks.device)
    rows = compare_streams(  # no queue to fill, no pause
        f"{config.arch}, {precision.name}",
        {name: forever(step) for name, step in make_steps(config, ranks, precision).items()},
        times=(OURS,),
        images=config.batch_size,
        device=ranks.device,
        **vars(options),
    )
    kept = {name: getattr(config, name) for name in ("arch", "crop", "batch_size")}
    return {**kept, "device": ranks.device.type, "precision": precision.name, "rounds": options.rounds, "steps": rows}


def make_steps(config: Config, ranks: Ranks, precision: Precision) -> dict[str, Callable[[], object]]:
    """By name: a function that takes one training step on the resident batch."""
    data = open_training_data(config, ranks, precision)
    batches = data.train_batches(0)
    classes = len(data.classes)
    model = network_of(config, classes=classes, device=ranks.device)
    parts = assemble(config, ranks=ranks, precision=precision, micro_batch=data.micro_batch, model=model)
    parts.step.warm_up(*next(batches))
    steps: dict[str, Callable[[], object]] = {OURS: lambda: parts.step(batches)}
    images, labels = next(batches)
    batch = images[:, :3].contiguous(memory_format=torch.channels_last), labels  # the others take no --pad-channels
    for library, network in peers(config, classes).items():
        network.to(ranks.device).to(memory_format=torch.channels_last)
        step = usual_step(network, config, precision)
        steps[f"{library}, eager"] = functools.partial(step, network, batch)
        steps[f"{library}, compiled"] = functools.partial(step, torch.compile(network), batch)
    return steps


def peers(config: Config, classes: int) -> dict[str, nn.Module]:
    """The same network by others, with fresh weights."""
    name = _NAMES[config.arch] + "_bn" * config.batch_norm
    networks: dict[str, nn.Module] = {
        "torchvision": torchvision.models.get_model(name, num_classes=classes, dropout=config.dropout)
    }
    try:
        import timm
    except ImportError as error:
        say(f"timm is left out: {error}")
    else:
        networks["timm"] = timm.create_model(name, num_classes=classes, drop_rate=config.dropout)
    return networks


if __name__ == "__main__":
    end(main)
