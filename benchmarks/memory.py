"""python -m benchmarks.memory --data DIR --epochs 20 --plot FILE.png: the loader's memory, epoch after epoch.

DIR: prepared data, or a folder with train/<class>/* and val/<class>/*. The resident memory of the process is read after each
epoch; the first one fills DALI's pools, so growth is counted from the second on.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks import flag_parser, program
from common.memory import share_one_heap
from common.process import end
from common.progress import say
from common.ranks import ranks_of_this_run
from engine.config import parse_args
from engine.data import open_training_data
from engine.precision import choose_precision


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("memory", "The loader's resident memory over epochs.")
    parser.add_argument("--data", required=True, help="prepared data, or a folder with train/ and val/")
    parser.add_argument("--epochs", type=int, default=20, help="epochs to load (%(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments, flags = parser.parse_known_args(argv)
    share_one_heap()  # as train.py does
    config = parse_args(["--data", arguments.data, "--device", "cpu", *flags])
    with ranks_of_this_run("cpu") as ranks:
        data = open_training_data(config, ranks, choose_precision("fp32", torch.device("cpu")))
        found = measure(data.train_batches(0), data.train_images, config.batch_size, arguments.epochs)
    if arguments.plot:
        plot(found, arguments.plot)
    growth = (found[-1] - found[1]) / (len(found) - 2) if len(found) > 2 else 0.0
    return {"resident_mib": found, "growth_mib_per_epoch": round(growth, 3)}


def measure(batches: Iterator, images: int, batch_size: int, epochs: int) -> list[float]:
    """Resident memory in MiB after each epoch."""
    resident, seen = [], 0
    for epoch in range(1, epochs + 1):
        while seen < epoch * images:
            next(batches)
            seen += batch_size
        status = Path("/proc/self/status").read_text().partition("VmRSS:")[2]
        resident.append(round(int(status.split()[0]) / 1024, 1))
        say(f"epoch {epoch}: {resident[-1]:,.1f} MiB")
    return resident


def plot(resident_mib: list[float], path: Path) -> None:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(resident_mib) + 1), resident_mib, marker="o")
    axes.set(xlabel="epoch", ylabel="resident memory, MiB", ylim=(0, 1.15 * max(resident_mib)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    end(main)
