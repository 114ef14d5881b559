"""The loop's ends: what fails in a run, what is saved first, and how it goes on."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from PIL import Image
from torch import nn

import common.ranks
import engine.training.assembly
import engine.training.clock
import engine.training.resume
import perf.costs
import train
from common.errors import TrainingError
from common.lock import FolderLock
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint, load
from engine.config import parse_args
from engine.evaluation.accuracy import Accuracy
from engine.monitoring import dashboards, runlog
from engine.monitoring.runlog import RunLog
from engine.training import preemption, trainer
from engine.training.assembly import too_little_memory
from engine.training.clock import Clock, TimedBatches, process_seconds
from engine.training.resume import claim_out
from engine.training.trainer import samples_of_other_data
from model.dropout import Dropout
from pipeline.dali.loader import DaliLoader
from tests.engine.test_accuracy import RANKS
from tests.support.launch import SMALL, assert_same_weights, run


def network_of(config, *, classes, device):
    """A network with all kinds of state whose steps take milliseconds."""
    torch.manual_seed(config.seed)
    layers = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12), Dropout(0.5), nn.Linear(12, classes)
    return nn.Sequential(*layers).to(device)


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(engine.training.assembly, "network_of", network_of)
    monkeypatch.setattr(engine.training.resume, "check_weights", lambda *_: None)  # it is no VGG


@pytest.fixture
def unseen(monkeypatch):
    """Without the pictures, which take seconds."""
    monkeypatch.setattr(runlog, "draw_curves", lambda _: None)
    monkeypatch.setattr(runlog, "draw_confusion", lambda *_: np.zeros((2, 2, 3), dtype=np.uint8))


def write_images(root: Path, classes: list[str], train_images: int, val_images: int = 2) -> Path:
    """So many images of each class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", val_images)):
        for name in classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 44, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve training images and four of validation."""
    return write_images(tmp_path_factory.mktemp("images"), ["one", "two"], 6)


def flags_of(folder: Path, out: Path, *flags: str) -> list[str]:
    own = ["--arch", "A", "--data", str(folder), "--crop", "32", "--train-scale", "36", "--batch-size", "4"]
    return [*own, "--schedule", "step", "--log-every", "1", "--ema", "0.9", "--out", str(out), *flags]


# ---- what shows a run ------------------------------------------------------------------------------------------------


@pytest.mark.seconds
def test_class_names_that_cannot_be_drawn_as_they_are(tmp_path, capsys):
    names = [os.fsdecode(b"caf\xe9"), "$^$", "two\nlines", "\x1b[31m"]
    folder = write_images(tmp_path / "data", names, 2)
    out = tmp_path / "out $^$"
    assert train.main(flags_of(folder, out, "--epochs", "1")) == 0
    assert "warning" not in capsys.readouterr().err
    assert len(load(out / "last.pt").history) == 1
    assert (out / "curves.png").exists()
    assert parse_args(["--recipe", str(out / "config.yaml")]).out == out


def test_pictures_and_dashboards_only_warn_and_come_after_the_checkpoint(folder, tmp_path, capsys, monkeypatch):
    """What is written beside a picture was begun before it."""
    saved = []

    def fail(*_, **__):
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        saved.append((tmp_path / "best.pt").exists() and len(load(tmp_path / "last.pt").history))
        raise ValueError("no\nfont")

    monkeypatch.setattr(runlog, "draw_confusion", fail)
    monkeypatch.setattr(runlog, "draw_curves", fail)
    monkeypatch.setattr(dashboards.TensorBoard, "scalars", lambda *_: 1 / 0)
    assert train.main(flags_of(folder, tmp_path, "--epochs", "2")) == 0
    assert saved == [1, 2, 2]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: TensorBoard's log cannot be written (division by zero); the training goes on",
        "warning: the picture of confusions cannot be written (no font); the training goes on",
        "warning: curves.png cannot be written (no font); the training goes on",
    ]


@pytest.mark.usefixtures("unseen")
def test_a_dashboard_that_fails_again_and_again_is_not_tried_any_more(folder, tmp_path, monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        raise ValueError

    monkeypatch.setattr(dashboards.TensorBoard, "scalars", fail)
    monkeypatch.setattr(dashboards.TensorBoard, "picture", fail)
    assert train.main(flags_of(folder, tmp_path, "--steps", "6")) == 0
    assert len(tries) == 3


@pytest.mark.usefixtures("unseen")
def test_a_tensorboard_that_cannot_start_and_a_terminal_that_is_gone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dashboards, "SummaryWriter", lambda *_, **__: 1 / 0)

    def gone(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(runlog, "say", gone)
    assert train.main(flags_of(folder, tmp_path, "--steps", "4")) == 0
    assert len(load(tmp_path / "last.pt").history) == 1


@pytest.mark.usefixtures("unseen")
def test_lines_that_the_disk_refuses_are_written_later(folder, tmp_path, capsys, monkeypatch):
    write, calls = os.write, []

    def refusing(descriptor, content):
        calls.append(content)
        if len(calls) in (1, 2):
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:50])  # never more at a time

    monkeypatch.setattr(runlog.os, "write", refusing)
    assert train.main(flags_of(folder, tmp_path, "--steps", "4")) == 0
    monkeypatch.setattr(runlog.os, "write", write)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 1), ("train", 2), ("train", 3), ("validation", 3), ("train", 4)
    ]  # fmt: skip
    warning = "warning: metrics.jsonl cannot be written (No space left on device); the training goes on"
    assert capsys.readouterr().err.count(warning) == 1


# ---- the rate and the random numbers of each step ---------------------------------------------------------------------


@pytest.fixture
def updates(monkeypatch) -> list[dict]:
    """The optimizer's settings in each of its updates."""
    seen: list[dict] = []
    step = torch.optim.SGD.step

    def noting(self, *args, **kwargs):
        (group,) = self.param_groups
        seen.append({name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "dampening")})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noting)
    return seen


