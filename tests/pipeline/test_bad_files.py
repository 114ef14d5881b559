"""Files of all kinds, good and bad: every good one is used, with the right picture, and every bad one is named."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from common.progress import printable
from engine.checkpoint import load
from pipeline.dali.decoding import decode_whole
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.dali.recovery import undecodable
from pipeline.dataset.headers import read_header
from pipeline.dataset.manifest import open_manifest
from pipeline.dataset.quarantine import read_quarantine
from pipeline.plan.samples import LOST_LABEL, PADDING_LABEL, rescaled_sizes
from pipeline.plan.training import TrainPlan
from pipeline.plan.validation import ValidationPlan
from tests.support.bad_files import BAD, JPEG, KINDS, MISREAD, ODD_KINDS, UNUSUAL, content, encoded, file_name, photo
from tests.support.launch import ROOT, run

CROP = 32
EPOCHS = 2
FLAGS = ["--arch", "A", "--crop", str(CROP), "--train-scale", "32-48", "--batch-size", "8", "--epochs", str(EPOCHS)]
FLAGS += ["--schedule", "step", "--dropout", "0", "--lr", "0.001", "--max-bad-images", "100"]

# Nothing of a folder's files is a file of this data set: a folder is looked into, and one above is not looked into twice.
NOT_FILES = {"folder", "link to a folder above"}
# Opening one waits until somebody writes to it: the scan looks before it opens, a run does not.
KINDS_THAT_WAIT = {"fifo", "link to a fifo"}
GOOD_KINDS = [kind for kind in KINDS if KINDS[kind].decodable]
BAD_KINDS = [kind for kind in KINDS if not KINDS[kind].decodable]


def place(kind: str, root: Path, split: str) -> Path:
    """Where the file of a kind lies in a data folder of two classes."""
    return root / split / f"class {list(KINDS | ODD_KINDS).index(kind) % 2}" / file_name(kind)


def zoo(root: Path) -> Path:
    """One file of each kind in train and in val."""
    for split in ("train", "val"):
        for kind in KINDS:
            path = place(kind, root, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            KINDS[kind].write(path)
    return root


def zoo_that_was_good(root: Path) -> Path:
    """The same, but whatever is bad was a good JPEG when the folder was scanned, and no folder's time tells."""
    for split in ("train", "val"):
        for kind in set(KINDS) - KINDS_THAT_WAIT:
            path = place(kind, root, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            (KINDS[kind].write if KINDS[kind].decodable else content(JPEG))(path)
    assert open_manifest(root).quarantined == 0
    for folder in root.glob("*/class *"):
        times = os.stat(folder)
        for kind in BAD_KINDS:
            path = place(kind, root, folder.parent.name)
            if path.parent == folder and kind not in KINDS_THAT_WAIT:
                path.unlink()
                KINDS[kind].write(path)
        os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
    return root


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.slow
@pytest.mark.parametrize("make", [zoo, zoo_that_was_good])
def test_training_uses_every_good_file_once_an_epoch_and_names_every_bad_one(tmp_path, monkeypatch, make, ranks):
    root = make(tmp_path / "data")
    monkeypatch.setenv("RECORD", str(tmp_path))
    script, out = "tests/support/programs/recorder.py", tmp_path / "out"
    done = run(*FLAGS, "--data", str(root), "--out", str(out), ranks=ranks, script=script)
    assert "Traceback" not in done.stderr
    assert ("scanning" in done.stderr) == (make is zoo)

    scanned = {file_name(kind) for kind in GOOD_KINDS}
    bad_kinds = [kind for kind in BAD_KINDS if kind not in (NOT_FILES if make is zoo else KINDS_THAT_WAIT)]
    manifest = open_manifest(root)
    reasons = dict(read_quarantine(manifest.folder))
    for split in ("train", "val"):
        for kind in bad_kinds:
            name = printable(str(place(kind, root, split).relative_to(root)))
            assert reasons.pop(name, ""), f"{name} is not named"
    assert not reasons, "no good file is named"

    lines = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    shown = [
        (number, Path(path), label)
        for line in lines
        for number, path, label in zip(line["numbers"], line["paths"], line["labels"], strict=True)
    ]
    # Each good file has its turn once an epoch; some other is shown in the turn of a bad one.
    plan = TrainPlan(
        table=manifest.train, batch_size=8, crop=CROP, scale=(32, 48), seed=load(out / "last.pt").config["seed"]
    )
    images = len(manifest.train)
    at_turn = {number: path for number, path, _ in shown if path.is_relative_to(root / "train")}
    turns = np.arange(EPOCHS * images)
    for number, row in zip(turns.tolist(), plan.epochs_and_rows(turns)[1].tolist(), strict=True):
        own = manifest.train.path(row)
        assert at_turn[number] == own or own.name not in scanned
    used = {path.name for path in at_turn.values()}
    assert scanned <= used <= scanned | {file_name(kind) for kind in BAD_KINDS if kind.startswith("cut")}
    right = [path.name for _, path, label in shown if path.is_relative_to(root / "val") and label >= 0]
    assert Counter(right) == Counter(dict.fromkeys(scanned, EPOCHS))
    assert {label for _, _, label in shown} <= {0, 1, LOST_LABEL, PADDING_LABEL}

    named_images = [kind for kind in bad_kinds if Path(file_name(kind)).suffix or make is zoo_that_was_good]
    expected = (len(scanned) + len(named_images), len(named_images))
    assert [(entry["images"], entry["lost"]) for entry in load(out / "last.pt").history] == [expected] * EPOCHS


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A data folder of the good kinds and of those that would be misread, its manifest, and the picture of each row of val."""
    root = tmp_path_factory.mktemp("good")
    for split in ("train", "val"):
        for kind in (*GOOD_KINDS, *ODD_KINDS):
            path = place(kind, root, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            (KINDS | ODD_KINDS)[kind].write(path)
    manifest = open_manifest(root)
    kinds = {file_name(kind): kind for kind in (*GOOD_KINDS, *ODD_KINDS)}
    rows = [kinds[manifest.val.path(row).name] for row in range(len(manifest.val))]
    pictures = [picture(manifest.val.path(row), kind) for row, kind in enumerate(rows)]
    return manifest, rows, pictures


def picture(path: Path, kind: str) -> np.ndarray:
    pixels = (KINDS | ODD_KINDS)[kind].pixels
    if pixels is not None:
        return pixels
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits: PIL's convert cuts off what DALI scales
            levels = (np.asarray(image).astype(np.int64) + 128) // 257
            return np.repeat(levels[..., None], 3, axis=2).astype(np.uint8)
        return np.array(image.convert("RGB"))


def test_what_would_be_misread_is_left_out_by_name_and_nothing_else(good):
    manifest, rows, _ = good
    assert sorted(rows) == sorted((*GOOD_KINDS, *UNUSUAL))
    reasons = dict(read_quarantine(manifest.folder))
    assert {Path(path).name for path in reasons} == {printable(file_name(kind)) for kind in MISREAD}
    assert len(reasons) == manifest.quarantined == 2 * len(MISREAD)
    assert manifest.val_lost == len(MISREAD), "what is lost in val counts"
    for path, reason in reasons.items():
        assert reason.endswith("not decoded here"), f"{path}: {reason}"


def test_pictures_are_pils(good):
    manifest, rows, pictures = good
    results = decode_whole(manifest.val, np.arange(len(pictures)), threads=2)
    for kind, expected, (image, reason) in zip(rows, pictures, results, strict=True):
        assert image is not None, f"{kind}: {reason}"
        assert image.shape == expected.shape, kind
        assert np.abs(image.astype(int) - expected).max() <= (kind in UNUSUAL), kind  # ink and palettes round


def test_what_the_network_sees_is_the_picture_rescaled_and_cropped(good):
    manifest, _, pictures = good
    plan = ValidationPlan(table=manifest.val, crop=CROP, scale=CROP + 8)
    count = len(pictures)
    loader = DaliLoader(
        lambda skip: plan.batches(rank=0, world_size=1, batch_size=count, skip=skip),
        GraphOptions(crop=CROP, threads=2, prefetch=1),
        lose=lambda *lost: pytest.fail(f"lost {lost}"),
        batch_size=count,
    )
    images, _ = next(loader)
    images += torch.tensor(plan.mean_rgb)[:, None, None]
    for row, expected in enumerate(pictures):
        size = rescaled_sizes(np.array([expected.shape[:2]]), np.array([plan.scale]))[0].tolist()
        rescaled = functional.resize(torch.from_numpy(expected).permute(2, 0, 1), size, antialias=True)
        difference = (functional.center_crop(rescaled, [CROP, CROP]) - images[row]).abs()
        assert difference.max() <= 2.5, manifest.val.path(row)


@pytest.fixture(scope="module")
def plain_jpegs():
    return {"JPEG": JPEG, "progressive": encoded(photo(), "JPEG", progressive=True)}


@pytest.mark.parametrize("kind", ["JPEG", "progressive"])
def test_a_jpeg_cut_anywhere_is_found_by_the_scan_and_by_decoding(tmp_path, plain_jpegs, kind):
    whole = plain_jpegs[kind]
    cuts = [*range(0, len(whole) - 1, len(whole) // 40), *range(len(whole) - 12, len(whole))]
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        for length in cuts:
            (tmp_path / split / f"class/{length:05d}.jpg").write_bytes(whole)
    manifest = open_manifest(tmp_path)
    paths = [manifest.train.path(row) for row in range(len(manifest.train))]
    for path in paths:
        os.truncate(path, int(path.stem))
        assert read_header(path).reason, path
    results = list(decode_whole(manifest.train, np.arange(len(paths)), threads=2))
    assert len(results) == len(cuts)
    for path, (image, reason) in zip(paths, results, strict=True):
        assert image is None, path
        assert reason


def test_an_image_that_ends_early_is_used_where_it_is_whole_and_never_shows_what_it_has_not(tmp_path):
    """What is decoded of a cut file is what was there before the cut, never a decoder's grey."""
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        for index in range(9):
            (tmp_path / split / f"class/{index}.jpg").write_bytes(JPEG)
    manifest = open_manifest(tmp_path)

    def crops(decoder: str = "cpu", share: float = 1.0) -> tuple[torch.Tensor, set[int]]:
        plan = ValidationPlan(table=manifest.val, crop=CROP, scale=110)  # 32 rows in the middle of 110
        lost: set[int] = set()

        def lose(samples, dead, reasons):
            assert decoder == "split" or not dead.any() or {0, 1} & set(samples.rows[dead].tolist())
            lost.update(samples.rows.tolist())
            plan.lose(samples, dead)

        loader = DaliLoader(
            lambda skip: plan.batches(rank=0, world_size=1, batch_size=9, skip=skip),
            GraphOptions(crop=CROP, prefetch=1, decoder=decoder),
            lose=lose,
            batch_size=9,
        )
        loader.share = share
        return next(loader)[0], lost

    whole, lost = crops()
    assert not lost
    for row in range(9):
        os.truncate(manifest.val.path(row), len(JPEG) * row // 10)
    cut, lost = crops()
    assert {0, 1, 2, 3} <= lost < set(range(9))
    for row in set(range(9)) - lost:
        assert torch.equal(cut[row], whole[row])
    samples = next(ValidationPlan(table=manifest.val, crop=CROP, scale=110).batches(rank=0, world_size=1, batch_size=9))
    assert set(undecodable(samples, CROP, None)) == lost
    assert set(undecodable(samples, CROP, None, whole=True)) == set(range(9)), "as the GPU's decoder has it"
    for row in lost:
        Path(manifest.val.path(row)).write_bytes(JPEG)
    for share in (0.0, 0.5, 1.0):
        assert crops("split", share)[1] == set(range(9)) - lost, "and both, where they share a batch, whichever has it"


def test_links_to_folders_above_bring_no_image_in_twice(tmp_path):
    for name in ("a", "b"):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "image.jpg").write_bytes(JPEG)
    for depth, target in enumerate((".", "..", "../..", "../../train")):
        (tmp_path / f"train/a/link{depth}").symlink_to(target)
    assert len(open_manifest(tmp_path).train) == 2


# Imported first: what root can import, another user may not.
AS_NOBODY = """
import os, sys
from PIL import Image
from pipeline.manifest import main
Image.init()
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def for_others():
    """A folder that another user can enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_nobody(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    """Run the manifest's command as a user to whom permissions apply: as this one or, for root, as nobody."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", AS_NOBODY, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_files_without_permission_are_named_and_folders_without_are_an_error(for_others):
    root, cache = for_others / "data", for_others / "cache"
    for split in ("train", "val"):
        (root / split / "class").mkdir(parents=True)
        for name in ("good.jpg", "secret.jpg"):
            (root / split / "class" / name).write_bytes(JPEG)
        (root / split / "class/secret.jpg").chmod(0o000)
    cache.mkdir()
    cache.chmod(0o777)
    root.chmod(0o555)
    done = as_nobody(str(root), cache=cache)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["train"], result["val"], result["val_lost"]) == (1, 1, 1)
    assert result["reasons"] == {"cannot be read: Permission denied": 2}
    assert Path(result["manifest"]).is_relative_to(cache)

    root.chmod(0o755)
    (root / "val/class/deeper").mkdir()
    for folder in ("val/class/deeper", "train/class", "val", ""):
        (root / folder).chmod(0o000)
        done = as_nobody(str(root), "--rescan", cache=cache)
        (root / folder).chmod(0o755)
        assert done.returncode == 2, folder
        assert re.fullmatch(
            rf"error: {root}/?{folder}(/\w+)?: cannot be listed \(Permission denied\); let this user read and enter it.*",
            done.stderr.splitlines()[-1],
        )
        assert "Traceback" not in done.stderr


def test_there_are_kinds_enough():
    assert len(BAD) >= 25
    assert len({file_name(kind) for kind in KINDS | ODD_KINDS}) == len(KINDS) + len(ODD_KINDS)
