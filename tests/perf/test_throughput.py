"""The program as a whole; its figures are judged where they are made."""

import json
import math
import types

import msgspec
import pytest
import torch

from common.ranks import Ranks
from engine.config import parse_args
from perf import peaks, throughput
from perf.report import STAGES, Summary, read_report
from perf.timing import Timing, step_parts
from tests.support.launch import run
from tests.support.made_up_report import gpu_report

SMALL = ["--arch", "A", "--data", "digits", "--batch-size", "4", "--steps", "5", "--seconds", "60"]
FILES = {"report.json", "report.html", "waterfall.png", "timeline.png", "roofline.png"}

pytestmark = pytest.mark.seconds  # the fixture is a run


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A run's folder, exit code, report and last line."""
    out, threads = tmp_path_factory.mktemp("profile"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks, "_MEASURE_SECONDS", 0.05)
        lines: list[str] = []
        torch.set_num_threads(1)
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        code = throughput.main([*SMALL, "--micro-batch", "2", "--trace", "--price-per-hour", "2", "--out", str(out)])
        torch.set_num_threads(threads)
    return out, code, read_report(out / "report.json"), json.loads(lines[-1])


def test_a_run_leaves_a_report_and_a_line_of_json(profiled):
    out, code, report, line = profiled
    assert code == 0
    assert {path.name for path in out.iterdir()} >= {*FILES, "trace.json"}
    assert line["program"] == "throughput"
    assert line["verdict"] == msgspec.to_builtins(report.verdict)
    assert line["report"] == str(out / "report.json")
    assert list(line["images_per_second"]) == list(STAGES)
    assert line["images_per_second"]["step"] == round(report.stages.step.images_per_second, 2)


def test_every_stage_is_a_rate(profiled):
    _, _, report, _ = profiled
    for name in STAGES:
        rate = getattr(report.stages, name)
        assert rate.stopped_by in ("precision", "time", "steps")
        assert rate.images == 4 * 5
        assert rate.images_per_second == pytest.approx(20 / rate.seconds)
        assert rate.images_per_second == pytest.approx(4 / rate.step_seconds.mean)
        assert rate.images_per_second_per_rank == pytest.approx([rate.images_per_second])
        assert sum(rate.series_seconds) * rate.steps_a_lap == pytest.approx(rate.seconds)
        assert rate.interval is None, "of five steps at most"
        assert rate.cpu_seconds_per_step > 0
    assert report.warm_up.steps >= 5 * 3
    assert report.warm_up.compile_seconds is None
    assert report.warm_up.first_batch_seconds > 0


def test_the_parts_add_up(profiled):
    _, _, report, _ = profiled
    parts = report.step_parts
    assert parts.all_reduce is None
    whole = report.stages.step.step_seconds.mean
    assert 0.9 * whole < parts.forward.mean + parts.backward.mean + parts.optimizer.mean <= whole
    parts, whole = report.training_parts, report.stages.training.step_seconds.mean
    assert parts.data_wait.mean + parts.step.mean == pytest.approx(whole)
    assert 0.9 * parts.step.mean < parts.forward.mean + parts.backward.mean + parts.optimizer.mean <= parts.step.mean
    assert report.host_seconds_per_step > 0


def test_what_engineers_look_for_is_there(profiled):
    _, _, report, _ = profiled
    assert report.trace.steps == 3
    assert len(report.trace.kernels) == 10
    assert any("convolution" in kernel.name for kernel in report.trace.kernels)
    assert all(layer.measured_seconds > 0 for layer in report.roofline.layers)
    assert report.memory is None
    seconds = 1437 / report.stages.training.images_per_second
    assert report.costs.seconds == pytest.approx(seconds)
    assert report.costs.price == pytest.approx(seconds * 2 / 3600)
    assert report.costs.price_basis == "--price-per-hour 2"


def test_the_configuration_is_resolved(profiled):
    _, _, report, _ = profiled
    wanted = {
        "arch": "A", "data": "digits", "crop": 32, "train_scale": "36", "batch_size": 4, "micro_batch": 2,
        "precision": "fp32", "compile": False, "decoder": "cpu", "images_in": "files", "grad_compression": "none",
    }  # fmt: skip
    assert wanted.items() <= report.config.items()
    assert report.config["threads"] >= 2
    assert "out" not in report.config
    assert set(report.changed) - {"data"} == {"arch", "batch_size", "micro_batch"}
    assert (report.hardware.device, report.hardware.ranks) == ("cpu", 1)
    assert math.isfinite(report.roofline.mfu)


def test_the_trace_has_the_steps(profiled):
    out, *_ = profiled
    names = [event.get("name") for event in json.loads((out / "trace.json").read_text())["traceEvents"]]
    assert names.count("Optimizer.step#SGD.step") == 3


def test_a_report_is_never_overwritten(profiled, capsys):
    out, *_ = profiled
    before = (out / "report.json").read_bytes()
    assert throughput.main([*SMALL, "--out", str(out)]) == 2
    assert "holds a report already; choose another folder" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == before


@pytest.mark.parametrize("flags", [["--freeze", "block1"], ["--head-epochs", "1"]])
def test_a_training_of_some_layers_has_other_limits(capsys, flags):
    assert throughput.main([*SMALL, "--weights", "none.pt", *flags]) == 2
    assert "--freeze and --head-epochs: the limits here are those of training all layers" in capsys.readouterr().err


