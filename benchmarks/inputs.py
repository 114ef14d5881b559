"""python -m benchmarks.inputs --data DIR [flags of train.py]: how fast one training step is, by what feeds it.

DIR holds train/<class>/* and val/<class>/*. The same network and step train on: a batch of noise that stays on the device,
which nothing can beat; DIR's files; and what pipeline.prepare makes of them. On a GPU each of these is decoded by the GPU
(as --hw-decoder-load has it, by its JPEG engine alone, and with a queue twice as deep) and by the CPU. Decoders and training
share a GPU: one that is the faster alone may leave the step waiting.

They take turns in one process (benchmarks/turns.py); ratios to noise are taken within a round.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import flag_parser, program
from benchmarks.turns import add_turn_flags, compare_streams, forever
from common.errors import UserError
from common.memory import share_one_heap
from common.process import end
from common.ranks import Ranks, ranks_of_this_run
from engine.config import DIGITS, SYNTHETIC, Config, parse_args
from engine.data import TrainingData, open_training_data
from engine.precision import Precision, choose_precision, set_numerics
from engine.training.assembly import assemble, network_of, too_little_memory
from pipeline.dali.loader import Batch
from pipeline.preparation.packing import Settings, prepare
from pipeline.shards.index import is_prepared

NOISE = "noise"
_PAUSE_SECONDS = 0.5
"""Long enough for queues of a few batches to fill up."""


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser(
        "inputs", "Compare what feeds a training step: images per second. It takes all flags of train.py."
    )
    add_turn_flags(parser)
    try:
        options, flags = parser.parse_known_args(argv)
        config = parse_args(flags)
        if config.data in (SYNTHETIC, DIGITS) or is_prepared(config.data):
            raise UserError(f"--data {config.data}: give a folder of photographs; the rest is made from it")
        share_one_heap()  # as train.py does
        with ranks_of_this_run(config.device) as ranks, tempfile.TemporaryDirectory() as work:
            if ranks.world_size > 1:
                raise UserError("benchmarks.inputs measures one rank; start it without torchrun")
            return compare(config, ranks, options, Path(work))
    except torch.OutOfMemoryError as error:
        raise too_little_memory(config.micro_batch or config.batch_size) from error


def compare(config: Config, ranks: Ranks, options: argparse.Namespace, work: Path) -> dict:
    """Measure, print the table, return the figures. work: a folder for the prepared images."""
    set_numerics(deterministic=config.deterministic)
    precision = choose_precision(config.precision, ranks.device)
    files = open_training_data(config, ranks, precision)
    step = training_step(files, ranks, precision)
    inputs = make_inputs(files, ranks, precision, work)
    rows = compare_streams(
        f"{config.arch}, {precision.name}, {config.batch_size} images",
        {name: forever(functools.partial(step, batches)) for name, batches in inputs.items()},
        of=NOISE,
        images=config.batch_size,
        device=ranks.device,
        pause_seconds=_PAUSE_SECONDS,
        **vars(options),
    )
    kept = {name: getattr(config, name) for name in ("arch", "data", "crop", "batch_size")}
    kept |= {"device": ranks.device.type, "precision": precision.name, "threads": files.threads}
    return {**kept, "rounds": options.rounds, "inputs": rows}


def training_step(data: TrainingData, ranks: Ranks, precision: Precision) -> Callable[[Iterator[Batch]], object]:
    """The trainer's own, compiled where it would be, for these classes. It leaves the weights as they are."""
    config = data.config
    model = network_of(config, classes=len(data.classes), device=ranks.device)
    config = replace(config, lr=0.0)
    step = assemble(config, ranks=ranks, precision=precision, micro_batch=data.micro_batch, model=model).step
    step.warm_up(*next(data.resident_batches()))
    return step


def make_inputs(files: TrainingData, ranks: Ranks, precision: Precision, work: Path) -> dict[str, Iterator[Batch]]:
    """Endless iterators of batches, by name."""
    config, folder = files.config, work / "prepared"
    low, high = config.scale
    settings = Settings(short_side=f"{low}" if low == high else f"max:{high}", quality=90, shard_images=2048)
    prepare(Path(config.data), folder, settings, threads=files.threads, ranks=ranks)
    prepared = open_training_data(replace(config, data=str(folder)), ranks, precision)
    inputs = {NOISE: files.resident_batches()}
    for kind, data in (("files", files), ("prepared", prepared)):
        for name, changes in decoders(config, ranks).items():
            inputs[f"{kind}, {name}"] = replace(data, loading=replace(data.config, **changes)).train_batches(0)
    return inputs


def decoders(config: Config, ranks: Ranks) -> dict[str, dict]:
    """What is changed of how images are loaded, by name."""
    if ranks.device.type == "cpu":
        return {"CPU": {"decoder": "cpu"}}
    return {
        "GPU": {"decoder": "gpu"},
        "JPEG engine": {"decoder": "gpu", "hw_decoder_load": 1.0},
        "GPU, deeper queue": {"decoder": "gpu", "prefetch": 2 * config.prefetch},
        "CPU": {"decoder": "cpu"},
    }


if __name__ == "__main__":
    end(main)
