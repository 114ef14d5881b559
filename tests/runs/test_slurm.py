"""sweeps/*.sbatch under a real SLURM on two nodes (tests/support/slurm.py): time limits, lost nodes, jobs that go first."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from perf.sweep_table import read_rows
from tests.support.launch import SMALL, assert_same_weights, environment, results_of_output, run
from tests.support.slurm import Slurm, cluster
from tests.support.used import read_used

pytestmark = pytest.mark.slow

NODES = ("n1", "n2")
SECONDS_A_STEP = "2"  # besides the step's own time, so that a run lasts on fast machines too
START_SECONDS, END_SECONDS = 200, 900  # on cores that others use
URGENT = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with cluster(*NODES) as slurm:
        yield slurm


def variables(**others: str) -> dict[str, str]:
    """What a job finds in its environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environment(), "PATH": path, "SECONDS_A_STEP": SECONDS_A_STEP, **others}


class Training:
    """A job of sweeps/slurm.sbatch on both nodes, one rank on each."""

    def __init__(
        self, slurm: Slurm, folder: Path, *flags: str, steps: int = 30, checkpoint_minutes: str = "60"
    ) -> None:
        self.slurm, self.steps, self.log, self.out = slurm, steps, folder / "log", folder / "out"
        self.flags = [*SMALL, "--steps", str(steps), "--checkpoint-minutes", checkpoint_minutes]
        job = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", f"--output={self.log}", *flags]
        training = ["sweeps/slurm.sbatch", *self.flags, "--out", str(self.out)]
        worker = "tests/support/programs/recording_worker.py"
        self.number = slurm.command(*job, *training, variables=variables(PROGRAM=worker)).strip()

    def wait_for_steps(self, count: int) -> None:
        self.slurm.wait(lambda: self.steps_begun() >= count, START_SECONDS, f"{count} steps")

    def steps_begun(self) -> int:
        return sum(len(file.read_text().splitlines()) for file in self.out.glob("used/*-0-of-2.jsonl"))

    def wait_for_end(self) -> None:
        self.slurm.wait_for_state(self.number, "COMPLETED", END_SECONDS)

    def wait_for_requeue(self) -> None:
        self.slurm.wait(lambda: self.restarts() > 0, START_SECONDS, "queued again")

    def restarts(self) -> int:
        return int(self.slurm.job(self.number)["Restarts"])

    def assert_whole(self, *, repeated: bool) -> None:
        """All steps, each image of them as planned; some made twice, or none."""
        text = self.log.read_text()
        used = read_used(self.out, batch_size=12)
        results = results_of_output("\n".join(line for line in text.splitlines() if line.startswith("{")))
        assert results["steps"] == self.steps
        assert len(used.images) == self.steps * 12
        assert not used.differing
        assert used.world_sizes == [2] * used.starts
        assert used.starts == text.count("going on from") + 1 == self.restarts() + 1
        assert (used.repeated_steps > 0) == repeated


def test_time_limit(slurm, tmp_path):
    """Two minutes, of which SLURM gives 55 to 85 s: it looks every 30 s which signals will have been due at its next look."""
    training = Training(slurm, tmp_path, "--time=2", "--signal=B:USR1@35", steps=45)
    training.wait_for_end()
    assert training.restarts() >= 1
    training.assert_whole(repeated=False)
    run(*training.flags, "--out", str(tmp_path / "plain"), ranks=2)
    assert_same_weights(training.out / "last.pt", tmp_path / "plain" / "last.pt")


@pytest.mark.parametrize("node", NODES)
def test_node_without_power(slurm, tmp_path, node):
    """n1 has the job's script and the list of the machines."""
    training = Training(slurm, tmp_path, checkpoint_minutes="0.05")
    training.wait_for_steps(10)
    slurm.switch_off(node)
    try:
        training.wait_for_requeue()
    finally:
        slurm.start_node(node)
    training.wait_for_end()
    training.assert_whole(repeated=True)


def test_job_that_goes_first(slurm, tmp_path):
    training = Training(slurm, tmp_path)
    training.wait_for_steps(10)
    urgent = slurm.command(*URGENT, "--wrap", "sleep 5").strip()
    slurm.wait_for_state(urgent, "COMPLETED", START_SECONDS)
    assert training.steps_begun() < training.steps
    training.wait_for_end()
    training.assert_whole(repeated=False)


