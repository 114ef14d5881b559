"""sweeps/*.sh: rows that are there are skipped, failures are recorded, nothing is lost or done twice, whoever is killed."""

import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from perf.machine import git_revision
from perf.show import main as report
from perf.sweep import RESULTS, cause_in, results_in
from perf.sweep_plot import Point, efficiency, independent, plot_sweep, points_of, sweep_table, varying
from perf.sweep_table import add_row, find_row, read_rows
from tests.support.launch import ROOT, environment, signal_before
from tests.support.made_up_report import gpu_report

# Stands for Python in the runs alone. Learning rate 0.5 fails; 0.7 goes on until there is a file "go", or SIGTERM comes.
# To draw takes seconds: that is left out where there is no file "draw".
STUB = """#!/usr/bin/env bash
case $1 in
    profile/report.py) [ -e {folder}/draw ] || exit 0 ;;
esac
case $1 in
    profile/*) exec {python} "$@" ;;
esac
echo "$$ $*" >> {folder}/calls
case "$*" in
    *--lr\\ 0.5*) printf 'Traceback\\nerror: it diverged, "so"\\nlast words\\n' >&2; exit 1 ;;
    *--lr\\ 0.7*) trap 'exit 143' TERM; until [ -e {folder}/go ]; do sleep 0.05; done ;;
esac
echo "for people"
echo '{{"best_top1": 0.75, "images_per_second": 12.5, "stopped": false}}'
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, folder=tmp_path))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "calls").touch()
    return tmp_path


def variables(folder: Path, **others: str) -> dict[str, str]:
    return {**environment(), "PYTHON": str(folder / "python"), "CSV": str(folder / "lr.csv"), **others}


def sweep(folder: Path, *flags: str, name: str = "lr", **others: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [f"sweeps/{name}.sh", *flags],
        cwd=ROOT,
        env=variables(folder, **others),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def rates_run(folder: Path) -> list[str]:
    """The learning rate of each run that was started."""
    words = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return [line[line.index("--lr") + 1] for line in words]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_rows_are_written_once_and_a_failure_does_not_stop_the_rest(folder):
    (folder / "draw").touch()
    done = sweep(folder, LRS="0.5 0.01 0.02")
    assert done.returncode == 1, done.stderr
    assert rates_run(folder) == ["0.5", "0.01", "0.02"]
    rows = read_rows(folder / "lr.csv")
    assert [row["lr"] for row in rows] == ["0.5", "0.01", "0.02"]
    assert [row["error"] for row in rows] == ['it diverged, "so"', "", ""]
    assert [row["images_per_second"] for row in rows] == ["", "12.5", "12.5"]
    assert {row["arch"] for row in rows} == {"A"}  # of the sweep's own flags
    assert {row["crop"] for row in rows} == {"32"}  # a default of the data set
    assert all(row["git_revision"] == (git_revision() or "") and row["card"] for row in rows)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["rows"], result["failed"], result["varies"]) == (3, 1, {"train.py": ["lr"]})
    with Image.open(result["pictures"]["train.py"]) as image:
        assert image.format == "PNG"
    (folder / "draw").unlink()

    again = sweep(folder, LRS="0.5 0.01 0.02 0.04")  # skipped, and a point more
    assert again.returncode == 0
    assert again.stderr.count("has a row") == 3
    assert rates_run(folder)[3:] == ["0.04"]
    assert sweep(folder, "--retry-failed", LRS="0.5 0.01").returncode == 1
    assert rates_run(folder)[4:] == ["0.5"]
    assert [row["lr"] for row in read_rows(folder / "lr.csv")] == ["0.5", "0.01", "0.02", "0.04"]


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(folder):
    """kill -9 of the sweep and of what watches over its run: the run ends too, and no row is lost or there twice."""
    command = ["sweeps/lr.sh"]
    env = variables(folder, LRS="0.01 0.7 0.02")
    killed = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: "0.7" in rates_run(folder))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    orphan = (folder / "calls").read_text().splitlines()[-1].split()[0]
    wait_until(lambda: not Path("/proc", orphan).exists())
    assert [row["lr"] for row in read_rows(folder / "lr.csv")] == ["0.01"]
    (folder / "go").touch()
    done = sweep(folder, LRS="0.01 0.7 0.02")
    assert done.returncode == 0, done.stderr
    assert rates_run(folder) == ["0.01", "0.7", "0.7", "0.02"]
    assert [row["lr"] for row in read_rows(folder / "lr.csv")] == ["0.01", "0.7", "0.02"]


def test_run_whose_row_was_not_written_any_more(folder):
    assert sweep(folder, LRS="0.01").returncode == 0
    (folder / "lr.csv").unlink()
    assert sweep(folder, LRS="0.01").returncode == 0
    assert rates_run(folder) == ["0.01"]
    assert len(read_rows(folder / "lr.csv")) == 1


@pytest.mark.slow
def test_two_sweeps_share_the_runs(folder):
    both = [
        subprocess.Popen(["sweeps/lr.sh"], cwd=ROOT, env=variables(folder, LRS="0.7 0.01"), stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    wait_until(lambda: len(rates_run(folder)) == 2)  # one is at 0.7, the other has gone on to 0.01
    assert all(each.poll() is None for each in both)
    (folder / "go").touch()
    assert [each.wait(timeout=30) for each in both] == [0, 0]
    assert sorted(rates_run(folder)) == ["0.01", "0.7"]
    assert sorted(row["lr"] for row in read_rows(folder / "lr.csv")) == ["0.01", "0.7"]


def test_ctrl_c_ends_the_sweep_without_a_row(folder):
    env = variables(folder, LRS="0.7 0.01")
    process = subprocess.Popen(["sweeps/lr.sh"], cwd=ROOT, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: rates_run(folder))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) in (130, -signal.SIGINT)
    assert rates_run(folder) == ["0.7"]
    assert read_rows(folder / "lr.csv") == []


@pytest.mark.parametrize(
    ("flags", "others", "words"),
    [
        ([], {"LRS": "0.01 -1"}, "--lr -1.0: must be above 0"),
        (["--arch", "X"], {}, "invalid choice 'X'"),
        (["--out", "here"], {}, "a sweep gives each run a folder of its own"),
        (["--run", "4"], {}, "--run 4: there are runs 1 to 3"),
        (["--run"], {}, "--run: give the number of a run"),
        (["--run", ""], {}, "--run: give the number of a run"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_run(flags, others, words, folder):
    done = sweep(folder, *flags, **others)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert rates_run(folder) == []


CODE = [
    "a[$(touch {mark})]",
    "x[`touch {mark}`]",
    "1;touch {mark}",
    "$(touch {mark})",
    "-x;touch {mark}",
    "1\n2 $(touch {mark})",
]
NO_NUMBERS = [*CODE, "*", "08", "99999999999999999999", "--help", " "]
"""What stands in bash's arithmetic is run, and in an unquoted list it is a pattern of file names."""


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["sweeps/scaling.sh", "--count"], ["RANKS", "BATCH_SIZE"]),
        (["sweeps/batch_size.sh", "--count"], ["BATCH_SIZES"]),
        (["sweeps/loader.sh", "--count"], ["THREADS", "PREFETCHES"]),
        (["recipes/reproduce.sh", "--dry-run"], ["RANKS"]),
        (["sweeps/two_machines.sh", "--dry-run"], ["PORT", "NODES", "RANKS", "RESTARTS", "LAST_CALL", "PROGRAM"]),
        (["sweeps/two_machines.sh", "--dry-run"], ["HOST"]),
        (["bash", "sweeps/slurm.sbatch", "--dry-run"], ["RANKS", "PORT"]),
    ],
)
def test_a_variable_that_is_no_number_is_refused_and_not_run(command, names, tmp_path):
    mark = tmp_path / "mark"
    for name in names:
        for value in NO_NUMBERS:
            variables = {"HOST": "localhost", name: value.format(mark=mark)}
            if (name, value) == ("HOST", "99999999999999999999"):
                continue  # may be a name
            done = subprocess.run(
                command, cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, check=False
            )
            assert not mark.exists(), f"{variables} was run"
            assert done.returncode == 2, (variables, done)
            assert done.stderr.startswith(f"error: {name}="), (variables, done)
            assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("value", CODE)
