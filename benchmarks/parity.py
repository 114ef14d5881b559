"""python -m benchmarks.parity --data DIR --out OUT [--modern] [flags of train.py]: does it learn what a plain loop learns?

DIR holds train/<class>/* and val/<class>/*. Each seed is trained twice: by train.py, and by a loop over torchvision's
ImageFolder and transforms (benchmarks/plain.py) from the same initial weights, with the same hyper-parameters. What differs
is what this project wrote itself: the order, the augmentation's draws, decoding and resizing by DALI, the step, the schedule,
the validation. Compared are the validation results after the last epoch: means over seeds, their spread, and the 95 % confidence
interval of the difference of means (Welch's t). The defaults are for a few thousand images of 32 pixels: the paper's recipe or,
with --modern, that of recipes/modern/A.yaml, for which the loop takes torchvision's RandomResizedCrop, and torch's label
smoothing and AveragedModel; with --mixup and --cutmix it takes torchvision's too.

A finished run is kept in OUT and not repeated; a run of train.py goes on where it was interrupted.
"""

import json
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from scipy import stats

from benchmarks import flag_parser, program, train_config
from benchmarks.plain import train_plainly
from common.errors import TrainingError, UserError
from common.files import DAMAGED_FILE, replacing
from common.flags import FlagParser
from common.process import end
from common.progress import say
from engine import checkpoint
from engine.config import Config, parse_args
from engine.monitoring.run_files import METRICS, read_records
from perf.machine import ROOT
from perf.plot_style import BLUE, VERMILION, new_figure, png

OURS, PLAIN = "this trainer", "plain loop"
RESULT = "result.json"
_COLOURS = {OURS: BLUE, PLAIN: VERMILION}
_MEASURES = {"top1": ("validation top-1 (%)", 100), "loss": ("validation loss (nats)", 1)}
"""What people call it, and how many of their units it is."""
_DEFAULT_FLAGS = ["--arch", "A", "--crop", "32", "--batch-size", "50", "--epochs", "8", "--warmup-epochs", "1"]
_DEFAULT_FLAGS += ["--checkpoint-minutes", "1", "--keep", "1"]
_PAPER = ["--train-scale", "36", "--lr", "0.015"]
# The recipe's rate is for batches of 256, its average for 200,000 steps; here an epoch is a hundred steps.
_MODERN = ["--recipe", str(ROOT / "recipes/modern/A.yaml"), "--lr", "0.02", "--ema", "0.99"]
# What the plain loop has no other of.
_CHOSEN = ["--schedule=cosine", "--precision=fp32", "--compile=off", f"--seed={Config.seed}"]
_NOT_PLAIN = ("steps", "weights", "init_from", "head_lr_factor", "micro_batch", "grad_compression")


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser(
        "parity", "Train with train.py and with a plain PyTorch loop, and compare. Other flags are train.py's."
    )
    add_run_flags(parser, picture="parity.png")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, at least 2")
    parser.add_argument(
        "--modern", action="store_true", help="defaults of recipes/modern/A.yaml instead of the paper's"
    )
    arguments, flags = parser.parse_known_args(argv)
    if arguments.seeds < 2:
        raise UserError(f"--seeds {arguments.seeds}: must be at least 2, or there is no spread")
    defaults = [*_DEFAULT_FLAGS, *(_MODERN if arguments.modern else _PAPER)]
    flags += ["--data", str(arguments.data)]
    check(train_config(flags, defaults=defaults, chosen=_CHOSEN))  # what is wrong is said before hours have passed
    flags = [*defaults, *_CHOSEN, *flags]
    histories: dict[str, list[list[dict]]] = {OURS: [], PLAIN: []}
    for seed in range(arguments.seeds):
        for name, run in train_both(arguments.out, [*flags, "--seed", str(seed)], seed).items():
            if run["diverged_at"]:
                raise TrainingError(f"seed {seed} diverged; choose a lower --lr and another --out")
            histories[name].append(run["history"])
    result = compare(histories)
    picture = arguments.plot or arguments.out / "parity.png"
    with replacing(picture) as file:
        file.write(plot(histories, arguments.data.name))
    print_table(result)
    settings = {"data": str(arguments.data), "flags": flags, "seeds": arguments.seeds}
    return {**settings, **result, "plot": str(picture)}


def check(config: Config) -> None:
    """Raises UserError: the plain loop does not do what these flags ask for."""
    for name in _NOT_PLAIN:
        if getattr(config, name) != getattr(Config, name):
            raise UserError(f"--{name.replace('_', '-')}: the plain loop has nothing like it; leave it out")


def train_both(out: Path, flags: list[str], seed: int) -> dict[str, dict]:
    """The results of the two runs of a seed, by name."""
    ours, plain = (out / f"{name}-{seed}" for name in ("ours", "plain"))

    def train(_: Path, flags: list[str]) -> dict:
        used = checkpoint.load(ours / checkpoint.LAST)
        return {"history": train_plainly(parse_args(flags), used.mean_rgb, used.colour_shift), "diverged_at": None}

    return {OURS: kept(ours, flags, run_trainer), PLAIN: kept(plain, flags, train)}


