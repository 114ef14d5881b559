"""python -m engine.curves RUN: draw RUN/curves.png from RUN/metrics.jsonl, also while the run goes on."""

import json
import sys
from pathlib import Path

from common.errors import UserError, tell
from engine.runlog import METRICS


def draw_curves(out: Path) -> Path:
    """Plot loss, validation top-1 and top-5, learning rate and images per second over epochs. Returns the PNG's path.

    Raises UserError where there are no figures to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        records = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{out / METRICS}: no figures of a run to draw ({error})") from error
    training = [record for record in records if record["kind"] == "train"]
    validation = [record for record in records if record["kind"] == "validation"]
    epochs, tested = [record["epoch"] for record in training], [record["epoch"] for record in validation]

    figure, ((loss, accuracy), (rate, speed)) = pyplot.subplots(
        2, 2, figsize=(11, 7), sharex=True, layout="constrained"
    )
    loss.plot(epochs, [record["loss"] for record in training], label="training", alpha=0.8)
    loss.plot(tested, [record["loss"] for record in validation], "o-", label="validation")
    loss.set(ylabel="cross-entropy (nats)", yscale="log")
    for name, label in (("top1", "top-1"), ("top5", "top-5")):
        accuracy.plot(tested, [100 * record[name] for record in validation], "o-", label=label)
    accuracy.set(ylabel="validation accuracy (%)")
    rate.plot(epochs, [record["lr"] for record in training])
    rate.set(ylabel="learning rate", xlabel="epoch", yscale="log")
    rate.set_ylim(bottom=max((record["lr"] for record in training), default=1.0) / 1e4)
    speed.plot(epochs, [record["images_per_second"] for record in training])
    speed.set(ylabel="images per second", xlabel="epoch", ylim=(0, None))
    for axes in (loss, accuracy):
        axes.legend()
    for axes in (loss, accuracy, rate, speed):
        axes.grid(alpha=0.3)
    figure.suptitle(str(out))
    figure.savefig(out / "curves.png", dpi=110)
    pyplot.close(figure)
    return out / "curves.png"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("error: give one folder of a run: python -m engine.curves runs/D-imagenet", file=sys.stderr)
        return UserError.exit_code
    try:
        path = draw_curves(Path(arguments[0]))
    except UserError as error:
        return tell(error)
    print(json.dumps({"curves": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