def test_what_slurm_says_is_a_number_or_refused(value, tmp_path):
    mark = tmp_path / "mark"
    for script, names in {
        "slurm.sbatch": ["SLURM_JOB_ID", "SLURM_NNODES", "SLURM_GPUS_ON_NODE"],
        "slurm_array.sbatch": ["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_JOB_ID"],
    }.items():
        for name in names:
            done = subprocess.run(
                ["bash", f"sweeps/{script}", "--dry-run", "sweeps/lr.sh"],
                cwd=ROOT,
                env={**environment(), name: value.format(mark=mark)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert not mark.exists()
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: {name}=")


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        *(("lr", "LRS", value) for value in (*CODE, "*", "fast", "--help", " ")),
        *(("lr", variable, "$(true)") for variable in ("SEEDS", "SECONDS_A_STAGE")),
        *((name, variable, "--help") for name, variable in (("arch", "ARCHS"), ("precision", "COMPILES"))),
        ("lr", "PYTHON", "no such program"),
    ],
)
def test_values_of_a_grid_are_no_flags_and_no_patterns(name, variable, value, folder):
    mark = folder / "mark"
    done = sweep(folder, "--dry-run", name=name, **{variable: value.format(mark=mark)})
    assert (done.returncode, done.stdout, mark.exists()) == (2, "", False)
    assert done.stderr.startswith(f"error: {variable}=")
    assert rates_run(folder) == []


