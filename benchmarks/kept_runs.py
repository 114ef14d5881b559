"""Training runs of an experiment: each result is kept in a file as soon as it is there, and not made a second time."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import TrainingError, UserError
from common.files import DAMAGED_FILE, replacing
from common.flags import FlagParser
from common.progress import say
from engine.records import METRICS, read_records
from perf.machine import ROOT

RESULT = "result.json"


def add_run_flags(parser: FlagParser, *, picture: str) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/* and val/<class>/*")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--plot", type=Path, help=f"PNG to write; default: OUT/{picture}")


def kept(out: Path, flags: list[str], make: Callable[[], dict]) -> dict:
    """What OUT/result.json holds; where there is none yet, what make() returns, written there.

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
    result = {"flags": flags, **make()}
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
        for last in process.stderr:
            sys.stderr.write(last)
    diverged = re.search(r"after step (\d+): the training diverged", last)
    if process.returncode and not diverged:
        kind = UserError if process.returncode == UserError.exit_code else TrainingError
        raise kind(f"train.py ended with exit code {process.returncode}: {last.strip().removeprefix('error: ')}")
    validations = [record for record in read_records(out / METRICS) if record["kind"] == "validation"]
    history = [{key: record[key] for key in ("epoch", "loss", "top1")} for record in validations]
    return {"history": history, "diverged_at": int(diverged[1]) if diverged else None}
