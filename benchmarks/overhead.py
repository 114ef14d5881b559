"""python -m benchmarks.overhead trainer [flags of train.py]: what the training loop costs beyond the network itself.
python -m benchmarks.overhead sampler [--interval-ms 100] [flags of train.py]: what the NVML sampler costs the training step.

Both against a bare loop of forward, backward and update on a batch that stays on the device, in turns in one process. The
figure is the median over rounds of seconds with / seconds without, with its 95 % interval.

trainer: the trainer's own loop (learning rate, seeds, counters, logging) runs over the same compiled model and batch.

sampler: the seconds tell what throughput loses, on a machine that does nothing else. Steadier, and right on a busy one too, is
what the sampler's own threads take of a core; it leaves out what they do to others. It needs NVML. On a machine without a GPU,
the tests' stub of it, whose PCIe readings can be made to take their 20 ms:

    gcc -shared -fPIC -o DIR/libnvidia-ml.so.1 tests/support/nvml_stub.c -lm
    NVML_STUB_PCIE_MS=20 LD_LIBRARY_PATH=DIR python -m benchmarks.overhead sampler
"""

import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import clock_gettime, perf_counter, pthread_getcpuclockid

import torch

from benchmarks import flag_parser, program, train_config
from benchmarks.plain import usual_step
from benchmarks.turns import finish, interval, spread, take_turns
from common.errors import UserError
from common.process import end
from common.ranks import ranks_of_this_run
from engine.config import SYNTHETIC, save_config
from engine.data import TrainingData, open_training_data
from engine.monitoring.run_files import CONFIG
from engine.precision import choose_precision, set_numerics
from engine.training.assembly import network_of
from engine.training.preemption import StopRequests
from engine.training.trainer import Trainer
from model.vgg import VGG
from perf.nvml_sampler import add_interval_flag, check_interval
from perf.telemetry import NvmlSampler, uuids_of
from pipeline.dali.loader import Batch

_DEFAULT_FLAGS = ["--arch", "A", "--crop", "64", "--train-scale", "64", "--batch-size", "16", "--log-every", "10"]
_STEPS_A_TURN = 10
"""Of the trainer and of the loop that it is held against."""
_SECONDS_A_TURN = 1.0
"""With the sampler and without."""

Rounds = tuple[list[float], list[float]]
"""Seconds of each round with what is measured, and without."""


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("overhead", "Measure what is done beside the bare training step. Other flags are train.py's.")
    parser.add_argument("of", choices=("trainer", "sampler"), help="the training loop, or the sampler of NVML")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each that are counted, at least 3")
    add_interval_flag(parser)
    arguments, flags = parser.parse_known_args(argv)
    check_interval(arguments.interval_ms)
    if arguments.rounds < 3:
        raise UserError(f"--rounds is {arguments.rounds}: a confidence interval needs 3")
    with tempfile.TemporaryDirectory() as out:
        # One step more than whole turns: the trainer's last turn ends when the next batch is asked for.
        steps = _STEPS_A_TURN * (arguments.rounds + 1) + 1
        chosen = [f"--data={SYNTHETIC}", f"--out={out}", f"--steps={steps}"]
        config = train_config(flags, defaults=_DEFAULT_FLAGS, chosen=chosen)
        set_numerics(deterministic=config.deterministic)
        with ranks_of_this_run(config.device) as ranks:
            data = open_training_data(config, ranks, choose_precision(config.precision, ranks))
            model = network_of(config, classes=len(data.classes), device=ranks.device)
            batch = next(data.train_batches(0))
            bare = bare_loop(data, model, batch)
            if arguments.of == "trainer":
                rounds, notes = trainer_overhead(data, model, batch, bare)
            else:
                rounds, notes = sampler_overhead(bare, ranks.device, arguments.rounds, arguments.interval_ms / 1e3)
            device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
    result = {name: getattr(config, name) for name in ("arch", "crop", "batch_size")}
    result |= {"device": device, "precision": data.precision.name, "rounds": arguments.rounds, **notes}
    ratios = [a / b for a, b in zip(*rounds, strict=True)]
    median, lowest, highest = spread(ratios, 4)
    low, high = interval(ratios) or []
    print(
        f"seconds with the {arguments.of} / without: {median:.4f} (95 % {low:.4f}–{high:.4f}; "
        f"rounds {lowest:.4f}–{highest:.4f})"
    )
    return {**result, "seconds_with_to_without": [median, lowest, highest], "seconds_95": [low, high]}


