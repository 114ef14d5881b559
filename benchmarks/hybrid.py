"""python -m benchmarks.hybrid --arch D A --ranks 2 4: training steps over limited links, data parallel against --parallel hybrid.

Each rank runs on a machine of its own, a network namespace (benchmarks/allreduce.py), with an equal share of the cores. Data,
hybrid, and ranks that are each alone, which send nothing, take turns; each turn starts its processes anew. Bytes are counted at
the ranks' interfaces, packets' headers included. The prediction is perf/hybrid.py's, from the parts of the step alone, with the
link's rate less the packets' headers. Needs Linux, iproute2 and root.

python -m benchmarks.hybrid --predict: what the model says of up to 512 H100, as a table, and as a picture with --out.
"""

import argparse
import collections
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from benchmarks import flag_parser, program
from benchmarks.allreduce import INTERFACE, PAYLOAD_SHARE, limited_machines, run_ranks
from common.errors import UserError
from common.files import replacing
from common.process import end, usable_cores
from common.progress import say
from common.ranks import ranks_of_this_run, wait_for_all
from engine.config import parse_args
from engine.precision import choose_precision
from engine.training.assembly import assemble, network_of
from perf.costs import Job
from perf.hybrid import activation_bytes, communication_seconds, predict_hybrid
from perf.laps import BACKWARD, FORWARD, OPTIMIZER, Laps, MarkedBatches, MarkedPrecision
from perf.peaks import CARDS, peaks_of
from perf.plot_style import BLUE, GREEN, VERMILION, new_figure, png
from perf.report import Links, Peaks
from perf.scaling import ComputeTimes, floor_times, links_from, no_link_flags
from pipeline.dali.loader import Batch

MODES = ("alone", "data", "hybrid")
_CLASSES, _CROP = 1000, 224
_NOT_COUNTED = 2  # steps, after the warm-up
_BATCHES, _GPUS = (256, 1024, 4096), (8, 16, 32, 64, 128, 256, 512)


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("hybrid", "Steps that share FC6 and FC7 against data parallel ones, over limited links.")
    add = parser.add_argument
    add("--arch", nargs="+", choices=("A", "B", "C", "D", "E"), default=["D"], help="networks to try")
    add("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks to try")
    add("--gbits-per-second", type=float, nargs="+", default=[1, 10], help="rates of each link to try; 0: no limit")
    add("--images", type=int, default=2, help="images of each rank in a step")
    add("--steps", type=int, default=4, help="steps that are counted in a turn")
    add("--rounds", type=int, default=2, help="turns of each mode")
    add("--predict", action="store_true", help="measure nothing; print what the model says of many GPUs")
    add("--gpu", default="H100", help="with --predict: a GPU of the table")
    add("--out", type=Path, help="with --predict: the picture to write")
    arguments = parser.parse_args(argv)
    if arguments.predict:
        return {"predictions": predictions(arguments.gpu, arguments.out)}
    if min(arguments.ranks) < 2 or min(arguments.images, arguments.steps, arguments.rounds) < 1:
        raise UserError("give --ranks of 2 or more, and --images, --steps and --rounds of 1 or more")
    rows = [
        row for arch in arguments.arch for ranks in arguments.ranks for row in measured_rows(arch, ranks, arguments)
    ]
    return {"images": arguments.images, "rows": rows}


# ---- measured ------------------------------------------------------------------------------------------------------


def measured_rows(arch: str, ranks: int, arguments: argparse.Namespace) -> list[dict]:
    """One for each link and mode, of this network on so many ranks; a line is printed for each."""
    print(f"{arch} at {_CROP} pixels, {ranks} ranks, {arguments.images} images each, {usable_cores()} cores")
    print(f"{'Gbit/s':>8}{'mode':>8}{'s a step':>10}{'of alone':>10}{'predicted':>11}{'MB sent':>9}{'predicted':>11}")
    rows: list[dict] = []
    for gbits in arguments.gbits_per_second:
        turns: dict[str, list[dict]] = collections.defaultdict(list)
        with limited_machines(ranks, mbits_per_second=1000 * gbits or None) as machines:
            for number in range(arguments.rounds):
                for mode in MODES[:: -1 if number % 2 else 1]:
                    call = f"rank({arch!r}, {mode!r}, {arguments.images}, {arguments.steps})"
                    code = f"from benchmarks import hybrid; hybrid.{call}"
                    turns[mode].append(run_ranks(machines, code))
        job = Job(arch=arch, classes=_CLASSES, crop=_CROP, batch=arguments.images, precision="fp32", ranks=ranks)
        rows += _rows_of(turns, job, gbits)
    return rows