def half_cosine(step: int) -> float:
    """Three epochs of three steps, the first of them warm-up; as the middle of each step has it."""
    epoch = (step + 0.5) / 3
    return 0.02 * epoch if epoch < 1 else 0.01 * (1 + np.cos(np.pi * (epoch - 1) / 2))


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--schedule", "step", "--step-epochs", "2", "--epochs", "5"], [0.02] * 6 + [0.002] * 6 + [0.0002] * 3),
        (["--schedule", "cosine", "--warmup-epochs", "1", "--epochs", "3"], [half_cosine(step) for step in range(9)]),
        # No better top-1 after the second epoch: plateaus after the fourth, sixth and eighth, and the end after the tenth.
        (
            ["--schedule", "plateau", "--plateau-epochs", "2"],
            [0.02] * 12 + [0.002] * 6 + [0.0002] * 6 + [0.00002] * 6,
        ),
    ],
    ids=["step", "cosine", "plateau"],
)
def test_every_step_is_taken_at_the_rate_that_the_schedule_says(
    folder, tmp_path, monkeypatch, updates, flags, expected
):
    """Three steps an epoch; a run that is resumed in the middle of one has the rates of one that is not, and the flags it is
    given now."""
    results = iter([0.4, 0.5, *[0.5, 0.3] * 10])
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_, **__: Accuracy(loss=1.0, top1=next(results), top5=1.0, images=4, lost=0)
    )
    command = flags_of(folder, tmp_path, "--lr", "0.02", *flags)
    assert train.main([*command, "--momentum", "0.7", "--weight-decay", "0.002", "--steps", "4"]) == 0
    assert train.main([*command, "--momentum", "0.8", "--weight-decay", "0.001"]) == 0
    assert [update["lr"] for update in updates] == pytest.approx(expected)
    settings = [(update["momentum"], update["weight_decay"]) for update in updates]
    assert settings == [(0.7, 0.002)] * 4 + [(0.8, 0.001)] * (len(expected) - 4)
    assert {(update["nesterov"], update["dampening"]) for update in updates} == {(False, 0)}
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [record["lr"] for record in records if record["kind"] == "train"] == pytest.approx(expected)


@pytest.fixture
def samples(monkeypatch) -> list[int]:
    """The number of the first sample at each forward pass in training, as dropout has it."""
    seen: list[int] = []

    class Noting(Dropout):
        def forward(self, x):
            if self.training:
                seen.append(int(self.first_sample))
            return super().forward(x)

    def noting_network_of(config, *, classes, device):
        network = network_of(config, classes=classes, device=device)
        network[3] = Noting(0.5)
        return network

    monkeypatch.setattr(engine.training.assembly, "network_of", noting_network_of)
    return seen


@pytest.mark.usefixtures("unseen")
def test_dropout_hears_the_number_of_each_sample(folder, tmp_path, monkeypatch, samples):
    """On each rank and in each pass of a step, in a run that is resumed too."""
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: Accuracy(loss=1.0, top1=0.5, top5=1.0, images=4, lost=0))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for rank in (0, 1):
            ranks = dataclasses.replace(RANKS, rank=rank, local_rank=rank, world_size=2, local_world_size=2)
            monkeypatch.setattr(
                common.ranks, "ranks_of_this_run", lambda _, ranks=ranks, **__: contextlib.nullcontext(ranks)
            )
            out = tmp_path / f"{rank}"
            out.mkdir()
            found = []
            for steps in ("4", "12"):
                if rank == 0 or steps == "12":  # rank 0 writes the checkpoints
                    samples.clear()
                    assert (
                        train.main(flags_of(folder, out, "--batch-size", "8", "--micro-batch", "2", "--steps", steps))
                        == 0
                    )
                    warm_ups = 2  # of several ranks
                    found += samples[warm_ups:]
            assert found == [8 * step + 4 * rank + number for step in range(12) for number in (0, 2)]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("unseen")
