"""Images that turn out at run time not to be decodable: the run goes on, the same on any number of ranks."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from common.ranks import Ranks
from engine.checkpoint import load
from engine.config import parse_args
from engine.data import open_training_data
from engine.precision import Precision
from tests.support.images import photo_folder
from tests.support.launch import results_of, run

FLAGS = ["--arch", "A", "--crop", "32", "--train-scale", "32-48", "--batch-size", "6", "--epochs", "3"]
FLAGS += ["--schedule", "step", "--dropout", "0", "--lr", "0.001"]


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> Path:
    """A folder that was good when it was scanned, but for two images of val."""
    folder = photo_folder(tmp_path_factory.mktemp("data") / "photos", train=25, val=9)
    (folder / "val/class0/empty.jpg").write_bytes(b"")
    (folder / "val/class1/text.png").write_text("text")
    (folder / "val/class1/README.txt").write_text("not an image, and not meant to be one")
    run(*FLAGS, "--data", str(folder), "--steps", "1", "--out", str(folder.parent / "out"))
    return folder


@pytest.fixture
def damaged(scanned, tmp_path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(scanned, folder)  # with the folders' times: no reason for a new scan
    os.truncate(folder / "train/class0/004.JPEG", 0)
    (folder / "train/class1/011.JPEG").write_bytes(b"garbage" * 100)
    cut = folder / "train/class0/016.JPEG"
    os.truncate(cut, cut.stat().st_size // 2)
    (folder / "val/class1/003.JPEG").write_bytes(b"")
    return folder


@pytest.mark.slow
def test_training_and_validation_go_on_without_them(damaged, tmp_path):
    results = {}
    for ranks in (0, 2):
        out = tmp_path / str(ranks)
        done = run(*FLAGS, "--data", str(damaged), "--max-bad-images", "3", "--out", str(out), ranks=ranks)
        assert "scanning" not in done.stderr, "the damage came after the scan"
        results[ranks] = results_of(done)
        for name in ("004", "011", "016", "003"):
            assert f"{name}.JPEG cannot be decoded" in done.stderr
        if not ranks:
            assert done.stderr.count("cannot be decoded (") == 4, "each once"
        history = load(out / "last.pt").history
        assert [(entry["images"], entry["lost"]) for entry in history] == [(11, 3)] * 3
        assert all(entry["top1"] <= 8 / 11 for entry in history)
    quarantine = (damaged / ".vgg-manifest/quarantine.tsv").read_text()
    for name in ("train/class0/004.JPEG", "train/class1/011.JPEG", "train/class0/016.JPEG", "val/class1/003.JPEG"):
        assert f"{name}\t" in quarantine

    alone, together = load(tmp_path / "0/last.pt"), load(tmp_path / "2/last.pt")
    for name, weight in alone.model.items():
        error = (weight - together.model[name]).norm() / weight.norm().clamp(min=1e-3)
        assert error < 1e-4, name


def test_too_many_of_them_end_the_run(damaged, tmp_path):
    flags = [*FLAGS, "--data", str(damaged), "--max-bad-images", "2", "--out", str(tmp_path / "out")]
    done = run(*flags, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "3 images cannot be decoded, more than the 2 that --max-bad-images allows" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_three_ranks_count_as_one_does(damaged, tmp_path):
    for ranks in (0, 3):
        out = tmp_path / str(ranks)
        run(*FLAGS, "--data", str(damaged), "--max-bad-images", "9", "--epochs", "1", "--out", str(out), ranks=ranks)
    alone, together = (load(tmp_path / f"{ranks}/last.pt").history for ranks in (0, 3))
    assert [(entry["images"], entry["lost"], entry["top1"]) for entry in alone] == [
        (entry["images"], entry["lost"], entry["top1"]) for entry in together
    ]
    assert (alone[0]["images"], alone[0]["lost"]) == (11, 3)


def test_a_list_that_cannot_be_written_is_warned_of_once_and_ends_nothing(damaged, capsys):
    ranks = Ranks(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"), patient_group=None
    )
    config = parse_args([*FLAGS, "--data", str(damaged), "--max-bad-images", "9"])
    data = open_training_data(config, ranks, Precision("fp32", "cpu"))
    (damaged / ".vgg-manifest/quarantine.tsv").unlink()
    (damaged / ".vgg-manifest/quarantine.tsv").mkdir()  # in the way, since permissions do not stop root
    batches = data.train_batches(0)
    for _ in range(8):
        next(batches)
    output = capsys.readouterr().err
    assert output.count("going on without it") == 3
    assert output.count("quarantine.tsv cannot be added to (Is a directory)") == 1


@pytest.mark.seconds
def test_a_header_that_is_cut_does_not_end_the_process_in_a_large_batch(tmp_path):
    folder = photo_folder(tmp_path / "photos", train=128, val=2)
    config = parse_args(
        [*FLAGS, "--data", str(folder), "--batch-size", "128", "--out", str(tmp_path / "out"), "--max-bad-images", "1"]
    )
    ranks = Ranks(
        rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"), patient_group=None
    )
    data = open_training_data(config, ranks, Precision("fp32", "cpu"))
    bad = folder / "train/class0/064.JPEG"
    os.truncate(bad, 300)
    images, _ = next(data.train_batches(0))
    assert images.shape == (128, 3, 32, 32)
    assert len(data.lost["train"].rows) == 1
