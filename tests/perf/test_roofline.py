"""The floor against sums by hand and against real steps of this machine; the command line."""

import argparse
import itertools
import json
import math
from time import perf_counter, process_time

import msgspec
import pytest
import torch

from common.errors import UserError
from engine.precision import Precision, set_numerics
from engine.training.step import TrainStep
from model.vgg import build
from perf import peaks as peaks_module
from perf import roofline as script
from perf.peaks import measure_peaks
from perf.report import Links, Peaks, StepParts, Summary
from perf.roofline import Job, main, roofline
from perf.scaling import add_link_flags, links_from
from tests.support.made_up_report import summary

CPU = torch.device("cpu")
H100 = Peaks(name="H100", source="table", flops_per_second=989.4e12, bytes_per_second=3.35e12, watts=700)
JOB = Job(arch="D", classes=1000, crop=224, batch=256, precision="bf16")
LINKS = Links(peer_bytes_per_second=450e9, network_bytes_per_second=50e9, gpus_per_node=8, latency_seconds=1e-5)


def test_floor_is_the_longer_of_computing_and_moving():
    result = roofline(JOB, peaks=H100, links=LINKS)
    layers = {layer.name: layer for layer in result.layers}
    products = 256 * 512 * 512 * 9 * 28 * 28  # of the third convolution of block 4: limited by computing
    assert layers["features.21"].flops == 6 * products
    assert layers["features.21"].floor_seconds == pytest.approx(6 * products / 989.4e12)
    x, y = 256 * 64 * 224 * 224, 256 * 64 * 112 * 112  # of the first pooling: limited by memory
    assert layers["features.3"].floor_seconds == pytest.approx((4 * x + 4 * y + 2 * y) / 3.35e12)
    floor = result.floor_seconds
    assert floor.forward + floor.backward == pytest.approx(sum(row.floor_seconds for row in result.layers))
    assert floor.optimizer == pytest.approx(138_357_544 * 20 / 3.35e12)
    assert floor.all_reduce == 0.0
    assert floor.total == pytest.approx(floor.forward + floor.backward + floor.optimizer)
    assert result.flops_per_image == pytest.approx(92.65e9, rel=1e-3)
    assert result.peaks == H100
    assert (result.mfu, result.images_per_joule, result.scaling_from) == (None, None, "floor")


def test_passes_read_the_weights_again():
    whole = roofline(JOB, peaks=H100, links=LINKS)
    parts = roofline(Job(**{**vars(JOB), "micro_batch": 64}), peaks=H100, links=LINKS)
    assert parts.flops_per_image == whole.flops_per_image
    for one, other in zip(parts.layers, whole.layers, strict=True):
        assert (one.bytes > other.bytes) == (one.kind in ("conv", "linear"))
    assert parts.floor_seconds.optimizer == whole.floor_seconds.optimizer


def test_the_floor_of_a_step_in_passes_is_that_of_each_pass_times_their_number():
    """All but the optimizer's part, which comes once; fused or not, of each layer and of all."""
    one = roofline(Job(**{**vars(JOB), "batch": 64}), peaks=H100, links=LINKS)
    four = roofline(Job(**{**vars(JOB), "micro_batch": 64}), peaks=H100, links=LINKS)
    for name in ("floor_seconds", "floor_seconds_unfused"):
        of_one, of_four = getattr(one, name), getattr(four, name)
        assert of_four.forward == pytest.approx(4 * of_one.forward)
        assert of_four.backward == pytest.approx(4 * of_one.backward)
        assert of_four.optimizer == of_one.optimizer
        assert of_four.total == pytest.approx(4 * (of_one.forward + of_one.backward) + of_one.optimizer)
        of_layers = sum(getattr(layer, name) for layer in four.layers)
        assert of_layers == pytest.approx(of_four.forward + of_four.backward)
    for layer, pass_of_layer in zip(four.layers, one.layers, strict=True):
        for name in ("flops", "bytes", "bytes_unfused", "floor_seconds", "floor_seconds_unfused"):
            assert getattr(layer, name) == pytest.approx(4 * getattr(pass_of_layer, name)), (layer.name, name)
    assert four.scaling[0].plain.images_per_second == pytest.approx(256 / four.floor_seconds.total)


