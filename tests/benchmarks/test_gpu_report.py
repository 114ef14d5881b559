"""What of make gpu-report works without a GPU: its plan, its table, and how it goes on when a run fails."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks import gpu_report, turns
from benchmarks import inputs as compare_inputs
from benchmarks.gpu_report import (
    BEGIN,
    END,
    FORMAT,
    Run,
    execute,
    of_tests,
    of_throughput,
    plan,
    results_of,
    rewrite_table,
    section,
)
from benchmarks.photographs import photograph_folder
from common.errors import UserError
from common.ranks import ranks_of_this_run
from engine.config import parse_args
from pipeline.dataset.manifest import open_manifest
from tests.runs.test_profile import run_script
from tests.support.made_up_report import cpu_report
from tests.support.made_up_report import gpu_report as made_up_throughput

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_step" name="test_one"/>
<testcase classname="tests.gpu.test_step" name="test_two"><failure message="AssertionError: 3 &lt; 2&#10;more"/></testcase>
<testcase classname="tests.gpu.test_nvml" name="test_three"><skipped type="pytest.skip" message="no permission"/></testcase>
<testcase classname="tests.gpu.test_jpeg" name="test_four"><skipped type="pytest.xfail" message="exit code -11"/></testcase>
</testsuite></testsuites>"""
TURNS = turns.summarise(
    {"this project": [1050.0, 1040.0, 1060.0], "timm, eager": [700.0, 705.0, 690.0]}, times=("this project",)
)
INPUTS = turns.summarise({"noise": [2000.0, 1990.0, 2010.0], "files, CPU": [1900.0, 1880.0, 1910.0]}, of="noise")


def made_up_results() -> dict:
    loaders = {"images": 5, "batch_size": 128, "threads": 9, "rounds": 5, "scales": {"S=256": TURNS}, "data": "/home/x"}
    inputs = {"batch_size": 256, "threads": 8, "rounds": 5, "inputs": INPUTS, "data": "/home/x"}
    steps = {"batch_size": 256, "rounds": 5, "steps": TURNS, "crop": 224}
    return {
        "format": FORMAT,
        "created": "2026-11-24T13:00:00+00:00",
        "git_revision": "0123456789abcdef",
        "card": "NVIDIA H100 80GB HBM3",
        "hardware": msgspec.to_builtins(made_up_throughput().hardware),
        "data": "imagenet",
        "tests": of_tests(JUNIT),
        "throughput": {"D bf16, images": of_throughput(made_up_throughput())},
        "inputs": {"D bf16, inputs": results_of("inputs", json.dumps(inputs))},
        "steps": {"D bf16, against others": results_of("steps", json.dumps(steps))},
        "loaders": results_of("loaders", json.dumps(loaders)),
        "left_out": {"timm's networks": "timm is not installed"},
        "failed": {"E fp16, noise": "out of time"},
    }


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--work", str(tmp_path / "work"), "--docs", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no GPU: torch finds none here; check the driver with nvidia-smi, or see --dry-run\n"
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_the_plan_is_all_that_waits_for_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_report, "usable_cores", lambda: 12)
    assert gpu_report.main(["--dry-run", "--data", str(tmp_path / "images")]) == 0
    captured = capsys.readouterr()
    names, left_out = (json.loads(captured.out)[key] for key in ("runs", "left_out"))
    assert left_out["D bf16, inputs on 16 cores"] == "this machine has 12"
    expected = {f"{a} {p}, {images}" for a in "ADE" for p in ("bf16", "fp16") for images in ("noise", "images")}
    assert set(names) == expected | {
        "tests/gpu",
        "D bf16, inputs",
        "D bf16, inputs on 6 cores",
        "D bf16, against others",
        "D fp16, against others",
        "loaders",
    }
    assert len(captured.err.splitlines()) == len(names) == 18
    assert f"--data {tmp_path / 'images'}" in captured.err


@pytest.mark.parametrize("script", ["profile/throughput.py", "benchmarks.inputs", "benchmarks.steps"])
def test_the_planned_flags_are_known(tmp_path, script):
    for run in plan(tmp_path, tmp_path / "work")[0]:
        if script in run.command[:2]:
            flags = [*run.command[run.command.index(script) + 1 :], "--micro-batch", "32"]
            flags = [flag for flag in flags if flag != "--variants"]  # the benchmark's own
            assert parse_args(flags).device == "cuda"