def bare_loop(data: TrainingData, model: VGG, batch: Batch) -> Callable[[int], float]:
    """A function that does forward, backward and update on the batch so many times, and returns the seconds.

    The device is idle before and after.
    """
    step = usual_step(model, replace(data.config, lr=1e-4), data.precision, fused=True)

    def seconds_of(steps: int) -> float:
        began = perf_counter()
        for _ in range(steps):
            step(model, batch)
        finish(data.ranks.device)
        return perf_counter() - began

    return seconds_of


@dataclass(frozen=True, kw_only=True)
class DataInTurns(TrainingData):
    """Hands the trainer the same batch again and again; between two turns of the trainer, runs the bare loop."""

    batch: Batch
    bare: Callable[[int], float]
    trainer_seconds: list[float]
    bare_seconds: list[float]

    def train_batches(self, start: int) -> Iterator[Batch]:
        while True:
            self.bare_seconds.append(self.bare(_STEPS_A_TURN))
            began = perf_counter()
            for _ in range(_STEPS_A_TURN):
                yield self.batch
            finish(self.ranks.device)
            self.trainer_seconds.append(perf_counter() - began)


def trainer_overhead(data: TrainingData, model: VGG, batch: Batch, bare: Callable[[int], float]) -> tuple[Rounds, dict]:
    """The model is the bare loop's, too: the trainer compiles it in place."""
    config = data.config
    turns = DataInTurns(**vars(data), batch=batch, bare=bare, trainer_seconds=[], bare_seconds=[])
    save_config(config, config.out / CONFIG)  # as train.py does
    with StopRequests() as requests:
        compiled = Trainer(
            config,
            ranks=data.ranks,
            precision=data.precision,
            data=turns,
            model=model,
            checkpoint=None,
            requests=requests,
        ).fit()["compiled"]
    without = turns.bare_seconds[1:-1]  # behind the last there is one more step
    milliseconds = round(1e3 * statistics.median(without) / _STEPS_A_TURN, 3)
    notes = {"compiled": compiled, "steps_a_turn": _STEPS_A_TURN, "bare_ms_per_step": milliseconds}
    return (turns.trainer_seconds[1:], without), notes


def sampler_overhead(
    bare: Callable[[int], float], device: torch.device, rounds: int, interval_seconds: float
) -> tuple[Rounds, dict]:
    """Raises UserError: there is nothing to sample here."""
    uuids = uuids_of(device)
    with NvmlSampler(uuids, interval_seconds) as sampler:
        pass
    found = sampler.report()
    if not found["available"]:
        reason = found["reason"]
        raise UserError(f"nothing can be sampled here: {reason}; the script's first lines tell what else to do")
    bare(3)  # warms up
    steps = max(1, round(3 * _SECONDS_A_TURN / bare(3)))
    own, samples = [], []

    def sampled_turn() -> float:
        with NvmlSampler(uuids, interval_seconds) as sampler:
            before = _sampler_core_seconds()
            seconds = bare(steps)
            own.append((_sampler_core_seconds() - before) / seconds)
        samples.append(sampler.report()["samples"])
        return seconds

    seconds = take_turns({"with": sampled_turn, "without": lambda: bare(steps)}, rounds=rounds)
    notes = {
        "threads": torch.get_num_threads(),
        "gpu_sampled": found["devices"][0]["name"],
        "interval_seconds": interval_seconds,
        "seconds_a_turn": round(statistics.median(seconds["without"]), 3),
        "samples": sum(samples),
        "sampler_core_seconds_a_second": round(statistics.mean(own), 5),
    }
    return (seconds["with"], seconds["without"]), notes


def _sampler_core_seconds() -> float:
    """Time that the sampler's threads have spent on cores, while they live."""
    threads = [t.ident for t in threading.enumerate() if t.ident is not None and t.name.startswith("nvml-")]
    return sum(clock_gettime(pthread_getcpuclockid(thread)) for thread in threads)


if __name__ == "__main__":
    end(main)
