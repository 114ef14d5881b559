"""The verdict on made-up reports: a run without a bottleneck of its own, into which one is planted."""

import copy
import shlex

import pytest

from engine.config import parse_args
from perf.verdict import judge
from tests.made_up_report import cpu_report, gpu_report, rate, summary


def healthy(device: str) -> dict:
    """A run that does nothing but arithmetic: two ranks on GPUs, or one on a CPU."""
    report = gpu_report() if device == "cuda" else cpu_report()
    ranks, batch = report["hardware"]["ranks"], report["config"]["batch_size"]
    report["config"] |= {
        "images_in": "files",
        "read_threads": None,
        "read_ahead": 8,
        "order": "global",
        "compile": True,
    }
    report["stages"] = {
        "reading": rate(60_000, batch, ranks),
        "decoding": rate(24_000, batch, ranks),
        "loader": rate(20_000, batch, ranks),
        "step": rate(6000, batch, ranks),
        "training": rate(5900, batch, ranks),
    }
    step = batch / 6000
    report["step_parts"] = {
        "forward": summary(0.28 * step),
        "backward": summary(0.62 * step),
        "all_reduce": summary(0.04 * step) if ranks > 1 else None,
        "optimizer": summary(0.06 * step),
    }
    report["training_parts"] = {"data_wait": summary(0.01 * step), "step": summary(step)}
    report["host_seconds_per_step"] = 0.1 * step
    report["roofline"] |= {"mfu": 0.5}
    report["ceiling"]["set_by"] = "step"
    for devices in report["telemetry"]["stages"].values():
        for gpu in devices:
            gpu["throttled_fraction"] = dict.fromkeys(gpu["throttled_fraction"], 0.0)
    return report


def throttle(reason: str, share: float, relative_clock: float):
    def plant(report: dict) -> None:
        for gpu in report["telemetry"]["stages"]["training"][-1:]:
            gpu["throttled_fraction"][reason] = share
            gpu["fields"]["sm_clock_mhz"] |= {"median": 1980 * relative_clock, "max": 1980}

    return plant


def slow_disk(report: dict) -> None:
    set_rates(report, reading=3100, loader=3000, training=2950)


def slow_decoder(report: dict) -> None:
    set_rates(report, decoding=3200, loader=3000, training=2950)


def waiting(report: dict) -> None:
    step = report["training_parts"]["step"]["median"]
    report["training_parts"]["data_wait"] = summary(0.25 * step)


def test_a_decoder_that_shares_the_gpu_with_the_step_is_told_of():
    report = healthy("cuda")
    waiting(report)
    report["config"]["decoder"] = "gpu"
    found = judge(report)
    assert "shares the GPU" in found["sentence"]
    assert [one["flags"] for one in found["try"]] == ["--decoder cpu", "--data PREPARED"]
    assert f"{report['hardware']['cores']} cores" in found["try"][0]["why"]

    report["config"]["decoder"] = "cpu"
    found = judge(report)
    assert "slower part is decoding" in found["sentence"]
    assert found["try"][0]["flags"] == "--decoder gpu"


def slow_host(report: dict) -> None:
    report["host_seconds_per_step"] = 0.95 * step_seconds(report)


def slow_part(part: str, share: float):
    def plant(report: dict) -> None:
        step = step_seconds(report)
        report["step_parts"][part] = summary(share * step)
        report["step_parts"]["backward"] = summary((0.9 - share) * step)

    return plant


def slow_memory(report: dict) -> None:
    peaks = report["roofline"]["peaks"]
    for layer in report["roofline"]["layers"]:
        layer["bytes"] = 3 * layer["flops"] / peaks["flops_per_second"] * peaks["bytes_per_second"] + layer["bytes"]
        layer["floor_seconds"] = layer["bytes"] / peaks["bytes_per_second"]


def nothing(report: dict) -> None:
    pass


def set_rates(report: dict, **rates: float) -> None:
    for name, value in rates.items():
        report["stages"][name] = rate(value, report["config"]["batch_size"], report["hardware"]["ranks"])


def step_seconds(report: dict) -> float:
    return report["stages"]["step"]["seconds_per_step"]["median"]