def test_a_resumed_run_mixes_images_as_one_that_is_not(folder, tmp_path):
    """Bit for bit, whatever torch's generator has given out; in two passes a step, and not as without mixing."""
    flags = flags_of(folder, tmp_path / "whole", "--mixup", "0.2", "--cutmix", "1", "--micro-batch", "2")
    assert train.main([*flags, "--steps", "6"]) == 0
    flags += ["--out", str(tmp_path / "parts")]
    assert train.main([*flags, "--steps", "4"]) == 0
    torch.rand(3)
    assert train.main([*flags, "--steps", "6"]) == 0
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
    plain = flags_of(folder, tmp_path / "plain", "--micro-batch", "2", "--steps", "6")
    assert train.main(plain) == 0
    losses = {
        name: [
            record["loss"]
            for record in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if record["kind"] == "train"
        ]
        for name in ("whole", "parts", "plain")
    }
    assert losses["whole"] == losses["parts"] != losses["plain"]


# ---- what ends a run -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (TrainingError("the bucket is closed"), "the bucket is closed"),
        (MemoryError(), "this machine's memory is used up"),
        (OSError(5, "Input/output error"), "the system refuses: Input/output error"),
    ],
)
def test_a_loader_that_fails_in_the_middle_of_a_step_loses_nothing(
    folder, tmp_path, capsys, monkeypatch, failure, sentence
):
    """In the second of two passes: batch normalisation has seen the first one by then."""
    flags = flags_of(folder, tmp_path / "run", "--steps", "7", "--micro-batch", "2")
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    deliver, asked = DaliLoader.__next__, []

    def failing(self):
        asked.append(1)
        if len(asked) == 12:  # three steps of two, a validation of two batches, a step and a half
            raise failure
        return deliver(self)

    monkeypatch.setattr(DaliLoader, "__next__", failing)
    assert train.main(flags) == 1
    error = capsys.readouterr().err.splitlines()
    assert sentence in error[-1]
    assert "saved the state after step 4" in error
    assert load(tmp_path / "run/last.pt").steps == 4
    monkeypatch.setattr(DaliLoader, "__next__", deliver)
    assert train.main(flags) == 0
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "run/last.pt")


@pytest.mark.usefixtures("unseen")
def test_too_many_lost_images_end_a_run_whose_state_is_saved(folder, tmp_path, monkeypatch):
    def check(self, _):
        if self._steps == 2:
            raise TrainingError("too many")

    monkeypatch.setattr(trainer.Trainer, "_check_lost_images", check)
    assert train.main(flags_of(folder, tmp_path, "--steps", "4")) == 1
    assert load(tmp_path / "last.pt").steps == 2


@pytest.mark.usefixtures("unseen")
def test_an_error_in_the_update_saves_nothing(folder, tmp_path, monkeypatch):
    """Some weights may be new and others old."""
    step, calls = torch.optim.SGD.step, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", failing)
    assert train.main(flags_of(folder, tmp_path, "--steps", "4")) == 1
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 75), (signal.SIGXCPU, 75), (signal.SIGINT, 130)])
def test_a_signal_in_training_saves(folder, tmp_path, capfd, monkeypatch, number, code):
    advance, steps = RunLog.advance, []

    def signalled(self):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        advance(self)

    monkeypatch.setattr(RunLog, "advance", signalled)
    flags = flags_of(folder, tmp_path / "parts", "--steps", "5")
    assert train.main(flags) == code
    assert load(tmp_path / "parts/last.pt").steps == 2
    assert "Traceback" not in capfd.readouterr().err
    assert train.main(flags) == 0
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.usefixtures("unseen")
def test_ctrl_c_twice_in_a_checkpoint_leaves_it_whole(folder, tmp_path, capfd, monkeypatch):
    save = torch.save

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)

    monkeypatch.setattr(checkpoints.torch, "save", interrupted)
    assert train.main(flags_of(folder, tmp_path, "--steps", "5", "--checkpoint-minutes", "0")) == 130
    assert load(tmp_path / "last.pt").steps == 1
    error = capfd.readouterr().err
    assert "cannot write" not in error
    assert "Traceback" not in error


# ---- checkpoints beside the training ---------------------------------------------------------------------------------