def test_cdpath_does_not_lead_elsewhere(folder):
    """With it set, cd prints where it went, which --count would print along."""
    assert sweep(folder, "--count", CDPATH=str(ROOT)).stdout == "3\n"


def test_make_does_not_run_the_name_of_a_folder(folder):
    for data in ("a b`touch {mark}`", "a; touch {mark}", "it's"):
        data = data.format(mark=folder / "mark")
        python = folder / "show"
        python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
        python.chmod(0o755)
        shown = subprocess.run(
            ["make", "--silent", "gpu-report", f"PYTHON={python}"],
            cwd=ROOT,
            env={**environment(), "DATA": data},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert shown.splitlines() == ["-m", "benchmarks.gpu_report", "--data", data]
    assert not (folder / "mark").exists()


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("batch_size", "loader", "precision", "arch")]


@pytest.mark.parametrize("name", ["scaling", "lr", *_SLOW])
def test_dry_run_prints_a_command_for_each_run(name, folder):
    done = sweep(folder, "--dry-run", name=name)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == int(sweep(folder, "--count", name=name).stdout)
    assert len({line.split("--out")[1] for line in lines}) == len(lines)
    program = "train.py" if name in ("arch", "lr") else "profile/throughput.py"
    assert all(program in line and "--data digits" in line for line in lines)
    if name == "scaling":
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
        assert [torchrun in line for line in lines] == [False, True, False, True]
        assert [line.split("--batch-size ")[1].split()[0] for line in lines] == ["32", "32", "32", "64"]
    assert sorted(folder.iterdir()) == [folder / "calls", folder / "python"]


def test_slurm_array(folder):
    for name, action in {"sbatch": "", "scontrol": ""}.items():
        script = folder / name
        script.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/slurm\n{action}')
        script.chmod(0o755)
    env = variables(folder, LRS="0.01 0.7", SLURM_SUBMIT_DIR=str(ROOT), SLURM_ARRAY_JOB_ID="8")
    env["PATH"] = f"{folder}:{env['PATH']}"
    command = ["bash", "sweeps/slurm_array.sbatch", "sweeps/lr.sh", "--arch", "B", "--data", "digits"]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    subprocess.run(command, cwd=ROOT, env={**env, "CPUS": "4"}, check=True)
    flags = "sweeps/slurm_array.sbatch sweeps/lr.sh --arch B --data digits"
    jobs = [f"sbatch --export=ALL --array=1-2 {flags}", f"sbatch --export=ALL --array=1-2 --cpus-per-task=4 {flags}"]
    assert (folder / "slurm").read_text().splitlines() == jobs

    second = subprocess.Popen(command, cwd=ROOT, env={**env, "SLURM_ARRAY_TASK_ID": "2"})
    wait_until(lambda: rates_run(folder) == ["0.7"])
    second.send_signal(signal.SIGUSR1)  # ahead of the time limit
    assert second.wait(timeout=30) == 75
    assert (folder / "slurm").read_text().splitlines()[2:] == ["scontrol requeue 8_2"]
    (folder / "go").touch()
    tasks = [subprocess.Popen(command, cwd=ROOT, env={**env, "SLURM_ARRAY_TASK_ID": task}) for task in "12"]
    assert [task.wait(timeout=30) for task in tasks] == [0, 0]
    assert sorted(row["lr"] for row in read_rows(folder / "lr.csv")) == ["0.01", "0.7"]


