"""The telemetry of several machines, put together on rank 0, and what is worked out from it."""

import json
from typing import Any

import pytest
import torch

from common import ranks as common_ranks
from common.ranks import Ranks
from perf.telemetry import mean_watts, telemetry_of
from tests.support.launch import run
from tests.support.nvml_stub import compile_stub, environment, run_python

ENERGY = 300.0  # watts of GPU 0 of the stub


def rank(number: int, world_size: int) -> Ranks:
    return Ranks(
        rank=number,
        world_size=world_size,
        local_rank=0,
        local_world_size=1,
        device=torch.device("cpu"),
        patient_group=None,
    )


class Kept:
    """A sampler that says what a real one said, its clock moved by so many seconds."""

    def __init__(self, said: dict, clock: float) -> None:
        self.said, self.clock = said, clock
        self.started = said["started"] + clock

    def report(self, start: float | None = None, end: float | None = None) -> dict:
        whole = json.loads(json.dumps(self.said["whole"]))
        return whole if start is None else json.loads(json.dumps(self.said["windows"][f"{start - self.clock:.6f}"]))


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict:
    """What the sampler says of two GPUs over two stages of 0.3 s."""
    code = """
with NvmlSampler(interval_seconds=0.02) as sampler:
    sleep(0.1)
    moments = [now()]
    for _ in range(2):
        sleep(0.3)
        moments.append(now())
windows = {f"{start:.6f}": sampler.report(start, end) for start, end in zip(moments, moments[1:])}
print(json.dumps({"started": sampler.started, "moments": moments, "whole": sampler.report(), "windows": windows}))
"""
    return run_python(code, environment(compile_stub(tmp_path_factory.mktemp("nvml")), GPUS="2"))


def windows_of(said: dict, clock: float) -> dict[str, tuple[float, float]]:
    a, b, c = (moment + clock for moment in said["moments"])
    return {"step": (a, b), "training": (b, c)}


def gathered(monkeypatch, samplers: list[Any], windows: list[dict]):
    """telemetry_of on each rank: the others first, whose answers rank 0 then has."""
    given: list = []

    def from_each_machine(own, ranks):
        given.append(own)
        return [] if ranks.rank else [given[-1], *given[:-1]]

    monkeypatch.setattr(common_ranks, "from_each_machine", from_each_machine)
    world_size = len(samplers)
    for number in range(1, world_size):
        assert telemetry_of(samplers[number], windows[number], rank(number, world_size)) is None
    return telemetry_of(samplers[0], windows[0], rank(0, world_size))


def test_every_machine_is_there_in_rank_0s_time(monkeypatch, said):
    """Machine 1's clock is 1000 s ahead, and its sampler began 0.05 s later; rank 2 has no sampler."""
    later = {**said, "started": said["started"] + 0.05}
    samplers = [Kept(said, 0.0), Kept(later, 1000.0), None]
    found = gathered(monkeypatch, samplers, [windows_of(said, 0.0), windows_of(said, 1000.0), windows_of(said, 0.0)])
    assert found.devices
    assert found.reason is None
    assert [(device.machine, device.index) for device in found.devices] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for devices in found.stages.values():
        assert [(device.machine, device.index) for device in devices] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [device.series for device in devices] == [{}] * 4
        for device in devices:
            assert device.energy_joules == pytest.approx(ENERGY * (device.index + 1) * 0.3, rel=0.1)
    (a, b), (c, d) = found.stage_seconds["step"], found.stage_seconds["training"]
    assert a == pytest.approx(said["moments"][0] - said["started"])
    assert b == c < d
    ours, theirs = found.devices[0].series["seconds"], found.devices[2].series["seconds"]
    # What it counted from its own start is now as long before the first stage as it was by its own clock.
    assert [mine - its for mine, its in zip(ours, theirs, strict=True)] == pytest.approx([-0.05] * len(ours), abs=1e-3)


def test_a_machine_without_a_driver_is_named(monkeypatch, said):
    none = {**said, "whole": {**said["whole"], "devices": [], "available": False, "reason": "no NVIDIA driver"}}
    none["windows"] = dict.fromkeys(said["windows"], none["whole"])
    windows = [windows_of(said, 0.0)] * 2
    found = gathered(monkeypatch, [Kept(said, 0.0), Kept(none, 0.0)], windows)
    assert found.devices
    assert found.reason == "machine 1: no NVIDIA driver"
    assert {device.machine for device in found.devices} == {0}
    found = gathered(monkeypatch, [Kept(none, 0.0)], windows)
    assert (found.devices, found.reason, found.stages) == ([], "no NVIDIA driver", {"step": [], "training": []})


def test_watts_are_of_one_gpu_and_never_of_a_part_of_one(monkeypatch, said):
    found = gathered(monkeypatch, [Kept(said, 0.0)], [windows_of(said, 0.0)])
    assert mean_watts(found, "step") == pytest.approx(1.5 * ENERGY, rel=0.01)
    assert mean_watts(found, "loader") is None
    found.stages["step"][1].energy_joules = None
    assert mean_watts(found, "step") is None
    found.stages["training"][0].is_mig = True
    assert mean_watts(found, "training") is None


FOUR_RANKS = """
import torch.distributed as dist
from dataclasses import replace
from pathlib import Path
from common.ranks import from_each_machine, ranks_of_this_run
with ranks_of_this_run("cpu") as ranks:
    bytes_sent = []
    send = dist.send_object_list
    dist.send_object_list = lambda objects, **where: (bytes_sent.append(len(objects[0])), send(objects, **where))
    machines = replace(ranks, local_rank=ranks.rank % 2, local_world_size=2)  # two ranks a machine
    received = [len(each) for each in from_each_machine("x" * (1 + 100_000 * ranks.rank), machines)]
    Path(__file__).with_name(f"{ranks.rank}.txt").write_text(f"{received} {bytes_sent}")
"""


def test_the_first_rank_of_each_machine_sends_and_rank_0_alone_receives(tmp_path):
    script = tmp_path / "four.py"
    script.write_text(FOUR_RANKS)
    run(script=str(script), ranks=4)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(4)]
    assert said == ["[1, 200001] []", "[] []", "[] [200001]", "[] []"]