def _rows_of(turns: dict[str, list[dict]], job: Job, gbits: float) -> Iterator[dict]:
    seconds = {mode: statistics.median(s for turn in own for s in turn["seconds"]) for mode, own in turns.items()}
    parts = {
        name: statistics.median(turn["parts"][name] for turn in turns["alone"]) for name in turns["alone"][0]["parts"]
    }
    rate = 1e9 * gbits / 8 * PAYLOAD_SHARE
    links = Links(peer_bytes_per_second=rate, network_bytes_per_second=rate, gpus_per_node=1, latency_seconds=1e-4)
    for mode in MODES[1:]:
        sharing = job.ranks if mode == "hybrid" else 1
        sent = statistics.median(turn["bytes_sent"] for turn in turns[mode])
        row = {"arch": job.arch, "ranks": job.ranks, "gbits_per_second": gbits, "mode": mode, "seconds": seconds[mode]}
        row |= {"alone_seconds": seconds["alone"], "bytes_sent": sent, "predicted_bytes": bytes_sent(job, sharing)}
        if gbits:
            times = _as_measured(job, sharing, parts)
            _, exposed = communication_seconds(job, times, sharing=sharing, links=links, algorithm="ring")
            row["predicted_seconds"] = times.seconds + exposed
        predicted = f"{row['predicted_seconds']:11.2f}" if gbits else f"{'':11}"
        print(
            f"{gbits or 'none':>8}{mode:>8}{seconds[mode]:10.2f}{seconds['alone'] / seconds[mode]:10.2f}{predicted}"
            f"{sent / 1e6:9.0f}{row['predicted_bytes'] / 1e6:11.0f}",
            flush=True,
        )
        yield row


def bytes_sent(job: Job, sharing: int) -> float:
    """By each rank in a step, in rings: (n - 1) / n of what is gathered or added up, twice for an all-reduce."""
    of_each = (job.ranks - 1) / job.ranks
    sent = sum(sum(layer.parameters) for layer in replace(job, sharing=sharing).layers() if not layer.is_shared)
    activations = 2 * job.passes * sum(activation_bytes(job, sharing)) if sharing > 1 else 0
    return of_each * (2 * 4 * sent + activations)


def _as_measured(job: Job, sharing: int, parts: dict[str, float]) -> ComputeTimes:
    """The floor of a step that shares layers, its parts as many times as long as those of the step alone were measured."""
    peaks = Peaks(name="a core", source="assumed", flops_per_second=5e10, bytes_per_second=1e10, watts=None)
    alone, own = (
        floor_times(replace(job, sharing=count).layers(), peaks, batch=job.batch, passes=job.passes, precision="fp32")
        for count in (1, sharing)
    )
    return own.stretched(
        forward=parts[FORWARD] / alone.forward_seconds,
        backward=parts[BACKWARD] / alone.backward_seconds,
        optimizer=parts[OPTIMIZER] / alone.optimizer_seconds,
    )


def rank(arch: str, mode: str, images: int, steps: int) -> None:
    """One rank: print the seconds of each step, of the parts of a step, and the bytes that a step sends, as JSON."""
    with ranks_of_this_run("cpu") as ranks:
        # Alone: a step of this rank's images, at the same time as the others', which it never hears of.
        of_step = replace(ranks, world_size=1, local_world_size=1) if mode == "alone" else ranks
        parallel = "hybrid" if mode == "hybrid" else "data"
        flags = ["--data", "synthetic", "--arch", arch, "--parallel", parallel]
        config = parse_args([*flags, "--batch-size", str(images * of_step.world_size)])
        laps, plain = Laps(ranks.device), choose_precision("fp32", ranks)
        precision = MarkedPrecision(plain.name, plain.device_type, laps)
        model = network_of(config, classes=_CLASSES, device=ranks.device)
        parts = assemble(config, ranks=of_step, precision=precision, micro_batch=images, model=model)
        batch = (
            torch.randn(images, 3, _CROP, _CROP).to(memory_format=torch.channels_last),
            torch.arange(images) % _CLASSES,
        )
        parts.step.warm_up(*batch)
        batches = MarkedBatches(_again_and_again(batch), laps)
        seconds, sent = [], []
        laps.begin()
        for _ in range(_NOT_COUNTED + steps):
            wait_for_all(ranks)
            before, began = _bytes_sent(), perf_counter()
            parts.step(batches)
            seconds.append(perf_counter() - began)
            sent.append(_bytes_sent() - before)
            laps.end_lap()
        of_parts = laps.take()[_NOT_COUNTED:]
        if ranks.is_main:
            medians = {
                name: statistics.median(lap.get(name, 0.0) for lap in of_parts)
                for name in (FORWARD, BACKWARD, OPTIMIZER)
            }
            found = {"seconds": seconds[_NOT_COUNTED:], "parts": medians}
            print(json.dumps(found | {"bytes_sent": statistics.median(sent[_NOT_COUNTED:])}))


