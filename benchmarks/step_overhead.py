"""python -m benchmarks.step_overhead [flags of train.py]: what the training loop costs beyond the network itself.

The trainer's own loop (learning rate, seeds, counters, logging) and a bare loop of forward, backward and optimizer step run
over the same compiled model and the same resident batch, in turns of a few steps, in one process. The first turn of each is
warm-up and not counted. The figure is the median over turns of trainer seconds / bare seconds.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import torch
import torch.nn.functional as F
from torch import nn

from common.process import end, run_program
from common.ranks import Ranks, ranks_of_this_run
from engine.config import SYNTHETIC, parse_args, save_config
from engine.data import Data
from engine.precision import Precision, choose_precision, set_numerics
from engine.preemption import StopRequests
from engine.records import CONFIG
from engine.trainer import Trainer
from model.vgg import build
from pipeline.loader import Batch

_DEFAULT_FLAGS = ["--arch", "A", "--crop", "64", "--train-scale", "64", "--batch-size", "16", "--log-every", "10"]
_STEPS_A_TURN = 10
_TURNS = 20


@dataclass
class Turns:
    """Hands the trainer its batches; between two turns of the trainer, runs the bare loop."""

    batch: Batch
    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    trainer_seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    _steps: int = 0
    _turn_started: float = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._steps % _STEPS_A_TURN == 0:
            now = self._synchronised_time()
            if self._steps:
                self.trainer_seconds.append(now - self._turn_started)
            self._bare_steps()
            self._turn_started = self._synchronised_time()
            self.bare_seconds.append(self._turn_started - now)
        self._steps += 1
        return self.batch

    def _bare_steps(self) -> None:
        images, labels = self.batch
        for _ in range(_STEPS_A_TURN):
            with self.precision.autocast():
                loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _synchronised_time(self) -> float:
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        return perf_counter()


@dataclass(frozen=True, kw_only=True)
class DataInTurns(Data):
    """Synthetic data through Turns."""

    turns: Turns

    def train_batches(self, start: int) -> Iterator[Batch]:
        return self.turns


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    flags = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as out:
        # One step more than whole turns: the last turn ends when the next batch is asked for.
        fixed = ["--data", SYNTHETIC, "--out", out, "--steps", str(_STEPS_A_TURN * (_TURNS + 1) + 1)]
        config = parse_args([*_DEFAULT_FLAGS, *flags, *fixed])
        with ranks_of_this_run(config.device) as ranks:
            result = measure(config, ranks)
    low, high = result["trainer_to_bare_quartiles"]
    print(
        f"{result['arch']}, batch {result['batch_size']}, crop {result['crop']}, {result['device']}, {result['precision']}"
        f"{', compiled' if result['compiled'] else ''}: bare {result['bare_ms_per_step']:.2f} ms a step, "
        f"trainer {result['trainer_ms_per_step']:.2f} ms; ratio {result['trainer_to_bare']:.4f} ({low:.4f}–{high:.4f})"
    )
    print(json.dumps(result))
    return 0


def measure(config, ranks: Ranks) -> dict:
    set_numerics(deterministic=config.deterministic)
    precision = choose_precision(config.precision, ranks.device)
    data = Data(config=config, ranks=ranks, precision=precision, micro_batch=config.batch_size, manifest=None)
    model = build(
        config.arch,
        classes=len(data.classes),
        crop=config.crop,
        dropout=config.dropout,
        init=config.init,
        device=ranks.device,
        batch_norm=config.batch_norm,
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-4, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    turns = Turns(next(data.train_batches(0)), model, optimizer, precision)
    data = DataInTurns(
        config=config, ranks=ranks, precision=precision, micro_batch=config.batch_size, manifest=None, turns=turns
    )
    save_config(config, config.out / CONFIG)  # as train.py does
    with StopRequests() as requests:
        trainer = Trainer(
            config, ranks=ranks, precision=precision, data=data, model=model, checkpoint=None, requests=requests
        )
        compiled = trainer.fit()["compiled"]
    trainer_seconds, bare_seconds = turns.trainer_seconds[1:], turns.bare_seconds[1:]
    ratios = [ours / bare for ours, bare in zip(trainer_seconds, bare_seconds, strict=False)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "arch": config.arch,
        "crop": config.crop,
        "batch_size": config.batch_size,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "precision": precision.name,
        "compiled": compiled,
        "steps_a_turn": _STEPS_A_TURN,
        "turns": len(ratios),
        "bare_ms_per_step": round(1e3 * statistics.median(bare_seconds) / _STEPS_A_TURN, 3),
        "trainer_ms_per_step": round(1e3 * statistics.median(trainer_seconds) / _STEPS_A_TURN, 3),
        "trainer_to_bare": round(statistics.median(ratios), 4),
        "trainer_to_bare_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
    }


if __name__ == "__main__":
    end(main)
