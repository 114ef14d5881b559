"""python -m tests.stop_seconds [flags of train.py]: from SIGTERM to the checkpoint on the disk, in its parts.

The run is stopped at a random moment between two steps' ends, several times; each run goes on from the one before, so that
all but the first replace a checkpoint. What it says is how long ahead of its end a scheduler has to send the signal.
"""

import json
import random
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
from tests.support.launch import start, wait_for

_DEFAULT_FLAGS = ["--arch", "D", "--data", "synthetic", "--batch-size", "2", "--log-every", "1"]
_STOPS = 5


def stop_once(flags: list[str], out: Path) -> dict[str, float]:
    """Seconds of one stop: until the checkpoint is there, and what of it was the step and what the writing."""
    process = start(*flags, "--out", str(out))
    wait_for(process, "step ")
    began = time.time()
    wait_for(process, "step ")
    time.sleep(random.random() * (time.time() - began))
    signalled = time.time()
    process.send_signal(signal.SIGTERM)
    wait_for(process, "step ")
    step_ended = time.time()
    process.communicate()
    left = time.time()
    if process.returncode != 75:
        raise subprocess.CalledProcessError(process.returncode, flags)
    saved = (out / "last.pt").stat().st_ctime  # when the file got its last name
    figures = {
        "until_saved": saved - signalled,
        "of_it_the_step": step_ended - signalled,
        "of_it_writing": saved - step_ended,
        "until_left": left - signalled,
    }
    return {name: round(value, 2) for name, value in figures.items()}


def main(argv: list[str]) -> int:
    """Print each stop on stderr, and the figures as one line of JSON on stdout."""
    return run_program(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    stops = []
    with tempfile.TemporaryDirectory(prefix="stop.") as folder:
        for _ in range(_STOPS):
            stops.append(stop_once([*_DEFAULT_FLAGS, *argv], Path(folder)))
            print(stops[-1], file=sys.stderr, flush=True)
        mebibytes = (Path(folder) / "last.pt").stat().st_size >> 20
    print(json.dumps({"checkpoint_mebibytes": mebibytes, "stops": stops}))
    return 0


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
