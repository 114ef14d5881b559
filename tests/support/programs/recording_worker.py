"""torchrun … tests/support/programs/recording_worker.py FLAGS: train.py, which also writes down what it trains on, in OUT/used.

A file for each start and rank, a line for each batch that the loader has delivered: the step (from 0), and for each image
its number in the plan, the row that it shows, and a checksum of its pixels. A line is on the disk before the batch is used:
a step whose gradients were added up over all ranks is in the files of all of them, whoever was killed thereafter.

SECONDS_A_STEP in the environment: so long it also sleeps in each step, for a run that is to last.
"""

import json
import os
import sys
import time
import zlib
from typing import Any, TextIO

import torch.distributed as dist

import train
from engine.data import TrainingData
from engine.training.step import TrainStep
from engine.training.trainer import Trainer

_init, _step, _train_batches = Trainer.__init__, TrainStep.__call__, TrainingData.train_batches
_loader: Any
_file: TextIO
_batch_size: int
_pause_seconds = float(os.environ.get("SECONDS_A_STEP", 0))


def open_loader(self, start):
    global _loader
    _loader = _train_batches(self, start)
    return _loader


def init_and_open_file(self, config, *, ranks, **others) -> None:
    global _batch_size, _file
    start = [time.time_ns()]
    if ranks.patient_group is not None:
        dist.broadcast_object_list(start, src=0, group=ranks.patient_group)
    folder = config.out / "used"
    folder.mkdir(exist_ok=True)
    _file = open(folder / f"{start[0]}-{ranks.rank}-of-{ranks.world_size}.jsonl", "w", buffering=1)  # noqa: SIM115
    _batch_size = config.batch_size
    _init(self, config, ranks=ranks, **others)


def step(self, batches, **others):
    time.sleep(_pause_seconds)
    return _step(self, recorded(batches), **others)


def recorded(batches):
    for images, labels in batches:
        delivered = _loader.delivered
        assert delivered
        pixels = [zlib.crc32(image.contiguous().numpy().tobytes()) for image in images]
        numbers, rows = delivered.numbers.tolist(), delivered.rows.tolist()
        line = {"step": numbers[0] // _batch_size, "numbers": numbers, "rows": rows, "pixels": pixels}
        _file.write(json.dumps(line) + "\n")
        yield images, labels


TrainingData.train_batches = open_loader  # type: ignore[method-assign]
Trainer.__init__ = init_and_open_file  # type: ignore[method-assign]
TrainStep.__call__ = step  # type: ignore[method-assign]
sys.exit(train.main())
