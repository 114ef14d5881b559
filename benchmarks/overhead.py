"""python -m benchmarks.overhead trainer [flags of train.py]: what the training loop costs beyond the network itself.
python -m benchmarks.overhead sampler [--interval-ms 100] [flags of train.py]: what the NVML sampler costs the training step.

Both against a bare loop of forward, backward and update on a batch that stays on the device, in turns in one process, of which
the first are warm-up. The figure is the median over rounds of seconds with / seconds without, with its 95 % interval.

trainer: the trainer's own loop (learning rate, seeds, counters, logging) runs over the same compiled model and batch.

sampler: also of the process's time on all cores. The seconds tell what throughput loses, on a machine that does nothing else;
the cores' time, less what is lost by waiting, on a busy one too, given OMP_NUM_THREADS=1 (threads that wait for each other do so
at work). Steadiest is what the sampler's own threads take of a core; it leaves out what they do to others. It needs NVML. On a
machine without a GPU, the tests' stub of it, whose PCIe readings can be made to take their 20 ms:

    gcc -shared -fPIC -o DIR/libnvidia-ml.so.1 tests/support/nvml_stub.c -lm
    NVML_STUB_PCIE_MS=20 LD_LIBRARY_PATH=DIR python -m benchmarks.overhead sampler
"""

import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import clock_gettime, perf_counter, process_time, pthread_getcpuclockid

import torch

from benchmarks import flag_parser, program
from benchmarks.plain import usual_step
from benchmarks.turns import finish, interval, spread, take_turns
from common.errors import UserError
from common.process import end
from common.ranks import Ranks, ranks_of_this_run
from engine.config import SYNTHETIC, Config, parse_args, save_config
from engine.data import TrainingData, open_training_data
from engine.monitoring.run_files import CONFIG
from engine.precision import Precision, choose_precision, set_numerics
from engine.training.assembly import network_of
from engine.training.preemption import StopRequests
from engine.training.trainer import Trainer
from model.vgg import VGG
from perf.telemetry import NvmlSampler, uuids_of
from pipeline.dali.loader import Batch

_DEFAULT_FLAGS = ["--arch", "A", "--crop", "64", "--train-scale", "64", "--batch-size", "16", "--log-every", "10"]
_STEPS_A_TURN = 10
"""Of the trainer and of the loop that it is held against."""
_SECONDS_A_TURN = 1.0
"""With the sampler and without."""


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("overhead", "Measure what is done beside the bare training step. Other flags are train.py's.")
    parser.add_argument("of", choices=("trainer", "sampler"), help="the training loop, or the sampler of NVML")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each that are counted, at least 3")
    parser.add_argument("--interval-ms", type=float, default=100.0, help="milliseconds between two samples of a GPU")
    arguments, flags = parser.parse_known_args(argv)
    if not arguments.interval_ms >= 1:
        raise UserError(f"--interval-ms is {arguments.interval_ms:g}: give it at least 1")
    if arguments.rounds < 3:
        raise UserError(f"--rounds is {arguments.rounds}: a confidence interval needs 3")
    with tempfile.TemporaryDirectory() as out:
        # One step more than whole turns: the trainer's last turn ends when the next batch is asked for.
        steps = str(_STEPS_A_TURN * (arguments.rounds + 1) + 1)
        config = parse_args([*_DEFAULT_FLAGS, *flags, "--data", SYNTHETIC, "--out", out, "--steps", steps])
        with ranks_of_this_run(config.device) as ranks:
            bare, data = bare_step(config, ranks)
            clocks, notes = (
                trainer_overhead(bare, data)
                if arguments.of == "trainer"
                else sampler_overhead(bare, data, arguments.rounds, arguments.interval_ms / 1e3)
            )
            device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
    result = {name: getattr(config, name) for name in ("arch", "crop", "batch_size")}
    result |= {"device": device, "precision": bare.precision.name, "rounds": arguments.rounds, **notes}
    for clock, (with_it, without) in clocks.items():
        ratios = [a / b for a, b in zip(with_it, without, strict=True)]
        median, lowest, highest = result[f"{clock}_with_to_without"] = spread(ratios, 4)
        low, high = result[f"{clock}_95"] = interval(ratios) or []
        print(
            f"{clock.replace('_', ' ')} with the {arguments.of} / without: {median:.4f} (95 % {low:.4f}–{high:.4f}; "
            f"rounds {lowest:.4f}–{highest:.4f})"
        )
    return result


Clocks = dict[str, tuple[list[float], list[float]]]
"""By clock, what each round took with what is measured, and without."""