def array_task(folder: Path) -> tuple[list[str], dict[str, str]]:
    """A task of a SLURM array, as a command and its environment; its sweep saves when it gets TERM, which takes half a second."""
    scripts = {
        "scontrol": f'echo "scontrol $*" >> {folder}/slurm',
        "sweep": f"""
            trap 'sleep 0.5; echo "saved, given $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s" >> {folder}/slurm; exit 75' TERM
            echo "$*" >> {folder}/slurm
            while :; do sleep 0.05; done""",
    }
    for name, action in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{action}\n")
        (folder / name).chmod(0o755)
    env = {**variables(folder), "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder)}
    env |= {"SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "2"}
    return ["bash", str(ROOT / "sweeps/slurm_array.sbatch"), "./sweep", "--arch", "A"], env


@pytest.mark.parametrize("by", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_array_waits_until_its_task_has_saved(folder, by):
    """TERM comes from SLURM, which queues a job that gives way again by itself, and kills what a script has left behind."""
    command, env = array_task(folder)
    task = subprocess.Popen(command, env=env)
    wait_until((folder / "slurm").exists)
    task.send_signal(by)
    time.sleep(0.2)
    task.send_signal(by)  # sent again, it does not end the wait
    assert task.wait(timeout=30) == 75
    requeued = ["scontrol requeue 8_2"] if by == signal.SIGUSR1 else []
    said = ["--run 2 --arch A", "saved, given 100 s", *requeued]
    assert (folder / "slurm").read_text().splitlines() == said


@pytest.mark.parametrize("before", ['"$1" --run "$SLURM_ARRAY_TASK_ID" "${@:2}"', "task=$!"])
def test_slurm_array_keeps_a_signal_that_comes_as_its_task_starts(folder, before):
    command, env = array_task(folder)
    done = subprocess.run(command, env=env | signal_before(before, "USR1", folder), timeout=30, check=False)
    assert (folder / "signal_sent").exists()
    assert done.returncode in (75, 128 + signal.SIGTERM)  # it may end before it has its trap
    assert (folder / "slurm").read_text().splitlines()[-1] == "scontrol requeue 8_2"


# ---- the table ---------------------------------------------------------------------------------------------------


def _add_ten(arguments: tuple[Path, int]) -> None:
    path, task = arguments
    for number in range(10):
        identity = {"task": str(task), "number": str(number)}
        row = {**identity, "error": "", f"only {task}": 'a "b",\nc'}
        assert add_row(path, row, identity)
        assert not add_row(path, row, identity)


def test_rows_of_many_processes(tmp_path):
    path = tmp_path / "table.csv"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_add_ten, [(path, task) for task in range(4)]))
    rows = read_rows(path)
    assert {(row["task"], row["number"]) for row in rows} == {(str(a), str(b)) for a in range(4) for b in range(10)}
    assert len(rows) == 40
    assert all(row[f"only {row['task']}"] == 'a "b",\nc' for row in rows)


FORMULAS = [
    "=1+2",
    "+cmd",
    "-x",
    "@sum(a)",
    "\t=1",
    "\r=1",
    "\n=1",
    "=",
    "-",
    "-1+2",
    "+1 2",
    "-inf",
    '=HYPERLINK("x",1)',
]
AS_THEY_ARE = [
    "-0.5",
    "+1",
    "-1e-3",
    "+.5E7",
    "-7.",
    "1e-05",
    "'",
    "'text",
    " =1",
    'a "b",\nc',
    "a\rb",
    "a\r\nb",
    "a\udcff",
]


@pytest.mark.parametrize("text", [*FORMULAS, *AS_THEY_ARE, "'=1", "''=1", "'-0.5", "'\t"])
def test_cells_that_a_spreadsheet_would_run_come_back_exactly(tmp_path, text):
    path = tmp_path / "table.csv"
    row = {"error": "", text: text, "last": text}
    assert add_row(path, row, {"last": text})
    assert read_rows(path) == [row]
    assert not add_row(path, row, {"last": text}), "the row is found"
    cells = list(csv.reader(io.StringIO(path.read_bytes().decode(errors="surrogateescape"), newline="")))
    shown = text if text in AS_THEY_ARE else f"'{text}"
    assert cells == [["error", shown, "last"], ["", shown, shown]]


def test_a_table_that_a_spreadsheet_has_saved(tmp_path):
    """With a byte order mark and its own line ends."""
    path = tmp_path / "table.csv"
    assert add_row(path, {"error": "", "lr": "0.1"}, {"lr": "0.1"})
    path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert not add_row(path, {"error": "", "lr": "0.1"}, {"lr": "0.1"})
    assert read_rows(path) == [{"error": "", "lr": "0.1"}]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "error\nx,y\n", "error,a,a\n,1,3\n", "caf\u00e9,b\n", '"'])
