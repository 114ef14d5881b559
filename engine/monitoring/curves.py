"""python -m engine.curves RUN: draw RUN/curves.png from RUN/metrics.jsonl, also while the run goes on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from common.files import replacing
from common.flags import FlagParser
from common.process import run_program
from common.progress import printable
from engine.monitoring.pictures import without_warnings
from engine.monitoring.run_files import Run, read_run

_LINES_OF_LEGEND = 12


def draw_curves(out: Path) -> Path:
    """Plot one run into its folder. Returns the PNG's path. Raises UserError where there are no figures to draw."""
    path = out / "curves.png"
    draw_runs([read_run(out)], [str(out)], path)
    return path


@without_warnings()
def draw_runs(runs: Sequence[Run], names: Sequence[str], path: Path) -> None:
    """Plot loss, validation top-1 and top-5, learning rate and images per second over epochs, a colour for each run.

    Raises OSError.
    """
    from matplotlib.figure import Figure  # not pyplot: no display is looked for, nothing has to be closed
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    (loss, accuracy), (rate, speed) = axes
    for index, run in enumerate(runs):
        colour = f"C{index % 10}"
        epochs, tested = [record["epoch"] for record in run.training], [record["epoch"] for record in run.validation]

        def of(records: list[dict], name: str) -> list[float]:
            return [record[name] for record in records]

        loss.plot(epochs, of(run.training, "loss"), color=colour, alpha=0.5, linewidth=1)
        loss.plot(tested, of(run.validation, "loss"), "o-", color=colour, markersize=4)
        accuracy.plot(tested, [100 * top1 for top1 in of(run.validation, "top1")], "o-", color=colour, markersize=4)
        accuracy.plot(tested, [100 * top5 for top5 in of(run.validation, "top5")], "--", color=colour, linewidth=1)
        rate.plot(epochs, of(run.training, "lr"), color=colour)
        speed.plot(epochs, of(run.training, "images_per_second"), color=colour)
    loss.set(ylabel="cross-entropy (nats)", yscale="log")
    accuracy.set(ylabel="validation accuracy (%)")
    rate.set(ylabel="learning rate", xlabel="epoch", yscale="log")
    rates = [record["lr"] for run in runs for record in run.training if 0 < record["lr"] < math.inf]
    rate.set_ylim(bottom=max(rates, default=1.0) / 1e4)
    speed.set(ylabel="images per second", xlabel="epoch", ylim=(0, None))
    training = Line2D([], [], color="black", alpha=0.5, linewidth=1, label="training")
    validation, top1 = (
        Line2D([], [], color="black", marker="o", markersize=4, label=label) for label in ("validation", "top-1")
    )
    top5 = Line2D([], [], color="black", linestyle="--", linewidth=1, label="top-5")
    loss.legend(handles=[training, validation])
    accuracy.legend(handles=[top1, top5])
    for one in axes.flat:
        one.grid(alpha=0.3)
    if len(runs) == 1:
        figure.suptitle(printable(names[0]), parse_math=False)
    else:
        handles = [Line2D([], [], color=f"C{index % 10}", label=printable(name)) for index, name in enumerate(names)]
        columns = 1 + (len(names) - 1) // _LINES_OF_LEGEND
        legend = figure.legend(handles=handles, loc="outside upper left", ncols=columns)
        for text in legend.get_texts():
            text.set_parse_math(False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        parser = FlagParser(
            prog="python -m engine.curves", description="Draw a run's curves.png from its metrics.jsonl."
        )
        parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run (--out of train.py)")
        print(json.dumps({"curves": str(draw_curves(parser.parse_args(argv).run))}))
        return 0

    return run_program(work)
