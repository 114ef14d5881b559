import dataclasses
import errno
import os
import pickle
import random
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import TrainingError, UserError
from common.files import link_over, open_own, replacing
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint, load, newest_good, save
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT


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


def test_a_file_from_before_batch_norm_colour_shift_std_ema_and_decoder_share_loads(tmp_path):
    path = save(make(7), tmp_path, is_best=False, keep=2)
    content = torch.load(path, weights_only=True)
    for name in ("batch_norm", "colour_shift", "std_rgb", "ema", "decoder_share"):
        del content[name]
    torch.save(content, path)
    loaded = load(path)
    assert (loaded.batch_norm, loaded.std_rgb, loaded.ema, loaded.decoder_share) == (False, [1.0, 1.0, 1.0], None, None)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_weight_of_one_tensor_that_is_not_finite_is_enough(tmp_path, value):
    weights = {"a": torch.ones(3, 3), "b": torch.tensor([1.0, value, 1.0]), "c": torch.ones(2)}
    with pytest.raises(TrainingError, match="not finite any more"):
        save(dataclasses.replace(make(2), model=weights), tmp_path, is_best=False, keep=2)
    assert list(tmp_path.iterdir()) == []


def test_weights_whose_sum_is_beyond_float32_are_finite(tmp_path):
    save(make(1, weight=3e38), tmp_path, is_best=False, keep=2)
    assert load(tmp_path / "last.pt").steps == 1


def test_of_many_checkpoints_the_newest_whole_one_is_gone_on_from(tmp_path):
    """Not the oldest, and best.pt only where none of the numbered ones is whole."""
    for steps in (1, 2, 3, 4):
        save(make(steps), tmp_path, is_best=steps == 1, keep=3)
    assert [path.name for path in checkpoints.all_in(tmp_path)] == [
        "last.pt", "step-00000004.pt", "step-00000003.pt", "step-00000002.pt", "best.pt"
    ]  # fmt: skip
    assert newest_good(tmp_path) == tmp_path / "last.pt"
    for damaged, expected in (("last.pt", "step-00000003.pt"), ("step-00000003.pt", "step-00000002.pt"),
                              ("step-00000002.pt", "best.pt")):  # fmt: skip
        os.truncate(tmp_path / damaged, 100)
        assert newest_good(tmp_path) == tmp_path / expected
        with pytest.raises(UserError, match=rf"; {tmp_path / expected} is a good one$"):
            load(tmp_path / damaged)


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
    ("write", "sentence"),
    [
        (lambda path: path.write_text("not a checkpoint\n"), "damaged, or not a checkpoint of this trainer"),
        (lambda path: path.touch(), "damaged: it is empty"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
        (lambda path: path.symlink_to("away.pt"), "is a link to a file that is not there"),
        (lambda path: path.mkdir(), "is a folder; give a file"),
        (os.mkfifo, "is not a file"),
        (lambda path: torch.save(torch.ones(3), path), "it holds a Tensor, not a checkpoint of this trainer"),
        (lambda path: torch.save("some.pt", path), "it holds a str, not a checkpoint of this trainer"),
        (lambda path: torch.save([1, 2], path), "it holds a list, not a checkpoint of this trainer"),
        (
            lambda path: torch.save({"state_dict": {}}, path),
            "it is not a checkpoint of this trainer; weights of other trainers are given as torchvision:{path}",
        ),
        (
            lambda path: torch.save({"format": "vgg-dali checkpoint 1", "arch": "A"}, path),
            "its entry classes is missing",
        ),
        (
            lambda path: torch.save({"format": "vgg-dali checkpoint 2"}, path),
            "it was written by another version of this trainer",
        ),
        (
            lambda path: torch.save(torch.nn.Linear(1, 1), path),
            "it holds Python objects (torch.nn.modules.linear.Linear), and loading those could run code; save the "
            "state_dict() alone",
        ),
        (lambda path: path.write_bytes(pickle.dumps({"model": 1})), "it was written by pickle, not by torch.save"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("a/b", "c"), "it is a zip archive of something else"),
        (lambda path: tarfile.open(path, "w").close(), "it is a tar archive of something else"),
    ],
)
def test_each_kind_of_foreign_file_is_told_apart(tmp_path, write, sentence):
    path = tmp_path / "some.pt"
    write(path)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value) == f"checkpoint {path}: {sentence.format(path=path)}"


