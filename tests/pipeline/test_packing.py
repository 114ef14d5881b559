"""Preparing a data set: what is in the shards, and that nothing but SRC and the flags decides it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import lock
from common.files import replacing
from pipeline.dataset.manifest import open_manifest
from pipeline.preparation import packing
from pipeline.shards.index import open_prepared
from tests.support.images import photo_folder
from tests.support.launch import ROOT, free_port
from tests.support.mounts import small_disk

FLAGS = ["--short-side", "256", "--shard-images", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = photo_folder(tmp_path_factory.mktemp("photos"), train=21, val=6)
    Image.open(folder / "train/class0/000.JPEG").resize((100, 300)).save(folder / "train/class1/small.png")
    (folder / "train/class0/000.JPEG").rename(folder / "train/class0/two.dots and space.JPEG")
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> Path:
    destination = tmp_path_factory.mktemp("prepared") / "256"
    assert packing.main([str(source), str(destination), *FLAGS]) == 0
    return destination


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def launch(ranks: int, *flags: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port()), "-m"]
    return subprocess.Popen([*launcher, "pipeline.prepare", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_every_image_once_at_its_size_with_its_label(source, prepared):
    manifest, data = open_manifest(source), open_prepared(str(prepared))
    assert data.classes == manifest.classes
    for split in ("train", "val"):
        table, originals = getattr(data, split), getattr(manifest, split)
        assert len(table) == len(originals)
        rows = table.read(np.arange(len(table)))
        used = []
        for (shard, offset, size), label, (height, width) in zip(rows.source, rows.labels, rows.sizes, strict=True):
            with open(prepared / table.shard_name(shard), "rb") as file:
                file.seek(offset)
                image = Image.open(io.BytesIO(file.read(size)))
            assert (image.format, image.size) == ("JPEG", (width, height))
            name = table.name(np.array([shard, offset, size])).partition(": ")[2]
            match = re.fullmatch(rf"{data.classes[label]}/(\d{{9}})-\w[\w ]*\.jpg", name)
            assert match
            row = int(match[1])
            original = originals.read(np.array([row]))
            whole = Image.open(originals.name(original.source[0])).convert("RGB")
            assert original.labels[0] == label
            if min(whole.size) <= 256:
                assert image.size == whole.size, "never larger"
            else:
                assert min(image.size) == 256
                assert abs(max(image.size) - max(whole.size) * 256 / min(whole.size)) <= 0.5
            buffer = io.BytesIO()
            whole.resize(image.size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(buffer)))
            assert difference.mean() < 1.5
            used.append(row)
        assert sorted(used) == list(range(len(originals)))
        if split == "train":
            assert used != sorted(used), "shuffled"


def test_shards_are_webdatasets(prepared):
    """Pairs of members with the same key up to the first dot of the base name, in order: .jpg and .cls."""
    data = open_prepared(str(prepared))
    rows = data.train.read(np.arange(len(data.train)))
    labels: list[int] = []
    for shard in range(len(data.train.shard_images)):
        with tarfile.open(prepared / f"train-{shard:06d}.tar") as tar:
            members = tar.getmembers()
            for jpeg, label in zip(members[::2], members[1::2], strict=True):
                match, file = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", jpeg.name), tar.extractfile(label)
                assert match
                assert file
                assert (match[2], label.name) == ("jpg", f"{match[1]}.cls")
                assert [shard, jpeg.offset_data, jpeg.size] == rows.source[len(labels)].tolist()
                labels.append(int(file.read()))
    assert labels == rows.labels.tolist()


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kept", ["jpeg", pytest.param("raw", marks=pytest.mark.slow)])
def test_interrupted_anywhere_and_on_any_number_of_ranks_the_result_is_the_same(
    source, prepared, tmp_path, ranks, kept
):
    destination = tmp_path / "again"
    if kept == "raw":
        prepared = tmp_path / "at once"
        assert packing.main([str(source), str(prepared), *FLAGS, "--format", kept]) == 0
    flags = [str(source), str(destination), *FLAGS, "--threads", "1", "--format", kept]
    process = launch(ranks, *flags)
    deadline = time.monotonic() + 60
    while len(list((destination / ".unfinished").glob("*.npz"))) < 2:
        assert time.monotonic() < deadline
        if process.poll() is not None:
            break  # faster than this test; the rest still holds
        time.sleep(0.01)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}").glob("children"):
        for pid in child.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    process.kill()
    process.wait()
    assert launch(1, *flags).wait() == 0
    assert content(destination) == content(prepared)


def test_a_limit_for_the_longer_side(source, tmp_path):
    assert packing.main([str(source), str(tmp_path / "max"), "--short-side", "max:200"]) == 0
    data, originals = open_prepared(str(tmp_path / "max")), open_manifest(source)
    assert data.train.read(np.arange(22)).sizes.max(axis=1).tolist() == [200] * 22
    ratios = [np.divide(*table.read(np.arange(22)).sizes.T) for table in (data.train, originals.train)]
    assert np.allclose(np.sort(ratios[0]), np.sort(ratios[1]), rtol=0.01)


def test_images_that_cannot_be_decoded_are_left_out_and_named(tmp_path):
    folder = photo_folder(tmp_path / "photos", train=12, val=5)
    open_manifest(folder)
    for path in ("train/class0/004.JPEG", "val/class1/003.JPEG"):
        os.truncate(folder / path, 3000)
    assert packing.main([str(folder), str(tmp_path / "out"), *FLAGS]) == 0
    data = open_prepared(str(tmp_path / "out"))
    assert (len(data.train), len(data.val), data.quarantined, data.val_lost) == (11, 4, 2, 1)
    assert data.train.shard_images.sum() == 11
    lines = (tmp_path / "out/quarantine.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["path", "train/class0/004.JPEG", "val/class1/003.JPEG"]
    assert all(line.split("\t")[1] for line in lines)


def test_an_image_too_long_for_a_jpeg_is_named(tmp_path):
    folder = photo_folder(tmp_path / "photos", train=4, val=4)
    Image.new("RGB", (70_000, 3)).save(folder / "train/class0/long.png")
    assert packing.main([str(folder), str(tmp_path / "out"), *FLAGS]) == 0
    assert len(open_prepared(str(tmp_path / "out")).train) == 4
    assert (
        "train/class0/long.png\ttoo long for a JPEG (70000×3 pixels)" in (tmp_path / "out/quarantine.tsv").read_text()
    )


def test_a_full_disk_ends_with_a_sentence_and_with_more_room_it_goes_on(source, prepared, tmp_path, capsys):
    with small_disk(tmp_path / "small", mebibytes=2) as place:
        (place / "filler").write_bytes(bytes(1_700_000))
        assert packing.main([str(source), str(place / "out"), *FLAGS]) == 1
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ")
        assert "No space left on device" in error
        assert "Traceback" not in error
        assert not (place / "out/index.json").exists()
        (place / "filler").unlink()
        assert packing.main([str(source), str(place / "out"), *FLAGS]) == 0
        assert content(place / "out") == content(prepared)


def test_a_complete_data_set_is_left_alone(source, prepared, capsys):
    before = content(prepared)
    assert packing.main([str(source), str(prepared), *FLAGS]) == 0
    output = capsys.readouterr()
    assert "complete already" in output.err
    assert json.loads(output.out.splitlines()[-1])["train"] == 22
    assert content(prepared) == before


WRONG = {
    "other settings": (["{source}", "{prepared}", "--short-side", "255"], "was prepared with --short-side 256"),
    "a folder in use": (["{source}", "{source}"], "is not empty"),
    "no source": (["{source}/nothing", "{new}"], "no such folder"),
    "no number": (["{source}", "{new}", "--short-side", "min:3"], "--short-side min:3: give a number of pixels"),
    "no pixels": (["{source}", "{new}", "--short-side", "0"], "--short-side 0: give a number of pixels"),
    "quality": (["{source}", "{new}", "--quality", "100"], "--quality 100: must be in 1–95"),
    "no images in a shard": (["{source}", "{new}", "--shard-images", "0"], "--shard-images 0: must be at least 1"),
    "a million threads": (["{source}", "{new}", "--threads", "1000000"], "--threads 1000000: must be in [1, 1024]"),
    "a bucket": (["{source}", "s3://bucket/x"], "prepare into a folder"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_a_sentence(source, prepared, tmp_path, capsys, flags, message):
    before = content(prepared)
    places = {"source": source, "prepared": prepared, "new": tmp_path / "new"}
    assert packing.main([flag.format(**places) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error
    assert content(prepared) == before
    assert not (tmp_path / "new").exists()


def test_two_into_one_folder(source, prepared, tmp_path, capsys, monkeypatch):
    """The second waits, and then says who the first is; nothing of the first's is touched."""
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.3)
    destination = tmp_path / "out"
    flags = [str(source), str(destination), *FLAGS]
    written: list[str] = []
    real = packing._write_shards

    def meanwhile(*arguments, **keywords):
        written.append("")
        if len(written) == 1:
            with replacing(destination / "train-000000.tar") as file:
                file.write(b"half")
                before = content(destination / ".unfinished") | {
                    "names": " ".join(sorted(os.listdir(destination))).encode()
                }
                assert packing.main(flags) == 2
                after = content(destination / ".unfinished") | {
                    "names": " ".join(sorted(os.listdir(destination))).encode()
                }
                assert after == before
        return real(*arguments, **keywords)

    monkeypatch.setattr(packing, "_write_shards", meanwhile)
    assert packing.main(flags) == 0
    assert len(written) == 1
    assert f"pid {os.getpid()}, host" in capsys.readouterr().err
    assert content(destination) == content(prepared)