class SlowWriting:
    """Whose checkpoint after the third step, at an epoch's end, is written no sooner than the run says."""

    def __init__(self, monkeypatch) -> None:
        self.may_write, self.steps = threading.Event(), 0
        self.written: list[int] = []
        save, advance = checkpoints.save, RunLog.advance
        self.after_step: dict[int, Callable[[], None]] = {}
        """What is done after a step, by its number."""

        def slow(checkpoint, *args, **named):
            if checkpoint.steps == 3:
                assert self.may_write.wait(60), "the training waits for it"
            save(checkpoint, *args, **named)
            self.written.append(checkpoint.steps)

        def counting(log) -> None:
            self.steps += 1
            self.after_step.get(self.steps, lambda: None)()
            advance(log)

        monkeypatch.setattr(checkpoints, "save", slow)
        monkeypatch.setattr(RunLog, "advance", counting)

    def write_soon(self) -> None:
        """While the training's thread waits, it is to be hoped."""
        threading.Timer(0.5, self.may_write.set).start()


@pytest.fixture
def slow_writing(monkeypatch, unseen) -> SlowWriting:
    return SlowWriting(monkeypatch)


def test_the_training_goes_on_while_a_checkpoint_is_written_which_has_the_state_of_its_step(
    folder, tmp_path, slow_writing
):
    slow_writing.may_write.set()
    assert train.main(flags_of(folder, tmp_path / "whole", "--steps", "3")) == 0
    slow_writing.may_write.clear()
    slow_writing.after_step[3 + 5] = slow_writing.write_soon  # else it would not be written
    assert train.main(flags_of(folder, tmp_path / "parts", "--steps", "5")) == 0
    assert slow_writing.written == [3, 3, 5], "the end waits for the one before"
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/step-00000003.pt")
    whole, part = load(tmp_path / "whole/last.pt"), load(tmp_path / "parts/step-00000003.pt")
    assert part.history == whole.history
    assert (tmp_path / "parts/best.pt").samefile(tmp_path / "parts/step-00000003.pt")
    assert load(tmp_path / "parts/last.pt").steps == 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_waits_for_the_checkpoint_that_is_being_written(folder, tmp_path, slow_writing, number, code):
    def signalled() -> None:
        os.kill(os.getpid(), number)
        slow_writing.write_soon()

    slow_writing.after_step[4] = signalled
    assert train.main(flags_of(folder, tmp_path, "--steps", "9")) == code
    assert slow_writing.written == [3, 4]
    assert load(tmp_path / "last.pt").steps == 4


def test_a_second_ctrl_c_waits_for_the_checkpoint_that_is_being_written(folder, tmp_path, slow_writing, monkeypatch):
    monkeypatch.setattr(preemption, "_SECONDS_OF_ONE_INTERRUPT", 0)

    def interrupted() -> None:
        slow_writing.write_soon()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    slow_writing.after_step[4] = interrupted
    assert train.main(flags_of(folder, tmp_path, "--steps", "9")) == 130
    assert (slow_writing.steps, slow_writing.written) == (4, [3])
    assert load(tmp_path / "last.pt").steps == 3


def test_an_error_waits_for_the_checkpoint_that_is_being_written(folder, tmp_path, slow_writing, capsys):
    def fail() -> None:
        slow_writing.write_soon()
        raise TrainingError("of something else")

    slow_writing.after_step[4] = fail
    assert train.main(flags_of(folder, tmp_path, "--steps", "9")) == 1
    assert slow_writing.written == [3, 4]
    assert load(tmp_path / "last.pt").steps == 4
    assert capsys.readouterr().err.splitlines()[-2:] == ["saved the state after step 4", "error: of something else"]


def test_an_error_saves_although_the_checkpoint_that_was_being_written_has_failed(
    folder, tmp_path, slow_writing, capsys, monkeypatch
):
    save = torch.save

    def full_once(*args) -> None:
        monkeypatch.setattr(checkpoints.torch, "save", save)
        raise OSError(28, "No space left on device")

    def fail() -> None:
        slow_writing.write_soon()
        raise TrainingError("of something else")

    monkeypatch.setattr(checkpoints.torch, "save", full_once)
    slow_writing.after_step[4] = fail
    assert train.main(flags_of(folder, tmp_path, "--steps", "9")) == 1
    assert slow_writing.written == [4]
    assert capsys.readouterr().err.splitlines()[-2:] == ["saved the state after step 4", "error: of something else"]


def test_the_last_good_checkpoint_may_still_be_written(folder, tmp_path, slow_writing, capsys, monkeypatch):
    """Where a loss that is not finite ends the run, the sentence names it."""
    step = engine.training.assembly.TrainStep.__call__

    def diverging(*args, **named):
        loss = step(*args, **named)
        return loss * math.nan if slow_writing.steps == 3 else loss

    monkeypatch.setattr(engine.training.assembly.TrainStep, "__call__", diverging)
    slow_writing.after_step[4] = slow_writing.write_soon
    assert train.main(flags_of(folder, tmp_path, "--steps", "9")) == 1
    assert f"the last good checkpoint is {tmp_path}/last.pt" in capsys.readouterr().err
    assert slow_writing.written == [3]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("fault", ["disk", "weights"])
