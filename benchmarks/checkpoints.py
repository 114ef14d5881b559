"""python -m benchmarks.checkpoints [--rounds 5] [flags of train.py]: how long a training stands still for a checkpoint.

The whole state of a training (weights, momentum, with --ema the average) is saved in turns in the foreground, where the training
waits for the disk, and in the background, where it waits for a copy. The first copy is told apart: its memory is new. Steps are
taken while a checkpoint is written and, as many, while none is. It writes to a temporary folder; TMPDIR chooses the disk.
"""

import functools
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter

from benchmarks import flag_parser, program, train_config
from benchmarks.turns import finish, spread
from common.errors import UserError
from common.flags import whole_above_zero
from common.memory import share_one_heap
from common.process import end
from common.progress import say
from common.ranks import ranks_of_this_run
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint
from engine.config import SYNTHETIC, to_dict
from engine.data import TrainingData, open_training_data
from engine.precision import choose_precision, set_numerics
from engine.training.assembly import assemble, network_of
from engine.training.checkpoint_writer import CheckpointWriter


@program
def main(argv: list[str] | None) -> dict:
    parser = flag_parser(
        "checkpoints", "Measure how long a training waits for a checkpoint. Other flags are train.py's."
    )
    parser.add_argument("--rounds", type=whole_above_zero, default=5, help="checkpoints of each kind that are counted")
    options, flags = parser.parse_known_args(argv)
    config = train_config(flags, defaults=["--arch=D", "--batch-size=2"], chosen=[f"--data={SYNTHETIC}"])
    share_one_heap()  # as train.py does
    set_numerics(deterministic=config.deterministic)
    with ranks_of_this_run(config.device) as ranks, tempfile.TemporaryDirectory() as work:
        if ranks.world_size > 1:
            raise UserError("benchmarks.checkpoints measures one rank; start it without torchrun")
        data = open_training_data(config, ranks, choose_precision(config.precision, ranks))
        figures = measure(data, Path(work), rounds=options.rounds)
    kept = {name: getattr(config, name) for name in ("arch", "crop", "batch_size")}
    return {**kept, "device": ranks.device.type, "precision": data.precision.name, "rounds": options.rounds, **figures}


def measure(data: TrainingData, out: Path, *, rounds: int) -> dict:
    """Seconds, each as [median, lowest, highest] over rounds; of steps, the mean of a round."""
    config, device = replace(data.config, lr=0.0), data.ranks.device  # no weights grow beyond bounds
    model = network_of(config, classes=len(data.classes), device=device)
    parts = assemble(config, ranks=data.ranks, precision=data.precision, micro_batch=data.micro_batch, model=model)
    batches = data.resident_batches()
    parts.step.warm_up(*next(batches))

    step = functools.partial(parts.step, batches)

    def seconds_of(call: Callable[[], object]) -> float:
        began = perf_counter()
        call()
        finish(device)
        return perf_counter() - began

    names = ("foreground", "background", "step_while_writing", "step_otherwise")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    writer = CheckpointWriter()
    for number in range(rounds + 1):
        checkpoint = Checkpoint(
            arch=config.arch,
            crop=config.crop,
            classes=list(data.classes),
            mean_rgb=list(data.mean_rgb),
            model=model.state_dict(),
            optimizer=parts.optimizer.state_dict(),
            scaler=parts.scaler.state_dict(),
            steps=number,
            samples_seen=0,
            history=[],
            fingerprint=data.fingerprint,
            config=to_dict(config),
            world_size=1,
            ema=parts.average.model.state_dict() if parts.average else None,
        )
        begin, save = (
            functools.partial(call, checkpoint, out, is_best=False, keep=1) for call in (writer.begin, checkpoints.save)
        )
        seconds["background"].append(seconds_of(begin))
        steps = [seconds_of(step)]
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            steps.append(seconds_of(step))
        writer.finish()
        seconds["step_while_writing"].append(mean(steps))
        seconds["step_otherwise"].append(mean(seconds_of(step) for _ in steps))
        seconds["foreground"].append(seconds_of(save))
        latest = (f"{name} {of[-1]:.3f}" for name, of in seconds.items())
        say(f"round {number} of {rounds}, seconds: {', '.join(latest)}")
    first = round(seconds["background"][0], 3)
    counted = {f"{name}_seconds": spread(of[1:], 3) for name, of in seconds.items()}
    mebibytes = (out / checkpoints.LAST).stat().st_size >> 20
    return {"checkpoint_mebibytes": mebibytes, "first_background_seconds": first, **counted}


if __name__ == "__main__":
    end(main)
