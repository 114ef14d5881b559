"""recipes/: each file is a configuration of the paper, and reproduce.sh runs them in the order in which they need each other.

recipes/modern/ is not the paper's, and in no table.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from engine.config import parse_args
from engine.evaluation.flags import parse_evaluate
from engine.evaluation.paper_tables import PAPER_CROP, TABLES, scales_to_test
from model.weights import TORCHVISION_STD_RGB
from tests.support.launch import ROOT, signal_before

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
MODERN = {path.stem: path for path in sorted((ROOT / "recipes/modern").glob("*.yaml"))}
SCALES = {"256": (256, 256), "384": (384, 384), "256-512": (256, 512)}
TABLE_STAGES = [f"table-{number}" for number in TABLES]


def split(name: str) -> tuple[str, str]:
    """A recipe's configuration of Table 1 and its training scale."""
    scale = next(scale for scale in ("256-512", "384", "256") if name.endswith(f"-{scale}"))
    return name.removesuffix(f"-{scale}"), scale


def test_there_is_a_recipe_for_each_training_of_table_3():
    at_256 = {(arch, "256") for arch in ("A", "A-LRN", "B", "C", "D", "E")}
    larger = {(arch, scale) for arch in "CDE" for scale in ("384", "256-512")}
    assert {split(name) for name in RECIPES} == at_256 | larger


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_papers_training(name):
    config = parse_args(["--recipe", str(RECIPES[name]), "--data", "/data/imagenet"])
    arch, scale = split(name)
    assert (config.arch, config.scale, config.crop, config.batch_size) == (arch, SCALES[scale], 224, 256)
    assert (config.momentum, config.weight_decay, config.dropout) == (0.9, 5e-4, 0.5)
    assert (config.schedule, config.epochs) == ("plateau", 74)
    assert config.lr == (0.01 if scale == "256" else 0.001)
    assert f"train.py --recipe recipes/{name}.yaml --data" in RECIPES[name].read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_the_expected_result_is_the_papers(name):
    """As engine/evaluation/paper_tables.py has it, for a single test scale and for several."""
    arch, scale = split(name)
    rows = [row for number in (3, 4) for row in TABLES[number] if row.networks == ((arch, SCALES[scale]),)]
    header = RECIPES[name].read_text().partition("arch:")[0]
    found = re.findall(r"([\d.]+) / ([\d.]+) at Q = ([\d, ]+) \(", header)
    assert [(float(top1), float(top5)) for top1, top5, _ in found] == [row.paper for row in rows]
    for row, (_, _, tested) in zip(rows, found, strict=True):
        expected = scales_to_test(SCALES[scale], PAPER_CROP, several=row.several_scales)
        assert tuple(map(int, tested.split(", "))) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_the_result_of_another(name):
    """Section 3.1: deeper networks from A's layers, S = 384 from S = 256, jitter from S = 384."""
    arch, scale = split(name)
    before = {"384": f"{arch}-256", "256-512": f"{arch}-384", "256": "A-256" if arch in "BCDE" else None}[scale]
    entries = yaml.safe_load(RECIPES[name].read_text())
    key = "init_from" if scale == "256" else "weights"
    expected = {key: f"{yaml.safe_load(RECIPES[before].read_text())['out']}/best.pt"} if before else {}
    assert {key: entries[key] for key in ("init_from", "weights") if key in entries} == expected


def test_every_recipe_is_one_of_the_papers_or_a_modern_one():
    assert {*RECIPES.values(), *MODERN.values()} == set((ROOT / "recipes").rglob("*.yaml"))
    assert set(MODERN) == {"A", "D"}


@pytest.mark.parametrize("name", MODERN)
def test_a_modern_recipe(name):
    """Two that differ in the network alone, and promise nothing."""
    config = parse_args(["--recipe", str(MODERN[name]), "--data", "/data/imagenet"])
    assert (config.arch, config.out) == (name, Path("runs/modern") / name)
    assert (config.batch_norm, config.crop_mode, config.crop, config.test_scale) == (True, "random-resized", 224, 256)
    assert (config.schedule, config.warmup_epochs, config.epochs, config.batch_size) == ("cosine", 5.0, 40, 256)
    assert (config.lr, config.weight_decay, config.weight_decay_on) == (0.1, 1e-4, "weights")
    assert (config.label_smoothing, config.ema, config.init) == (0.1, 0.9999, "kaiming")
    assert config.std_rgb == pytest.approx(TORCHVISION_STD_RGB)
    header = MODERN[name].read_text().partition("arch:")[0]
    assert f"train.py --recipe recipes/modern/{name}.yaml --data" in header
    assert "unmeasured" in header
    assert not re.search(r"\d\.\d", header), "a figure that nobody has measured"