def test_predictions_from_measured_passes_give_the_measured_step_again():
    def taking(seconds: float) -> Summary:
        return Summary(mean=seconds, median=1.0, p5=1.0, p95=1.0, min=1.0, max=1.0)  # means alone count

    parts = StepParts(forward=taking(0.012), backward=taking(0.025), optimizer=taking(0.001), all_reduce=None)
    job = Job(**{**vars(JOB), "micro_batch": 64, "ranks": 8})
    result = roofline(job, peaks=H100, links=LINKS, parts=parts)
    assert result.scaling[0].plain.images_per_second == pytest.approx(256 / 0.038)
    result = roofline(Job(**{**vars(JOB), "micro_batch": 64}), peaks=H100, links=LINKS, step_seconds=0.05)
    assert result.mfu == pytest.approx(256 * 92.648e9 / 0.05 / 989.4e12, rel=1e-4)


def test_the_all_reduce_counts_as_far_as_it_is_exposed():
    slow = Links(peer_bytes_per_second=1e9, network_bytes_per_second=1e9, gpus_per_node=8, latency_seconds=0.0)
    job = Job(**{**vars(JOB), "ranks": 2})
    floor = roofline(job, peaks=H100, links=slow, algorithm="ring").floor_seconds
    assert floor.all_reduce == pytest.approx(0.5534, rel=1e-3)  # 2 · ½ · 553.4 MB at 1 GB/s
    computing = floor.forward + floor.backward + floor.optimizer
    assert computing + floor.all_reduce - floor.backward < floor.total < computing + floor.all_reduce
    halved = roofline(Job(**{**vars(job), "grad_compression": "bf16"}), peaks=H100, links=slow, algorithm="ring")
    assert halved.floor_seconds.all_reduce == pytest.approx(0.2767, rel=1e-3)


def test_measured_steps():
    result = roofline(JOB, peaks=H100, links=LINKS, step_seconds=0.05, step_joules=30.0)
    assert result.mfu == pytest.approx(256 * 92.648e9 / 0.05 / 989.4e12, rel=1e-4)
    assert result.images_per_joule == pytest.approx(256 / 30)
    assert result.scaling_from == "measured"
    assert result.scaling[0].plain.images_per_second == pytest.approx(256 / 0.05)
    parts = StepParts(
        forward=summary(0.012), backward=summary(0.025), all_reduce=summary(0.004), optimizer=summary(0.001)
    )
    result = roofline(Job(**{**vars(JOB), "ranks": 8}), peaks=H100, links=LINKS, parts=parts)
    assert (result.mfu, result.scaling_from) == (None, "measured")
    assert result.scaling[0].plain.images_per_second == pytest.approx(256 / 0.038)
    # of several ranks, a step alone does not say what the all-reduce took
    alone = roofline(Job(**{**vars(JOB), "ranks": 8}), peaks=H100, links=LINKS, step_seconds=0.05)
    assert alone.scaling_from == "floor"
    assert alone.mfu == pytest.approx(256 * 92.648e9 / 0.05 / 989.4e12, rel=1e-4)


def links(peaks: Peaks, *flags: str, ranks_a_machine: int | None = None, ranks: int = 1) -> Links | None:
    parser = argparse.ArgumentParser()
    add_link_flags(parser)
    return links_from(parser.parse_args(flags), peaks, ranks_a_machine=ranks_a_machine, ranks=ranks)


CPU_PEAKS = Peaks(name="CPU, 2 threads", source="measured", flops_per_second=1.0, bytes_per_second=1.0, watts=None)