def test_of_a_runs_folder_the_file_to_give_is_named(tmp_path):
    save(make(1), tmp_path, is_best=False, keep=1)
    with pytest.raises(UserError, match=rf"{tmp_path}: is a folder; give {tmp_path}/last\.pt$"):
        load(tmp_path)
    save(make(2), tmp_path, is_best=True, keep=1)
    with pytest.raises(UserError, match=rf"give {tmp_path}/last\.pt or {tmp_path}/best\.pt$"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"no such file$"):
        load(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("entry", "value", "sentence"),
    [
        ("arch", "F", "its entry arch is not one of the paper's configurations"),
        ("arch", ["A"], "its entry arch is not one of the paper's configurations"),
        ("crop", 31, "its entry crop is not a multiple of 32"),
        ("classes", "ab", "its entry classes is not a list of different class names"),
        ("classes", [0, 1], "its entry classes is not a list of different class names"),
        ("classes", ["a", "a"], "its entry classes is not a list of different class names"),
        ("mean_rgb", [1.0, 2.0], "its entry mean_rgb is not a list of three numbers in 0–255"),
        ("mean_rgb", [1.0, 2.0, float("nan")], "its entry mean_rgb is not a list of three numbers in 0–255"),
        ("mean_rgb", [1, 2, "3"], "its entry mean_rgb is not a list of three numbers in 0–255"),
        ("std_rgb", [1.0, 2.0], "its entry std_rgb is not a list of three numbers in 1–255"),
        ("std_rgb", [1.0, 2.0, 0.2], "its entry std_rgb is not a list of three numbers in 1–255"),
        ("model", torch.ones(3), "its entry model is not a state dict"),
        ("model", {}, "its entry model is not a state dict"),
        ("model", {"features.0.weight": 1}, "its entry model is not a state dict"),
        ("model", {"a": torch.empty(3, device="meta")}, "its entry model is not a state dict of dense tensors"),
        ("model", {"a": torch.ones(3).to(torch.float8_e4m3fn)}, "its entry model is not a state dict of dense tensors"),
        ("ema", {"a": torch.ones(3).to_sparse()}, "its entry ema is not a state dict of dense tensors"),
        (
            "model",
            {"a": torch.ones(1), "b": torch.tensor([1, torch.inf])},
            "its tensor model.b holds values that are not",
        ),
        (
            "ema",
            {"running_var": torch.tensor([torch.nan])},
            "its tensor ema.running_var holds values that are not finite",
        ),
        ("ema", True, "its entry ema is not a state dict"),
        ("decoder_share", 1.5, "its entry decoder_share is not a number in [0, 1]"),
        ("decoder_share", "half", "its entry decoder_share is not a number"),
        ("optimizer", None, "its entry optimizer is not a state dict"),
        ("scaler", [], "its entry scaler is not a state dict"),
        ("steps", -1, "its entry steps is not a number from 0 on"),
        ("steps", 10**400, "its entry steps is not a number from 0 on"),
        ("samples_seen", 1.5, "its entry samples_seen is not a number from 0 on"),
        ("history", {}, "its entry history is not a list of validation results with epoch, loss, top1 and top5"),
        (
            "history",
            [{"epoch": 1}],
            "its entry history is not a list of validation results with epoch, loss, top1 and top5",
        ),
        ("history", [{"epoch": "1", "loss": 1.0, "top1": 0.5, "top5": 1.0}], "its entry history is not a list"),
        ("history", [{"epoch": 1, "loss": 1.0, "top1": 50.0, "top5": 1.0}], "its entry history is not a list"),
        (
            "history",
            [{"epoch": 1, "samples_seen": "9", "loss": 1.0, "top1": 0.5, "top5": 1.0}],
            "its entry history is not a list",
        ),
        ("std_rgb", [255.5, 1.0, 1.0], "its entry std_rgb is not a list of three numbers in 1–255"),
        ("fingerprint", 3, "its entry fingerprint is not a text"),
        ("config", ["--lr"], "its entry config is not a table of flags"),
        ("world_size", 0, "its entry world_size is not a number from 1 on"),
        ("batch_norm", "no", "its entry batch_norm is not true or false"),
        ("colour_shift", [[1.0] * 3] * 2, "its entry colour_shift is not a list of three lists of three numbers"),
        ("swish", 1, "it was written by another version of this trainer, which keeps swish too"),
    ],
)
def test_an_entry_of_another_form_is_named_and_the_one_before_is_used(tmp_path, capsys, entry, value, sentence):
    save(make(1), tmp_path, is_best=False, keep=2)
    save(make(2), tmp_path, is_best=False, keep=2)
    last, before = tmp_path / "last.pt", tmp_path / "step-00000001.pt"
    torch.save({**torch.load(last), entry: value}, last)  # and step-00000002.pt with it, which is the same file
    with pytest.raises(UserError) as caught:
        load(last)
    assert str(caught.value).startswith(f"checkpoint {last}: {sentence}")
    assert str(caught.value).endswith(f"; {before} is a good one")
    assert newest_good(tmp_path) == before
    assert f"warning: checkpoint {last}: {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_newest_checkpoint_that_only_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch, number):
    """The older one would be gone on from, and the newer ones removed."""
    for steps in (1, 2):
        save(make(steps), tmp_path, is_best=False, keep=2)
    really_open = Path.open

    def refuse(path, *arguments, **named):
        if path.name == "last.pt":
            raise OSError(number, os.strerror(number))
        return really_open(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=rf"last\.pt: cannot be read \({os.strerror(number)}\)$"):
        newest_good(tmp_path)