@dataclass
class BareStep:
    """Forward, backward and update, again and again on the same batch."""

    batch: Batch
    model: VGG
    precision: Precision
    step: Callable[[Callable, Batch], None]

    def seconds_of(self, steps: int) -> float:
        """The device is idle before and after."""
        began = perf_counter()
        for _ in range(steps):
            self.step(self.model, self.batch)
        finish(self.batch[0].device)
        return perf_counter() - began


def bare_step(config: Config, ranks: Ranks) -> tuple[BareStep, TrainingData]:
    """The configuration's network and batch of noise, and the data set that this is from."""
    set_numerics(deterministic=config.deterministic)
    precision = choose_precision(config.precision, ranks.device)
    data = open_training_data(config, ranks, precision)
    model = network_of(config, classes=len(data.classes), device=ranks.device)
    step = usual_step(model, replace(config, lr=1e-4), precision, fused=True)
    return BareStep(next(data.train_batches(0)), model, precision, step), data


@dataclass(frozen=True, kw_only=True)
class DataInTurns(TrainingData):
    """Hands the trainer the same batch again and again; between two turns of the trainer, runs the bare loop."""

    bare: BareStep
    trainer_seconds: list[float]
    bare_seconds: list[float]

    def train_batches(self, start: int) -> Iterator[Batch]:
        while True:
            self.bare_seconds.append(self.bare.seconds_of(_STEPS_A_TURN))
            began = perf_counter()
            for _ in range(_STEPS_A_TURN):
                yield self.bare.batch
            finish(self.ranks.device)
            self.trainer_seconds.append(perf_counter() - began)


def trainer_overhead(bare: BareStep, data: TrainingData) -> tuple[Clocks, dict]:
    config = data.config
    turns = DataInTurns(**vars(data), bare=bare, trainer_seconds=[], bare_seconds=[])
    save_config(config, config.out / CONFIG)  # as train.py does
    with StopRequests() as requests:
        compiled = Trainer(
            config,
            ranks=data.ranks,
            precision=bare.precision,
            data=turns,
            model=bare.model,
            checkpoint=None,
            requests=requests,
        ).fit()["compiled"]
    without = turns.bare_seconds[1:-1]  # behind the last there is one more step
    milliseconds = round(1e3 * statistics.median(without) / _STEPS_A_TURN, 3)
    notes = {"compiled": compiled, "steps_a_turn": _STEPS_A_TURN, "bare_ms_per_step": milliseconds}
    return {"seconds": (turns.trainer_seconds[1:], without)}, notes


def sampler_overhead(bare: BareStep, data: TrainingData, rounds: int, interval_seconds: float) -> tuple[Clocks, dict]:
    """Raises UserError: there is nothing to sample here."""
    uuids = uuids_of(data.ranks.device)
    with NvmlSampler(uuids, interval_seconds) as sampler:
        pass
    found = sampler.report()
    if not found["available"]:
        reason = found["reason"]
        raise UserError(f"nothing can be sampled here: {reason}; the script's first lines tell what else to do")
    bare.seconds_of(3)
    steps = max(1, round(3 * _SECONDS_A_TURN / bare.seconds_of(3)))
    with_it: list[float] = []
    without: list[float] = []
    own, samples = [], []

    def turn(kept: list[float]) -> float:
        before = process_time()
        seconds = bare.seconds_of(steps)
        kept.append(process_time() - before)
        return seconds

    def sampled_turn() -> float:
        with NvmlSampler(uuids, interval_seconds) as sampler:
            before = _sampler_core_seconds()
            seconds = turn(with_it)
            own.append((_sampler_core_seconds() - before) / seconds)
        samples.append(sampler.report()["samples"])
        return seconds

    seconds = take_turns({"with": sampled_turn, "without": lambda: turn(without)}, rounds=rounds, warm_up=1)
    notes = {
        "threads": torch.get_num_threads(),
        "gpu_sampled": found["devices"][0]["name"],
        "interval_seconds": interval_seconds,
        "seconds_a_turn": round(statistics.median(seconds["without"]), 3),
        "samples": sum(samples),
        "sampler_core_seconds_a_second": round(statistics.mean(own), 5),
    }
    # Of the cores' time the first was warm-up.
    return {"seconds": (seconds["with"], seconds["without"]), "core_seconds": (with_it[1:], without[1:])}, notes


def _sampler_core_seconds() -> float:
    """Time that the sampler's threads have spent on cores, while they live."""
    threads = [t.ident for t in threading.enumerate() if t.ident is not None and t.name.startswith("nvml-")]
    return sum(clock_gettime(pthread_getcpuclockid(thread)) for thread in threads)


if __name__ == "__main__":
    end(main)