def _again_and_again(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def _bytes_sent() -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


# ---- predicted -----------------------------------------------------------------------------------------------------


def predictions(gpu: str, out: Path | None) -> list[dict]:
    """Images a second of D at 224 pixels in bf16 on machines of eight GPUs, at the hardware's rates; printed as Markdown."""
    peaks = peaks_of(gpu, "bf16")
    links = links_from(no_link_flags(), peaks, ranks_a_machine=8, ranks=8) if peaks else None
    if peaks is None or links is None:
        raise UserError(
            f"--gpu {gpu}: not in the table, which has {', '.join(card.name for card in CARDS if card.bf16_tflops)}"
        )
    print(
        f"{peaks.name}: {links.source}\n\n"
        "| images a batch | GPUs | data, images/s | hybrid, images/s | shared by | hybrid / data |"
    )
    print("|---" * 6 + "|")
    rows = []
    for batch in _BATCHES:
        for gpus in (count for count in _GPUS if count <= batch):
            job = Job(arch="D", classes=_CLASSES, crop=_CROP, batch=batch // gpus, precision="bf16", ranks=gpus)

            def times_of(sharing: int, job: Job = job, peaks: Peaks = peaks) -> ComputeTimes:
                layers = replace(job, sharing=sharing).layers()
                return floor_times(layers, peaks, batch=job.batch, passes=1, precision="bf16")

            alone = times_of(1)
            _, exposed = communication_seconds(job, alone, sharing=1, links=links, algorithm="best")
            shared = predict_hybrid(job, times_of, links=links, algorithm="best")
            assert shared
            rates = {"data": batch / (alone.seconds + exposed), "hybrid": shared.images_per_second}
            efficiency = {"data": alone.seconds / (alone.seconds + exposed), "hybrid": shared.efficiency}
            cells = [f"{batch:,}", gpus, *(f"{rate:,.0f}" for rate in rates.values()), shared.sharing]
            print(f"| {' | '.join(map(str, cells))} | {rates['hybrid'] / rates['data']:.2f} |")
            rows.append(
                {
                    "batch": batch,
                    "gpus": gpus,
                    "images_per_second": rates,
                    "efficiency": efficiency,
                    "sharing": shared.sharing,
                }
            )
    if out:
        _draw(rows, peaks.name, out)
        say(f"drawn: {out}")
    return rows


def _draw(rows: list[dict], gpu: str, out: Path) -> None:
    figure = new_figure(3.6, f"D at {_CROP} pixels, bf16, predicted at the rates of {gpu}\nsolid: hybrid, dashed: data")
    axes = figure.subplots(1, 2)
    panels = (("images_per_second", "images/s"), ("efficiency", "of as many GPUs alone"))
    for axis, (name, label) in zip(axes, panels, strict=True):
        for batch, colour in zip(_BATCHES, (BLUE, VERMILION, GREEN), strict=True):
            own = [row for row in rows if row["batch"] == batch]
            for mode, style in (("hybrid", "-"), ("data", "--")):
                text = f"{batch:,} images a batch" if mode == "hybrid" else None
                gpus, values = [row["gpus"] for row in own], [row[name][mode] for row in own]
                axis.plot(gpus, values, style, marker="o", markersize=3, color=colour, label=text)
        axis.set_xscale("log", base=2)
        axis.set_xticks(_GPUS, [str(gpus) for gpus in _GPUS])
        axis.set_xlabel("GPUs, eight a machine")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=7)
    with replacing(out) as file:
        file.write(png(figure))


if __name__ == "__main__":
    end(main)
