"""train.py from its command line: whole runs, killed runs, ranks, and everything that a user can get wrong."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from engine.checkpoint import load
from tests.support.images import photo_folder
from tests.support.launch import ROOT, SMALL, assert_same_weights, results_of, run


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of eight steps."""
    out = tmp_path_factory.mktemp("short")
    run(*SMALL, "--steps", "8", "--out", str(out))
    return out


def test_a_run_leaves_everything_it_promises(short_run):
    checkpoint = load(short_run / "last.pt")
    assert (checkpoint.steps, checkpoint.samples_seen, checkpoint.arch, checkpoint.crop) == (8, 96, "A", 32)
    assert checkpoint.classes == list("0123456789")
    assert yaml.safe_load((short_run / "config.yaml").read_text()) == checkpoint.config
    records = [json.loads(line) for line in (short_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    events = EventAccumulator(str(short_run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Images("train/images")] == [1]
    assert (short_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_with_a_fourth_channel_the_run_is_the_same_up_to_rounding(short_run, tmp_path):
    run(*SMALL, "--pad-channels", "--steps", "4", "--out", str(tmp_path))
    losses, expected = (
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()[:4]]
        for out in (tmp_path, short_run)
    )
    assert losses == pytest.approx(expected, rel=1e-3)
    weights, plain = load(tmp_path / "last.pt").model, load(short_run / "last.pt").model
    assert {name: weight.shape for name, weight in weights.items()} == {n: w.shape for n, w in plain.items()}


def test_kill_9_at_a_random_step_and_resume_is_bit_identical(short_run, tmp_path):
    out = tmp_path / "killed"
    flags = [*SMALL, "--steps", "8", "--checkpoint-minutes", "0", "--out", str(out)]
    victim = subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wanted = f"step {random.randint(2, 6)}/8"
    assert victim.stderr
    for line in victim.stderr:
        if line.startswith(wanted):
            break
    time.sleep(random.random() * 0.2)  # in a step, or while a checkpoint is being written
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert load(out / "last.pt").steps < 8

    done = run(*flags)
    assert results_of(done)["resumed"]
    assert "going on from" in done.stderr
    assert_same_weights(short_run / "last.pt", out / "last.pt")
    records = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records == list(range(1, 9)), "no record twice, none lost"
    assert not list(out.glob(".*.tmp"))


def test_a_complete_run_started_again_says_so_and_changes_nothing(short_run):
    before = (short_run / "last.pt").read_bytes()
    done = run(*SMALL, "--steps", "8", "--out", str(short_run))
    assert "this run is complete" in done.stderr
    assert results_of(done)["steps"] == 8
    assert (short_run / "last.pt").read_bytes() == before


def test_resume_never_moves_the_earlier_run_aside(short_run, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(short_run, out)
    done = run(*SMALL, "--steps", "1", "--out", str(out), "--resume", "never")
    assert not results_of(done)["resumed"]
    assert load(out / "last.pt").steps == 1
    assert load(out / "earlier-1/last.pt").steps == 8


@pytest.mark.slow
def test_a_checkpoint_from_elsewhere_moves_the_run_in_out_aside(short_run, tmp_path):
    out = tmp_path / "another"
    shutil.copytree(short_run, out)
    flags = [*SMALL, "--out", str(out), "--resume"]
    run(*flags, str(short_run / "last.pt"), "--steps", "9")
    assert load(out / "last.pt").steps == 9
    assert load(out / "earlier-1/last.pt").steps == 8
    run(*flags, str(out / "last.pt"), "--steps", "10")
    assert load(out / "last.pt").steps == 10
    assert not (out / "earlier-2").exists(), "a checkpoint of its own"


@pytest.mark.slow
def test_resume_from_a_path_notes_what_changed(short_run, tmp_path):
    flags = [*SMALL, "--steps", "9", "--out", str(tmp_path / "new"), "--resume", str(short_run / "last.pt")]
    done = run(*flags, "--lr", "0.001", "--weight-decay", "0", "--precision", "fp16")
    assert results_of(done)["steps"] == 9
    for note in ("lr was 0.01 until now and is 0.001", "weight_decay was 0.0005 until now and is 0.0"):
        assert f"note: {note} from here on" in done.stderr
    checkpoint = load(tmp_path / "new/last.pt")
    assert checkpoint.optimizer["param_groups"][0]["lr"] == 0.001
    assert checkpoint.optimizer["param_groups"][0]["weight_decay"] == 0
    assert checkpoint.scaler["scale"] > 1


# Without dropout, whose masks differ between numbers of ranks; and at a rate at which the loss falls smoothly: where it
# jumps, a difference in the last bit grows a thousandfold within three steps.
SMOOTH = [*SMALL, "--dropout", "0", "--lr", "0.001"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Six steps on two ranks."""
    out = tmp_path_factory.mktemp("ranks") / "six"
    done = run(*SMOOTH, "--steps", "6", "--out", str(out), ranks=2, script="tests/support/programs/worker.py")
    assert results_of(done)["different_weights"] == 1
    return out


@pytest.mark.slow
def test_two_ranks_resumed_on_one_go_on_alike(two_ranks, tmp_path):
    out = tmp_path / "out"
    flags = [*SMOOTH, "--out", str(out)]
    run(*flags, "--steps", "3", ranks=2)
    done = run(*flags, "--steps", "6")
    assert "note: ranks were 2 until now and are 1 from here on; the batches and dropout stay" in done.stderr
    uninterrupted, resumed = load(two_ranks / "last.pt"), load(out / "last.pt")
    assert resumed.samples_seen == uninterrupted.samples_seen == 72
    for name, weight in uninterrupted.model.items():
        error = (weight - resumed.model[name]).norm() / weight.norm().clamp(min=1e-3)
        assert error < 1e-4, name


_ALL_STATE = ["--batch-norm", "--ema", "0.8"]


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batch", "extras"), [("4", _ALL_STATE), ("2", _ALL_STATE), ("4", [])])
def test_three_ranks_stopped_and_resumed_are_bit_identical_with_dropout(tmp_path, micro_batch, extras):
    """With accumulation and without: DDP's graph is static only without, and chooses its buckets later."""
    flags = [*SMALL, "--micro-batch", micro_batch, *extras]
    done = run(
        *flags, "--steps", "4", "--out", str(tmp_path / "whole"), ranks=3, script="tests/support/programs/worker.py"
    )
    assert results_of(done)["different_weights"] == 1
    for steps in ("2", "4"):
        run(*flags, "--steps", steps, "--out", str(tmp_path / "parts"), ranks=3)
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.slow
def test_accumulation_over_ranks_equals_one_rank(two_ranks, tmp_path):
    flags = [*SMOOTH, "--steps", "6"]
    run(*flags, "--micro-batch", "3", "--out", str(tmp_path), ranks=2)
    reference, accumulated = load(two_ranks / "last.pt"), load(tmp_path / "last.pt")
    for name, weight in reference.model.items():
        assert (weight - accumulated.model[name]).norm() / weight.norm().clamp(min=1e-3) < 1e-4, name


@pytest.mark.parametrize(("at_most", "passes", "size"), [(5, 3, 4), (12, 1, 12), (100, 1, 12), (7, 2, 6)])
def test_micro_batch_is_the_largest_divisor_that_it_allows(tmp_path, capsys, at_most, passes, size):
    assert train.main([*SMALL, "--micro-batch", str(at_most), "--steps", "1", "--out", str(tmp_path)]) == 0
    assert f"batch 12 = 1 ranks × {passes} passes × {size} images" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["bf16", "fp16"])
def test_compressed_gradients_keep_ranks_identical_and_close_to_uncompressed(two_ranks, tmp_path, compression):
    flags = [*SMOOTH, "--steps", "6", "--grad-compression", compression]
    done = run(*flags, "--out", str(tmp_path), ranks=2, script="tests/support/programs/worker.py")
    assert results_of(done)["different_weights"] == 1
    reference, compressed = load(two_ranks / "last.pt"), load(tmp_path / "last.pt")
    name = "features.0.weight"
    error = (reference.model[name] - compressed.model[name]).norm() / reference.model[name].norm()
    assert 0 < error < 1e-2


@pytest.mark.slow
def test_compiled_on_two_ranks_follows_eager(two_ranks, tmp_path):
    flags = [*SMOOTH, "--steps", "6", "--compile"]
    done = run(*flags, "--out", str(tmp_path), ranks=2, script="tests/support/programs/worker.py")
    result = results_of(done)
    assert result["compiled"]
    assert result["different_weights"] == 1
    reference, compiled = load(two_ranks / "last.pt"), load(tmp_path / "last.pt")
    for name, weight in reference.model.items():
        assert (weight - compiled.model[name]).norm() / weight.norm().clamp(min=1e-3) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 8])
def test_d_on_digits_loads_into_torchvisions_vgg16(tmp_path, ranks):
    flags = ["--arch", "D", "--data", "digits", "--steps", "4", "--out", str(tmp_path)]
    done = run(*flags, ranks=ranks, script="tests/support/programs/worker.py")
    assert results_of(done)["different_weights"] == 1
    reference = torchvision.models.vgg16(num_classes=10)
    reference.avgpool = torch.nn.Identity()
    reference.classifier[0] = torch.nn.Linear(512, 4096)
    reference.load_state_dict(load(tmp_path / "last.pt").model)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("data") / "photos", train=13, val=7, classes=3)


@pytest.mark.slow
def test_validation_is_exact_on_any_number_of_ranks(photos, tmp_path):
    """13 training and 7 validation photographs: batches straddle epochs, validation batches are padded."""
    flags = ["--arch", "A", "--data", str(photos), "--crop", "32", "--train-scale", "32-64", "--batch-size", "6"]
    flags += ["--epochs", "2", "--schedule", "step", "--dropout", "0", "--lr", "0.001"]
    results = {}
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        results[ranks] = results_of(run(*flags, "--out", str(out), ranks=ranks))
        history = load(out / "last.pt").history
        assert [entry["images"] for entry in history] == [7, 7]
        assert results[ranks]["steps"] == 5, "26 samples in batches of 6"
    assert results[3]["top1"] == results[1]["top1"]
    assert results[3]["top5"] == results[1]["top5"] == 1.0
    assert results[3]["validation_loss"] == pytest.approx(results[1]["validation_loss"], rel=1e-4)


@pytest.mark.slow
def test_scanning_waits_for_rank_0_and_its_errors_reach_all(photos, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy, ignore=shutil.ignore_patterns(".vgg-manifest"))
    flags = ["--arch", "A", "--data", str(copy), "--crop", "32", "--train-scale", "32", "--batch-size", "6"]
    done = run(*flags, "--steps", "1", "--out", str(tmp_path / "out"), ranks=2)
    assert done.stderr.count("scanning 20 files") == 1
    shutil.rmtree(copy / "val/class1")
    done = run(*flags, "--steps", "2", "--out", str(tmp_path / "out"), ranks=2, check=False)
    assert done.returncode == 2
    assert done.stderr.count("classes differ: class1 in train/ but not in val/") == 1


# ---- what a user can get wrong -----------------------------------------------------------------------------------


def fails(capsys, *flags: str, code: int = 2) -> str:
    """Run main() in this process; the one line that it says."""
    assert train.main(list(flags)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "F"], "invalid choice 'F'"),
        (["--crop", "100"], "--crop 100: must be a multiple of 32"),
        (["--data", "/no/such/folder"], "--data /no/such/folder: no such folder"),
        (["--decoder", "gpu"], "--decoder gpu: needs a GPU"),
        (["--decoder", "split"], "--decoder split: needs a GPU"),
        (["--device", "cuda"], "--device cuda: torch finds no GPU here"),
        (["--resume", "no.pt"], "no.pt: no such file"),
        (["--out", "/dev/null/run"], "--out /dev/null/run: cannot be written"),
    ],
)
def test_wrong_flags(capsys, tmp_path, flags, message):
    assert message in fails(capsys, *SMALL, "--steps", "1", "--out", str(tmp_path / "out"), "--device", "cpu", *flags)
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_divide_among_ranks(tmp_path):
    flags = [*SMALL, "--batch-size", "100", "--steps", "1", "--out", str(tmp_path)]
    done = run(*flags, ranks=3, check=False)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: --batch-size 100 does not divide among 3 ranks; run on a number of ranks that divides it, or take a "
        "multiple of 3"
    ]