def test_a_newest_checkpoint_on_a_disk_that_is_away_is_not_passed_over(tmp_path):
    """A run that started anew would take the link's name."""
    (tmp_path / "last.pt").symlink_to(tmp_path / "away" / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt: is a link to a file that is not there$"):
        newest_good(tmp_path)


def test_names_of_any_bytes_are_kept(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "日本", "a\nb", ""]
    path = save(dataclasses.replace(make(), classes=names), tmp_path, is_best=False, keep=1)
    assert load(path).classes == names


def test_a_folder_of_any_bytes_keeps_its_run(tmp_path):
    """torch takes names in UTF-8 only: each checkpoint there was "damaged", and no run went on."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    path = save(make(7), folder, is_best=True, keep=2)
    newest = newest_good(folder)
    assert newest
    assert load(path).steps == 7
    assert torch.equal(load(path).model["features.0.weight"], make().model["features.0.weight"])


def test_every_entry_has_a_form():
    assert checkpoints._FORMS.keys() == {field.name for field in dataclasses.fields(Checkpoint)}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such file$"):
        load(tmp_path / "none.pt")


def test_replacing_what_has_no_name_is_an_error_of_the_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path):
        with pytest.raises(OSError, match=r"\[Errno"), replacing(path) as file:
            file.write(b"new")
    assert not any(tmp_path.iterdir())


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


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, int | str]]:
    """The calls that put something on the disk or give it a name, in order: of what inode, or which name."""
    seen: list[tuple[str, int | str]] = []
    fsync, rename, link = os.fsync, os.replace, os.link

    def noting_fsync(descriptor):
        status = os.fstat(descriptor)
        seen.append((f"fsync of {status.st_size if stat.S_ISREG(status.st_mode) else 'a folder'}", status.st_ino))
        fsync(descriptor)

    def noting_rename(old, new):
        seen.append(("rename", Path(new).name))
        rename(old, new)

    def noting_link(old, new):
        seen.append(("link", Path(old).name))
        link(old, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_rename)
    monkeypatch.setattr(os, "link", noting_link)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, calls):
    """All of its bytes, also those that Python had buffered; and its folder, without which a power cut takes the name."""
    with replacing(tmp_path / "file") as file:
        file.write(b"12345")
        assert calls == []
    inode, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync of 5", inode), ("rename", "file"), ("fsync of a folder", folder)]


def test_a_second_name_is_on_the_disk_too(tmp_path, calls):
    (tmp_path / "file").write_text("content")
    link_over(tmp_path / "file", tmp_path / "other")
    assert calls == [("link", "file"), ("rename", "other"), ("fsync of a folder", tmp_path.stat().st_ino)]


def test_each_name_of_a_checkpoint_is_on_the_disk(tmp_path, calls):
    save(make(7), tmp_path, is_best=True, keep=2)
    last = (tmp_path / "last.pt").stat()
    folder = ("fsync of a folder", tmp_path.stat().st_ino)
    assert calls == [
        (f"fsync of {last.st_size}", last.st_ino), ("rename", "last.pt"), folder,
        ("link", "last.pt"), ("rename", "step-00000007.pt"), folder,
        ("link", "last.pt"), ("rename", "best.pt"), folder,
    ]  # fmt: skip


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refusing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o027, 0o077])
def test_files_are_as_open_to_others_as_the_umask_says(tmp_path, mask):
    """Not 0600, as temporary files are: a group shares its runs. The umask itself stays."""
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "file") as file:
            file.write(b"content")
        save(make(1), tmp_path, is_best=False, keep=1)
        os.close(open_own(tmp_path / "own", os.O_RDWR))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("file", "last.pt", "step-00000001.pt", "own"), 0o666 & ~mask)