def test_links_of_the_table():
    assert links(H100) == Links(
        peer_bytes_per_second=450e9,
        network_bytes_per_second=50e9,
        gpus_per_node=8,
        latency_seconds=1e-5,
        in_switch=True,
        source="H100's NVLink from the table; machines of 8, network 400 Gbit/s, latency 10 µs assumed",
    )
    pairs = links(msgspec.structs.replace(H100, name="A40"))
    assert pairs is not None
    assert (pairs.peer_bytes_per_second, pairs.in_switch) == (31.5e9, False), "eight are not joined by bridges of two"
    assert pairs.source.startswith("A40's PCIe from the table; ")
    sixteen = links(H100, "--gpus-per-node", "16")
    assert sixteen is not None
    assert (sixteen.peer_bytes_per_second, sixteen.in_switch) == (63e9, False), "one board's switches join eight"
    rack = links(msgspec.structs.replace(H100, name="GB200"))
    assert rack is not None
    assert (rack.gpus_per_node, rack.peer_bytes_per_second, rack.in_switch) == (72, 900e9, True)


def test_links_of_flags_and_of_this_run():
    flags = ("--gpus-per-node", "4", "--nvlink-gbytes-per-second", "200")
    given = links(H100, *flags, "--network-gbits-per-second", "800", "--latency-us", "3", ranks_a_machine=2)
    assert given == Links(
        peer_bytes_per_second=200e9,
        network_bytes_per_second=100e9,
        gpus_per_node=4,
        latency_seconds=3e-6,
        in_switch=True,
        source="machines of 4, network 800 Gbit/s, latency 3 µs, 200 GB/s within a machine from flags",
    )
    run = links(H100, ranks_a_machine=2)
    assert run is not None
    assert run.gpus_per_node == 2
    assert "machines of 2 as in this run" in run.source


def test_nothing_is_predicted_over_links_that_nobody_named():
    assert links(CPU_PEAKS) is None
    assert links(CPU_PEAKS, "--latency-us", "5", "--gpus-per-node", "2", ranks_a_machine=2) is None
    job = Job(**{**vars(JOB), "ranks": 2})
    result = roofline(job, peaks=CPU_PEAKS, links=None, step_seconds=1.0)
    assert (result.links, result.scaling, result.floor_seconds.all_reduce) == (None, [], 0.0)
    named = links(CPU_PEAKS, "--network-gbits-per-second", "10")
    assert named is not None
    assert named.source == "network 10 Gbit/s from flags; machines of 1, latency 10 µs assumed"
    assert (named.gpus_per_node, named.network_bytes_per_second, named.peer_bytes_per_second) == (1, 1.25e9, 1.25e9)
    assert [row.ranks for row in roofline(JOB, peaks=CPU_PEAKS, links=named).scaling] == [1, 2, 4, 8, 64, 512]


def test_what_the_links_cannot_do_is_said_before_anything_is_measured():
    with pytest.raises(UserError, match="no switch between these GPUs adds up"):
        links(msgspec.structs.replace(H100, name="A100-80GB"), "--all-reduce", "in-switch")
    with pytest.raises(UserError, match="12 GPUs do not fill machines of 8"):
        links(H100, ranks=12)
    other = links(CPU_PEAKS, "--all-reduce", "in-switch", "--nvlink-gbytes-per-second", "450")
    assert other is not None
    assert other.in_switch, "of a device that no table knows, the flag says it"


def test_unfused_floor():
    """54.7 ms were measured on an H100, each ReLU in front of its pooling: more than half of what is above the fused floor were
    memory passes."""
    result = roofline(JOB, peaks=H100, links=LINKS)
    assert result.floor_seconds.total == pytest.approx(28.8e-3, rel=1e-2)
    values = 256 * 128 * 112 * 112  # of the third convolution, in 2 bytes each, 3.35 TB/s
    layer = next(layer for layer in result.layers if layer.name == "features.5")
    elementwise = 2 * values * (2 + 2 + 3 + 1) / 3.35e12  # bias and ReLU there, ReLU and bias back
    kernels = layer.flops / 989.4e12  # each of its three kernels is limited by computing
    weights = (128 * 64 * 9 + 128) * 12 / 3.35e12
    assert layer.floor_seconds_unfused == pytest.approx(kernels + elementwise + weights)
    floor = result.floor_seconds_unfused
    assert floor.forward + floor.backward == pytest.approx(sum(layer.floor_seconds_unfused for layer in result.layers))
    assert floor.optimizer == result.floor_seconds.optimizer
    pooled = 256 * sum(
        w * side**2 for w, side in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))
    )  # values before
    by_relu = 3 / 4 * 2 * pooled * (2 + 3) / 3.35e12
    assert 0.5 * (54.7e-3 - result.floor_seconds.total) < floor.total + by_relu - result.floor_seconds.total
    assert floor.total < 54.7e-3, "no step is faster than its floor"