def test_a_run_is_tried_with_fewer_images_until_it_fits():
    program = (
        "import sys; n = int(sys.argv[2]); sys.exit('error: the GPU\\'s memory is too small' if n > 64 else print(n))"
    )
    assert execute(Run(kind="steps", name="", command=["-c", program], size_flag="--batch-size")) == ("64", "")
    program = "import sys; print('something'); sys.exit('error: no such folder')"
    assert execute(Run(kind="steps", name="", command=["-c", program])) == (None, "error: no such folder")
    assert execute(Run(kind="steps", name="", command=["-c", "import os; os._exit(9)"])) == (
        None,
        "exit code 9, and no word",
    )


def test_a_run_that_fails_does_not_end_the_others(tmp_path, monkeypatch):
    machine = made_up_throughput().hardware
    monkeypatch.setattr(gpu_report, "ranks_of_this_run", lambda device: nullcontext())
    monkeypatch.setattr(gpu_report, "hardware", lambda ranks: machine)
    steps = json.dumps({"batch_size": 2, "rounds": 5, "steps": TURNS})
    inputs = json.dumps({"batch_size": 2, "threads": 8, "rounds": 5, "inputs": INPUTS})
    (tmp_path / "report.json").write_bytes(msgspec.json.encode(made_up_throughput()))
    (tmp_path / "tests.xml").write_text(JUNIT)
    runs = [
        Run(kind="tests", name="tests/gpu", command=["-c", "import os; os._exit(1)"], report=tmp_path / "tests.xml"),
        Run(kind="loaders", name="loaders", command=["-c", "import os; os.abort()"]),
        Run(kind="throughput", name="D", command=["-c", "pass"], report=tmp_path / "report.json"),
        Run(kind="inputs", name="inputs", command=["-c", f"print({inputs!r})"]),
        Run(kind="steps", name="others", command=["-c", f"print('words'); print({steps!r})"]),
    ]
    report = gpu_report.measure(runs, {}, tmp_path / "work")
    assert report["tests"]["passed"] == 1
    assert list(report["throughput"]) == ["D"]
    assert report["inputs"]["inputs"]["inputs"] == INPUTS
    assert report["steps"]["others"]["steps"] == TURNS
    assert (report["loaders"], report["failed"]) == (None, {"loaders": "exit code -6, and no word"})
    gpu_report.write({**report, "data": "x"}, _docs(tmp_path))


def _docs(folder: Path) -> Path:
    (folder / "performance.md").write_text(f"{BEGIN}{END}")
    return folder


def test_results_of_tests_are_counted_by_kind():
    assert of_tests(JUNIT) == {
        "passed": 1,
        "failed": {"test_step::test_two": "AssertionError: 3 < 2"},
        "skipped": {"test_nvml::test_three": "no permission"},
        "expected_failures": {"test_jpeg::test_four": "exit code -11"},
    }


def test_the_section_says_what_was_measured_and_what_was_not():
    lines = section([made_up_results()]).splitlines()
    assert lines[0] == "### NVIDIA H100 80GB HBM3"
    (row,) = [line for line in lines if line.startswith("| D bf16, images")]
    report = made_up_throughput()
    step, loader, training = (
        f"{getattr(report.stages, stage).images_per_second:,.0f}" for stage in ("step", "loader", "training")
    )
    ratio, mfu, joules = report.ceiling.training_over_ceiling, report.roofline.mfu, report.roofline.images_per_joule
    assert mfu is not None
    start = (
        f"| D bf16, images | {step} | {loader} | {training} | {ratio:.3f} | {100 * mfu:.1f} % | {joules:.2f} | 256 |"
    )
    assert row == f"{start} {report.verdict.bound} |"
    assert "| timm, eager | 700 (690–705) | 1.50 (1.48–1.54, 95 % 1.43–1.58) |" in lines
    assert any(line.startswith("| files, CPU | 1,900 (1,880–1,910) | 0.950 (0.945–0.950, 95 % 0.9") for line in lines)
    assert any(line.startswith("| this project | 1,050 (1,040–1,060) |  |") for line in lines)
    assert "Left out: timm's networks (timm is not installed)." in lines
    assert "Failed: E fp16, noise (out of time)." in lines
    assert lines[-5].startswith("tests/gpu: 1 passed; failed: `test_step::test_two` (AssertionError: 3 < 2)")
    text = json.dumps(made_up_results())
    assert "/home/x" not in text, "no paths of the machine"


def test_what_was_not_measured_is_a_dash():
    results = made_up_results()
    quiet = cpu_report()
    quiet.stages.loader = quiet.stages.training = None
    quiet.ceiling.training_over_ceiling = quiet.roofline.mfu = None
    results |= {
        "throughput": {"A bf16, noise": of_throughput(quiet)},
        "loaders": None,
        "tests": None,
        "inputs": {},
        "steps": {},
    }
    rate, size = quiet.stages.step.images_per_second, quiet.config["micro_batch"]
    row = f"| A bf16, noise | {rate:,.0f} | – | – | – | – | – | {size} | {quiet.verdict.bound} |"
    assert row in section([results])


