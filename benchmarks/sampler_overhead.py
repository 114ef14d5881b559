"""python -m benchmarks.sampler_overhead [--interval-ms 100] [--pairs 40]: what sampling costs the training step.

Forward, backward and update of VGG A on one batch that stays on the device, in turns of a fixed number of steps, some 1 s long:
one with the sampler and one without make a pair, and every other pair has them the other way round. The first pair is warm-up.
The figure is the median over pairs of with / without, with its 95 % confidence interval (order statistics) and its quartiles:
of the seconds a turn took, and of the process's time on all cores. The first tells what throughput loses, on a machine that
does nothing else; the second, less what is lost by waiting, on a busy one too, given OMP_NUM_THREADS=1 (threads that wait for
each other do so at work). Steadiest is what the sampler's own threads take of a core; it leaves out what they do to others.

It needs NVML. On a machine without a GPU, the tests' stub of it, whose PCIe readings can be made to take their 20 ms:

    gcc -shared -fPIC -o DIR/libnvidia-ml.so.1 tests/nvml_stub.c -lm
    NVML_STUB_PCIE_MS=20 LD_LIBRARY_PATH=DIR python -m benchmarks.sampler_overhead
"""

import json
import math
import statistics
import threading
from time import clock_gettime, perf_counter, process_time, pthread_getcpuclockid

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()

import torch
import torch.nn.functional as F

from common.errors import UserError
from common.flags import FlagParser
from common.process import end, run_program
from common.progress import track
from engine.precision import choose_precision, set_numerics
from model.vgg import build
from perf.nvml_sampler import NvmlSampler, uuids_of

_BATCH_SIZE = 16
_CROP = 64
_CLASSES = 1000
_TURN_SECONDS = 1.0


class Step:
    """One training step, again and again on the same batch."""

    def __init__(self, device: torch.device) -> None:
        set_numerics(deterministic=False)
        self._device = device
        self._precision = choose_precision("auto", device)
        self._model = build("A", classes=_CLASSES, crop=_CROP, dropout=0.5, init="xavier", device=device)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4, momentum=0.9, fused=True)
        images = torch.randn(_BATCH_SIZE, 3, _CROP, _CROP, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(_CLASSES, (_BATCH_SIZE,), device=device)

    def turn(self, steps: int) -> tuple[float, float]:
        """Run so many; the device is idle before and after. Returns seconds, and seconds of all cores together."""
        started, cores_started = perf_counter(), process_time()
        for _ in range(steps):
            with self._precision.autocast():
                loss = F.cross_entropy(self._model(self._images), self._labels)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started, process_time() - cores_started


def main(argv: list[str] | None = None) -> int:
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = FlagParser(
        prog="python -m benchmarks.sampler_overhead", description="Measure the sampler's cost, in pairs of turns."
    )
    parser.add_argument("--interval-ms", type=float, default=100.0, help="milliseconds between two samples of a GPU")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of turns that are counted, at least 6")
    arguments = parser.parse_args(argv)
    if not arguments.interval_ms >= 1:
        raise UserError(f"--interval-ms is {arguments.interval_ms:g}: give it at least 1")
    if arguments.pairs < 6:
        raise UserError(f"--pairs is {arguments.pairs}: a confidence interval of a median needs 6")
    result = measure(arguments.interval_ms / 1e3, arguments.pairs)
    for name in ("seconds", "core_seconds"):
        line = "with the sampler / without, {}: {median:.4f}, 95 % interval {low:.4f}–{high:.4f}"
        print(line.format(name.replace("_", " "), **result[f"{name}_with_to_without"]))
    print(f"the sampler's threads: {result['sampler_core_seconds_a_second']:.2%} of a core")
    print(json.dumps(result))
    return 0


def measure(interval_seconds: float, pairs: int) -> dict:
    """Raises UserError: there is nothing to sample here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with NvmlSampler(uuids_of(device), interval_seconds) as sampler:
        pass
    found = sampler.report()
    if not found["available"]:
        raise UserError(
            f"nothing can be sampled here: {found['reason']}; the script's first lines tell what else to do"
        )
    step = Step(device)
    step.turn(3)
    steps = max(1, round(3 * _TURN_SECONDS / step.turn(3)[0]))
    with_sampler, without, samples, own = [], [], 0, 0.0
    for pair in track(range(pairs + 1), total=pairs + 1, label="measuring", unit="pairs"):
        for sampled in (True, False) if pair % 2 else (False, True):
            if sampled:
                with NvmlSampler(uuids_of(device), interval_seconds) as sampler:
                    before = _sampler_core_seconds()
                    with_sampler.append(step.turn(steps))
                    own += _sampler_core_seconds() - before
                samples += sampler.report()["samples"]
            else:
                without.append(step.turn(steps))
    ratios = [(a / b, c / d) for (a, c), (b, d) in zip(with_sampler[1:], without[1:], strict=True)]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "gpu_sampled": found["devices"][0]["name"],
        "interval_seconds": interval_seconds,
        "pairs": pairs,
        "steps_a_turn": steps,
        "seconds_a_turn": round(statistics.median(seconds for seconds, _ in without), 3),
        "samples": samples,
        "seconds_with_to_without": _spread([ratio for ratio, _ in ratios]),
        "core_seconds_with_to_without": _spread([ratio for _, ratio in ratios]),
        "sampler_core_seconds_a_second": round(own / sum(seconds for seconds, _ in with_sampler), 5),
    }


def _sampler_core_seconds() -> float:
    """Time that the sampler's threads have spent on cores, while they live."""
    threads = [t.ident for t in threading.enumerate() if t.ident is not None and t.name.startswith("nvml-")]
    return sum(clock_gettime(pthread_getcpuclockid(thread)) for thread in threads)


def _spread(ratios: list[float]) -> dict[str, float]:
    ratios, count = sorted(ratios), len(ratios)
    # The ranks that enclose the median of independent values with a probability of 95 %, by the normal approximation.
    rank = max(0, math.floor((count - 1.96 * math.sqrt(count)) / 2))
    first, median, third = statistics.quantiles(ratios, n=4)
    figures = {"median": median, "low": ratios[rank], "high": ratios[-1 - rank], "p25": first, "p75": third}
    return {name: round(figure, 5) for name, figure in figures.items()}


if __name__ == "__main__":
    end(main)