def reproduce(*flags: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "recipes/reproduce.sh", *flags],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_dry_run_prints_commands_that_train_py_takes(tmp_path):
    done = reproduce("--dry-run", DATA="digits", OUT=str(tmp_path / "a b"))
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    trained: set[str] = set()
    for command in commands[:12]:
        assert command[:2] == ["python", "train.py"]
        config = parse_args(command[2:])
        arch, scale = split(config.out.name)
        assert config.arch == arch
        # The recipe's scales times 32/224, rounded down.
        assert config.scale == tuple(pixels * 32 // 224 for pixels in SCALES[scale])
        assert (config.crop, config.schedule) == (32, "cosine")
        start = config.init_from or config.weights
        assert start is None or Path(start).parent.name in trained, "its weights are not there yet"
        trained.add(config.out.name)
    assert trained == set(RECIPES)
    assert [command[:2] for command in commands[12:]] == [["python", "evaluate.py"]] * 4
    for number, command in zip(TABLES, commands[12:], strict=True):
        flags = parse_evaluate(command[2:])
        assert flags.table == number
        tested = {split(Path(checkpoint).parent.name) for checkpoint in flags.checkpoint}
        assert {(arch, SCALES[scale]) for arch, scale in tested} == {
            network for row in TABLES[number] for network in row.networks
        }
    assert not (tmp_path / "a b").exists()


def test_full_size_and_several_ranks(tmp_path):
    done = reproduce("--dry-run", DATA="/data/imagenet", OUT=str(tmp_path), RANKS="8")
    command = shlex.split(done.stdout.splitlines()[2])
    launch = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8", "train.py"]
    assert command[:6] == launch
    config = parse_args(command[6:])
    assert (config.arch, config.crop, config.batch_size, config.schedule) == ("B", 224, 256, "plateau")


def test_a_wrong_flag():
    done = reproduce("--dryrun")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def stub(folder: Path, action: str) -> tuple[Path, Path]:
    """A program in Python's place that writes down its stage and does `action`; and the file it writes to."""
    python, calls = folder / "stub", folder / "calls"
    python.write_text(
        f"""#!/usr/bin/env bash
if [ "$1" = train.py ]; then stage=$(basename "$7"); else stage=table-$3; fi
echo "$stage" >> {shlex.quote(str(calls))}
{action}
echo "figures of $stage"
echo '{{"stage": "'"$stage"'"}}'
"""
    )
    python.chmod(0o755)
    return python, calls


def test_each_stage_is_run_once(tmp_path):
    """It fails in the middle; started again, it begins with the stage that failed; started a third time, it only prints."""
    out = tmp_path / "out"
    python, calls = stub(tmp_path, f'[ "$stage" != D-256 ] || [ -e {tmp_path}/repaired ] || exit 7')
    first = reproduce(PYTHON=str(python), OUT=str(out))
    assert first.returncode == 7
    assert calls.read_text().split() == ["A-256", "A-LRN-256", "B-256", "C-256", "D-256"]
    assert json.loads((out / "C-256/result.json").read_text()) == {"stage": "C-256"}
    assert not (out / "D-256/result.json").exists()
    assert len(reproduce("--dry-run", PYTHON=str(python), OUT=str(out)).stdout.splitlines()) == 12 + 4 - 4

    (tmp_path / "repaired").touch()
    second = reproduce(PYTHON=str(python), OUT=str(out))
    assert second.returncode == 0, second.stderr
    stages = calls.read_text().split()
    assert stages.count("D-256") == 2
    assert {stage for stage in stages if stages.count(stage) == 1} == {*RECIPES, *TABLE_STAGES} - {"D-256"}
    assert second.stdout.split("\n") == [line for table in TABLE_STAGES for line in ("", f"figures of {table}")] + [""]

    third = reproduce(PYTHON=str(python), OUT=str(out))
    assert third.stdout == second.stdout
    assert calls.read_text().split() == stages


def test_results_on_other_data_are_not_taken_for_those_of_these(tmp_path):
    """After a trial on the digits, with OUT's default, say."""
    python, calls = stub(tmp_path, ":")
    variables = {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    assert reproduce(**variables).returncode == 0
    (tmp_path / "images").mkdir()
    ran = calls.read_text()
    for flags in ((), ("--dry-run",)):
        done = reproduce(*flags, DATA=str(tmp_path / "images"), **variables)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: OUT={tmp_path}/out: holds trainings on digits, and DATA is {tmp_path}/images; choose another OUT\n"
        )
    assert calls.read_text() == ran


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"PYTHON": "/nonexistent/python"}, "PYTHON=/nonexistent/python: no such program"),
        ({"OUT": "/proc/nothing"}, "OUT=/proc/nothing: cannot be made"),
        ({"OUT": "/dev/null"}, "OUT=/dev/null: cannot be made"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_begins(tmp_path, variables, error):
    python, calls = stub(tmp_path, ":")
    done = reproduce(**{"PYTHON": str(python), "OUT": str(tmp_path / "out"), **variables})
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {error}")
    assert done.stderr.count("\n") == 1
    assert not calls.exists()


def saving_stub(folder: Path) -> tuple[dict[str, str], Path]:
    """Variables with which the script runs a stage that saves and leaves with 75 at SIGTERM; and the file there once it can."""
    ready = folder / "ready"
    action = f"trap 'echo saved > {folder}/state; exit 75' TERM; touch {ready}; while :; do sleep 0.1; done"
    python, _ = stub(folder, action)
    return {**os.environ, "PYTHON": str(python), "OUT": str(folder)}, ready


def test_a_signal_is_passed_on(tmp_path):
    """The program saves its state and leaves with 75, and so does the script."""
    variables, ready = saving_stub(tmp_path)
    script = subprocess.Popen([ROOT / "recipes/reproduce.sh"], env=variables)
    while not ready.exists():
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    assert script.wait(timeout=20) == 75
    assert (tmp_path / "state").read_text() == "saved\n"
    assert (tmp_path / "calls").read_text().split() == ["A-256"]


@pytest.mark.parametrize("before", ['"${@:2}" > "$folder/stdout.txt"', "child=$!"])
def test_a_signal_that_comes_as_a_stage_starts_is_passed_on(tmp_path, before):
    variables, _ = saving_stub(tmp_path)
    variables |= signal_before(before, "TERM", tmp_path)
    done = subprocess.run([ROOT / "recipes/reproduce.sh"], env=variables, timeout=20, check=False)
    assert (tmp_path / "signal_sent").exists()
    assert done.returncode in (75, 128 + signal.SIGTERM)  # the stage may end before it has its trap
    assert not (tmp_path / "A-256/result.json").exists()
