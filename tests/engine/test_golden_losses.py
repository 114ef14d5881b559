"""The first 30 losses of A and D on the digits, as they were when tests/engine/golden_losses.json was written.

Whoever upgrades torch or DALI sees here whether the numbers of a training change: the initial weights, the order of the images,
what is decoded and cropped, dropout, forward, backward and update. Where they change and are meant to, make them anew:

    python -m tests.engine.test_golden_losses > tests/engine/golden_losses.json

float32 sums depend on their order, which differs between CPUs (by the width of their registers) as it does between numbers of
threads. On one machine, 1 and 2 threads agree to 3e-7 of the loss in the first 10 steps of either network. Then what was
rounded differently grows, more so in A, whose first losses jump: to 8e-4 in step 30 (D: 6e-6). A change of any formula shows in
the first ten: a rate that is 1 % higher moves A's third by 1e-4 and its ninth by 1e-3.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import train
from engine.monitoring import runlog
from engine.training import trainer

GOLDEN = Path(__file__).with_name("golden_losses.json")
# Each is written out: another default is no change of the numbers.
FLAGS = [
    "--data", "digits", "--crop", "32", "--train-scale", "36", "--batch-size", "8", "--steps", "30", "--log-every", "1",
    "--seed", "0", "--epochs", "1", "--lr", "0.0001", "--momentum", "0.9", "--weight-decay", "0.0005", "--dropout", "0.5",
    "--init", "xavier", "--schedule", "step", "--step-epochs", "1", "--device", "cpu", "--precision", "fp32", "--no-compile",
    "--decoder", "cpu", "--threads", "1", "--resume", "never",
]  # fmt: skip
FIRST = 10
TOLERANCE, TOLERANCE_LATER = 1e-4, 1e-2


def losses(arch: str, out: Path) -> list[float]:
    """Of the run as a user would start it, less its checkpoint and its pictures; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            mock.patch.object(trainer.checkpoints, "save"),
            mock.patch.object(runlog, "draw_curves"),
            contextlib.redirect_stdout(sys.stderr),
        ):
            assert train.main(["--arch", arch, *FLAGS, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("arch", ["A", "D"])
@pytest.mark.seconds
def test_losses_are_what_they_were(tmp_path, arch):
    found, golden = losses(arch, tmp_path), json.loads(GOLDEN.read_text())[arch]
    assert len(golden) == 30
    assert found[:FIRST] == pytest.approx(golden[:FIRST], rel=TOLERANCE)
    assert found[FIRST:] == pytest.approx(golden[FIRST:], rel=TOLERANCE_LATER)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figures = {arch: losses(arch, Path(folder) / arch) for arch in ("A", "D")}
    lines = [f'"{arch}": {json.dumps([round(loss, 6) for loss in of_arch])}' for arch, of_arch in figures.items()]
    print("{\n" + ",\n".join(lines) + "\n}")