def test_what_goes_wrong_in_the_background_ends_the_run_with_the_next_step(
    folder, tmp_path, capsys, monkeypatch, fault
):
    """The third step's checkpoint fails during the fourth, which is not saved: disk or state are at fault."""
    may_fail = threading.Event()
    save, advance, write = checkpoints.save, RunLog.advance, torch.save
    assert train.main(flags_of(folder, tmp_path, "--steps", "2")) == 0

    def faulty(checkpoint, *args, **named):
        assert may_fail.wait(60)
        if fault == "weights":
            checkpoint.model["2.weight"][0] = math.nan
        save(checkpoint, *args, **named)

    def full_once(*_):
        monkeypatch.setattr(checkpoints.torch, "save", write)
        raise OSError(28, "No space left on device")

    def waiting(self):
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                may_fail.set()
                thread.join()
        advance(self)

    monkeypatch.setattr(checkpoints, "save", faulty)
    monkeypatch.setattr(RunLog, "advance", waiting)
    if fault == "disk":
        monkeypatch.setattr(checkpoints.torch, "save", full_once)
    capsys.readouterr()
    assert train.main(flags_of(folder, tmp_path, "--steps", "9")) == 1
    said = capsys.readouterr().err.splitlines()
    sentence = {
        "disk": f"cannot write a checkpoint to {tmp_path} (No space left on device); the last good one is",
        "weights": "the weights are not finite any more; the last good checkpoint is",
    }[fault]
    assert said[-1] == f"error: {sentence} {tmp_path}/last.pt"
    assert not any("saved the state" in line for line in said)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records) == 4
    assert load(tmp_path / "last.pt").steps == 2


def test_a_signal_while_the_last_curves_are_drawn_changes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "draw_curves", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(flags_of(folder, tmp_path, "--steps", "1")) == 0


# ---- how it goes on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "history", "images", "expected"),
    [
        (1050, [{"epoch": 10, "samples_seen": 1000}], 200, 2050),
        (1050, [{"epoch": 10, "samples_seen": 1000}], 20, 220),  # the eleventh is over
        (1050, [{"epoch": 10, "samples_seen": 1000}], 100, 1050),
        (1050, [{"epoch": 10}], 200, 2000),  # of an earlier version
        (30, [], 200, 30),
        (30, [], 20, 20),
        (220, [{"epoch": 10, "samples_seen": 1000}], 100, 1000),  # of a version that mixed up two changes
    ],
)
def test_samples_counted_in_another_data_set(seen, history, images, expected):
    fields = {field.name: None for field in dataclasses.fields(Checkpoint)}
    checkpoint = Checkpoint(**{**fields, "samples_seen": seen, "history": history})
    assert samples_of_other_data(checkpoint, images) == expected


@pytest.mark.usefixtures("unseen")
@pytest.mark.seconds
@pytest.mark.parametrize(
    ("images_and_steps", "at", "epochs"),
    [
        # Of each of two classes: an epoch of 4, 20 and 8 images.
        ([(2, 5), (10, 15), (4, 20)], [1, 2, 3, 4, 5, 10, 15, 17, 19], 9),
        # 20, then 16 and 14 while the second epoch lasts: 8 images of it were seen at the first change, 12 at the second.
        ([(10, 7), (8, 8), (7, 9)], [5, 9], 2),
    ],
)
def test_data_that_grow_and_shrink_are_validated_after_each_epoch(tmp_path, images_and_steps, at, epochs):
    folder, out = tmp_path / "data", tmp_path / "out"
    flags = flags_of(folder, out, "--allow-changed-data", "--epochs", "20")
    for images, steps in images_and_steps:
        write_images(folder, ["one", "two"], images)
        for path in folder.glob("train/*/*.png"):
            if int(path.stem) >= images:
                path.unlink()
        assert train.main([*flags, "--steps", str(steps)]) == 0
    validated = [
        record["step"]
        for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "validation"
    ]
    assert validated == at
    assert [entry["epoch"] for entry in load(out / "last.pt").history] == list(range(1, epochs + 1))


@pytest.mark.usefixtures("unseen")
def test_a_resumed_run_goes_on_with_the_scale_of_its_losses(folder, tmp_path):
    """The scaler counts the steps without an overflow since it last changed its scale."""
    scalers = []
    for name, parts in (("whole", ["4"]), ("parts", ["2", "4"])):
        flags = flags_of(folder, tmp_path / name, "--precision", "fp16")
        for steps in parts:
            assert train.main([*flags, "--steps", steps]) == 0
            scalers.append(load(tmp_path / name / "last.pt").scaler)
    whole, half_way, resumed = scalers
    assert resumed == whole != half_way