def test_files_that_others_have_put_there_stay(source, prepared, tmp_path, monkeypatch):
    destination = tmp_path / "out"
    flags = [str(source), str(destination), *FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_finish", lambda *_: signal.raise_signal(signal.SIGINT))
        assert packing.main(flags) == 130
    (tmp_path / "precious").write_text("somebody's")
    others = [".editor.tmp", ".train-000000.tar.abc_1234.tmp.swp", ".unfinished/notes.txt"]
    for name in others:
        (destination / name).write_text("somebody's")
    (destination / ".train-000000.tar.link.tmp").symlink_to(tmp_path / "precious")
    (destination / ".train-000000.tar.abc_1234.tmp").write_text("ours")
    assert packing.main(flags) == 0
    assert all((destination / name).read_text() == "somebody's" for name in others)
    assert not (destination / ".train-000000.tar.abc_1234.tmp").exists()
    assert (destination / ".train-000000.tar.link.tmp").is_symlink()
    assert (tmp_path / "precious").read_text() == "somebody's"
    assert os.listdir(destination / ".unfinished") == ["notes.txt"]
    assert (
        content(prepared).items()
        <= {path.name: path.read_bytes() for path in destination.iterdir() if path.is_file()}.items()
    )


@pytest.mark.parametrize("where", ["link", "index.json"])
def test_a_folder_that_is_not_prepared_data_is_not_written_to(source, tmp_path, capsys, where):
    destination = tmp_path / "out"
    destination.mkdir()
    (tmp_path / "precious").mkdir()
    if where == "link":
        (destination / ".unfinished").symlink_to(tmp_path / "precious")
    else:
        (destination / "index.json").write_text('{"0": "cat"}')
    assert packing.main([str(source), str(destination), *FLAGS]) == 2
    assert f"{destination}: is not empty; give a new folder" in capsys.readouterr().err
    assert len(list(destination.iterdir())) == 1
    assert not list((tmp_path / "precious").iterdir())


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"source": 1}', b"\xff", b"[" * 100_000])
def test_notes_that_are_damaged_are_said_in_a_sentence(source, tmp_path, capsys, damage):
    (tmp_path / "out/.unfinished").mkdir(parents=True)
    (tmp_path / "out/.unfinished/job.json").write_bytes(damage)
    assert packing.main([str(source), str(tmp_path / "out"), *FLAGS]) == 2
    assert "job.json: does not say any more what is being prepared" in capsys.readouterr().err


def test_a_damaged_part_of_the_index_is_named_and_made_again(source, prepared, tmp_path, capsys, monkeypatch):
    destination = tmp_path / "out"
    flags = [str(source), str(destination), *FLAGS]
    part = destination / ".unfinished/train-000003.tar.npz"
    real = packing._finish

    def damaged_first(*arguments):
        part.write_bytes(b"PK not a zip file")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_finish", damaged_first)
        assert packing.main(flags) == 1
    assert f"{part}: is damaged; remove it, and give the same command" in capsys.readouterr().err
    part.unlink()
    assert packing.main(flags) == 0
    assert content(destination) == content(prepared)
