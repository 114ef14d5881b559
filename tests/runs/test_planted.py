"""Real runs of profile/throughput.py, each with one bottleneck: the verdict must name it."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from common.ranks import ranks_of_this_run
from perf.report import STAGES, Rate, Report, read_report
from pipeline.dataset.digits import digits_folder
from pipeline.preparation.packing import Settings, prepare
from tests.support.images import photographs
from tests.support.launch import ROOT, environment, one_machine, results_of
from tests.support.programs import planted

pytestmark = pytest.mark.slow


def profile(
    out: Path, *flags: str, plant: str = "nothing", ranks: int = 0, variables: dict[str, str] | None = None
) -> Report:
    """The report of a run with one thread a rank, in an environment with these variables.

    A verdict is inconclusive, and rightly, where the machine's speed changed in the meantime: then it is measured once more.
    """
    report = measured(out, *flags, plant=plant, ranks=ranks, variables=variables or {})
    if report.verdict.bound != "inconclusive":
        return report
    print("measured again:", report.verdict.sentence)
    return measured(out.with_name("again"), *flags, plant=plant, ranks=ranks, variables=variables or {})


def measured(out: Path, *flags: str, plant: str, ranks: int, variables: dict[str, str]) -> Report:
    launcher = [sys.executable, *(one_machine(ranks) if ranks else [])]
    done = subprocess.run(
        [*launcher, "tests/support/programs/planted.py", "--arch", "A", "--seconds", "4", "--out", str(out), *flags],
        cwd=ROOT,
        env={**environment(), "PLANT": plant, **variables},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = read_report(out / "report.json")
    assert msgspec.to_builtins(report.verdict) == results_of(done)["verdict"]
    print(report.verdict.sentence)
    return report


def flags_of(report: Report) -> list[str]:
    return [advice.flags for advice in report.verdict.tries]


def rates_of(report: Report) -> list[Rate]:
    """Of all stages: none is missing."""
    rates = [getattr(report.stages, name) for name in STAGES]
    assert None not in rates
    return rates


def prepared_digits(folder: Path, *, shard_images: int) -> list[str]:
    """Prepare them; the flags that train on them."""
    folder.mkdir()
    with ranks_of_this_run("cpu") as ranks:
        settings = Settings(short_side="36", quality=90, shard_images=shard_images)
        prepare(digits_folder(), folder, settings, threads=2, ranks=ranks)
    return ["--data", str(folder), "--crop", "32", "--train-scale", "36", "--batch-size", "8"]


def test_a_slow_disk(tmp_path):
    """One thread that waits 0.1 s for each image reads at most 10 a second."""
    flags = [*prepared_digits(tmp_path / "prepared", shard_images=500), "--read-threads", "1"]
    report = profile(tmp_path / "out", *flags, "--seconds", "8", plant="slow_disk")  # a step takes 0.8 s
    assert report.verdict.bound == "input"
    assert "reading" in report.verdict.sentence
    assert flags_of(report)[0] == "--read-threads 2"
    reading, decoding, loader, *_ = rates_of(report)
    assert 8 < reading.images_per_second < 10.5
    assert 8 < loader.images_per_second < 10.5
    assert decoding.images_per_second > 100
    assert report.ceiling.set_by == "loader", "waiting takes no core from the step"
    assert report.ceiling.training_over_ceiling == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("flags", [(), ("--order", "window", "--window-shards", "4")])
def test_slow_storage(tmp_path, flags):
    """Windows of 20 images, 5 steps, come at once, every 2.5 s; a step is shorter than the 0.5 s that its images take."""
    own = [*prepared_digits(tmp_path / "prepared", shard_images=5), "--batch-size", "4"]
    report = profile(tmp_path / "out", *own, *flags, plant="limited_storage")
    (reading, _, loader, _, training), parts = rates_of(report), report.training_parts
    assert parts
    for rate in (reading, loader):
        assert rate.images_per_second == pytest.approx(planted.IMAGES_PER_SECOND, rel=0.05)
    truth = min(planted.IMAGES_PER_SECOND, 4 / parts.step.mean)  # a machine that is busy may be slower than the storage
    assert training.images_per_second == pytest.approx(truth, rel=0.05)
    wait = parts.data_wait.mean / training.step_seconds.mean
    assert wait == pytest.approx(1 - parts.step.mean * truth / 4, abs=0.03)


def test_steps_that_stall(tmp_path):
    """8 of 40 steps sleep: the rate is that of images over all of the time, and the stalls are seen in the series."""
    flags = ["--data", "synthetic", "--crop", "32", "--train-scale", "32", "--batch-size", "1", "--seconds", "20"]
    rate = profile(tmp_path / "out", *flags, plant="stalling_steps").stages.step
    assert rate.images_per_second == pytest.approx(rate.images / rate.seconds)
    steady = sorted(rate.series_seconds)[: int(0.7 * len(rate.series_seconds))]
    truth = 40 / (40 * sum(steady) / len(steady) + 8 * planted.STALL_SECONDS)
    assert rate.images_per_second == pytest.approx(truth, rel=0.1)
    assert rate.interval
    assert rate.interval[0] <= truth <= rate.interval[1]
    assert max(rate.series_seconds) > planted.STALL_SECONDS


def test_one_thread_with_large_images(tmp_path):
    """To decode 27 million pixels takes one thread 0.1 to 0.2 s."""
    photos = tmp_path / "photos"
    for split in ("train", "val"):
        (photos / split / "a").mkdir(parents=True)
        for number, image in enumerate(photographs()):
            large = image.resize((6000, 4500), Image.Resampling.NEAREST)
            large.save(photos / split / "a" / f"{number}.jpg", quality=90)
    flags = ["--data", str(photos), "--crop", "32", "--train-scale", "32", "--batch-size", "2", "--threads", "1"]
    report = profile(tmp_path / "out", *flags, "--seconds", "8")  # a step takes 0.2 to 0.4 s: twenty make an interval
    assert report.verdict.bound == "input"
    assert "decoding" in report.verdict.sentence
    assert flags_of(report)[0] == f"--threads {len(os.sched_getaffinity(0)) + 1}"


def test_a_slow_host_and_a_tiny_batch(tmp_path):
    flags = ["--data", "digits", "--batch-size", "1", "--seconds", "8"]  # a step takes 0.7 s: six make an interval
    report = profile(tmp_path / "out", *flags, plant="slow_host")
    assert report.verdict.bound == "launch"
    assert flags_of(report) == ["--compile", "--batch-size 2"]
    layers = 8 + 8 + 5 + 3 + 2 + 2  # convolutions and ReLUs, pools; linear layers, ReLUs, dropouts
    assert report.host_seconds_per_step
    assert report.host_seconds_per_step > 0.02 * (layers + 3)  # and the three modules that hold them


def test_all_reduce_of_a_tiny_batch(tmp_path):
    """Two ranks of one image each add up 112 MB in every step."""
    report = profile(tmp_path / "out", "--data", "digits", "--batch-size", "2", ranks=2)
    assert report.verdict.bound == "communication"
    assert flags_of(report)[0] == "--grad-compression bf16"
    assert report.all_reduce
    assert report.all_reduce.bytes_per_rank == 4 * 28_144_010


def test_an_update_for_one_image(tmp_path):
    """The C library keeps its memory: otherwise the backward pass waits for the kernel to give it pages for the gradients."""
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    report = profile(tmp_path / "out", "--data", "digits", "--batch-size", "1", variables=keep)
    assert report.verdict.bound == "optimizer"
    assert flags_of(report) == ["--batch-size 2"]


def test_nothing_but_arithmetic(tmp_path):
    flags = ["--data", "synthetic", "--crop", "96", "--train-scale", "96", "--batch-size", "8"]
    report = profile(tmp_path / "out", *flags)
    assert report.verdict.bound == "compute"
    assert report.stages.training is None