@pytest.mark.usefixtures("unseen")
def test_best_stays_the_best_when_a_run_goes_back(folder, tmp_path, monkeypatch):
    top1 = iter([0.5, 0.9, 0.7, 0.8, 0.95])
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_, **__: Accuracy(loss=1.0, top1=next(top1), top5=1.0, images=4, lost=0)
    )
    flags = flags_of(folder, tmp_path, "--keep", "9")
    assert train.main([*flags, "--epochs", "2"]) == 0
    assert load(tmp_path / "best.pt").steps == 6
    back = ["--resume", str(tmp_path / "step-00000003.pt")]
    assert train.main([*flags, *back, "--epochs", "3"]) == 0
    assert load(tmp_path / "best.pt").history[-1]["top1"] == 0.9, "not 0.7 or 0.8, which are better than 0.5"
    assert train.main([*flags, "--epochs", "4"]) == 0
    assert load(tmp_path / "best.pt").history[-1]["top1"] == 0.95


@pytest.mark.usefixtures("unseen")
def test_best_of_a_run_that_began_with_anothers_weights_is_its_own(folder, tmp_path, monkeypatch):
    """Stopped and resumed in between: what the other run has reached lies in the other's folder."""
    top1 = iter([0.9, 0.5, 0.6, 0.7])
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_, **__: Accuracy(loss=1.0, top1=next(top1), top5=1.0, images=4, lost=0)
    )
    other, own = tmp_path / "other", tmp_path / "own"
    assert train.main([*flags_of(folder, other), "--epochs", "1"]) == 0
    flags = flags_of(folder, own)
    assert train.main([*flags, "--epochs", "2", "--resume", str(other / "last.pt")]) == 0
    for epochs, best in (("3", 0.6), ("4", 0.7)):
        assert train.main([*flags, "--epochs", epochs]) == 0
        assert load(own / "best.pt").history[-1]["top1"] == best


@pytest.mark.usefixtures("unseen")
def test_a_run_whose_plateaus_are_used_up_says_what_goes_on(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: Accuracy(loss=1.0, top1=0.5, top5=1.0, images=4, lost=0))
    flags = [*flags_of(folder, tmp_path), "--schedule", "plateau"]
    for plateau_epochs, epochs in (("1", 5), ("2", 9)):
        assert train.main([*flags, "--plateau-epochs", plateau_epochs]) == 0
        assert len(load(tmp_path / "last.pt").history) == epochs
    capsys.readouterr()
    assert train.main([*flags, "--plateau-epochs", "2"]) == 0
    assert "this run is complete; --plateau-epochs 3 or more goes on" in capsys.readouterr().err
    assert train.main([*flags, "--plateau-epochs", "9", "--steps", "27"]) == 0
    assert "this run is complete; a larger --steps goes on" in capsys.readouterr().err


@pytest.mark.usefixtures("unseen")
def test_only_what_a_run_writes_is_moved_aside(folder, tmp_path, capsys):
    flags = flags_of(folder, tmp_path, "--steps", "3")
    assert train.main(flags) == 0
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb-id").write_text("x")
    left = {path.name for path in tmp_path.iterdir()} - {".lock"}
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "precious").write_text("x")
    os.rename(tmp_path / "tensorboard", tmp_path / "events")
    (tmp_path / "tensorboard").symlink_to(target)
    foreign = [
        "README",
        ".git",
        "step-5.pt",
        ".step-7.tmp",
        ".notes.tmp",
        "train",
        "events",
        "elsewhere",
        "best.pt.bak",
    ]
    for name in foreign[:6]:
        (tmp_path / name).write_text(name)
    (tmp_path / "best.pt.bak").write_text("x")
    (tmp_path / ".last.pt.abc_1234.tmp").write_text("half of one")
    (tmp_path / "earlier-1").symlink_to("nowhere")
    with FolderLock(tmp_path) as lock:
        claim_out(dataclasses.replace(parse_args(flags), resume="never"), None, lock)
    assert {path.name for path in tmp_path.iterdir()} == {*foreign, "earlier-1", "earlier-2", ".lock", "config.yaml"}
    assert {path.name for path in (tmp_path / "earlier-2").iterdir()} == left
    assert (target / "precious").read_text() == "x"
    (tmp_path / "config.yaml").write_text("lr: 1\narch: mine\n")
    assert train.main([*flags, "--resume", "never"]) == 2
    assert "its config.yaml is not a run's" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "lr: 1\narch: mine\n"