def test_class_folders_that_are_empty_or_missing(capsys, tmp_path, photos):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    flags = [*SMALL, "--data", str(copy), "--train-scale", "32", "--crop", "32", "--out", str(tmp_path / "out")]
    for image in (copy / "train/class2").iterdir():
        image.unlink()
    assert "class2: class folder without an image" in fails(capsys, *flags)
    shutil.rmtree(copy / "train/class2")
    assert "classes differ: class2 in val/ but not in train/" in fails(capsys, *flags)
    shutil.rmtree(copy / "val")
    assert "has no folder val/" in fails(capsys, *flags)


def test_a_text_file_as_checkpoint(capsys, tmp_path):
    (tmp_path / "last.pt").write_text("hello")
    message = fails(capsys, *SMALL, "--out", str(tmp_path))
    assert re.search(r"last\.pt: damaged, or not a checkpoint of this trainer$", message)
    assert (tmp_path / "last.pt").read_text() == "hello"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "B"], "was trained with --arch A, this run asks for B"),
        (["--crop", "64", "--train-scale", "64"], "was trained with --crop 32, this run asks for 64"),
        (
            ["--data", "synthetic", "--crop", "32", "--train-scale", "32"],
            "it knows 10 classes, the data set has 1000; choose another --out",
        ),
    ],
)
def test_a_checkpoint_of_another_network(capsys, short_run, flags, message):
    before = (short_run / "last.pt").stat().st_mtime_ns
    assert message in fails(capsys, *SMALL, "--out", str(short_run), "--steps", "20", *flags)
    assert (short_run / "last.pt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_data_that_changed_since_the_checkpoint(capsys, tmp_path, photos):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(photos, copy)
    flags = ["--arch", "A", "--data", str(copy), "--crop", "32", "--train-scale", "32", "--batch-size", "4"]
    flags += ["--schedule", "step", "--out", str(out)]
    assert train.main([*flags, "--steps", "1"]) == 0
    (copy / "train/class0/000.JPEG").unlink()
    capsys.readouterr()
    assert "the data set changed since the checkpoint was written" in fails(capsys, *flags, "--steps", "2")
    assert train.main([*flags, "--steps", "2", "--allow-changed-data"]) == 0
    assert load(out / "last.pt").steps == 2


def test_a_gpu_that_is_too_small_is_said_to_be(capsys, tmp_path, monkeypatch):
    from engine.training.step import TrainStep

    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainStep, "__call__", too_much)
    assert "--micro-batch 6" in fails(capsys, *SMALL, "--out", str(tmp_path), code=1)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(capsys, tmp_path):
    flags = [*SMALL, "--out", str(tmp_path)]
    assert train.main([*flags, "--steps", "2"]) == 0
    capsys.readouterr()
    message = fails(capsys, *flags, "--steps", "20", "--lr", "1e9", "--checkpoint-minutes", "0", code=1)
    assert re.search(r"the loss is (nan|inf) after step \d+|the weights are not finite", message)
    checkpoint = load(tmp_path / "last.pt")
    assert all(weight.isfinite().all() for weight in checkpoint.model.values())
    assert f"the last good checkpoint is {tmp_path / 'last.pt'}" in message
