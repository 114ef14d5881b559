import dataclasses
import os

import pytest
import torch

from common.errors import TrainingError, UserError
from common.files import link_over, replacing
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint, load, save


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
    )


def test_what_is_saved_is_loaded(tmp_path):
    assert save(make(7), tmp_path, is_best=False) == tmp_path / "last.pt"
    loaded = load(tmp_path / "last.pt")
    for field in dataclasses.fields(Checkpoint):
        if field.name not in ("model", "optimizer"):
            assert getattr(loaded, field.name) == getattr(make(7), field.name)
    assert torch.equal(loaded.model["features.0.weight"], make().model["features.0.weight"])
    assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(64, 64))


def test_last_previous_and_best(tmp_path):
    for steps in (1, 2, 3, 4):
        save(make(steps), tmp_path, is_best=steps == 2)
    kept = {name: load(tmp_path / name).steps for name in ("last.pt", "previous.pt", "best.pt")}
    assert kept == {"last.pt": 4, "previous.pt": 3, "best.pt": 2}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.pt", "last.pt", "previous.pt"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    save(make(1), tmp_path, is_best=False)
    with pytest.raises(TrainingError, match=r"not finite any more; the last good checkpoint is .*last\.pt"):
        save(make(2, weight=float("nan")), tmp_path, is_best=False)
    assert load(tmp_path / "last.pt").steps == 1


@pytest.mark.parametrize("moment", ["write", "fsync", "rename"])
def test_a_failure_at_any_moment_leaves_the_last_good_one(tmp_path, monkeypatch, moment):
    save(make(1), tmp_path, is_best=False)

    def fail(*_):
        raise OSError(28, "No space left on device")

    target = {"write": (torch, "save"), "fsync": (os, "fsync"), "rename": (os, "replace")}[moment]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(TrainingError, match=r"No space left on device.*the last good one is"):
        save(make(2), tmp_path, is_best=True)
    monkeypatch.undo()
    assert load(tmp_path / "last.pt").steps == 1
    assert not (tmp_path / "best.pt").exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named_with_the_one_before(tmp_path, share):
    save(make(1), tmp_path, is_best=False)
    save(make(2), tmp_path, is_best=False)
    last = tmp_path / "last.pt"
    os.truncate(last, int(last.stat().st_size * share))
    with pytest.raises(UserError, match=r"last\.pt: damaged.*--resume .*previous\.pt") as caught:
        load(last)
    assert "\n" not in str(caught.value)
    assert load(tmp_path / "previous.pt").steps == 1


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
