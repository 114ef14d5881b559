"""What a sentence advises helps in the very case in which it is said; docs/faq.md has them all."""

import errno
import os
import re
import subprocess
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import allreduce, parity, photographs
from benchmarks import evaluation as compare_evaluation
from benchmarks import inputs as compare_inputs
from benchmarks import loaders as compare_loaders
from benchmarks import steps as compare_steps
from common.errors import TrainingError, UserError
from common.ranks import Ranks
from engine.config import parse_args
from engine.evaluation import trials
from engine.training.resume import check_same_data
from perf import feeds, sweep
from perf.sweep import Point
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.dali.lost_images import LostImages
from pipeline.dataset import manifest, scan
from pipeline.shards.index import Prepared

RANKS = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"), patient_group=None)


def raising(error: BaseException):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize(("decoder", "cure"), [("gpu", "try --decoder cpu"), ("cpu", "try --threads 1")])
def test_a_batch_that_the_cpus_decoder_refuses_is_not_sent_to_the_cpus_decoder(decoder, cure):
    loader = DaliLoader.__new__(DaliLoader)
    loader._in_flight, loader._options, loader._attempts = deque(), GraphOptions(crop=32, decoder=decoder), 0
    with pytest.raises(TrainingError, match=f"{cure}$"):
        loader._do_without_what_fails(RuntimeError("Error in fn.decoders.image: encountered:\nsomething"))


@pytest.mark.parametrize(
    ("batch_size", "cure"), [(8, "halve it with --batch-size 4$"), (1, "compute scale 256 with --device cpu$")]
)
def test_one_image_is_not_halved(monkeypatch, batch_size, cure):
    monkeypatch.setattr(trials, "write_rows", raising(torch.OutOfMemoryError("full")))
    network: Any = SimpleNamespace(name="a.pt")
    self: Any = SimpleNamespace(
        _data=SimpleNamespace(ranks=RANKS),
        _batch_size=batch_size,
        _shape=lambda network: (3, 10),
        _look_up=lambda *_: (Path("x.npy"), False),
        _model=lambda network: None,
        _blocks=lambda *_: iter(()),
    )
    with pytest.raises(TrainingError, match=cure):
        trials.Evaluator._computed(self, network, "dense", 256, "auto")


@pytest.mark.parametrize(
    ("batch_size", "cure"), [("2", "smaller --batch-size$"), ("1", "smaller --crop, or another GPU$")]
)
def test_a_batch_of_one_is_not_made_smaller(monkeypatch, batch_size, cure, capsys):
    monkeypatch.setattr(compare_steps, "make_steps", raising(torch.OutOfMemoryError("full")))
    assert compare_steps.main(["--arch", "A", "--batch-size", batch_size, "--device", "cpu"]) == TrainingError.exit_code
    assert re.search(cure, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EACCES, "let this user read and enter it"),
        (errno.EIO, "nothing was written: once its storage answers"),
        (errno.ENAMETOOLONG, "put the images into fewer folders"),
        (errno.ENOENT, "it changed meanwhile"),
    ],
)
def test_only_what_lacks_a_permission_is_to_be_made_readable(monkeypatch, tmp_path, number, cure):
    monkeypatch.setattr(scan, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(scan.os, "scandir", raising(OSError(number, os.strerror(number))))
    with pytest.raises(UserError, match=rf"cannot be listed \({os.strerror(number)}\); {cure}"):
        scan.list_files(tmp_path)


def test_where_no_manifest_can_be_written_there_is_still_a_way(monkeypatch, tmp_path):
    monkeypatch.setattr(manifest, "write_manifest", raising(OSError(errno.ENOSPC, "No space left on device")))
    found = scan.Scan(classes=[], tables={}, folders={}, quarantine=[], val_lost=0)
    with pytest.raises(UserError, match=r"no place for the manifest.*; set XDG_CACHE_HOME to a folder of yours$"):
        manifest._write_somewhere(tmp_path, found)


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--resume", "old.pt"], "give --resume another one, or never to start anew$"),
        ([], "choose another --out, or --resume never to start anew$"),
    ],
)
def test_another_folder_does_not_make_a_checkpoint_fit_that_was_named(flags, cure):
    checkpoint: Any = SimpleNamespace(classes=("cat", "dog"))
    changed: Any = SimpleNamespace(classes=("dog", "emu"))
    with pytest.raises(UserError, match=f"does not fit the data set: .*; {cure}"):
        check_same_data(checkpoint, changed, parse_args(["--data", "digits", *flags]))


def test_lost_images_need_not_be_listed_where_nothing_can_be_written():
    of_many: Any = SimpleNamespace(val=range(9000), folder=Path("read-only"))
    with pytest.raises(
        TrainingError, match=r"named above, and are listed in .*quarantine\.tsv where that can be written$"
    ):
        LostImages(manifest=of_many, split="val", max_bad_images=2).check(3)


@pytest.mark.parametrize(("user", "cure"), [(1000, "run this as root$"), (0, "start that with --privileged$")])
def test_root_is_not_told_to_be_root(monkeypatch, user, cure):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    refused = subprocess.CompletedProcess([], 1, "", "mount failed:\nOperation not permitted\n")
    monkeypatch.setattr(allreduce.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(UserError, match=cure) as caught:
        allreduce._commands("ip netns add a")
    assert "\n" not in str(caught.value)


def test_an_interpreter_that_is_not_there_is_no_fault_of_the_csv_file(tmp_path):
    point = Point(program="train.py", flags=(), ranks=1, identity={}, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"--python no-python: cannot be run .*; name another interpreter$"):
        sweep._run(point, "no-python", tmp_path / "run.out", tmp_path / "run.log")


@pytest.mark.parametrize("content", ["", "[1]", '{"seconds": 3}', '{"flags": 3}'])
def test_a_result_that_is_damaged_is_not_one_of_other_flags(tmp_path, content):
    (tmp_path / parity.RESULT).write_text(content)
    with pytest.raises(UserError, match=r"is not a result of an earlier start; remove it, or choose another --out$"):
        parity.kept(tmp_path, ["--arch", "A"], raising(AssertionError("made anew")))


def test_images_in_shards_are_not_to_be_found_by_the_manifest_of_folders(tmp_path):
    folder: Any = SimpleNamespace(manifest=SimpleNamespace(root=tmp_path))
    assert feeds._without_it(folder) == f"have python -m pipeline.manifest {tmp_path} --verify decode leave it out"
    prepared: Any = SimpleNamespace(manifest=Prepared.__new__(Prepared))
    assert feeds._without_it(prepared) == "prepare the data set anew"


@pytest.mark.parametrize("program", [compare_evaluation, compare_inputs, compare_loaders])
def test_prepared_data_are_refused_where_files_are_compared(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(photographs, "is_prepared", lambda folder: folder == str(tmp_path))
    assert program.main(["--data", str(tmp_path)]) == UserError.exit_code
    said = f"--data {tmp_path}: give a folder of photographs, with train/<class>/* and val/<class>/*"
    assert said in capsys.readouterr().err