def test_file_that_no_sweep_wrote_is_left_alone(content, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(UserError, match="name another CSV file"):
        add_row(path, {"error": ""}, {"a": "3"})
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("log", "status", "cause"),
    [
        ("Traceback\nerror: too large\n====\nRoot Cause\n", 1, "too large"),
        ("[rank1]: torch.OutOfMemoryError: full\ntorch.distributed.ChildFailedError: \n====\n", 1, "full"),
        ("W1124 some\nlast words\n\n", 3, "last words"),
        ("step 1\n", -9, "killed by signal 9"),
        ("", 4, "ended with exit code 4 and said nothing"),
    ],
)
def test_cause(log, status, cause):
    assert cause in cause_in(log, status)


def test_the_results_of_a_report(tmp_path):
    report = gpu_report()
    report.stages.loader = None
    report.stages.step.interval = None
    (tmp_path / "report.json").write_bytes(msgspec.json.encode(report))
    (tmp_path / "out").write_text(f'for people\n{{"program": "throughput", "report": "{tmp_path}/report.json"}}\n')
    found = results_in(tmp_path / "out", "profile/throughput.py")
    assert found
    assert set(found) <= set(RESULTS)
    training, step = report.stages.training, report.stages.step
    assert training
    assert training.interval
    assert float(found["training_images_per_second"]) == training.images_per_second
    ends = [float(found[f"training_images_per_second_{end}"]) for end in ("low", "high")]
    assert ends == list(training.interval)
    assert float(found["step_images_per_second"]) == step.images_per_second
    assert found["step_images_per_second_low"] == found["loader_images_per_second"] == ""
    assert float(found["ceiling_images_per_second"]) == report.ceiling.images_per_second
    assert (found["bound"], found["device_used"]) == (report.verdict.bound, "cuda")
    assert float(found["mfu"]) == report.roofline.mfu
    assert float(found["images_per_joule"]) == report.roofline.images_per_joule


def test_a_table_of_an_earlier_format(tmp_path):
    """Its rows have p5 and p95 for the ends: they count as done, are shown and drawn, and new rows find their place."""
    path = tmp_path / "table.csv"
    identity = {"program": "profile/throughput.py", "ranks": "1", "lr": "0.1"}
    path.write_text(
        "program,ranks,error,training_images_per_second,training_images_per_second_p5,training_images_per_second_p95,lr\n"
        "profile/throughput.py,1,,100,90,120,0.1\n"
    )
    assert find_row(read_rows(path), identity)
    assert not add_row(path, {**identity, "error": ""}, identity)
    new = {"program": "profile/throughput.py", "ranks": "2", "error": "", "training_images_per_second": "150"}
    new |= {"training_images_per_second_low": "140", "training_images_per_second_high": "155", "lr": "0.1"}
    assert add_row(path, new, {**identity, "ranks": "2"})
    rows = read_rows(path)
    assert varying(rows) == ["ranks"]
    points = points_of(rows, "ranks", "training_images_per_second", {"1": 1.0, "2": 2.0})
    assert points == [Point(1.0, 100, 90, 120), Point(2.0, 150, 140, 155)]


# ---- the report --------------------------------------------------------------------------------------------------


def row(program: str = "train.py", **columns: str) -> dict[str, str]:
    return {"program": program, "git_revision": "abc", "error": "", "arch": "A", "data": "digits", **columns}


SCALING = [
    row(
        "profile/throughput.py",
        variant=variant,
        ranks=str(ranks),
        batch_size=str(32 * (ranks if variant == "weak" else 1)),
        training_images_per_second=str(rate),
    )
    for variant, rates in {"strong": (100, 150, 200), "weak": (110, 200, 300)}.items()
    for ranks, rate in zip((1, 2, 4), rates, strict=True)
]