@pytest.mark.parametrize("out", ["{data}/train", "{data}/val/class0/run", "{data}/.."])
def test_a_run_does_not_write_among_the_images_nor_moves_them(tmp_path, capsys, out):
    data = write_images(tmp_path / "tensorboard", ["class0", "class1"], 2)
    before = sorted(tmp_path.rglob("*"))
    assert train.main(flags_of(data, Path(out.format(data=data)), "--resume", "never")) == 2
    assert "would be taken for each other; choose another folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_on_a_gpu_the_wait_is_what_passes_on_the_gpu():
    """Events made up: the GPU's clock moves by what is in `passes`, the host's does not count."""
    clock, made = [0.0], []

    class Event:
        def __init__(self):
            made.append(self)

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    def batches():
        for milliseconds in (5.0, 0.0, 20.0, 1.0):
            time.sleep(0.01)
            clock[0] += milliseconds
            yield torch.zeros(1), torch.zeros(1)

    timed = TimedBatches(batches(), make_event=Event)
    for expected in (0.005, 0.020, 0.001):
        next(timed)
        clock[0] += 100  # the step
        if expected == 0.020:
            next(timed)
        assert timed.take_wait_seconds() == pytest.approx(expected)
    assert len(made) == 4, "events are used again"
    on_cpu = TimedBatches(batches())
    next(on_cpu)
    assert on_cpu.take_wait_seconds() >= 0.01


def test_training_evaluation_and_checkpoints_each_have_their_own_time(monkeypatch):
    """A made-up time: two laps with pauses in them, the second after a resume at step 10."""
    now = [100.0]
    monkeypatch.setattr(engine.training.clock.time, "perf_counter", lambda: now[0])

    def pass_seconds(seconds: float) -> None:
        now[0] += seconds

    clock = Clock()
    pass_seconds(50)  # of start-up
    clock.start(10)
    pass_seconds(3)
    with clock.evaluating():
        pass_seconds(7)
    pass_seconds(2)
    with clock.saving():
        pass_seconds(20)
    assert clock.lap(14) == (4, 5.0)
    with clock.evaluating():
        pass_seconds(1)
    pass_seconds(6)
    with clock.saving():
        pass_seconds(2)
    assert clock.lap(16) == (2, 6.0)
    assert (clock.training_steps, clock.training_seconds) == (6, 11.0)
    assert (clock.evaluation_seconds, clock.checkpoint_seconds) == (8.0, 22.0)


@pytest.mark.usefixtures("unseen")
def test_a_line_has_the_mean_loss_and_the_rate_of_the_steps_since_the_one_before(folder, tmp_path, monkeypatch):
    """Three steps an epoch, at whose ends there is a line too."""
    lap = Clock.lap
    monkeypatch.setattr(Clock, "lap", lambda self, steps_done: (lap(self, steps_done)[0], 2.0))
    monkeypatch.setattr(TimedBatches, "take_wait_seconds", lambda self: 0.5)
    monkeypatch.setattr(perf.costs, "peak_seconds_an_image", lambda *_: 0.05)
    lines = {}
    for every in ("1", "2"):
        out = tmp_path / every
        assert train.main([*flags_of(folder, out, "--steps", "7"), "--log-every", every]) == 0
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines[every] = {record["step"]: record for record in records if record["kind"] == "train"}
    assert list(lines["2"]) == [2, 3, 4, 6, 7]
    loss = {step: record["loss"] for step, record in lines["1"].items()}
    for step, of_steps in ((2, (1, 2)), (3, (3,)), (4, (4,)), (6, (5, 6)), (7, (7,))):
        assert lines["2"][step]["loss"] == pytest.approx(np.mean([loss[one] for one in of_steps]), rel=1e-6)
        assert lines["2"][step]["images_per_second"] == pytest.approx(len(of_steps) * 4 / 2.0)
        assert lines["2"][step]["data_wait"] == pytest.approx(0.5 / 2.0)
        assert lines["2"][step]["mfu"] == pytest.approx(len(of_steps) * 4 / 2.0 * 0.05)
        assert "images_per_joule" not in lines["2"][step], "without a GPU"


def test_of_two_machines_one_takes_half_of_the_images(monkeypatch):
    """Whose energy is that of its GPUs."""
    monkeypatch.setattr(trainer, "RunLog", lambda config, **settings: settings)
    ranks = dataclasses.replace(RANKS, world_size=16, local_world_size=8)
    data = SimpleNamespace(classes=["a"], mean_rgb=(0, 0, 0))
    run: Any = SimpleNamespace(_ranks=ranks, _config=None, _steps=0, _total_steps=1, _history=[], _data=data)
    assert trainer.Trainer._open_log(run)["machine_share"] == 0.5  # type: ignore[index]


