import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from pipeline import manifest as manifests
from pipeline import scan
from pipeline.headers import Header, read_header
from pipeline.manifest import open_manifest
from pipeline.tables import FileTable
from tests.images import photo_folder, photographs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    return photo_folder(tmp_path / "data", train=6, val=3, classes=2)


def paths(table):
    names = table.read(np.arange(len(table))).source
    return [os.path.normpath(bytes(name).decode()) for name in names]


def test_rows_are_those_of_imagefolder(folder):
    from torchvision.datasets import ImageFolder

    manifest = open_manifest(folder)
    reference = ImageFolder(str(folder / "train"))
    assert list(manifest.classes) == reference.classes
    assert paths(manifest.train) == [path for path, _ in reference.samples]
    rows = manifest.train.read(np.arange(len(manifest.train)))
    assert rows.labels.dtype == np.int64
    assert list(rows.labels) == reference.targets
    for (path, _), (height, width) in zip(reference.samples, rows.sizes, strict=True):
        assert Image.open(path).size == (width, height)


def test_files_that_cannot_be_decoded_are_left_out_with_the_reason(folder, capsys):
    photo, good = photographs()[0], open_manifest(folder)
    jpeg = (folder / "train/class0/000.JPEG").read_bytes()
    bad = folder / "train/class1"
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "garbage.jpg").write_bytes(bytes(range(256)) * 20)
    (bad / "page.jpg").write_text("<html>not found</html>")
    (bad / "header_cut.jpg").write_bytes(jpeg[:100])
    (bad / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (bad / "end_missing.jpg").write_bytes(jpeg[:-2])
    photo.save(bad / "animation.JPEG", "GIF")
    photo.save(bad / "cut.png")
    (bad / "cut.png").write_bytes((bad / "cut.png").read_bytes()[:-12])
    (bad / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(bad / "pipe.jpg")
    (bad / "folder.jpg").mkdir()
    (bad / ".hidden.jpg").write_bytes(b"")

    manifest = open_manifest(folder)
    assert paths(manifest.train) == paths(good.train)
    assert manifest.quarantined == 10
    assert "10 files cannot be decoded" in capsys.readouterr().err
    lines = (manifest.folder / "quarantine.tsv").read_text().splitlines()
    reasons = {Path(path).name: reason for path, reason in (line.split("\t") for line in lines[1:])}
    assert reasons == {
        "empty.jpg": "empty file",
        "garbage.jpg": "not an image",
        "page.jpg": "not an image",
        "header_cut.jpg": "no image header (Truncated File Read)",
        "truncated.jpg": "no end marker (truncated JPEG)",
        "end_missing.jpg": "no end marker (truncated JPEG)",
        "animation.JPEG": "GIF: a format that is not decoded here",
        "cut.png": "no end marker (truncated PNG)",
        "dangling.jpg": "cannot be read: No such file or directory",
        "pipe.jpg": "not a regular file",
    }


def test_files_of_val_that_say_they_are_images_count_as_lost(folder, capsys):
    for name in ("a.jpg", "b.JPEG", "c.PnG", "d.gif", "e.JP2", "f.webp", "README.txt", "Thumbs.db", "jpg", "ILSVRC"):
        for split in ("train", "val"):
            (folder / split / "class0" / name).write_bytes(b"nothing")
    manifest = open_manifest(folder)
    assert (manifest.quarantined, manifest.val_lost) == (20, 6)
    assert "(6 images of val among them count as wrong)" in capsys.readouterr().err


def test_absurd_sizes_are_not_believed(tmp_path):
    path = tmp_path / "image.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    assert read_header(path).reason == "more than 178,956,970 pixels"


def test_bytes_after_the_end_are_harmless_but_a_thumbnails_end_does_not_count(tmp_path):
    image = photographs()[0].resize((200, 150))
    thumbnail = tmp_path / "thumbnail.jpg"
    image.resize((40, 30)).save(thumbnail)
    path = tmp_path / "image.jpg"
    image.save(path, comment=thumbnail.read_bytes())
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * 5000)
    assert read_header(path) == Header(height=150, width=200, bytes=len(content) + 5000, format="JPEG")
    path.write_bytes(content[:-2] + b"\0" * 5000)
    assert read_header(path).reason == "no end marker (truncated JPEG)"


def test_second_start_does_not_scan_and_a_change_does(folder, monkeypatch):
    first = open_manifest(folder)
    monkeypatch.setattr(manifests, "scan", lambda root: pytest.fail("scanned again"))
    assert open_manifest(folder).fingerprint == first.fingerprint
    monkeypatch.undo()

    shutil.copy(folder / "train/class0/000.JPEG", folder / "train/class0/new.JPEG")
    added = open_manifest(folder)
    assert len(added.train) == len(first.train) + 1
    assert added.fingerprint != first.fingerprint

    (folder / "train/class0/new.JPEG").unlink()
    assert open_manifest(folder).fingerprint == first.fingerprint
    assert len(list(first.folder.glob("*.npy"))) == 2, "old tables are removed"


def test_rescan_sees_a_file_overwritten_in_place(folder):
    first = open_manifest(folder)
    photographs()[1].resize((300, 200)).save(folder / "train/class0/000.JPEG", "JPEG")
    assert open_manifest(folder, rescan=True).fingerprint != first.fingerprint


def test_damaged_manifest_is_made_anew(folder):
    first = open_manifest(folder)
    (first.folder / "manifest.json").write_text('{"version": 1, "classes"')
    assert open_manifest(folder).fingerprint == first.fingerprint


def test_folder_that_cannot_be_written_is_cached_elsewhere(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / ".vgg-manifest").write_text("a file in the way, since permissions do not stop root")
    manifest = open_manifest(folder)
    assert manifest.folder.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(manifests, "scan", lambda root: pytest.fail("scanned again"))
    assert open_manifest(folder).fingerprint == manifest.fingerprint


def test_folder_can_be_moved(folder):
    first = open_manifest(folder)
    moved = folder.rename(folder.with_name("moved"))
    again = open_manifest(moved)
    assert again.fingerprint == first.fingerprint
    assert all(Path(path).is_file() for path in paths(again.train))


def test_worker_processes_read_the_same(folder, monkeypatch):
    alone = open_manifest(folder)
    monkeypatch.setattr(scan, "_FILES_WORTH_A_POOL", 1)
    monkeypatch.setattr(scan, "_FILES_A_CHUNK", 2)
    assert open_manifest(folder, rescan=True).fingerprint == alone.fingerprint


def test_names_that_are_not_ascii_nested_folders_and_links(folder):
    source = folder / "train/class0/000.JPEG"
    nested = folder / "train/class0/deep/er"
    nested.mkdir(parents=True)
    shutil.copy(source, nested / "größe 猫\t.jpg")
    (folder / "train/class0/deep/loop").symlink_to(folder / "train/class0")
    manifest = open_manifest(folder)
    assert str(nested / "größe 猫\t.jpg") in paths(manifest.train)
    assert len(manifest.train) == 7
    shutil.copy(source, nested / "another.jpg")
    assert len(open_manifest(folder).train) == 8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: shutil.rmtree(root / "val"), "has no folder val/"),
        (lambda root: shutil.rmtree(root / "val/class1"), "classes differ: class1 in train/ but not in val/"),
        (lambda root: (root / "val/extra").mkdir(), "classes differ: extra in val/ but not in train/"),
        (
            lambda root: [(root / split / "none").mkdir() for split in ("train", "val")],
            "train/none: class folder without an image that can be decoded: no files at all",
        ),
        (
            lambda root: (
                [(root / f"val/class1/{name}").write_bytes(b"") for name in ("001.JPEG", "2.jpg", "3.jpg")]
                + [(root / "val/class1/a").write_text("text")]
            ),
            "val/class1: class folder without an image that can be decoded: 3 × empty file; 1 × not an image",
        ),
        (lambda root: (root / "train").rename(root / "old") and (root / "train").mkdir(), "holds no class folders"),
    ],
)
def test_wrong_folders_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_manifest(folder)


