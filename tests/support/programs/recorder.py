"""[torchrun …] recorder.py FLAGS: train.py, and $RECORD/<rank>.jsonl tells of every batch that a loader delivered."""

import json
import os
import sys

import train
from pipeline.dali.loader import Batch, DaliLoader

_next = DaliLoader.__next__
_record = open(f"{os.environ['RECORD']}/{os.environ.get('RANK', '0')}.jsonl", "w", buffering=1)  # noqa: SIM115


def next_and_record(self: DaliLoader) -> Batch:
    batch, samples = _next(self), self.delivered
    assert samples
    paths = [os.path.normpath(os.fsdecode(path.tobytes())) for path in samples.source]
    delivered = {"numbers": samples.numbers.tolist(), "labels": samples.labels.tolist()}
    _record.write(json.dumps({"paths": paths, **delivered}) + "\n")
    return batch


DaliLoader.__next__ = next_and_record  # type: ignore[method-assign]
sys.exit(train.main())