def test_by_default_each_run_has_a_new_folder():
    config, options = throughput.parse(["--data", "digits", "--arch", "B", "--seconds", "3"])
    assert options.out is None
    assert str(config.out).startswith("runs/profile/B-digits-20")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seconds", "0"], "--seconds: 0 is not a number above 0"),
        (["--price-per-kwh", "-1"], "--price-per-kwh: -1 is not a number above 0"),
        (["--price-per-hour", "nan"], "--price-per-hour: nan is not a number above 0"),
        (["--price-per-kwh", "inf"], "--price-per-kwh: inf is not a number above 0"),
        (["--price-per-kwh", "0.3", "--price-per-hour", "2"], "not allowed with"),
        (["--seconds", "inf"], "--seconds: inf is not a number above 0"),
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
        "--network-gbits-per-second",
        "10",
        "--all-reduce",
        "tree",
    ]
    assert throughput.main([*flags, "--out", str(tmp_path)]) == 0
    report = read_report(tmp_path / "report.json")
    assert report.roofline.links
    assert "network 10 Gbit/s" in report.roofline.links.source
    assert {row.algorithm for row in report.roofline.scaling} == {"tree"}
    assert [name for name in STAGES if getattr(report.stages, name)] == ["step"]
    assert report.training_parts is None
    assert report.costs is None
    assert report.warm_up.first_batch_seconds is None
    assert report.ceiling.set_by == "step"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images_per_second"]["training"] is None


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--grad-compression", "bf16", "--micro-batch", "1", "--compile"]])
def test_two_ranks(tmp_path, flags):
    done = run(*SMALL, *flags, "--out", str(tmp_path / "out"), ranks=2, script="profile/throughput.py")
    report = read_report(tmp_path / "out/report.json")
    assert len(done.stdout.splitlines()[-1]) > 10
    assert report.hardware.ranks == 2
    parts = report.step_parts
    whole = report.stages.step.step_seconds.mean
    assert 0.8 * whole < sum(part.mean for part in msgspec.structs.astuple(parts)) <= whole
    assert report.all_reduce
    assert report.all_reduce.bytes_per_rank == (2 if flags else 4) * 28_144_010
    assert report.all_reduce.seconds.mean > 0
    for name in STAGES:
        rate = getattr(report.stages, name)
        assert rate.images == 4 * 5
        assert len(rate.images_per_second_per_rank) == 2
        assert rate.images_per_second == pytest.approx(2 * min(rate.images_per_second_per_rank))
    assert (report.warm_up.compile_seconds is None) == (not flags)


def timing_of(laps: list[dict[str, float]]) -> Timing:
    return Timing(
        laps=laps, steps_a_lap=1, laps_a_period=1, stopped_by="steps", cpu_seconds=0.0, cores_of_others=0.0,
        warm_up_steps=0, warm_up_seconds=0.0, began=0.0, ended=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("with_it", "without", "exposed"), [((0.5, 0.7), (0.4, 0.42), 0.19), ((0.3, 0.3), (0.4, 0.4), 0.0)]
)
def test_the_parts_of_a_step_add_up_with_an_all_reduce(with_it, without, exposed):
    """Also where noise has the backward pass longer without it."""
    step = timing_of([{"forward": 0.2, "backward": seconds, "optimizer": 0.1} for seconds in with_it])
    alone = timing_of([{"forward": 0.3, "backward": seconds, "optimizer": 0.2} for seconds in without])
    parts = step_parts(step, alone)
    assert parts.all_reduce
    assert parts.all_reduce.mean == pytest.approx(exposed)
    assert sum(part.mean for part in msgspec.structs.astuple(parts)) == pytest.approx(step.step_seconds.mean())


def test_peak_memory_is_all_that_the_gpu_had_given_away(monkeypatch):
    """NVML's reading of rank 0's own GPU, DALI's memory included; or torch's figure, where that is more or NVML has none."""
    own = types.SimpleNamespace(uuid="abc", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: own)
    ranks = Ranks(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cuda", 0), patient_group=None
    )
    telemetry = gpu_report().telemetry
    device = telemetry.devices[0]
    device.uuid, device.machine = "GPU-abc", 0
    device.fields["memory_used_bytes"] = Summary(median=1, p5=1, p95=1, min=1, max=9 << 30, mean=1)

    def peak(reserved: int) -> int:
        memory = throughput.peak_memory(ranks, reserved, telemetry)
        assert memory
        assert memory.total_bytes == own.total_memory
        return memory.peak_bytes

    assert (peak(5 << 30), peak(10 << 30)) == (9 << 30, 10 << 30)
    device.machine = 1
    assert peak(5 << 30) == 5 << 30, "another machine's"


def test_what_differs_from_the_data_sets_defaults():
    assert set(throughput.changed(parse_args(["--data", "digits"]))) <= {"data"}
    flags = ["--data", "digits", "--arch", "A", "--crop", "32", "--batch-size", "8", "--lr", "1", "--no-compile"]
    assert set(throughput.changed(parse_args(flags))) - {"data"} == {"arch", "batch_size", "compile"}