def test_batch_norm_moves_more_and_computes_the_same():
    plain, normed = (
        roofline(Job(**{**vars(JOB), "batch_norm": batch_norm}), peaks=H100, links=LINKS)
        for batch_norm in (False, True)
    )
    assert normed.flops_per_image == plain.flops_per_image
    values = 256 * sum(  # of the thirteen convolutions of D
        width * side**2 * count
        for width, side, count in ((64, 224, 2), (128, 112, 2), (256, 56, 3), (512, 28, 3), (512, 14, 3))
    )
    passes = 3 + 5  # forward reads twice and writes, backward reads two things twice and writes
    more = passes * 2 * values / 3.35e12
    assert normed.floor_seconds.total - plain.floor_seconds.total == pytest.approx(more, rel=1e-2)
    assert normed.all_reduce_bytes - plain.all_reduce_bytes == 4 * 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)


def test_measured_layers_stand_beside_their_floor():
    job = Job(**{**vars(JOB), "micro_batch": 64})
    result = roofline(job, peaks=H100, links=LINKS, layer_seconds={"features.2": 0.002})
    measured = {layer.name: layer.measured_seconds for layer in result.layers}
    assert measured["features.2"] == pytest.approx(4 * 0.002), "of a step of four passes"
    assert measured["features.0"] is None


