"""Disks that are full or read-only, crashes in the middle of a checkpoint, two runs in one folder."""

import fcntl
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import train
from common import lock
from common.errors import UserError
from common.files import half_written, remove_own
from common.lock import BusyError, FolderLock
from engine.checkpoint import load
from engine.monitoring.runlog import RunLog
from pipeline.dataset import manifest as manifests
from pipeline.dataset.manifest import open_manifest
from pipeline.dataset.table import TABLE_NAMES
from tests.support.images import photo_folder
from tests.support.launch import ROOT, SMALL, assert_same_weights
from tests.support.mounts import remount, small_disk

# A checkpoint of SMALL takes 216 MiB: one and its successor's beginning fit on this disk, two do not.
SMALL_DISK = 300
FLAGS = [*SMALL, "--steps", "3", "--checkpoint-minutes", "0"]


def error_of(capsys, *flags: str, code: int) -> str:
    """Run train.py in this process; the error that it ends with."""
    assert train.main(list(flags)) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert train.main([*FLAGS, "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(whole, tmp_path, capsys):
    with small_disk(tmp_path / "disk", SMALL_DISK) as disk:
        out = disk / "out"
        error = error_of(capsys, *FLAGS, "--out", str(out), code=1)
        assert re.search(
            r"cannot write a checkpoint to .* \(No space left on device\); the last good one is .*/last\.pt$", error
        )
        assert load(out / "last.pt").steps == 1
        assert not list(out.glob(".*.tmp"))
        remount(disk, "size=1g")
        assert train.main([*FLAGS, "--out", str(out)]) == 0
        assert_same_weights(whole / "last.pt", out / "last.pt")


def test_a_disk_that_is_full_from_the_start(tmp_path, capsys):
    with small_disk(tmp_path / "disk", 1) as disk:
        fill(disk)
        error = error_of(capsys, *FLAGS, "--out", str(disk / "out"), code=2)
        assert "cannot be written (No space left on device); choose another folder" in error


def test_a_disk_that_is_too_full_for_the_log_and_the_checkpoint(tmp_path, capsys, monkeypatch):
    with small_disk(tmp_path / "disk", 1) as disk:
        monkeypatch.setattr(RunLog, "advance", lambda self: fill(disk))
        assert train.main([*FLAGS, "--out", str(disk / "out")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "warning: metrics.jsonl cannot be written (No space left on device); the training goes on" in said
    assert said[-1].startswith("error: cannot write a checkpoint to")
    assert "No space left on device" in said[-1]
    assert not any("Traceback" in line for line in said), "nor of TensorBoard's thread"


def fill(disk) -> None:
    with open(disk / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            return


def test_a_read_only_disk(tmp_path, capsys):
    with small_disk(tmp_path / "disk", SMALL_DISK) as disk:
        (disk / "empty").mkdir()
        remount(disk, "ro")
        for out in ("empty", "new"):
            error = error_of(capsys, *FLAGS, "--out", str(disk / out), code=2)
            assert f"--out {disk / out}: cannot be written (Read-only file system); choose another folder" in error


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "survivor"), [("replace", 1), ("link", 2)])
def test_killed_between_writing_and_renaming_or_linking(whole, tmp_path, moment, survivor):
    """In the second checkpoint, kill -9 before last.pt is replaced, or after that and before it gets its number."""
    code = f"""
import os, signal, sys, train
call, number = os.{moment}, 0
def killing(source, target):
    global number
    number += str(target).endswith("last.pt") or "step-" in str(target) and "{moment}" == "link"
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    call(source, target)
os.{moment} = killing
train.main(sys.argv[1:])
"""
    flags = [*FLAGS, "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert load(tmp_path / "last.pt").steps == survivor
    assert len(list(tmp_path.glob(".*.tmp"))) == (1 if moment == "replace" else 0)
    assert train.main(flags) == 0
    assert_same_weights(whole / "last.pt", tmp_path / "last.pt")
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(whole, tmp_path, capsys):
    flags = [*FLAGS, "--out", str(tmp_path)]
    assert train.main([*flags, "--steps", "2"]) == 0
    os.truncate(tmp_path / "last.pt", 10**8)
    capsys.readouterr()
    assert train.main(flags) == 0
    said = capsys.readouterr().err
    assert f"warning: checkpoint {tmp_path}/last.pt: damaged" in said
    assert f"going on from {tmp_path}/step-00000001.pt: step 1" in said
    assert_same_weights(whole / "last.pt", tmp_path / "last.pt")


# ---- two runs in one folder --------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.3)
    with FolderLock(tmp_path) as first:
        first.take()
        error = error_of(capsys, *FLAGS, "--out", str(tmp_path), code=2)
    expected = rf"another run \(pid {os.getpid()}, host .+\) is writing to {tmp_path}; end it first, or choose another"
    assert re.search(expected, error)
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]


def test_a_run_waits_for_one_that_is_ending(tmp_path):
    with FolderLock(tmp_path) as first:
        first.take()
        threading.Timer(0.5, first.__exit__, (None, None, None)).start()
        with FolderLock(tmp_path) as second:
            second.take()
            second.take()  # once is enough
        first._descriptor = None  # closed by the timer


def test_the_lock_of_a_killed_run_is_free(tmp_path, monkeypatch):
    code = "import pathlib, sys; from common.lock import BusyError, FolderLock; lock = FolderLock(pathlib.Path(sys.argv[1]))"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; lock.take(); print(flush=True); input()", str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout
    holder.stdout.readline()
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0)
    with FolderLock(tmp_path) as ours, pytest.raises(UserError, match=rf"pid {holder.pid}, host"):
        ours.take()
    holder.kill()
    holder.wait()
    with FolderLock(tmp_path) as ours:
        ours.take()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FolderLock(tmp_path) as first, FolderLock(tmp_path) as second:
        first.take()
        second.take()
    with FolderLock(tmp_path) as needed, pytest.raises(UserError, match=r"its file system has no locks \(No locks"):
        needed.take(required=True)


def test_two_locks_of_one_folder_and_how_long_each_is_waited_for(tmp_path, capsys):
    with FolderLock(tmp_path) as first, FolderLock(tmp_path, ".other") as other, FolderLock(tmp_path) as second:
        first.take()
        other.take(patience_seconds=0.0)
        began = time.monotonic()
        with pytest.raises(BusyError):
            second.take(patience_seconds=0.0)
        assert time.monotonic() - began < 0.5
        assert capsys.readouterr().err == ""
        threading.Timer(1.0, first.__exit__, (None, None, None)).start()
        second.take(patience_seconds=math.inf)
        first._descriptor = None  # closed by the timer
        assert capsys.readouterr().err.startswith(f"waiting for another run (pid {os.getpid()}, host ")


def test_two_scans_of_one_folder(tmp_path, monkeypatch):
    """The one that is writing is waited for: else the first to end would remove the other's tables as old ones."""
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.2)
    folder = photo_folder(tmp_path / "photos")
    first, refused = open_manifest(folder), []
    write_quarantine = manifests.write_quarantine

    def meanwhile(*arguments):
        monkeypatch.setattr(manifests, "write_quarantine", write_quarantine)
        with pytest.raises(UserError, match=rf"pid {os.getpid()}, host .* is writing to {first.folder}; end it first"):
            open_manifest(folder, rescan=True)
        refused.append(True)
        return write_quarantine(*arguments)

    monkeypatch.setattr(manifests, "write_quarantine", meanwhile)
    (folder / "train/class0/000.JPEG").unlink()
    assert len(open_manifest(folder).train) == len(first.train) - 1
    assert refused
    names = {path.name for path in first.folder.iterdir()}
    assert len(names) == 5, "two tables, their description, the quarantine, the lock"


# ---- links -------------------------------------------------------------------------------------------------------


def test_no_lock_is_taken_through_a_link(tmp_path, capsys):
    (tmp_path / "precious").write_text("somebody's")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").symlink_to(tmp_path / "precious")
    error = error_of(capsys, *FLAGS, "--out", str(tmp_path / "out"), code=2)
    assert "cannot be written (it is a link, and nothing is written through one); choose another folder" in error
    assert (tmp_path / "precious").read_text() == "somebody's"


def test_a_lock_file_that_is_somebody_elses_stays_as_it_is(tmp_path):
    (tmp_path / ".lock").write_text("a tool's own lock")
    with FolderLock(tmp_path) as ours:
        ours.take()
    assert (tmp_path / ".lock").read_text() == "a tool's own lock"
    (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with FolderLock(tmp_path) as ours, pytest.raises(OSError, match="it is no regular file"):
        ours.take()


def test_a_folder_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with FolderLock(tmp_path / "link") as ours:
        ours.take()
    assert (tmp_path / "real/.lock").read_text().startswith(f"pid {os.getpid()}, host ")


def test_only_files_of_ours_are_removed(tmp_path):
    ours = f"train-{'0' * 32}.npy"
    for name in (ours, "mine.npy", "train-x.npy", f".{ours}.abc_1234.tmp", ".other.tmp", "target"):
        (tmp_path / name).write_text("content")
    (tmp_path / f"val-{'0' * 32}.npy").symlink_to(tmp_path / "target")
    (tmp_path / f"val-{'1' * 32}.npy").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    remove_own(tmp_path, f"{TABLE_NAMES}|{half_written(TABLE_NAMES)}", but=["mine.npy"])
    assert before - {path.name for path in tmp_path.iterdir()} == {ours, f".{ours}.abc_1234.tmp"}
