import dataclasses
import os
import random

import numpy as np
import pytest
import torch

from common.errors import TrainingError, UserError
from common.files import link_over, replacing
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint, load, newest_good, save
from pipeline.plan import IMAGENET_COLOUR_SHIFT


def make(steps: int = 1, weight: float = 1.0) -> Checkpoint:
    return Checkpoint(
        arch="A",
        crop=32,
        classes=["a", "b"],
        mean_rgb=[1.0, 2.0, 3.0],
        model={"features.0.weight": torch.full((64, 64), weight)},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(64, 64)}}, "param_groups": [{"lr": 0.1}]},
        scaler={},
        steps=steps,
        samples_seen=steps * 32,
        history=[{"epoch": 1, "loss": 0.5, "top1": 0.9, "top5": 1.0, "images": 10}],
        fingerprint="abc",
        config={"arch": "A", "lr": 0.1},
        world_size=1,
    )


def test_what_is_saved_is_loaded(tmp_path):
    assert save(make(7), tmp_path, is_best=False, keep=2) == tmp_path / "last.pt"
    loaded = load(tmp_path / "last.pt")
    for field in dataclasses.fields(Checkpoint):
        if field.name not in ("model", "optimizer"):
            assert getattr(loaded, field.name) == getattr(make(7), field.name)
    assert torch.equal(loaded.model["features.0.weight"], make().model["features.0.weight"])
    assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(64, 64))


def test_a_file_from_before_batch_norm_colour_shift_and_ema_loads(tmp_path):
    path = save(make(7), tmp_path, is_best=False, keep=2)
    content = torch.load(path, weights_only=True)
    for name in ("batch_norm", "colour_shift", "ema"):
        del content[name]
    torch.save(content, path)
    loaded = load(path)
    assert (loaded.batch_norm, loaded.ema) == (False, None)
    assert np.allclose(loaded.colour_shift, IMAGENET_COLOUR_SHIFT)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_last_best_and_as_many_numbered_ones_as_asked_for(tmp_path, keep):
    for steps in (1, 2, 9, 10):  # 10 is later than 9, in whatever order names sort
        save(make(steps), tmp_path, is_best=steps == 2, keep=keep)
    kept = {entry.name: load(entry).steps for entry in tmp_path.iterdir()}
    numbered = {"step-00000010.pt": 10, "step-00000009.pt": 9, "step-00000002.pt": 2}
    assert kept == {"last.pt": 10, "best.pt": 2, **dict(list(numbered.items())[:keep])}
    assert (tmp_path / "last.pt").samefile(tmp_path / "step-00000010.pt")
    assert (tmp_path / "best.pt").stat().st_nlink == (2 if keep == 3 else 1)


def test_a_run_that_goes_back_leaves_none_of_its_later_checkpoints(tmp_path):
    (tmp_path / "step-by-step.pt").write_text("not ours")
    for steps in (10, 20, 30, 15):
        save(make(steps), tmp_path, is_best=False, keep=3)
    assert sorted(entry.name for entry in tmp_path.glob("step-0*")) == ["step-00000010.pt", "step-00000015.pt"]
    assert load(tmp_path / "last.pt").steps == 15
    assert (tmp_path / "step-by-step.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    save(make(1), tmp_path, is_best=False, keep=2)
    with pytest.raises(TrainingError, match=r"not finite any more; the last good checkpoint is .*last\.pt"):
        save(make(2, weight=float("nan")), tmp_path, is_best=False, keep=2)
    assert load(tmp_path / "last.pt").steps == 1


@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_a_failure_at_any_moment_leaves_the_last_good_one(tmp_path, monkeypatch, moment):
    save(make(1), tmp_path, is_best=False, keep=2)

    def fail(*_):
        raise OSError(28, "No space left on device")

    target = {"write": (torch, "save"), "fsync": (os, "fsync"), "rename": (os, "replace")}[moment]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(TrainingError, match=r"No space left on device.*the last good one is"):
        save(make(2), tmp_path, is_best=True, keep=2)
    monkeypatch.undo()
    assert load(tmp_path / "last.pt").steps == 1
    assert not (tmp_path / "best.pt").exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


def test_cut_at_any_byte_it_is_damaged_and_the_one_before_is_used(tmp_path, capsys):
    """The first and the last 64 lengths, and 200 between them."""
    save(make(1), tmp_path, is_best=True, keep=2)
    save(make(2), tmp_path, is_best=False, keep=2)
    last, before = tmp_path / "last.pt", tmp_path / "step-00000001.pt"
    whole = last.read_bytes()
    lengths = [*range(64), *random.sample(range(64, len(whole) - 64), 200), *range(len(whole) - 64, len(whole))]
    for length in lengths:
        last.write_bytes(whole[:length])  # and step-00000002.pt with it, which is the same file
        with pytest.raises(UserError, match=rf"last\.pt: damaged.*; {before} is a good one$") as caught:
            load(last)
        assert "\n" not in str(caught.value)
        assert newest_good(tmp_path) == before, length
        assert f"warning: checkpoint {last}: damaged" in capsys.readouterr().err
    before.write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.pt: damaged, or not a checkpoint of this trainer$"):
        newest_good(tmp_path)
    last.write_bytes(whole)
    assert newest_good(tmp_path) == last


def test_the_newest_good_one_of_a_folder(tmp_path):
    assert newest_good(tmp_path) is None
    for steps in (9, 10):
        save(make(steps), tmp_path, is_best=steps == 9, keep=1)
    (tmp_path / "last.pt").unlink()
    assert newest_good(tmp_path) == tmp_path / "step-00000010.pt"
    (tmp_path / "step-00000010.pt").unlink()
    assert newest_good(tmp_path) == tmp_path / "best.pt"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("not a checkpoint\n"),
        lambda path: torch.save({"state_dict": {}}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"format": "vgg-dali checkpoint 1", "arch": "A"}, path),
        lambda path: torch.save(torch.nn.Linear(1, 1), path),
        lambda path: path.mkdir(),
    ],
)
def test_foreign_files_are_refused(tmp_path, write):
    path = tmp_path / "some.pt"
    write(path)
    with pytest.raises(UserError, match=r"some\.pt: damaged, or not a checkpoint of this trainer$"):
        load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such file$"):
        load(tmp_path / "none.pt")


def test_replacing_keeps_the_old_file_on_an_exception(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted_write():
        with replacing(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_link_over_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    target.write_text("old")

    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    link_over(source, target)
    assert target.read_text() == "new"
    assert checkpoints.LAST == "last.pt"
