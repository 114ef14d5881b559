"""pipeline.imagenet on made-up tar files of the official layout."""

import copy
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from common import lock
from common.lock import FolderLock
from pipeline.preparation import imagenet

# Three classes; their numbers in the development kit are not in the order of their WordNet ids.
IDS = {1: "n03000000", 2: "n01000000", 3: "n02000000"}
VAL_IDS = [3, 1, 2, 2, 1, 3, 3]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def made_up_tars(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / imagenet.TRAIN_TAR, "w") as train:
        for name in IDS.values():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(4):
                    add(tar, f"{name}_{number}.JPEG", f"{name} {number}".encode() * (number + 1))
            add(train, f"{name}.tar", inner.getvalue())
    with tarfile.open(folder / imagenet.VAL_TAR, "w") as val:
        for number in reversed(range(len(VAL_IDS))):  # whatever the order in the tar file: names count
            add(val, f"ILSVRC2012_val_{number + 1:08}.JPEG", f"val {number}".encode())
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([(n, name, "thing", 0) for n, name in IDS.items()] + [(4, "n09", "group", 3)], dtype=kind)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / imagenet.DEVKIT_TAR, "w:gz") as devkit:
        add(devkit, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{number}\n" for number in VAL_IDS).encode()
        add(devkit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    return folder


@pytest.fixture
def tars(tmp_path):
    return made_up_tars(tmp_path / "tars")


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def expected() -> dict[str, bytes]:
    train = {
        f"train/{name}/{name}_{number}.JPEG": f"{name} {number}".encode() * (number + 1)
        for name in IDS.values()
        for number in range(4)
    }
    val = {
        f"val/{IDS[label]}/ILSVRC2012_val_{number + 1:08}.JPEG": f"val {number}".encode()
        for number, label in enumerate(VAL_IDS)
    }
    return train | val


def test_every_image_lies_in_its_class_folder(tars, tmp_path, capsys):
    assert imagenet.main([str(tars), str(tmp_path / "data")]) == 0
    assert contents(tmp_path / "data") == expected()
    assert json.loads(capsys.readouterr().out) == {"data": str(tmp_path / "data"), "train": 12, "val": 7}


def test_goes_on_with_what_is_missing_after_an_interruption(tars, tmp_path, monkeypatch):
    data = tmp_path / "data"
    copied = []

    def interrupted(source, target):
        copied.append(target.name)
        if len(copied) == 6:
            raise KeyboardInterrupt
        target.write(source.read())

    monkeypatch.setattr(imagenet, "_THREADS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(imagenet.shutil, "copyfileobj", interrupted)
        assert imagenet.main([str(tars), str(data)]) == 130
    finished = data / "train/n01000000"
    assert finished.is_dir()
    assert not (data / "train/n02000000").exists()  # the folder that was interrupted
    untouched = (finished / "n01000000_0.JPEG").stat().st_mtime_ns
    assert imagenet.main([str(tars), str(data)]) == 0
    assert contents(data) == expected()
    assert (finished / "n01000000_0.JPEG").stat().st_mtime_ns == untouched


@pytest.mark.parametrize("name", [imagenet.TRAIN_TAR, imagenet.VAL_TAR, imagenet.DEVKIT_TAR])
@pytest.mark.parametrize("damage", ["missing", "cut", "foreign"])
def test_a_wrong_tar_file_is_said_in_one_sentence(tars, tmp_path, capsys, name, damage):
    path = tars / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(whole[: len(whole) // 3] if damage == "cut" else b"<html>not found</html>" * 100)
    assert imagenet.main([str(tars), str(tmp_path / "data")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.strip().count("\n") == 0, output.err
    assert "download it" in output.err


def special(name: str, kind: bytes, target: str = "", size: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, target, size
    return entry


STRANGE = {
    "symbolic link": (special("n01000000_9.JPEG", tarfile.SYMTYPE, "/etc/passwd"), "is a link or no plain file"),
    "hard link": (special("n01000000_9.JPEG", tarfile.LNKTYPE, "n01000000_0.JPEG"), "is a link or no plain file"),
    "link to nothing": (special("n01000000_9.JPEG", tarfile.LNKTYPE, "nothing"), "is a link or no plain file"),
    "device": (special("n01000000_9.JPEG", tarfile.CHRTYPE), "is a link or no plain file"),
    "pipe": (special("n01000000_9.JPEG", tarfile.FIFOTYPE), "is a link or no plain file"),
    "above": (special("../../planted.JPEG", tarfile.REGTYPE), "is no name of an image"),
    "two points": (special("..", tarfile.REGTYPE), "is no name of an image"),
    "absolute": (special("/{place}/planted.JPEG", tarfile.REGTYPE), "is no name of an image"),
    "hidden": (special(".lock", tarfile.REGTYPE), "is no name of an image"),
    "twice": (special("n01000000_0.JPEG", tarfile.REGTYPE), "holds n01000000_0.JPEG twice"),
    "larger than the file": (special("n01000000_9.JPEG", tarfile.REGTYPE, size=10**12), "is cut short"),
}


def append(path: Path, entry: tarfile.TarInfo) -> None:
    with tarfile.open(path, "a") as tar:
        tar.fileobj.seek(tar.offset)
        tar.fileobj.write(entry.tobuf())
        tar.offset += 512


@pytest.mark.parametrize("where", ["train", "class", "val"])
@pytest.mark.parametrize(("entry", "message"), STRANGE.values(), ids=STRANGE)
def test_members_that_imagenet_does_not_have(tars, tmp_path, capsys, where, entry, message):
    entry = copy.copy(entry)
    entry.name = entry.name.replace("{place}", str(tmp_path))
    if where == "class":
        inner = tmp_path / "inner.tar"
        with tarfile.open(tars / imagenet.TRAIN_TAR) as tar:
            classes = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        inner.write_bytes(classes["n01000000.tar"])
        append(inner, entry)
        with tarfile.open(tars / imagenet.TRAIN_TAR, "w") as tar:
            for name, content in (classes | {"n01000000.tar": inner.read_bytes()}).items():
                add(tar, name, content)
        inner.unlink()
    else:
        if where == "train" and entry.name == "n01000000_0.JPEG":
            entry.name, message = "n01000000.tar", "holds n01000000.tar twice"
        if where == "val" and entry.name == "n01000000_0.JPEG":
            entry.name, message = "ILSVRC2012_val_00000001.JPEG", "holds ILSVRC2012_val_00000001.JPEG twice"
        append(tars / (imagenet.TRAIN_TAR if where == "train" else imagenet.VAL_TAR), entry)
    before = contents(tmp_path)
    assert imagenet.main([str(tars), str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert message in said[-1]
    outside = {name: content for name, content in contents(tmp_path).items() if not name.startswith("data/")}
    assert outside == before
    data = tmp_path / "data"
    assert where == "class" or not data.exists(), "the two outer tar files are looked at before anything is written"
    assert not (data / "train/n01000000").exists(), "a folder has its name only when it is complete"


def devkit_of(folder: Path, ids: list[tuple[int, str]], truth: str) -> None:
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([(n, name, "thing", 0) for n, name in ids], dtype=kind)})
    with tarfile.open(folder / imagenet.DEVKIT_TAR, "w:gz") as devkit:
        add(devkit, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(devkit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


DEVKITS = {
    "unknown class": (list(IDS.items()), "1\n2\n99\n", "the ground truth names a class 99, which does not exist"),
    "no number": (list(IDS.items()), "1\ntwo\n", "not ImageNet's development kit"),
    "a path": ([(1, "../../planted"), (2, "n01000000")], "1\n", "is no WordNet id"),
    "one id twice": ([(1, "n01000000"), (2, "n01000000")], "1\n", "two classes with one number or one WordNet id"),
    "fewer classes": (
        [(1, "n03000000"), (2, "n01000000")],
        "1\n" * 7,
        "n02000000.tar, which is no class of ILSVRC2012",
    ),
}


@pytest.mark.parametrize(("ids", "truth", "message"), DEVKITS.values(), ids=DEVKITS)
def test_a_development_kit_that_does_not_fit(tars, tmp_path, capsys, ids, truth, message):
    devkit_of(tars, ids, truth)
    assert imagenet.main([str(tars), str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "data").exists()


def test_two_at_once_and_folders_of_others(tars, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE_SECONDS", 0.2)
    data = tmp_path / "data"
    data.mkdir()
    with FolderLock(data) as other:
        other.take()
        assert imagenet.main([str(tars), str(data)]) == 2
    assert f"is writing to {data}" in capsys.readouterr().err
    assert [path.name for path in data.iterdir()] == [".lock"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("somebody's")
    (data / "train/.mine.tmp").mkdir(parents=True)
    (data / "train/.n01000000.tmp").mkdir()
    (data / "train/.n09000000.tmp").symlink_to(tmp_path / "precious")
    assert imagenet.main([str(tars), str(data)]) == 0
    assert set(contents(data)) == set(expected())
    assert (data / "train/.mine.tmp").is_dir()
    assert (tmp_path / "precious/file").exists()