@pytest.mark.usefixtures("unseen")
def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path, monkeypatch, capsys):
    step = engine.training.assembly.TrainStep.__call__
    for value in (math.nan, math.inf):
        out = tmp_path / str(value)
        monkeypatch.setattr(
            engine.training.assembly.TrainStep,
            "__call__",
            lambda *args, value=value, **named: step(*args, **named) + value,
        )
        assert train.main(flags_of(folder, out, "--steps", "4")) == 1
        assert f"the loss is {value} after step 1: the training diverged" in capsys.readouterr().err
        assert not (out / "last.pt").exists()


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize(("minutes", "saved"), [("2", [2, 3, 4]), ("2.1", [3, 4])])
def test_checkpoints_within_an_epoch_come_by_the_clock(folder, tmp_path, monkeypatch, minutes, saved):
    """A step takes a minute; epochs end at the third one and, for the shorter run, at the fourth."""
    moment = [0.0]
    advance = RunLog.advance

    def minute_later(self):
        moment[0] += 60
        advance(self)

    monkeypatch.setattr(RunLog, "advance", minute_later)
    monkeypatch.setattr(trainer.time, "monotonic", lambda: moment[0])
    steps, save = [], checkpoints.save

    def noting(checkpoint, *args, **named):
        steps.append(checkpoint.steps)
        return save(checkpoint, *args, **named)

    monkeypatch.setattr(checkpoints, "save", noting)
    assert train.main(flags_of(folder, tmp_path, "--steps", "4", "--checkpoint-minutes", minutes)) == 0
    assert steps == saved


@pytest.mark.usefixtures("unseen")
def test_the_last_step_of_a_run_may_reach_beyond_its_last_epoch(folder, tmp_path):
    """Two epochs of twelve images in steps of five: the fifth completes the second epoch."""
    assert train.main(flags_of(folder, tmp_path, "--batch-size", "5", "--epochs", "2")) == 0
    last = load(tmp_path / "last.pt")
    assert (last.steps, last.samples_seen, [entry["epoch"] for entry in last.history]) == (5, 25, [1, 2])


@pytest.mark.usefixtures("unseen")
def test_of_two_epochs_that_are_as_good_the_first_is_the_best(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: Accuracy(loss=1.0, top1=0.5, top5=1.0, images=4, lost=0))
    assert train.main(flags_of(folder, tmp_path, "--epochs", "2")) == 0
    assert load(tmp_path / "best.pt").steps == 3


def test_start_up_counts_from_the_process_s_start():
    began, started = process_seconds(), time.monotonic()
    assert 0 < began < time.clock_gettime(time.CLOCK_BOOTTIME)
    time.sleep(0.1)
    assert process_seconds() - began == pytest.approx(time.monotonic() - started, abs=0.02)


def test_halving_is_advised_where_there_is_something_to_halve():
    assert "--micro-batch 1 " in str(too_little_memory(2))
    assert "halve" not in str(too_little_memory(1))


# ---- several ranks ---------------------------------------------------------------------------------------------------

FAILING = """
import os
from common.errors import DataSourceError
from common.process import end
import engine.training.assembly, engine.training.resume, train
from model.dropout import Dropout
from pipeline.dali.loader import DaliLoader
from tests.engine.test_trainer import network_of

engine.training.assembly.network_of = network_of
engine.training.resume.check_weights = lambda *_: None
deliver, asked = DaliLoader.__next__, []

def failing(self):
    asked.append(1)
    if len(asked) == 5 and os.environ["RANK"] == "1":
        FAULT
    return deliver(self)

DaliLoader.__next__ = failing
end(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            "raise DataSourceError('the bucket is closed')",
            "error: the bucket is closed",
        ),
        ("raise ValueError('out of order')", "error: rank 1 failed: ValueError out of order"),
        ("os.kill(os.getpid(), 9)", "saved"),
    ],
)
def test_a_rank_that_fails_has_the_others_save(tmp_path, fault, sentence):
    """Batch normalisation and accumulation: the step that is given up has changed the statistics by then."""
    flags = [*SMALL, "--steps", "4", "--micro-batch", "3", "--out"]
    script = tmp_path / "failing.py"
    script.write_text(FAILING.replace("FAULT", "pass"))
    run(*flags, str(tmp_path / "whole"), ranks=2, script=str(script))
    script.write_text(FAILING.replace("FAULT", fault))
    done = run(*flags, str(tmp_path / "parts"), ranks=2, script=str(script), check=False)
    assert done.returncode == (-signal.SIGKILL if "kill" in fault else 1), "of the rank that failed first"
    assert sentence in done.stderr
    assert "saved the state after step 2" in done.stderr
    assert load(tmp_path / "parts/last.pt").steps == 2
    script.write_text(FAILING.replace("FAULT", "pass"))
    run(*flags, str(tmp_path / "parts"), ranks=2, script=str(script))
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")