# ---- runs of an experiment: each result is kept in a file as soon as it is there, and not made a second time --------


def add_run_flags(parser: FlagParser, *, picture: str) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--plot", type=Path, help=f"PNG to write; default: OUT/{picture}")


def kept(out: Path, flags: list[str], make: Callable[[Path, list[str]], dict]) -> dict:
    """What OUT/result.json holds; where there is none yet, what make(out, flags) returns, written there.

    flags: of train.py, which the result belongs to. Raises UserError: OUT holds the result of other ones.
    """
    path = out / RESULT
    if path.exists():
        try:
            found = json.loads(path.read_text())
            earlier = list(map(str, found["flags"]))
        except DAMAGED_FILE as error:
            raise UserError(
                f"{path}: is not a result of an earlier start; remove it, or choose another --out"
            ) from error
        if earlier != flags:
            raise UserError(f"{out} holds a run with other flags ({' '.join(earlier)}); choose another --out")
        say(f"{out}: done before")
        return found
    out.mkdir(parents=True, exist_ok=True)
    result = {"flags": flags, **make(out, flags)}
    with replacing(path) as file:
        file.write(json.dumps(result).encode())
    return result


def run_trainer(out: Path, flags: list[str]) -> dict:
    """train.py as a user starts it, in a process of its own; one that was interrupted goes on where it was.

    Returns {"history": [{"epoch", "loss", "top1"}, …] of the validations, "diverged_at": the step after which its loss was found
    to be infinite or NaN, which ended it, or None}. Raises UserError and TrainingError as it does.
    """
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(out)]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            for last in process.stderr:
                sys.stderr.write(last)
        except BaseException:  # else its end would be waited for
            process.terminate()
            raise
    diverged = re.search(r"after step (\d+): the training diverged", last)
    if process.returncode and not diverged:
        kind = UserError if process.returncode == UserError.exit_code else TrainingError
        raise kind(f"train.py ended with exit code {process.returncode}: {last.strip().removeprefix('error: ')}")
    validations = [record for record in read_records(out / METRICS) if record["kind"] == "validation"]
    history = [{key: record[key] for key in ("epoch", "loss", "top1")} for record in validations]
    return {"history": history, "diverged_at": int(diverged[1]) if diverged else None}


# ---- the comparison ------------------------------------------------------------------------------------------------


def compare(histories: dict[str, list[list[dict]]]) -> dict:
    """The figures after the last epoch. histories: by name, then by seed, at least two, then by epoch."""
    result: dict = {}
    for measure in _MEASURES:
        values = {name: [run[-1][measure] for run in runs] for name, runs in histories.items()}
        means = {name: statistics.mean(runs) for name, runs in values.items()}
        low, high = difference_interval(values[OURS], values[PLAIN])
        result[measure] = {
            name: {"runs": runs, "mean": means[name], "standard_deviation": statistics.stdev(runs)}
            for name, runs in values.items()
        } | {
            "difference": means[OURS] - means[PLAIN],
            "difference_95": [low, high],
            "equal_within_spread": low <= 0 <= high,
        }
    by_epoch = {name: [[entry["top1"] for entry in run] for run in runs] for name, runs in histories.items()}
    return {**result, "top1_by_epoch": by_epoch}


def difference_interval(one: list[float], other: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the difference of two means, each of two values or more with a variance of its own (Welch)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where all values are the same
        low, high = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    return float(low), float(high)


def print_table(result: dict) -> None:
    for measure, (title, unit) in _MEASURES.items():
        print(f"{title} after the last epoch, seed by seed; mean ± standard deviation")
        for name in (OURS, PLAIN):
            row = result[measure][name]
            runs = "  ".join(f"{unit * value:7.3f}" for value in row["runs"])
            print(f"  {name:14}{runs}    {unit * row['mean']:.3f} ± {unit * row['standard_deviation']:.3f}")
        middle, (low, high) = result[measure]["difference"], result[measure]["difference_95"]
        print(f"  difference of means {unit * middle:+.3f} ({unit * low:+.3f} … {unit * high:+.3f})")


def plot(histories: dict[str, list[list[dict]]], data: str) -> bytes:
    """A PNG: top-1 and loss over epochs, each run thin, the means bold."""
    figure = new_figure(3.4, f"This trainer and a plain PyTorch loop, on {data}")
    for axes, (measure, (label, unit)) in zip(figure.subplots(1, 2), _MEASURES.items(), strict=True):
        for name, runs in histories.items():
            values = [[unit * entry[measure] for entry in run] for run in runs]
            epochs = [entry["epoch"] for entry in runs[0]]
            for run in values:
                axes.plot(epochs, run, color=_COLOURS[name], alpha=0.35, linewidth=0.8)
            means = [statistics.mean(column) for column in zip(*values, strict=True)]
            axes.plot(epochs, means, "o-", color=_COLOURS[name], markersize=3, label=f"{name}, mean of {len(runs)}")
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    return png(figure)


if __name__ == "__main__":
    end(main)
