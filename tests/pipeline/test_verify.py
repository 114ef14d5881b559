"""python -m pipeline.manifest DATA --verify decode: every image decoded once, what fails left out, resumable at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from pipeline.dataset import scan
from pipeline.dataset.headers import Header, read_header
from pipeline.dataset.manifest import open_manifest
from pipeline.dataset.quarantine import read_quarantine
from pipeline.manifest import main
from pipeline.preparation import verify
from pipeline.preparation.verify import PROGRESS
from tests.support.images import photo_folder, photographs
from tests.support.launch import ROOT


def encoded_cut(path: Path, image_format: str) -> None:
    """An image whose header is good, but which ends in the middle: no scan of headers sees it."""
    photographs()[0].resize((200, 150)).save(path, image_format)
    os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def folder(tmp_path):
    """Two files that the scan leaves out, and five that only decoding finds."""
    folder = photo_folder(tmp_path / "data", train=12, val=6)
    (folder / "train/class0/empty.jpg").write_bytes(b"")
    (folder / "val/class1/text.jpg").write_bytes(b"text")
    encoded_cut(folder / "train/class0/a\tb.bmp", "BMP")
    encoded_cut(folder / "train/class1/cut.ppm", "PPM")
    encoded_cut(folder / "val/class0/cut.ppm", "PPM")
    encoded_cut(folder / "val/class0/no extension", "BMP")
    encoded_cut(folder / "val/class1/cut.bmp", "BMP")
    return folder


def test_what_cannot_be_decoded_is_left_out_and_listed_and_once_is_enough(folder, capsys, monkeypatch):
    scanned = open_manifest(folder)
    assert (len(scanned.train), len(scanned.val), scanned.quarantined, scanned.val_lost) == (14, 9, 2, 1)
    assert not scanned.verified
    capsys.readouterr()

    assert main([str(folder), "--verify", "decode"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    assert (result["train"], result["val"], result["quarantined"], result["verified"]) == (12, 6, 7, "decode")
    assert result["val_lost"] == 4, "what had a good header counts, whatever it is called"
    assert result["reasons"] == {"corrupt image data": 5, "empty file": 1, "not an image": 1}
    assert result["splits"]["train"]["formats"] == {"JPEG": 12}
    assert "5 left out: corrupt image data" in output.err

    verified = open_manifest(folder)
    assert verified.verified
    assert verified.fingerprint == result["fingerprint"] != scanned.fingerprint
    kept = {verified.train.path(row).name for row in range(12)}
    assert kept == {f"{number:03d}.JPEG" for number in range(12)}
    assert {path for path, _ in read_quarantine(verified.folder)} == {
        "train/class0/empty.jpg",
        "train/class0/a\\tb.bmp",
        "train/class1/cut.ppm",
        "val/class0/cut.ppm",
        "val/class0/no extension",
        "val/class1/cut.bmp",
        "val/class1/text.jpg",
    }
    tables = {f"{split}-{verified.fingerprint}.npy" for split in ("train", "val")}
    assert set(os.listdir(verified.folder)) == {"manifest.json", "quarantine.tsv", ".lock", *tables}

    monkeypatch.setattr(verify, "decode_whole", lambda *_, **__: pytest.fail("decoded again"))
    assert main([str(folder), "--verify", "decode"]) == 0
    output = capsys.readouterr()
    assert "has been decoded before" in output.err
    assert json.loads(output.out.splitlines()[-1])["fingerprint"] == verified.fingerprint


def test_a_folder_that_changes_is_not_verified_any_more(folder):
    assert verify.verify(open_manifest(folder)).verified
    encoded_cut(folder / "train/class0/new.bmp", "BMP")
    changed = open_manifest(folder)
    assert not changed.verified
    assert len(changed.train) == 15
    assert not open_manifest(folder, rescan=True).verified
    assert len(verify.verify(changed).train) == 12


def test_what_runs_have_added_to_the_list_is_replaced_by_what_verifying_finds(folder):
    scanned = open_manifest(folder)
    with open(scanned.folder / "quarantine.tsv", "a") as file:
        file.write("train/class1/cut.tif\tfound by a run\ntrain/class0/000.JPEG\ta disk that failed for a moment\n")
    verified = verify.verify(scanned)
    listed = dict(read_quarantine(verified.folder))
    assert len(listed) == 7
    assert listed["train/class1/cut.ppm"] == "corrupt image data"
    assert "train/class0/000.JPEG" not in listed


@pytest.mark.seconds
def test_a_file_that_cannot_be_read_for_its_storage_is_not_left_out(folder, monkeypatch, capsys):
    """The decoder failed, and by then the storage fails too, for a moment or for good."""
    monkeypatch.setattr(scan, "_PATIENCE_SECONDS", 0.3)
    victim, failures = folder / "train/class0/000.JPEG", 2
    decode_whole = verify.decode_whole

    def decodes_all_but_one(table, rows, **arguments):
        for row, (image, reason) in zip(rows.tolist(), decode_whole(table, rows, **arguments), strict=True):
            is_lost = failures and table.path(row) == victim
            yield (None, "Input/output error") if is_lost else (image, reason)

    def reads_at_times(path):
        nonlocal failures
        if path == victim and failures:
            failures -= 1
            return Header(reason="cannot be read: Input/output error", storage_failed=True)
        return read_header(path)

    monkeypatch.setattr(verify, "decode_whole", decodes_all_but_one)
    for module in (verify, scan):
        monkeypatch.setattr(module, "read_header", reads_at_times)
    scanned = open_manifest(folder)
    failures = 10**6
    assert main([str(folder), "--verify", "decode"]) == 2
    assert "000.JPEG: cannot be read (Input/output error), which says nothing of the image" in capsys.readouterr().err
    assert open_manifest(folder).fingerprint == scanned.fingerprint
    failures = 2
    assert main([str(folder), "--verify", "decode"]) == 0
    assert len(open_manifest(folder).train) == 12


def test_a_class_without_an_image_is_named_with_the_reasons_and_can_be_repaired(folder, capsys):
    good = {path: path.read_bytes() for path in (folder / "val/class1").glob("*.JPEG")}
    scanned = open_manifest(folder)
    for number, path in enumerate(good):
        path.write_bytes(b"" if number else b"garbage")
    capsys.readouterr()
    assert main([str(folder), "--verify", "decode"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder / 'val/class1'}: class folder without an image that can be decoded: ")
    for reason in ("2 × not an image", "2 × empty file", "1 × corrupt image data"):
        assert reason in error
    assert open_manifest(folder).fingerprint == scanned.fingerprint, "the manifest stays as it was"
    for path, content in good.items():
        path.write_bytes(content)
    assert main([str(folder), "--verify", "decode"]) == 0, "what failed is tried again"
    assert len(open_manifest(folder).val) == 6


@pytest.mark.parametrize("images", [1, 4, 15, 16, 23])
@pytest.mark.seconds
def test_interrupted_after_any_image_it_goes_on_there(folder, capsys, monkeypatch, images):
    monkeypatch.setattr(verify, "_SECONDS_BETWEEN_SAVES", 0.0)
    decode_whole = verify.decode_whole
    asked: list[tuple] = []

    def interrupted(table, rows, **arguments):
        for result in decode_whole(table, rows, **arguments):
            asked.append(result)
            if len(asked) == images:
                signal.raise_signal(signal.SIGINT)
            yield result

    open_manifest(folder)
    monkeypatch.setattr(verify, "decode_whole", interrupted)
    assert main([str(folder), "--verify", "decode"]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"interrupted after {images} of 23 images; the same command goes on from there"
    rows: list[int] = []

    def counted(table, rows_asked, **arguments):
        rows.extend(rows_asked)
        return decode_whole(table, rows_asked, **arguments)

    monkeypatch.setattr(verify, "decode_whole", counted)
    assert main([str(folder), "--verify", "decode"]) == 0
    bad_before = sum(image is None for image, _ in asked)
    assert len(rows) == 23 - images + bad_before
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["train"], result["val"], result["quarantined"]) == (12, 6, 7)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", '{"fingerprint": "another", "done": {}}', "[1]", "null", "[" * 100_000),
        '{"fingerprint": "FINGERPRINT", "done": {"train": "1", "val": 0}, "bad": {"train": {}, "val": {}}}',
        '{"fingerprint": "FINGERPRINT", "done": {"train": 99, "val": 0}, "bad": {"train": {}, "val": {}}}',
        '{"fingerprint": "FINGERPRINT", "done": {"train": 1, "val": 0}, "bad": {"train": {"99": "x"}, "val": {}}}',
        '{"fingerprint": "FINGERPRINT", "done": {"train": 1}, "bad": {"train": {}, "val": {}}}',
    ],
)
@pytest.mark.seconds
def test_progress_that_means_nothing_here_is_not_used(folder, content):
    scanned = open_manifest(folder)
    (scanned.folder / PROGRESS).write_text(content.replace("FINGERPRINT", scanned.fingerprint))
    assert len(verify.verify(scanned).train) == 12


def test_killed_at_any_moment_it_goes_on(folder):
    """SIGKILL and Ctrl-C at moments a few milliseconds apart; meanwhile and in the end, the folder is as it should be."""
    command = [
        sys.executable,
        "-c",
        "import sys; from common.process import end; from pipeline import manifest; from pipeline.preparation import verify; "
        "verify._SECONDS_BETWEEN_SAVES = 0; print('up', flush=True); end(lambda: manifest.main(sys.argv[1:]))",
    ]
    command += [str(folder), "--verify", "decode"]
    interrupted = 0
    for attempt in range(6):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.02 + 0.03 * attempt)
        process.send_signal(signal.SIGKILL if attempt % 2 else signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors
        # -SIGINT: when all was done, while the interpreter was ending.
        assert process.returncode in (-signal.SIGKILL, -signal.SIGINT, 130, 0)
        interrupted += process.returncode != 0
        assert len(open_manifest(folder).train) in (14, 12)
    assert interrupted
    assert main(command[3:]) == 0
    verified = open_manifest(folder)
    assert verified.verified
    assert (len(verified.train), len(verified.val), verified.quarantined) == (12, 6, 7)


def test_a_manifest_that_cannot_be_written_is_said_to_be(folder, monkeypatch):
    scanned = open_manifest(folder)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verify, "replacing", refuse)
    with pytest.raises(UserError, match=r"cannot write the manifest in .* \(Permission denied\)"):
        verify.verify(scanned)


def test_figures_of_the_summary(folder, capsys):
    for image_format in ("PNG", "PNG", "WEBP"):
        photographs()[0].save(folder / f"train/class0/{len(os.listdir(folder / 'train/class0'))}.x", image_format)
    assert main([str(folder)]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    figures = result["splits"]["train"]
    sizes = open_manifest(folder).train.read(np.arange(17)).sizes
    shorter = sizes.min(axis=1)
    assert figures["formats"] == {"JPEG": 12, "PNG": 2, "BMP": 1, "PPM": 1, "WEBP": 1}
    assert figures["shorter_side_px"] == [shorter.min(), int(np.median(shorter)), shorter.max()]
    assert figures["longer_side_px"][2] == sizes.max()
    assert "JPEG 12, PNG 2, BMP 1, PPM 1, WEBP 1" in output.err
    assert result["verified"] is None