class Steps:
    """Training steps of A on this CPU: the shortest time, and the least CPU time divided by the threads."""

    def __init__(self, crop: int, batch: int) -> None:
        self.job = Job(arch="A", classes=10, crop=crop, batch=batch, precision="fp32")
        self.seconds = self.cpu_seconds = math.inf
        model = build("A", classes=10, crop=crop, dropout=0.5, init="xavier", device=CPU)
        precision = Precision("fp32", "cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4, fused=True)
        self._step = TrainStep(
            model, optimizer=optimizer, scaler=precision.grad_scaler(), precision=precision, passes=1
        )
        images = torch.randn(batch, 3, crop, crop).to(memory_format=torch.channels_last)
        self._batches = itertools.repeat((images, torch.zeros(batch, dtype=torch.int64)))

    def run(self, times: int) -> None:
        for _ in range(times):
            began, cpu_began = perf_counter(), process_time()
            self._step(self._batches)
            self.seconds = min(self.seconds, perf_counter() - began)
            self.cpu_seconds = min(self.cpu_seconds, (process_time() - cpu_began) / torch.get_num_threads())


@pytest.mark.slow
def test_no_step_of_this_machine_is_faster_than_its_floor(monkeypatch):
    """Steps that computing limits, and steps that weights and optimizer limit.

    In turns with measuring the peaks, and the best of each: this machine may have others at work on it at any time.
    """
    monkeypatch.setattr(peaks_module, "_MEASURE_SECONDS", 0.1)
    monkeypatch.setitem(peaks_module._MATRIX_SIDE, "cpu", 1024)
    set_numerics(deterministic=False)
    cases = [Steps(crop=64, batch=16), Steps(crop=32, batch=1)]
    measured = []
    for _ in range(3):
        measured.append(measure_peaks(CPU, "fp32"))
        for steps in cases:
            steps.run(2)
    best = Peaks(
        name="CPU",
        source="measured",
        flops_per_second=max(peaks.flops_per_second for peaks in measured),
        bytes_per_second=max(peaks.bytes_per_second for peaks in measured),
        watts=None,
    )
    print(f"{best.flops_per_second / 1e9:.0f} GFLOP/s, {best.bytes_per_second / 1e9:.1f} GB/s")
    for steps in cases:
        floor = roofline(steps.job, peaks=best, links=None).floor_seconds.total
        print(f"crop {steps.job.crop}: floor {1e3 * floor:.1f} ms, step {1e3 * steps.seconds:.1f} ms")
        assert floor <= steps.seconds
        assert floor > steps.cpu_seconds / 20, "so low a floor says nothing"


# ---- the command line --------------------------------------------------------------------------------------------


def results(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_command_line(capsys):
    flags = ["--arch", "E", "--batch-size", "128", "--micro-batch", "32", "--gpu", "NVIDIA A100-SXM4-80GB", "--layers"]
    flags += ["--ranks", "16", "--grad-compression", "bf16", "--step-seconds", "0.4", "--step-joules", "150"]
    flags += ["--image-size", "375x500", "--train-scale", "256-512", "--jpeg-bytes", "110e3"]
    assert main(flags) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert (result["arch"], result["precision"], result["ranks"], result["micro_batch"]) == ("E", "bf16", 16, 32)
    assert result["peaks"]["name"] == "A100-80GB"
    assert result["mfu"] == pytest.approx(128 * result["flops_per_image"] / 0.4 / 312e12)
    assert result["images_per_joule"] == pytest.approx(128 / 150)
    assert result["all_reduce_bytes"] == 2 * 143_667_240
    assert result["decode"]["jpeg_bytes_per_image"] == 110_000
    assert 224**2 / 4 < result["decode"]["pixels_per_image"] < 375 * 500
    assert [row["ranks"] for row in result["scaling"]] == [1, 2, 4, 8, 64, 512]
    for word in (
        "features.34",
        "MFU",
        "images/joule",
        "to decode",
        "to read",
        "8 devices a machine, 300 GB/s from each to its peers",
        "All-reduce: best.",
    ):
        assert word in output


def test_without_a_gpu_the_cpu_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measured = Peaks(name="it", source="measured", flops_per_second=1e11, bytes_per_second=1e10, watts=None)
    for module in (peaks_module, script):
        monkeypatch.setattr(module, "measure_peaks", lambda device, precision: measured)
    for flags in ([], ["--measure"]):
        assert main(["--arch", "A", "--crop", "32", "--classes", "10", "--batch-size", "16", *flags]) == 0
        result = results(capsys)
        assert (result["precision"], result["peaks"]["source"]) == ("fp32", "measured")


def test_precision_of_a_card_without_bf16(capsys):
    assert main(["--gpu", "T4"]) == 0
    assert results(capsys)["precision"] == "fp16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "H800"], "--gpu H800: not in the table, which has V100, "),
        (["--gpu", "V100", "--precision", "bf16"], "--gpu V100 has no bf16; take --precision fp16 or fp32"),
        (["--gpu", "H100", "--crop", "100"], "--crop: crop 100 is not a multiple of 32"),
        (["--gpu", "H100", "--measure"], "--measure measures this machine: leave out --gpu"),
        (["--gpu", "H100", "--ranks", "12"], "12 GPUs do not fill machines of 8; give --gpus-per-node a divisor of 12"),
        (["--gpu", "A30", "--all-reduce", "in-switch"], "--all-reduce in-switch: no switch between these GPUs adds up"),
        (["--batch-size", "100", "--micro-batch", "64"], "--batch-size 100 is not a multiple of --micro-batch 64"),
        (["--arch", "F"], "argument --arch: invalid choice: 'F'"),
        (["--batch-size", "0"], "argument --batch-size: 0 is not a whole number above 0"),
        (["--latency-us", "-1"], "argument --latency-us: -1 is not a number above 0"),
        (["--step-seconds", "nan"], "argument --step-seconds: nan is not a number above 0"),
        (["--image-size", "500"], "argument --image-size: "),
        (["--train-scale", "512-256"], "512-256: the lowest scale comes first"),
        (["--image-size", "375x500", "--train-scale", "128"], "--train-scale 128 is less than --crop 224"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(capsys, flags, message):
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
