"""python -m benchmarks.memory --data DIR --epochs 20 --plot FILE.png: the loader's memory, epoch after epoch.

DIR: prepared data, or a folder with train/<class>/* and val/<class>/*. The resident memory of the process is read after each
epoch; the first one fills DALI's pools, so growth is counted from the second on.
"""

from pathlib import Path

from benchmarks import flag_parser, program, train_config
from common.files import replacing
from common.flags import whole_above_zero
from common.memory import share_one_heap
from common.process import end
from common.progress import say
from common.ranks import ranks_of_this_run
from engine.data import open_training_data
from engine.precision import choose_precision
from perf.plot_style import new_figure, png


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser("memory", "The loader's resident memory over epochs. Other flags are train.py's.")
    parser.add_argument("--epochs", type=whole_above_zero, default=20, help="epochs to load (%(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments, flags = parser.parse_known_args(argv)
    share_one_heap()  # as train.py does
    config = train_config(flags, chosen=["--device=cpu", "--precision=fp32"])
    resident, seen = [], 0
    with ranks_of_this_run("cpu") as ranks:
        data = open_training_data(config, ranks, choose_precision(config.precision, ranks))
        batches = data.train_batches(0)
        for epoch in range(1, arguments.epochs + 1):
            while seen < epoch * data.train_images:
                next(batches)
                seen += data.micro_batch
            status = Path("/proc/self/status").read_text().partition("VmRSS:")[2]
            resident.append(round(int(status.split()[0]) / 1024, 1))
            say(f"epoch {epoch}: {resident[-1]:,.1f} MiB")
    if arguments.plot:
        figure = new_figure(3.4, "The loader's memory, epoch after epoch")
        axes = figure.subplots()
        axes.plot(range(1, len(resident) + 1), resident, "o-")
        axes.set(xlabel="epoch", ylabel="resident memory, MiB", ylim=(0, None))
        axes.grid(alpha=0.3)
        with replacing(arguments.plot) as file:
            file.write(png(figure))
    growth = (resident[-1] - resident[1]) / (len(resident) - 2) if len(resident) > 2 else 0.0
    return {"resident_mib": resident, "growth_mib_per_epoch": round(growth, 3)}


if __name__ == "__main__":
    end(main)
