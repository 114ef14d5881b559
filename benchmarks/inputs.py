"""python -m benchmarks.inputs --data DIR [flags of train.py]: how fast one training step is, by what feeds it.

DIR holds train/<class>/* and val/<class>/*. The same network and step train on: a batch of noise that stays on the device,
which nothing can beat; DIR's files; and what pipeline.prepare makes of them. On a GPU each of these is decoded by the GPU
(as --hw-decoder-load has it, by its JPEG engine alone, and with a queue twice as deep), by the CPU, and by both (--decoder split,
with the share that a training finds at its beginning). Decoders and training share a GPU: one that is the faster alone may leave
the step waiting. --cores N leaves so many of the machine's cores to all of it.

They take turns in one process (benchmarks/turns.py); ratios to noise are taken within a round.
"""

import functools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import flag_parser, program
from benchmarks.photographs import check_photographs, prepared_copy
from benchmarks.turns import add_turn_flags, compare_calls
from common.errors import UserError
from common.memory import share_one_heap
from common.process import end, usable_cores
from common.ranks import Ranks, ranks_of_this_run
from engine.config import Config, parse_args
from engine.data import TrainingData, open_training_data
from engine.precision import choose_precision, set_numerics
from engine.training.assembly import assemble, network_of, too_little_memory
from engine.training.decoder_share import find_share
from engine.training.step import TrainStep
from pipeline.dali.loader import Batch, DaliLoader

NOISE, SPLIT = "noise", "CPU and GPU"
_PAUSE_SECONDS = 0.5
"""Long enough for queues of a few batches to fill up."""


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser(
        "inputs", "Compare what feeds a training step: images per second. It takes all flags of train.py."
    )
    add_turn_flags(parser)
    parser.add_argument("--cores", type=int, help="use so many of the cores; default: all")
    options, flags = parser.parse_known_args(argv)
    turns = {name: value for name, value in vars(options).items() if name != "cores"}
    config = parse_args(flags)
    if options.cores is not None:
        if not 1 <= options.cores <= usable_cores():
            raise UserError(f"--cores {options.cores}: must be in [1, {usable_cores()}], the cores of this machine")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before torch and DALI make threads
    check_photographs(config)
    share_one_heap()  # as train.py does
    set_numerics(deterministic=config.deterministic)
    with ranks_of_this_run(config.device) as ranks, tempfile.TemporaryDirectory() as work:
        if ranks.world_size > 1:
            raise UserError("benchmarks.inputs measures one rank; start it without torchrun")
        data = open_training_data(config, ranks, choose_precision(config.precision, ranks))
        try:
            step = training_step(data)
            inputs = make_inputs(data, Path(work), step)
            rows = compare_calls(
                f"{config.arch}, {data.precision.name}, {config.batch_size} images",
                {name: functools.partial(step, fed) for name, fed in inputs.items()},
                of=NOISE,
                images=config.batch_size,
                device=ranks.device,
                pause_seconds=_PAUSE_SECONDS,
                **turns,
            )
        except torch.OutOfMemoryError as error:
            raise too_little_memory(data.micro_batch) from error
    kept = {name: getattr(config, name) for name in ("arch", "data", "crop", "batch_size")}
    kept |= {"device": ranks.device.type, "precision": data.precision.name, "threads": data.threads}
    shares = {name: fed.share for name, fed in inputs.items() if isinstance(fed, DaliLoader) and SPLIT in name}
    return {**kept, "rounds": options.rounds, "inputs": rows, "decoder_shares": shares}


def training_step(data: TrainingData) -> TrainStep:
    """The trainer's own, compiled where it would be, for these classes. It leaves the weights as they are."""
    config = replace(data.config, lr=0.0)
    model = network_of(config, classes=len(data.classes), device=data.ranks.device)
    parts = assemble(config, ranks=data.ranks, precision=data.precision, micro_batch=data.micro_batch, model=model)
    parts.step.warm_up(*next(data.resident_batches()))
    return parts.step


def make_inputs(files: TrainingData, work: Path, step: TrainStep) -> dict[str, Iterator[Batch]]:
    """Endless iterators of batches, by name. step: what they feed; where two decoders share a batch, it finds the share."""
    inputs: dict[str, Iterator[Batch]] = {NOISE: files.resident_batches()}
    for kind, data in (("files", files), ("prepared", prepared_copy(files, work / "prepared"))):
        for name, changes in decoders(files.config, files.ranks).items():
            changed = replace(data, loading=replace(data.config, **changes))
            inputs[f"{kind}, {name}"] = loader = changed.train_batches(0)
            if changed.decoder == "split" and isinstance(loader, DaliLoader):
                find_share(loader, changed, lambda batches: functools.partial(step, batches))
    return inputs


def decoders(config: Config, ranks: Ranks) -> dict[str, dict]:
    """What is changed in the configuration, by name."""
    if ranks.device.type == "cpu":
        return {"CPU": {"decoder": "cpu"}}
    return {
        "GPU": {"decoder": "gpu"},
        "JPEG engine": {"decoder": "gpu", "hw_decoder_load": 1.0},
        "GPU, deeper queue": {"decoder": "gpu", "prefetch": 2 * config.prefetch},
        "CPU": {"decoder": "cpu"},
        SPLIT: {"decoder": "split"},
    }


if __name__ == "__main__":
    end(main)