# ---- sweeps ------------------------------------------------------------------------------------------------------


class Sweep:
    """An array of trainings that last, one task on a node at a time, since each asks for all cores."""

    def __init__(self, slurm: Slurm, folder: Path, rates: Sequence[str], steps: int, **limits: str) -> None:
        self.slurm, self.folder, self.csv, self.rates, self.steps = slurm, folder, folder / "lr.csv", rates, steps
        python = folder / "python"
        worker = "tests/support/programs/recording_worker.py"
        python.write_text(
            f'#!/usr/bin/env bash\n[ "$1" != train.py ] || set -- {worker} "${{@:2}}"\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        self._variables = variables(
            LRS=" ".join(rates),
            CSV=str(self.csv),
            PYTHON=str(python),
            CPUS=str(os.cpu_count()),
            SBATCH_GPUS_PER_NODE="0",
            SBATCH_OUTPUT=f"{folder}/%A_%a.log",
            **limits,
        )
        self.number = self.submit()

    def submit(self) -> str:
        flags = [*SMALL, "--steps", str(self.steps), "--checkpoint-minutes", "60"]
        array = ["bash", "sweeps/slurm_array.sbatch", "sweeps/lr.sh", *flags]
        return self.slurm.command(*array, variables=self._variables).split()[-1]

    def wait_for_steps(self, runs: int, count: int) -> None:
        """Until each of so many runs has made so many."""
        self.slurm.wait(lambda: sum(steps >= count for steps in self._begun()) >= runs, START_SECONDS, f"{count} steps")

    def _begun(self) -> list[int]:
        return [
            sum(len(file.read_text().splitlines()) for file in used.iterdir()) for used in self.folder.glob("lr/*/used")
        ]

    def restarts(self) -> dict[str, int]:
        """Of each task."""
        tasks = [f"{self.number}_{task}" for task in range(1, len(self.rates) + 1)]
        return {task: int(self.slurm.job(task)["Restarts"]) for task in tasks}

    def assert_whole(self, *, repeated: bool = False) -> None:
        """A row for each run; some steps made twice, or none."""
        rows = read_rows(self.csv)
        assert sorted(row["lr"] for row in rows) == sorted(self.rates)
        assert [row["error"] for row in rows] == [""] * len(rows)
        assert {row["steps_done"] for row in rows} == {str(self.steps)}
        used = [read_used(Path(row["out"]), batch_size=12) for row in rows]
        assert [len(run.images) for run in used] == [self.steps * 12] * len(rows)
        assert any(run.repeated_steps for run in used) == repeated


def test_time_limit_of_a_sweep(slurm, tmp_path):
    sweep = Sweep(slurm, tmp_path, ["0.001", "0.002", "0.003"], 45, SBATCH_TIMELIMIT="2", SBATCH_SIGNAL="B:USR1@35")
    slurm.wait_until_gone(sweep.number, END_SECONDS)
    assert min(sweep.restarts().values()) >= 1
    sweep.assert_whole()
    before = sweep.csv.read_text()
    slurm.wait_until_gone(sweep.submit(), END_SECONDS)  # all have rows
    assert sweep.csv.read_text() == before


def test_job_that_goes_before_a_sweep(slurm, tmp_path):
    sweep = Sweep(slurm, tmp_path, ["0.001", "0.002"], 30)
    sweep.wait_for_steps(runs=2, count=8)
    urgent = slurm.command(*URGENT, "--wrap", "sleep 5").strip()
    slurm.wait_for_state(urgent, "COMPLETED", START_SECONDS)
    assert not read_rows(sweep.csv)
    slurm.wait_until_gone(sweep.number, END_SECONDS)
    assert list(sweep.restarts().values()) == [1, 1]
    sweep.assert_whole()


def test_node_without_power_under_a_sweep(slurm, tmp_path):
    sweep = Sweep(slurm, tmp_path, ["0.001", "0.002"], 30)
    sweep.wait_for_steps(runs=2, count=8)
    slurm.switch_off("n2")
    try:
        slurm.wait(lambda: sum(sweep.restarts().values()), START_SECONDS, "a task queued again")
    finally:
        slurm.start_node("n2")
    slurm.wait_until_gone(sweep.number, END_SECONDS)
    assert sorted(sweep.restarts().values()) == [0, 1]
    sweep.assert_whole(repeated=True)
