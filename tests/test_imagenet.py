"""pipeline.imagenet on made-up tar files of the official layout."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from pipeline import imagenet

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
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
