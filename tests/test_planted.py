"""Real runs of profile/throughput.py, each with one bottleneck: the verdict must name it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from common.ranks import ranks_of_this_run
from pipeline.digits import digits_folder
from pipeline.prepare import Settings, prepare
from tests.images import photographs
from tests.runs import ROOT, environment, one_machine, results_of

pytestmark = pytest.mark.slow


def profile(
    out: Path, *flags: str, plant: str = "nothing", ranks: int = 0, variables: dict[str, str] | None = None
) -> dict:
    """The report of a run with one thread a rank, in an environment with these variables."""
    launcher = [sys.executable, *(one_machine(ranks) if ranks else [])]
    done = subprocess.run(
        [*launcher, "tests/planted.py", "--arch", "A", "--seconds", "4", "--out", str(out), *flags],
        cwd=ROOT,
        env={**environment(), "PLANT": plant, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"] == results_of(done)["verdict"]
    return report


def flags_of(report: dict) -> list[str]:
    return [entry["flags"] for entry in report["verdict"]["try"]]


def test_a_slow_disk(tmp_path):
    """One thread that waits 0.1 s for each image reads at most 10 a second."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    with ranks_of_this_run("cpu") as ranks:
        settings = Settings(short_side="36", quality=90, shard_images=500)
        prepare(digits_folder(), folder, settings, threads=2, ranks=ranks)
    flags = ["--data", str(folder), "--crop", "32", "--train-scale", "36", "--batch-size", "8", "--read-threads", "1"]
    report = profile(tmp_path / "out", *flags, plant="slow_disk")
    assert report["verdict"]["bound"] == "input"
    assert "reading" in report["verdict"]["sentence"]
    assert flags_of(report)[0] == "--read-threads 2"
    rates = {name: stage["images_per_second"]["median"] for name, stage in report["stages"].items()}
    assert 8 < rates["reading"] < 10.5
    assert 8 < rates["loader"] < 10.5
    assert rates["decoding"] > 100
    assert report["ceiling"]["set_by"] == "loader", "waiting takes no core from the step"
    assert report["ceiling"]["training_over_ceiling"] == pytest.approx(1, abs=0.1)


def test_one_thread_with_large_images(tmp_path):
    """To decode 27 million pixels takes one thread about 0.1 s."""
    photos = tmp_path / "photos"
    for split in ("train", "val"):
        (photos / split / "a").mkdir(parents=True)
        for number, image in enumerate(photographs()):
            large = image.resize((6000, 4500), Image.Resampling.NEAREST)
            large.save(photos / split / "a" / f"{number}.jpg", quality=90)
    flags = ["--data", str(photos), "--crop", "32", "--train-scale", "32", "--batch-size", "4", "--threads", "1"]
    report = profile(tmp_path / "out", *flags)
    assert report["verdict"]["bound"] == "input"
    assert "decoding" in report["verdict"]["sentence"]
    assert flags_of(report)[0] == f"--threads {len(os.sched_getaffinity(0)) + 1}"


def test_a_slow_host_and_a_tiny_batch(tmp_path):
    report = profile(tmp_path / "out", "--data", "digits", "--batch-size", "1", plant="slow_host")
    assert report["verdict"]["bound"] == "launch"
    assert flags_of(report) == ["--compile", "--batch-size 2"]
    layers = 8 + 8 + 5 + 3 + 2 + 2  # convolutions and ReLUs, pools; linear layers, ReLUs, dropouts
    assert report["host_seconds_per_step"] > 0.02 * (layers + 3)  # and the three modules that hold them


def test_all_reduce_of_a_tiny_batch(tmp_path):
    """Two ranks of one image each add up 112 MB in every step."""
    report = profile(tmp_path / "out", "--data", "digits", "--batch-size", "2", ranks=2)
    assert report["verdict"]["bound"] == "communication"
    assert flags_of(report)[0] == "--grad-compression bf16"
    assert report["all_reduce"]["bytes_per_rank"] == 4 * 28_144_010


def test_an_update_for_one_image(tmp_path):
    """The C library keeps its memory: otherwise the backward pass waits for the kernel to give it pages for the gradients."""
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    report = profile(tmp_path / "out", "--data", "digits", "--batch-size", "1", variables=keep)
    assert report["verdict"]["bound"] == "optimizer"
    assert flags_of(report) == ["--batch-size 2"]


def test_nothing_but_arithmetic(tmp_path):
    flags = ["--data", "synthetic", "--crop", "96", "--train-scale", "96", "--batch-size", "8"]
    report = profile(tmp_path / "out", *flags)
    assert report["verdict"]["bound"] == "compute"
    assert report["stages"]["training"] is None