def test_command_prints_a_summary(folder):
    (folder / "train/class0/bad.jpg").write_bytes(b"")
    command = [sys.executable, "-m", "pipeline.manifest", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["train"], result["val"], result["classes"], result["quarantined"]) == (6, 3, 2, 1)
    assert "1 left out: empty file" in done.stderr
    failed = subprocess.run(
        [*command[:-1], str(folder / "none")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert len(failed.stderr.splitlines()) == 1


START_UP = """
import json, resource, sys, time
from pathlib import Path
import numpy as np, torch
from nvidia.dali import fn
from pipeline.loader import DaliLoader
from pipeline.manifest import open_manifest
from pipeline.plan import TrainPlan
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
before, started = resident_mb(), time.perf_counter()
table = open_manifest(Path(sys.argv[1])).train
plan = TrainPlan(table=table, batch_size=32, crop=224, scale=(256, 256), seed=0)
loader = DaliLoader(lambda skip: plan.batches(start=0, rank=0, world_size=1, micro_batch=32, skip=skip),
                    lose=print, batch_size=32, crop=224,
                    device=torch.device("cpu"), decoder="cpu", half=False, threads=1, prefetch=2)
images, labels = next(loader)
print(json.dumps({"rows": len(table), "seconds": time.perf_counter() - started, "mb": resident_mb() - before}))
"""


def test_start_up_on_a_table_of_imagenets_size(folder):
    """1.28 M rows: under 3 s from opening the manifest to the first batch, under 300 MB above the imports."""
    manifest = open_manifest(folder)
    description = json.loads((manifest.folder / "manifest.json").read_text())
    table_path = manifest.folder / description["tables"]["train"]
    rows = np.load(table_path)
    np.save(table_path, np.resize(rows, 1_281_167))
    done = subprocess.run(
        [sys.executable, "-c", START_UP, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"] == 1_281_167
    assert result["seconds"] < 3
    assert result["mb"] < 300


def test_reading_rows_takes_the_same_time_for_any_length(folder):
    table = open_manifest(folder).train
    large = FileTable(folder, np.resize(table._rows._rows, 2_000_000))
    rows = np.random.default_rng(0).integers(0, len(large), 4096)
    large.read(rows)
    started = time.perf_counter()
    large.read(rows)
    assert time.perf_counter() - started < 0.2