def test_what_varies_is_found():
    assert varying(SCALING) == ["variant", "ranks", "batch_size"]
    assert independent(SCALING, varying(SCALING)) == ["variant", "ranks"]  # the batch follows from them
    header, lines = sweep_table(SCALING)
    assert header[:4] == ["variant", "ranks", "batch size", "training, images/s"]
    assert lines[5][:4] == ["weak", "4", "128", "300"]
    figure = plot_sweep(SCALING, "x")
    assert figure
    rates, efficiencies = figure.axes
    assert [np.asarray(line.get_xdata()).tolist() for line in rates.get_lines()[::3]] == [[1, 2, 4], [1, 2, 4]]
    assert [np.asarray(line.get_ydata()).tolist() for line in efficiencies.get_lines()[::3]] == [
        [100, 75, 50],
        pytest.approx([100, 100 * 200 / 220, 100 * 300 / 440]),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["variant strong", "variant weak"]


def test_efficiency_starts_at_the_fewest_ranks():
    points = efficiency([Point(2, 10, 8, 12), Point(4, 10, 10, 10)])
    assert points == [Point(2, 100, 80, 120), Point(4, 50, 50, 50)]


def test_runs_that_differ_in_the_seed_are_one_point():
    rows = [
        row(lr=lr, seed=seed, best_top1=top1)
        for lr, seed, top1 in [("0.1", "0", "0.5"), ("0.1", "1", "0.7"), ("1.0", "0", "0.2"), ("1.0", "1", "")]
    ]
    rows[3]["error"] = "diverged"
    figure = plot_sweep(rows, "x")
    assert figure
    line = figure.axes[0].get_lines()[0]
    assert np.asarray(line.get_xdata()).tolist() == [0.1, 1.0]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([60, 20])
    assert figure.axes[0].get_xscale() == "log"
    assert sweep_table(rows)[0] == ["lr", "seed", "best top-1, %", "validation loss", "images/s", "error"]


def test_names_are_laid_side_by_side():
    figure = plot_sweep([row(arch=arch, images_per_second="5") for arch in ("A", "A-LRN", "E")], "x")
    assert figure
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["A", "A-LRN", "E"]


@pytest.mark.parametrize("name", ["data", "arch", "odd\x1b\udcff$^$"])
def test_names_that_neither_a_terminal_nor_a_font_can_show(name):
    """Bytes of a path that is not UTF-8, control characters, and what would be a formula."""
    rows = [
        row(**{name: text, "lr": lr}, images_per_second="0")
        for text in ("a\udcff", "b\x1b[2J$x^$")
        for lr in ("1", "2")
    ]
    header, lines = sweep_table(rows)
    assert all(cell.isprintable() for line in (header, *lines) for cell in line)
    figure = plot_sweep(rows, "t\udcff")
    assert figure
    figure.savefig(io.BytesIO())
    assert efficiency([Point(1, 0, 0, 0), Point(2, 5, 5, 5)]) == []


def test_report_of_nothing(tmp_path, capsys):
    path = tmp_path / "lr.csv"
    assert report([str(path)]) == 2
    assert "no rows; run a sweep first" in capsys.readouterr().err
    assert add_row(path, row(lr="1", error="diverged"), {"lr": "1"})
    assert report([str(path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["failed"], result["pictures"]) == (1, {"train.py": None})


@pytest.mark.slow
def test_real_sweeps(tmp_path):
    """Of the digits: two learning rates of which one diverges, and the throughput of one batch on two ranks."""
    env = {"PYTHON": sys.executable}
    done = sweep(tmp_path, "--arch", "A", "--data", "digits", "--steps", "4", "--log-every", "1", **env, LRS="0.01 1e9")
    assert done.returncode == 1, done.stderr
    rows = read_rows(tmp_path / "lr.csv")
    assert float(rows[0]["images_per_second"]) > 0
    assert rows[0]["steps_done"] == "4"
    assert not list(tmp_path.rglob("*.pt"))
    assert "the training diverged" in rows[1]["error"]
    env |= {"CSV": str(tmp_path / "batch.csv"), "BATCH_SIZES": "8", "SECONDS_A_STAGE": "0.5"}
    done = sweep(tmp_path, "--arch", "A", "--data", "digits", "--ranks", "2", name="batch_size", **env)
    assert done.returncode == 0, done.stderr
    (only,) = read_rows(tmp_path / "batch.csv")
    assert only["ranks"] == "2"
    assert float(only["training_images_per_second"]) > 0
    if only["training_images_per_second_low"]:  # enough steps for an interval
        assert float(only["training_images_per_second_low"]) <= float(only["training_images_per_second"])