CLOCK = "median SM clock, of the highest"
CASES = [
    ("cuda", throttle("hw_thermal", 0.4, 0.6), "throttled", {"time with hw_thermal": 40, CLOCK: 60}),
    ("cuda", throttle("sw_power_cap", 0.9, 0.5), "throttled", {"time with sw_power_cap": 90, CLOCK: 50}),
    ("cuda", throttle("sw_power_cap", 0.9, 0.85), "compute", {"MFU of the step alone": 50}),
    ("cuda", throttle("hw_power_brake", 0.03, 0.85), "compute", {"MFU of the step alone": 50}),
    ("cuda", slow_disk, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cpu", slow_disk, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cuda", slow_decoder, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cpu", slow_decoder, "input", {"loader alone": 3000, "step alone": 6000}),
    ("cuda", waiting, "input", {"data wait, of a training step": 20, "loader alone": 20_000}),
    ("cpu", waiting, "compute", {"MFU of the step alone": 50}),
    ("cuda", slow_host, "launch", {"host, a step": 81.07, "step alone": 85.33}),
    ("cpu", slow_host, "launch", {"host, a step": 5.067, "step alone": 5.333}),
    ("cuda", slow_part("all_reduce", 0.5), "communication", {"all-reduce, exposed": 42.67, "step alone": 85.33}),
    ("cuda", slow_part("all_reduce", 0.2), "compute", {"MFU of the step alone": 50}),
    ("cuda", slow_part("optimizer", 0.4), "optimizer", {"optimizer": 34.13, "step alone": 85.33}),
    ("cpu", slow_part("optimizer", 0.4), "optimizer", {"optimizer": 2.133, "step alone": 5.333}),
    ("cuda", slow_memory, "memory", {"layers that memory limits, of the floor": 100}),
    ("cpu", slow_memory, "memory", {"layers that memory limits, of the floor": 100}),
    ("cuda", nothing, "compute", {"forward and backward, of the step alone": 90, "MFU of the step alone": 50}),
    ("cpu", nothing, "compute", {"forward and backward, of the step alone": 90, "MFU of the step alone": 50}),
]  # fmt: skip


@pytest.mark.parametrize(("device", "plant", "bound", "figures"), CASES)
def test_the_planted_bottleneck_is_named_with_its_two_figures(device, plant, bound, figures):
    report = healthy(device)
    plant(report)
    before = copy.deepcopy(report)
    verdict = judge(report)
    assert report == before, "judging changes nothing"
    assert verdict["bound"] == bound
    assert len(verdict["evidence"]) == 2
    evidence = {figure["name"]: figure["value"] for figure in verdict["evidence"]}
    for name, value in figures.items():
        assert evidence[name] == pytest.approx(value, rel=1e-3)
    assert verdict["sentence"].lower().startswith(bound)


def flags_of(report: dict) -> list[str]:
    return [entry["flags"] for entry in judge(report)["try"]]


@pytest.mark.parametrize(
    ("images_in", "compiled", "precision"),
    [("files", False, "fp32"), ("shards", True, "fp32"), ("files", True, "bf16")],
)
@pytest.mark.parametrize(("device", "plant", "bound", "figures"), CASES)
def test_flags_are_train_pys_and_change_something(device, plant, bound, figures, images_in, compiled, precision):
    report = healthy(device)
    config = report["config"] | {
        "images_in": images_in, "compile": compiled, "precision": precision, "threads": 1, "decoder": "cpu", "micro_batch": 8,
    }  # fmt: skip
    report["config"] = config
    plant(report)
    current = {**config, "compile": "on" if compiled else "off"}
    for flags in flags_of(report):
        words = shlex.split(flags)
        changed = vars(parse_args(words))
        names = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
        assert len(names) == 1
        assert changed[names[0]] != current[names[0]], flags


def test_what_to_try_fits_the_cause():
    report = healthy("cuda")
    slow_disk(report)
    assert flags_of(report)[0] == "--threads 28", "twice the 14 that read"
    assert flags_of(report)[-1] == "--data PREPARED"
    report["config"] |= {"images_in": "shards", "read_threads": 8}
    assert flags_of(report) == ["--read-threads 16", "--read-ahead 16", "--order window"]

    report = healthy("cuda")
    slow_decoder(report)
    report["config"]["decoder"] = "cpu"
    assert flags_of(report)[0] == "--decoder gpu"
    report = healthy("cpu")
    slow_decoder(report)
    report["config"]["threads"] = 1
    assert flags_of(report)[0] == "--threads 3", "one more than the cores"

    report = healthy("cuda")
    slow_part("all_reduce", 0.5)(report)
    assert flags_of(report) == ["--grad-compression bf16", "--batch-size 1024"]
    report["config"]["grad_compression"] = "bf16"
    assert flags_of(report) == ["--batch-size 1024"]

    report = healthy("cuda")
    report["config"] |= {"precision": "fp32", "compile": False}
    assert flags_of(report)[:2] == ["--precision bf16", "--compile"]
    report = healthy("cpu")
    report["config"]["precision"] = "bf16"
    assert flags_of(report)[0] == "--precision fp32"


def test_the_first_cause_wins():
    """A hot GPU makes everything slow, and a starved one is bound by nothing of its own."""
    report = healthy("cuda")
    slow_host(report)
    slow_part("optimizer", 0.5)(report)
    assert judge(report)["bound"] == "launch"
    slow_disk(report)
    assert judge(report)["bound"] == "input"
    throttle("sw_thermal", 0.5, 0.5)(report)
    assert judge(report)["bound"] == "throttled"


def test_what_was_not_measured_does_not_matter():
    report = healthy("cuda")
    report["stages"] |= {"reading": None, "decoding": None, "loader": None, "training": None}
    report["training_parts"] = report["host_seconds_per_step"] = None
    report["step_parts"]["all_reduce"] = None
    report["telemetry"] = {"available": False, "reason": "no driver", "devices": [], "stages": {}}
    assert judge(report)["bound"] == "compute"
    report = healthy("cuda")
    for gpu in report["telemetry"]["stages"]["training"]:
        gpu["throttled_fraction"] = None
        gpu["fields"] = dict.fromkeys(gpu["fields"])
    assert judge(report)["bound"] == "compute"


def test_a_slow_rank_is_a_slow_loader():
    report = healthy("cuda")
    report["stages"]["loader"]["images_per_second_per_rank"] = 1500.0
    assert judge(report)["bound"] == "input"