def test_the_table_is_made_again_between_its_comments(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n")
    rewrite_table(tmp_path)
    assert "Nothing yet" in page.read_text()
    gpu_report.write(made_up_results(), tmp_path)
    gpu_report.write({**made_up_results(), "card": "Tesla T4"}, tmp_path)
    assert {path.name for path in (tmp_path / "gpu").iterdir()} == {"nvidia-h100-80gb-hbm3.json", "tesla-t4.json"}
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n\n### NVIDIA H100")
    assert text.endswith(f"{END}\n\nafter\n")
    assert text.index("### NVIDIA H100") < text.index("### Tesla T4") < text.index(END)
    assert "old" not in text
    rewrite_table(tmp_path)
    assert page.read_text() == text
    page.write_text("no comments")
    with pytest.raises(UserError, match="restore them"):
        rewrite_table(tmp_path)


def test_the_repositorys_own_page_is_made_of_its_own_reports(tmp_path):
    docs = gpu_report.ROOT / "docs"
    page = tmp_path / "performance.md"
    page.write_text((docs / "performance.md").read_text())
    assert page.read_text().count(BEGIN) == page.read_text().count(END) == 1
    shutil.copytree(docs / "gpu", tmp_path / "gpu")
    rewrite_table(tmp_path)
    assert page.read_text() == (docs / "performance.md").read_text()


def test_photographs_are_a_data_set_of_varied_sizes(tmp_path):
    folder = photograph_folder(tmp_path / "photographs", train=12, val=2)
    manifest = open_manifest(folder)
    assert (len(manifest.train), len(manifest.val), manifest.quarantined) == (12, 2, 0)
    sizes = manifest.train.read(np.arange(12)).sizes
    assert len({tuple(size) for size in sizes.tolist()}) > 10
    assert sizes.min() >= 300
    assert sizes.max() < 520
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("*.jpg"))
    photograph_folder(folder, train=99)
    assert sorted(path.stat().st_mtime_ns for path in folder.rglob("*.jpg")) == before, "it is made once"
    assert [path.name for path in tmp_path.iterdir()] == ["photographs"]


@pytest.mark.slow
def test_compare_steps_runs_on_a_cpu():
    """timm is said to be missing, so that what it costs is not in the test."""
    settings = "from benchmarks import turns; turns.NOT_COUNTED = 1; sys.modules['timm'] = None"
    flags = "--arch A --crop 32 --train-scale 32 --batch-size 2 --rounds 2 --batches 1"
    result = run_script("benchmarks.steps", settings, *flags.split())
    assert set(result["steps"]) == {"this project", "torchvision, eager", "torchvision, compiled"}
    for row in result["steps"].values():
        for title in ("images_per_second", "times this project"):
            median, lowest, highest = row[title]
            assert 0 < lowest <= median <= highest
    assert (result["device"], result["precision"], result["batch_size"]) == ("cpu", "fp32", 2)


@pytest.mark.slow
def test_compare_inputs_runs_on_a_cpu(tmp_path):
    folder = photograph_folder(tmp_path / "photographs", train=8, val=2)
    flags = "--arch A --crop 32 --train-scale 32 --device cpu --no-compile --batch-size 4 --micro-batch 2 --rounds 2 --batches 1"
    settings = "from benchmarks import turns; turns.NOT_COUNTED = 1; script._PAUSE_SECONDS = 0.0"
    result = run_script("benchmarks.inputs", settings, *flags.split(), "--data", str(folder))
    assert set(result["inputs"]) == {compare_inputs.NOISE, "files, CPU", "prepared, CPU"}
    for row in result["inputs"].values():
        for title in ("images_per_second", "of noise"):
            median, lowest, highest = row[title]
            assert 0 < lowest <= median <= highest
    assert result["inputs"][compare_inputs.NOISE]["of noise"] == [1.0, 1.0, 1.0]


def test_on_a_gpu_every_decoder_is_compared():
    with ranks_of_this_run("cpu") as ranks:
        changed = compare_inputs.decoders(
            parse_args(["--prefetch", "3"]), replace(ranks, device=torch.device("cuda", 0))
        )
    assert [(one["decoder"], one.get("hw_decoder_load"), one.get("prefetch")) for one in changed.values()] == [
        ("gpu", None, None),
        ("gpu", 1.0, None),
        ("gpu", None, 6),
        ("cpu", None, None),
        ("split", None, None),
    ]


@pytest.mark.parametrize("data", ["synthetic", "digits"])
def test_inputs_are_compared_over_a_folder(data, capsys):
    assert compare_inputs.main(["--data", data]) == 2
    assert "give a folder of photographs" in capsys.readouterr().err
