"""python -m tests.soak --faults 30 --seed 0: one run on digits through faults at random moments, and what it trained on.

rank: kill -9 of a rank; torchrun --max-restarts=3 restarts all.
torchrun: kill -9 of torchrun; the same command is started again at once, while the ranks of the first may still save.
stop: SIGTERM to torchrun; when all have left, the same command is started again.
size: the same, on another number of ranks (1 to 3).
file: a training image is overwritten with something that cannot be decoded.

Every rank writes down which images its loader delivers (recording_worker.py). In the end, each epoch must have used
every image once, but for those that were overwritten; and a step that was made twice must have had the same images, to the
last pixel, on any number of ranks. Exit code 0 if so.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # before the other imports: Ctrl-C ends them in a line, too
    from common.start import begin

    begin()


from common.process import end, run_program
from common.progress import say
from engine.checkpoint import load
from pipeline.dataset.digits import write_digits
from pipeline.dataset.manifest import open_manifest
from tests.support.launch import ROOT, environment, one_machine, workers_of
from tests.support.used import Used, read_used

FAULTS = ("rank", "torchrun", "stop", "size", "file")
_PATIENCE_SECONDS = 240.0  # without a step, the run is taken to hang


class Run:
    """A training that is started again whenever it ends early."""

    def __init__(self, folder: Path, *, epochs: int, batch_size: int, world_size: int, parallel: str) -> None:
        self.out, self.log, self.world_size = folder / "out", folder / "log", world_size
        self.starts, self.unasked_ends = 0, 0
        self._flags = ["--arch", "A", "--data", str(folder / "digits"), "--crop", "32", "--train-scale", "36"]
        self._flags += ["--batch-size", str(batch_size), "--epochs", str(epochs), "--parallel", parallel]
        self._flags += ["--schedule", "cosine", "--warmup-epochs", "1"]
        self._flags += ["--max-bad-images", "1000", "--log-every", "1", "--checkpoint-minutes", "0.05"]
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            *one_machine(self.world_size, restarts=3),
            "tests/support/programs/recording_worker.py",
            *self._flags,
        ]
        with open(self.log, "ab") as log:
            self._log_offset = log.tell()
            self.torchrun = subprocess.Popen(
                [*command, "--out", str(self.out)], cwd=ROOT, env=environment(), stdout=log, stderr=log
            )
        self.starts += 1

    def steps_said(self) -> list[int]:
        """The numbers of the steps that were made since the last start."""
        said = self.log.read_bytes()[self._log_offset :].decode(errors="replace")
        return [int(number) for number in re.findall(r"^step (\d+)/", said, re.MULTILINE)]

    def is_done(self) -> bool:
        """Whether it has ended as it should; starts it again where it has not."""
        code = self.torchrun.poll()
        if code:
            self.unasked_ends += 1
            say(f"torchrun ended with {code}: starting it again")
            self.start()
        return code == 0

    def wait(self, *, for_a_step: bool = False) -> bool:
        """Until it is done, or has made a step more than so far. Returns whether it is done."""
        before, deadline = len(self.steps_said()) if for_a_step else 10**9, time.monotonic() + _PATIENCE_SECONDS
        latest = -1
        while not self.is_done():
            said = self.steps_said()
            if len(said) > before:
                return False
            if said and said[-1] != latest:
                latest, deadline = said[-1], time.monotonic() + _PATIENCE_SECONDS
            if time.monotonic() > deadline:
                raise SystemExit(f"no step in {_PATIENCE_SECONDS:.0f} s; see {self.log}")
            time.sleep(0.1)
        return True


def inflict(fault: str, run: Run, images: list[Path], dice: random.Random) -> str:
    """Returns what was done, in words."""
    if fault == "file":
        image = images.pop(dice.randrange(len(images)))
        image.write_bytes(b"not an image any more")
        return f"{image.parent.name}/{image.name} overwritten"
    if fault == "rank":
        while not (ranks := workers_of(run.torchrun)):  # between two starts
            time.sleep(0.1)
        os.kill(dice.choice(ranks), signal.SIGKILL)
        return f"kill -9 of one of {len(ranks)} ranks"
    before = run.world_size
    if fault == "torchrun":
        run.torchrun.kill()
    else:
        run.torchrun.terminate()
    run.torchrun.wait()
    if fault == "size":
        run.world_size = dice.choice([size for size in (1, 2, 3) if size != before])
    run.start()
    return {
        "torchrun": "kill -9 of torchrun, and the same command again",
        "stop": "SIGTERM to torchrun, and the same command again",
        "size": f"SIGTERM to torchrun, and again on {run.world_size} ranks instead of {before}",
    }[fault]


def judge(used: Used, lost: set[int], *, epochs: int, images: int) -> dict:
    """What was used, against what should have been. lost: rows of the images that were overwritten."""
    wrong_rows, substituted = 0, 0
    for epoch in range(epochs):
        counts = used.rows(epoch, images)
        missing = set(range(images)) - set(counts)
        extra = sum(counts.values()) - len(counts)
        substituted += extra
        wrong_rows += len(missing - lost) + abs(extra - len(missing))
    # Where the image was overwritten between the two times, another took its place.
    changed = sum(len({image for image in seen if image[0] not in lost}) > 1 for seen in used.differing.values())
    return {"rows_not_used_once": wrong_rows, "substituted": substituted, "images_changed_in_repeated_steps": changed}


def rows_of(paths: set[Path], data: Path) -> set[int]:
    """The rows of the training table that show these files."""
    table = open_manifest(data).train
    return {row for row in range(len(table)) if table.path(row) in paths}


def main(argv: list[str] | None = None) -> int:
    """Run it; prints one line for each fault on stderr, and the figures as one line of JSON on stdout."""
    return run_program(lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", default=FAULTS, choices=FAULTS, help="taken in turns, in random order")
    parser.add_argument("--seed", type=int, default=0, help="of the faults, their order and their moments")
    parser.add_argument("--epochs", type=int, default=4, help="must last longer than the faults")
    parser.add_argument(
        "--parallel", choices=("data", "hybrid"), default="data", help="of three ranks, data in any case"
    )
    parser.add_argument("--batch-size", type=int, default=12, help="a multiple of 6, for 1 to 3 ranks")
    args = parser.parse_args(argv)
    began, dice = time.monotonic(), random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    write_digits(folder / "digits")
    images = sorted((folder / "digits/train").rglob("*.jpg"))
    everything = set(images)
    faults = [args.kinds[number % len(args.kinds)] for number in range(args.faults)]
    dice.shuffle(faults)
    say(f"in {folder}")
    run = Run(folder, epochs=args.epochs, batch_size=args.batch_size, world_size=2, parallel=args.parallel)
    for number, fault in enumerate(faults, start=1):
        # One in four at any moment after the last one: while ranks start, or save; the others while steps are made.
        if dice.random() < 0.75 and run.wait(for_a_step=True):
            raise SystemExit(f"the run was done before fault {number}: give it more --epochs")
        time.sleep(8 * dice.random())
        latest = max(run.steps_said(), default=None)
        said = inflict(fault, run, images, dice)
        say(
            f"{time.monotonic() - began:5.0f} s  fault {number}/{args.faults}, last step of this start {latest}: {said}"
        )
    run.wait()
    checkpoint = load(run.out / "last.pt")
    used = read_used(run.out, args.batch_size)
    total = len(everything)
    lost = rows_of(everything - set(images), folder / "digits")
    judgement = judge(used, lost, epochs=args.epochs, images=total)
    exact = not judgement["rows_not_used_once"] and not judgement["images_changed_in_repeated_steps"]
    result = {
        "faults": {fault: faults.count(fault) for fault in FAULTS},
        "epochs": args.epochs,
        "images": total,
        "steps": checkpoint.steps,
        "steps_repeated": used.repeated_steps,
        "starts_of_ranks": used.starts,
        "starts_of_torchrun": run.starts,
        "torchrun_gave_up": run.unasked_ends,
        "world_sizes": used.world_sizes,
        **judgement,
        "top1": [entry["top1"] for entry in checkpoint.history],
        "seconds": round(time.monotonic() - began),
        "exact": exact and checkpoint.steps == -(-args.epochs * total // args.batch_size),
    }
    print(json.dumps(result), flush=True)
    if not result["exact"]:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    end(main)
