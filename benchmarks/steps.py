"""python -m benchmarks.steps [--arch D --precision bf16 --batch-size 128]: this project's training step against others'.

Ours is the trainer's own, as the flags of train.py have it (compiled on a GPU). The others are torchvision's and, where it is
installed, timm's network of the same configuration in channels_last under autocast, with torch's SGD, in the loop that
everyone writes, eager and compiled. --variants adds ours with each --fuse and --pad-channels. All take the same batch of noise,
which stays on the device, and the same dropout. They take turns in one process (benchmarks/turns.py).
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
import torchvision
from torch import nn

from benchmarks import flag_parser, program, train_config
from benchmarks.inputs import training_step
from benchmarks.plain import usual_step
from benchmarks.turns import OURS, add_turn_flags, compare_calls
from common.errors import TrainingError, UserError
from common.process import end
from common.progress import say
from common.ranks import ranks_of_this_run
from engine.config import SYNTHETIC, Config
from engine.data import TrainingData, open_training_data
from engine.precision import choose_precision, set_numerics
from perf.tuning import offered

_NAMES = {"A": "vgg11", "B": "vgg13", "D": "vgg16", "E": "vgg19"}
"""Configurations that torchvision and timm have, too."""


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("steps", "Compare training steps: images per second. It takes all flags of train.py.")
    parser.add_argument(
        "--variants", action="store_true", help="ours too with each way to fuse, and with padded channels"
    )
    add_turn_flags(parser)
    options, flags = parser.parse_known_args(argv)
    turns = {name: value for name, value in vars(options).items() if name != "variants"}
    config = train_config(flags, defaults=["--batch-size=128"], chosen=[f"--data={SYNTHETIC}", "--no-deterministic"])
    if config.arch not in _NAMES:
        raise UserError(f"--arch {config.arch}: nobody else has it; take one of {', '.join(_NAMES)}")
    set_numerics(deterministic=False)
    with ranks_of_this_run(config.device) as ranks:
        data = open_training_data(config, ranks, choose_precision(config.precision, ranks))
        try:
            rows = compare_calls(  # no queue to fill, no pause
                f"{config.arch}, {data.precision.name}",
                make_steps(data, variants=options.variants),
                times=(OURS,),
                images=config.batch_size,
                device=ranks.device,
                **turns,
            )
        except torch.OutOfMemoryError as error:
            cure = "a smaller --batch-size" if config.batch_size > 1 else "a smaller --crop, or another GPU"
            raise TrainingError(f"the GPU's memory is too small for all networks; take {cure}") from error
    kept = {name: getattr(config, name) for name in ("arch", "crop", "batch_size")}
    kept |= {"device": ranks.device.type, "precision": data.precision.name}
    return {**kept, "rounds": options.rounds, "steps": rows}


def make_steps(data: TrainingData, *, variants: bool = False) -> dict[str, Callable[[], object]]:
    """By name: a function that takes one training step on the resident batch."""
    config, device, batches = data.config, data.ranks.device, data.train_batches(0)
    steps: dict[str, Callable[[], object]] = {OURS: functools.partial(training_step(data), batches)}
    for fuse, pad_channels in itertools.product(offered("fuse"), (False, True)) if variants else ():
        changed = replace(config, fuse=fuse, pad_channels=pad_channels)
        if changed != config:
            other = replace(data, config=changed)
            name = f"--fuse {fuse}" + " --pad-channels" * pad_channels
            steps[name] = functools.partial(training_step(other), other.train_batches(0))
    images, labels = next(batches)
    batch = images[:, :3].contiguous(memory_format=torch.channels_last), labels  # the others take no --pad-channels
    for library, network in peers(config, len(data.classes)).items():
        network.to(device).to(memory_format=torch.channels_last)
        step = usual_step(network, replace(config, lr=0.0), data.precision)  # as ours: no weights grow beyond bounds
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
