"""The program as a whole; its figures are judged where they are made."""

import json
import math

import pytest
import torch

from perf import peaks, throughput
from tests.runs import run

SMALL = ["--arch", "A", "--data", "digits", "--batch-size", "4", "--steps", "5", "--seconds", "60"]
STAGES = ["reading", "decoding", "loader", "step", "training"]
FILES = {"report.json", "report.html", "waterfall.png", "timeline.png", "roofline.png"}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run's folder, exit code, report and last line."""
    out, threads = tmp_path_factory.mktemp("profile"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks, "_MEASURE_SECONDS", 0.05)
        lines: list[str] = []
        torch.set_num_threads(1)
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        code = throughput.main([*SMALL, "--micro-batch", "2", "--trace", "--out", str(out)])
        torch.set_num_threads(threads)
    return out, code, json.loads((out / "report.json").read_text()), json.loads(lines[-1])


def test_a_run_leaves_a_report_and_a_line_of_json(profiled):
    out, code, report, line = profiled
    assert code == 0
    assert {path.name for path in out.iterdir()} >= {*FILES, "trace.json"}
    assert line["program"] == "throughput"
    assert line["verdict"] == report["verdict"]
    assert line["report"] == str(out / "report.json")
    assert list(line["images_per_second"]) == STAGES


def test_every_stage_is_a_rate(profiled):
    _, _, report, _ = profiled
    assert list(report["stages"]) == STAGES
    for stage in report["stages"].values():
        assert stage["stopped_by"] in ("precision", "time", "steps")
        assert 0 < stage["images_per_second"]["p5"] <= stage["images_per_second"]["median"]
        assert stage["images_per_second"]["median"] <= stage["images_per_second"]["p95"]
        product = stage["images_per_second"]["median"] * stage["seconds_per_step"]["median"]
        assert product == pytest.approx(4), "images a step: the median of an odd number of laps is one of them"
        assert stage["seconds_per_step"]["count"] in (1, 5)
        assert stage["cpu_seconds_per_step"] > 0
    assert report["warm_up"]["steps"] >= 5 * 3
    assert report["warm_up"]["compile_seconds"] is None
    assert report["warm_up"]["first_batch_seconds"] > 0


def test_the_parts_add_up(profiled):
    _, _, report, _ = profiled
    step = report["stages"]["step"]["seconds_per_step"]["median"]
    parts = {name: part and part["median"] for name, part in report["step_parts"].items()}
    assert parts["all_reduce"] is None
    assert sum(filter(None, parts.values())) == pytest.approx(step, rel=0.25)
    training = report["stages"]["training"]["seconds_per_step"]["median"]
    assert sum(part["median"] for part in report["training_parts"].values()) == pytest.approx(training, rel=0.25)
    assert report["host_seconds_per_step"] > 0


def test_the_configuration_is_resolved(profiled):
    _, _, report, _ = profiled
    wanted = {
        "arch": "A", "data": "digits", "crop": 32, "train_scale": "36", "batch_size": 4, "micro_batch": 2,
        "precision": "fp32", "compile": False, "decoder": "cpu", "images_in": "files", "grad_compression": "none",
    }  # fmt: skip
    assert wanted.items() <= report["config"].items()
    assert report["config"]["threads"] >= 2
    assert "out" not in report["config"]
    assert (report["hardware"]["device"], report["hardware"]["ranks"]) == ("cpu", 1)
    assert report["telemetry"]["available"] in (True, False)
    assert math.isfinite(report["roofline"]["mfu"])


def test_the_trace_has_the_steps(profiled):
    out, *_ = profiled
    names = [event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]]
    assert names.count("Optimizer.step#SGD.step") == 3


def test_a_report_is_never_overwritten(profiled, capsys):
    out, _, report, _ = profiled
    assert throughput.main([*SMALL, "--out", str(out)]) == 2
    assert "holds a report already; choose another folder" in capsys.readouterr().err
    assert json.loads((out / "report.json").read_text()) == report


def test_by_default_each_run_has_a_new_folder():
    config, options = throughput.parse(["--data", "digits", "--arch", "B", "--seconds", "3"])
    assert options.out is None
    assert str(config.out).startswith("runs/profile/B-digits-20")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--seconds", "soon"], "invalid float value"),
        (["--crop", "33"], "--crop 33: must be a multiple of 32"),
        (["--no-such-flag"], "no-such-flag"),
        (["--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_mistakes_are_told_in_a_sentence(flags, words, capsys):
    assert throughput.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_synthetic_data_has_only_the_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peaks, "_MEASURE_SECONDS", 0.05)
    flags = [
        "--arch",
        "A",
        "--data",
        "synthetic",
        "--crop",
        "32",
        "--train-scale",
        "32",
        "--batch-size",
        "2",
        "--steps",
        "3",
    ]
    assert throughput.main([*flags, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [name for name, stage in report["stages"].items() if stage] == ["step"]
    assert report["training_parts"] is None
    assert report["warm_up"]["first_batch_seconds"] is None
    assert report["ceiling"]["set_by"] == "step"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images_per_second"]["training"] is None


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--grad-compression", "bf16", "--micro-batch", "1", "--compile"]])
def test_two_ranks(tmp_path, flags):
    done = run(*SMALL, *flags, "--out", str(tmp_path / "out"), ranks=2, script="profile/throughput.py")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(done.stdout.splitlines()[-1]) > 10
    assert report["hardware"]["ranks"] == 2
    assert report["step_parts"]["all_reduce"]["median"] >= 0
    bytes_per_value = 2 if flags else 4
    assert report["all_reduce"]["bytes_per_rank"] == bytes_per_value * 28_144_010
    assert report["all_reduce"]["seconds"]["median"] > 0
    for stage in report["stages"].values():
        assert stage["images_per_second"]["median"] >= 1.5 * stage["images_per_second_per_rank"]
    assert (report["warm_up"]["compile_seconds"] is None) == (not flags)
