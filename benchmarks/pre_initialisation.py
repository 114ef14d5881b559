"""python -m benchmarks.pre_initialisation --data DIR --init-from A.pt --out OUT [flags of train.py]: does E need A's layers?

Section 3.1 of the paper: a deep network initialised at random from a normal of variance 0.01 does not begin to learn, and does
where its first four convolutions and its three fully-connected layers are those of a trained A. Trained here with the same
flags and seed: E with A's layers, the rest from each of train.py's --init; and E at random throughout, from the paper's
normal, from a normal with a standard deviation of 0.01 (which some take the paper to mean), and from Glorot's distribution
(which the authors recommend in hindsight). A network has learned if its top-1 in the end is at least twice that of guessing.

A.pt is a checkpoint of A on the same data: one of benchmarks.parity's. A finished run is kept in OUT and not repeated; an
interrupted one goes on. The defaults are for a few thousand images of 32 pixels.
"""

from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from benchmarks import flag_parser, program, train_config
from benchmarks.parity import add_run_flags, kept, run_trainer
from common.files import replacing
from common.process import end
from engine import checkpoint
from engine.config import Config
from engine.monitoring.curves import draw_runs
from engine.monitoring.run_files import read_run
from engine.training.assembly import network_of
from model.weights import NOT_DIVIDED, to_torchvision

_ARCH: Final = "E"
_DEFAULT_FLAGS = ["--crop", "32", "--train-scale", "36", "--batch-size", "50", "--epochs", "5", "--schedule", "cosine"]
_DEFAULT_FLAGS += ["--warmup-epochs", "1", "--checkpoint-minutes", "1", "--keep", "1"]
# Each step is logged, to know the one in which a loss is no number any more.
_CHOSEN = [f"--arch={_ARCH}", "--no-batch-norm", f"--init={Config.init}", "--weights=None", "--log-every=1"]
_SMALL_NORMAL = "random, normal of standard deviation 0.01"


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser(
        "pre_initialisation", "Train E with and without the layers of a trained A. Other flags are train.py's."
    )
    add_run_flags(parser, picture="pre-initialisation.png")
    parser.add_argument("--init-from", type=Path, required=True, help="checkpoint of A, trained on the same data")
    arguments, flags = parser.parse_known_args(argv)
    flags += ["--data", str(arguments.data)]
    # What is wrong is said before hours have passed.
    config = train_config(flags, defaults=_DEFAULT_FLAGS, chosen=_CHOSEN)
    flags = [*_DEFAULT_FLAGS, *_CHOSEN, *flags]
    classes = checkpoint.load(arguments.init_from).classes
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = arguments.out / "normal-0.01.pth"
    write_small_normal(config, len(classes), weights)
    runs = {}
    for number, (name, start) in enumerate(starts(arguments.init_from, weights).items()):
        runs[name] = kept(arguments.out / str(number), [*flags, *start], run_trainer)
    chance = 1 / len(classes)
    summary = {name: summarise(run, chance) for name, run in runs.items()}
    picture = arguments.plot or arguments.out / "pre-initialisation.png"
    draw_runs([read_run(arguments.out / str(number)) for number in range(len(runs))], list(runs), picture)
    for name, row in summary.items():
        end = f"diverged in step {row['diverged_at']}" if row["diverged_at"] else f"top-1 {row['top1']:.1%}"
        print(f"{name:52}{end:>24}   {'learned' if row['learned'] else 'did not learn'}")
    return {"data": str(arguments.data), "flags": flags, "runs": summary, "plot": str(picture)}


def starts(a: Path, small_normal: Path) -> dict[str, list[str]]:
    """train.py's flags for the initial weights of each run, by its name."""
    return {
        "A's layers, the rest from Glorot's": ["--init-from", str(a), "--init", "xavier"],
        "random, normal of variance 0.01": ["--init", "normal"],
        _SMALL_NORMAL: ["--weights", f"torchvision:{small_normal}"],
        "A's layers, the rest normal of variance 0.01": ["--init-from", str(a), "--init", "normal"],
        "A's layers, the rest from He's": ["--init-from", str(a), "--init", "kaiming"],
        "random, Glorot's": ["--init", "xavier"],
    }


def write_small_normal(config: Config, classes: int, path: Path) -> None:
    """A state dict in torchvision's form of a network whose weights are normal with standard deviation 0.01, biases 0.

    train.py has no --init for it: it reads this with --weights. The weights are a tenth of those of --init normal.
    """
    model = network_of(replace(config, init="normal"), classes=classes, device=torch.device("cpu"))
    small = {name: weight / 10 for name, weight in model.state_dict().items()}
    state, _ = to_torchvision(small, (0.0, 0.0, 0.0), NOT_DIVIDED)
    with replacing(path) as file:
        torch.save(state, file)


def summarise(run: dict, chance: float) -> dict:
    """What is reported of a run. chance: top-1 of guessing."""
    top1 = [entry["top1"] for entry in run["history"]]
    last, diverged_at = top1[-1] if top1 else None, run["diverged_at"]
    learned = diverged_at is None and top1[-1] >= 2 * chance
    return {"top1_by_epoch": top1, "top1": last, "diverged_at": diverged_at, "learned": learned}


if __name__ == "__main__":
    end(main)
