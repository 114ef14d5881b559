"""Training from prepared data: the reader, the integer crop, both orders, and what happens to damaged shards."""

import errno
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import resized_crop

import train
from common import patience
from common.errors import DataSourceError, UserError
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.plan.samples import Samples
from pipeline.plan.training import RandomResized, TrainPlan
from pipeline.plan.validation import ValidationPlan
from pipeline.preparation import packing
from pipeline.shards import storage
from pipeline.shards.index import is_prepared, open_prepared
from pipeline.shards.reader import ShardReader
from pipeline.shards.shard_table import SHARD_ROW, ShardTable
from pipeline.shards.storage import FolderStorage
from tests.support.images import photo_folder
from tests.support.launch import ROOT, assert_same_weights, results_of, run

CPU = torch.device("cpu")
TRAIN = ["--arch", "A", "--crop", "32", "--train-scale", "64", "--batch-size", "6", "--schedule", "step"]
TRAIN += ["--lr", "0.001", "--log-every", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """24 training images with a shorter side of 64 pixels in eight shards, two of them smaller, and nine for validation."""
    photos = photo_folder(tmp_path_factory.mktemp("photos"), train=24, val=9)
    for name in ("class0/000", "class1/001"):
        Image.open(photos / f"train/{name}.JPEG").convert("RGB").resize((50, 70)).save(photos / f"train/{name}.JPEG")
    destination = tmp_path_factory.mktemp("prepared") / "64"
    assert packing.main([str(photos), str(destination), "--short-side", "64", "--shard-images", "3"]) == 0
    return destination


@pytest.fixture
def own_copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def table_of(folder: Path) -> ShardTable:
    return open_prepared(str(folder)).train


def make_plan(table: ShardTable, **arguments) -> TrainPlan:
    defaults = {"batch_size": 6, "crop": 32, "scale": (64, 64), "seed": 0}
    return TrainPlan(table=table, **{**defaults, **arguments})


def make_loader(plan: TrainPlan, *, lose=None, start: int = 0, decoder: str = "cpu") -> DaliLoader:
    assert isinstance(plan.table, ShardTable)
    reader = ShardReader(plan.table, threads=3, batches_ahead=2)
    return DaliLoader(
        lambda skip: plan.batches(start=start, rank=0, world_size=1, micro_batch=plan.batch_size, skip=skip),
        GraphOptions(crop=plan.crop, decoder="none" if plan.table.is_raw else decoder, threads=2),
        lose=lose or (lambda samples, dead, reasons: pytest.fail(f"lost an image: {reasons}")),
        batch_size=plan.batch_size,
        fetch=lambda batches: reader.fetch(batches, plan.read_group),
    )


def image_of(table: ShardTable, source: np.ndarray) -> Image.Image:
    shard, offset, size = source.tolist()
    content = (Path(table.storage.url) / table.shard_name(shard)).read_bytes()
    return Image.open(io.BytesIO(content[offset : offset + size])).convert("RGB")


@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_a_batch_that_two_decoders_share_is_the_same(folder, share):
    """Without a GPU, both are the CPU's. An image is cut to its window before either has it."""
    plan = make_plan(table_of(folder), batch_size=10)
    loader = make_loader(plan, decoder="split")
    loader.share = share
    images, labels = next(loader)
    expected, expected_labels = next(make_loader(plan))
    assert torch.equal(labels, expected_labels)
    assert torch.equal(images, expected)


def test_an_image_of_the_right_size_is_cropped_and_nothing_else(folder):
    table = table_of(folder)
    plan = make_plan(table, batch_size=48)
    samples = plan.samples(np.arange(48))  # two epochs
    assert samples.resized.sum() == 4, "the two small ones"
    assert 10 < samples.flipped.sum() < 38
    images, labels = next(make_loader(plan))
    assert np.array_equal(labels, samples.labels)
    images = images.permute(0, 2, 3, 1).numpy() + samples.mean[:, None, None]
    for n in np.flatnonzero(~samples.resized):
        y, x = samples.start[n]
        crop = np.asarray(image_of(table, samples.source[n]))[y : y + 32, x : x + 32].astype(int)
        if samples.flipped[n]:
            crop = crop[:, ::-1]
        assert samples.shape[n].tolist() == [32, 32]
        assert np.abs(images[n] - crop).max() < 1e-3, "to the last bit, for all that PIL decodes"


def test_random_resized_crops_of_prepared_images_are_torchvisions(folder):
    """Out of JPEGs that are cut to the tiles of their window before they are decoded."""
    table = table_of(folder)
    plan = make_plan(table, batch_size=48, random_resized=RandomResized())
    samples = plan.samples(np.arange(48))
    images, labels = next(make_loader(plan))
    assert np.array_equal(labels, samples.labels)
    images = images.permute(0, 2, 3, 1).numpy() + samples.mean[:, None, None]
    for n, ((y, x), (height, width)) in enumerate(zip(samples.start.tolist(), samples.shape.tolist(), strict=True)):
        whole = torch.from_numpy(np.array(image_of(table, samples.source[n]))).permute(2, 0, 1)
        expected = resized_crop(whole, y, x, height, width, [32, 32], antialias=True).permute(1, 2, 0).numpy()
        image = images[n, :, ::-1] if samples.flipped[n] else images[n]
        assert np.abs(image - expected)[2:-2, 2:-2].max() <= 3
        assert np.abs(image - expected).mean() < 0.5


def test_crops_come_from_everywhere_and_half_are_flipped(folder):
    table = table_of(folder)
    plan = make_plan(table)
    samples = plan.samples(np.arange(24 * 200))
    sizes = np.array([image_of(table, source).size[::-1] for source in table.read(np.arange(24)).source])
    room = sizes[samples.rows] - 32
    whole = ~samples.resized
    assert np.all(samples.start[whole] >= 0)
    assert np.all(samples.start[whole] <= room[whole])
    assert np.any(samples.start[whole] == 0, axis=0).all()
    assert np.any(samples.start[whole] == room[whole], axis=0).all()
    assert 0.47 < samples.flipped[whole].mean() < 0.53


@pytest.mark.parametrize("window_shards", [None, 3])
@pytest.mark.parametrize("batches_ahead", [1, 5])
@pytest.mark.seconds
def test_the_reader_brings_each_samples_bytes_in_order(folder, window_shards, batches_ahead):
    table = table_of(folder)
    plan = make_plan(table, window_shards=window_shards)
    reader = ShardReader(table, threads=2, batches_ahead=batches_ahead)
    batches = plan.batches(start=4, rank=0, world_size=1, micro_batch=6)
    expected = plan.batches(start=4, rank=0, world_size=1, micro_batch=6)
    fetched = reader.fetch(batches, plan.read_group)
    for _ in range(12):
        (samples, encoded), same = next(fetched), next(expected)
        assert np.array_equal(samples.numbers, same.numbers)
        for row, (shard, offset, size) in zip(encoded, samples.source, strict=True):
            with open(folder / table.shard_name(shard), "rb") as file:
                file.seek(offset)
                assert row[:size].tobytes() == file.read(size)
    limited = reader.fetch(iter([next(expected) for _ in range(3)]), plan.read_group)
    assert len(list(limited)) == 3, "batches that end"


def test_reads_are_issued_before_they_are_needed_and_not_without_bound(folder, monkeypatch):
    table = table_of(folder)
    plan = make_plan(table, batch_size=2)
    asked: list[Samples] = []

    def drawn():
        for samples in plan.batches(start=0, rank=0, world_size=1, micro_batch=2):
            asked.append(samples)
            yield samples

    fetched = ShardReader(table, threads=2, batches_ahead=4).fetch(drawn(), plan.read_group)
    next(fetched)
    assert 4 <= len(asked) <= 6
    for _ in range(10):
        next(fetched)
    assert 13 <= len(asked) <= 16


def test_a_reader_that_is_closed_reads_no_more(folder, monkeypatch):
    """What comes after it has the storage to itself; only what is being read at that moment is read to its end."""
    reads = []

    def slow(self, name, offsets, targets) -> None:
        reads.append(name)
        time.sleep(0.02)

    monkeypatch.setattr(storage.FolderStorage, "read", slow)
    table = table_of(folder)
    plan = make_plan(table, batch_size=2)
    batches = plan.batches(start=0, rank=0, world_size=1, micro_batch=2)
    fetched = ShardReader(table, threads=2, batches_ahead=50).fetch(batches, plan.read_group)
    next(fetched)
    del fetched
    before = len(reads)
    time.sleep(0.3)
    assert len(reads) - before <= 2, "one for each thread"


def test_a_window_is_read_in_few_large_pieces(own_copy, monkeypatch):
    """With --order window, one request a shard and window; and no shard is asked for twice in an epoch."""
    requests = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        requests.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(storage.os, "preadv", counted)
    table = table_of(own_copy)
    plan = make_plan(table, window_shards=4)
    batches = plan.batches(start=0, rank=0, world_size=1, micro_batch=6)
    fetched = ShardReader(table, threads=2, batches_ahead=1).fetch((next(batches) for _ in range(4)), plan.read_group)
    assert len(list(fetched)) == 4
    requests = [path for path in requests if path.startswith(str(own_copy))]  # not those of other tests' threads
    assert len(requests) == len(set(requests)) == 8


def test_neighbours_are_read_together_and_distant_places_apart(tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(1_000_000)
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(storage, "_MAX_BUFFERS", 7)
    generator = np.random.default_rng(1)
    for spread in (1000, 900_000):
        offsets = np.sort(generator.integers(0, spread, 50)).tolist()
        lengths = np.minimum(generator.integers(1, 60, 50), np.diff([*offsets, 10**6])).tolist()
        targets = [bytearray(length) for length in lengths]
        FolderStorage(str(tmp_path)).read("file", offsets, [memoryview(target) for target in targets])
        for offset, target in zip(offsets, targets, strict=True):
            assert target == content[offset : offset + len(target)]


def test_many_more_shards_than_open_files_from_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_MOST_OPEN_FILES", 3)
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    folder, wrong = FolderStorage(str(tmp_path)), []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 40, 300).tolist():
            target = bytearray(10)
            folder.read(str(number), [50], [memoryview(target)])
            if target != bytes([number]) * 10:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(folder._files) <= 3


def failing_preadv(monkeypatch, error: int, times: int) -> list[int]:
    """Have reading fail with this errno for the first calls; the list grows with each."""
    preadv = os.preadv
    failed: list[int] = []

    def patched(descriptor, buffers, offset):
        if len(failed) < times:
            failed.append(descriptor)
            raise OSError(error, os.strerror(error))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(storage.os, "preadv", patched)
    return failed


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT])
def test_a_storage_that_fails_for_a_moment_is_read_again(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "_warned_at", -100.0)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    folder = FolderStorage(str(tmp_path))
    before = folder._open("file")
    failed = failing_preadv(monkeypatch, error, times=3)
    targets = [bytearray(10), bytearray(10)]
    folder.read("file", [0, 50], [memoryview(target) for target in targets])
    assert targets == [bytes(range(10)), bytes(range(50, 60))]
    assert len(failed) == 3
    assert folder._open("file") is not before, "a stale handle stays stale"
    said = capsys.readouterr().err
    assert said == f"warning: {tmp_path}/file: cannot be read ({os.strerror(error)}); trying again for up to 60 s\n"


def test_a_storage_that_goes_on_failing_ends_the_run_and_costs_no_image(own_copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.5)
    before = {path.name: path.read_bytes() for path in own_copy.iterdir()}
    failing_preadv(monkeypatch, errno.EIO, times=10**9)
    assert train.main([*TRAIN, "--data", str(own_copy), "--steps", "1", "--out", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {own_copy}/train-00000")
    assert "cannot be read (Input/output error); once it can" in last
    assert {path.name: path.read_bytes() for path in own_copy.iterdir()} == before, "nothing in quarantine.tsv"


def test_bytes_that_should_be_there_and_do_not_come_are_no_zeros(tmp_path, monkeypatch):
    """A mount that answers with less than the file has; only what a file really does not have is filled with zeros."""
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.2)
    (tmp_path / "file").write_bytes(b"x" * 100)
    monkeypatch.setattr(storage.os, "preadv", lambda *_: 0)
    with pytest.raises(DataSourceError, match="/file: cannot be read"):
        FolderStorage(str(tmp_path)).read("file", [0], [memoryview(bytearray(10))])


def test_a_folder_that_is_unmounted_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.05)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_bytes(b"x" * 100)
    folder = FolderStorage(str(tmp_path / "data"))
    (tmp_path / "data").rename(tmp_path / "away")
    threading.Timer(0.3, lambda: (tmp_path / "away").rename(tmp_path / "data")).start()
    target = bytearray(10)
    folder.read("file", [0], [memoryview(target)])
    assert target == b"x" * 10


def test_fewer_files_may_be_open_than_there_are_shards(tmp_path):
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mine = max(map(int, os.listdir("/proc/self/fd"))) + 6
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (mine, hard))
        folder, target = FolderStorage(str(tmp_path)), bytearray(10)
        for number in range(40):
            folder.read(str(number), [50], [memoryview(target)])
            assert target == bytes([number]) * 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", ["global", "window"])
def test_a_run_goes_on_bit_exactly_in_the_middle_of_an_epoch_and_a_window(folder, tmp_path, order):
    flags = [*TRAIN, "--data", str(folder), "--order", order, "--window-shards", "3"]
    assert train.main([*flags, "--steps", "5", "--out", str(tmp_path / "whole")]) == 0
    for steps in ("3", "5"):
        assert train.main([*flags, "--steps", steps, "--out", str(tmp_path / "parts")]) == 0
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.slow
def test_two_ranks_train_and_validate_on_prepared_data(folder, tmp_path):
    flags = [*TRAIN, "--data", str(folder), "--order", "window", "--epochs", "1"]
    done = run(*flags, "--out", str(tmp_path / "two"), ranks=2)
    assert results_of(done)["epochs"] == 1
    assert json.loads((tmp_path / "two/metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("window_shards", [None, 3])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.seconds
def test_ranks_share_out_the_same_samples(folder, window_shards, world_size):
    table = table_of(folder)
    plan = make_plan(table, window_shards=window_shards)
    alone = plan.batches(start=6, rank=0, world_size=1, micro_batch=6)
    shares = [
        plan.batches(start=6, rank=rank, world_size=world_size, micro_batch=6 // world_size)
        for rank in range(world_size)
    ]
    for _ in range(9):
        together = np.concatenate([next(share).source for share in shares])
        assert np.array_equal(together, next(alone).source)


# ---- damage ------------------------------------------------------------------------------------------------------


def test_images_damaged_in_their_shard_are_replaced_and_named(own_copy):
    table = table_of(own_copy)
    plan = make_plan(table)
    shard, offset, size = table.read(np.array([4])).source[0].tolist()
    with open(own_copy / table.shard_name(shard), "r+b") as file:
        file.seek(offset)
        file.write(b"x" * size)
    lost: list[str] = []

    def lose(samples, dead, reasons):
        lost.extend(table.name(source) for source in samples.source)
        plan.lose(samples, dead)

    loader = make_loader(plan, lose=lose)
    batches = [next(loader) for _ in range(10)]
    assert len(lost) == 1
    assert lost[0].startswith(f"{own_copy}/{table.shard_name(shard)}: class")
    late = make_plan(table)
    late_loader = make_loader(late, start=30, lose=lambda samples, dead, _: late.lose(samples, dead))
    for images, labels in batches[5:]:
        late_images, late_labels = next(late_loader)
        assert torch.equal(images, late_images)
        assert torch.equal(labels, late_labels)


def test_a_shard_that_lost_its_end_meanwhile_costs_the_images_that_were_there(own_copy, capsys):
    table = table_of(own_copy)
    plan = make_plan(table)
    shard, offset, size = table.read(np.array([5])).source[0].tolist()
    os.truncate(own_copy / table.shard_name(shard), offset + size // 2)
    lost: list[int] = []

    def lose(samples, dead, reasons):
        lost.extend(samples.rows.tolist())
        plan.lose(samples, dead)

    loader = make_loader(plan, lose=lose)
    for _ in range(8):
        next(loader)
    assert set(lost) == {5}
    assert "beyond the end of the file" in capsys.readouterr().err


def test_a_shard_that_vanishes_ends_the_run_with_a_sentence(own_copy):
    table = table_of(own_copy)
    plan = make_plan(table)
    (own_copy / "train-000002.tar").unlink()
    with pytest.raises(DataSourceError, match=r"train-000002.tar: cannot be read \(No such file"):
        list(itertools.islice(make_loader(plan), 8))


def cut_a_shard(folder: Path) -> str:
    os.truncate(folder / "val-000001.tar", 1000)
    return "val-000001.tar has 1,000 bytes instead of"


def lose_a_shard(folder: Path) -> str:
    (folder / "train-000003.tar").unlink()
    return "train-000003.tar is missing"


def spoil_the_table(folder: Path) -> str:
    for table in folder.glob("train-*.npy"):
        np.save(table, np.zeros(3))
    return "rows of another kind); prepare or copy the data set anew"


def lose_the_table(folder: Path) -> str:
    for table in folder.glob("train-*.npy"):
        table.unlink()
    return "its index is damaged"


def spoil_the_index(folder: Path) -> str:
    (folder / "index.json").write_text("{}")
    return "not the index of a data set that pipeline.prepare"


def change_index(**changes):
    """A damage: other values in index.json."""

    def damage(folder: Path) -> None:
        description = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(description | changes))

    return damage


def raw_index(content: bytes):
    return lambda folder: (folder / "index.json").write_bytes(content)


HOSTILE_INDICES = {
    "absolute name": (change_index(tables={"train": "/etc/passwd", "val": "val.npy"}), "tables of other names"),
    "name above": (change_index(tables={"train": "../../x.npy", "val": "../x.npy"}), "tables of other names"),
    "fingerprint": (change_index(fingerprint="../../evil"), "no fingerprint"),
    "fingerprint of another type": (change_index(fingerprint=7), "no fingerprint"),
    "class above": (change_index(classes=["..", "class1"]), "a class whose name no folder can have"),
    "classes twice": (change_index(classes=["class0", "class0"]), "two classes of one name"),
    "classes of other types": (change_index(classes=[0, None]), "classes are not a list of names"),
    "no classes": (change_index(classes=[]), "classes are not a list of names"),
    "images": (change_index(images={"train": 10**30, "val": 9}), "train has no images"),
    "shards that do not add up": (change_index(shard_images={"train": [23], "val": [9]}), "do not add up"),
    "shards of other types": (change_index(shard_images={"train": [True] * 24, "val": [9]}), "do not add up"),
    "negative sizes": (change_index(shard_bytes={"train": [-1] * 8, "val": [1] * 3}), "sizes that are none"),
    "no sizes": (change_index(shard_bytes={"train": [], "val": []}), "train has sizes of 0 shards"),
    "counts": (change_index(quarantined="many"), "quarantined is no number"),
    "keys missing": (raw_index(b'{"format": "vgg-dali prepared 2"}'), "KeyError"),
    "not a number": (raw_index(b'{"format": "vgg-dali prepared 2", "quarantined": NaN}'), "not the index"),
    "no JSON": (raw_index(b"\xff\xfe{"), "not the index"),
    "a list": (raw_index(b"[]"), "not the index"),
    "nested": (raw_index(b"[" * 100_000), "not the index"),
    "large": (raw_index(b" " * (65 << 20)), "more than 67,108,864 bytes, which is too much"),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE_INDICES.values(), ids=HOSTILE_INDICES)
def test_an_index_that_cannot_be_is_refused_in_a_sentence(own_copy, damage, message):
    damage(own_copy)
    with pytest.raises(UserError, match=message):
        open_prepared(str(own_copy))


@pytest.mark.parametrize("format_key", [b"", b'{"0": "cat"}', b'{"format": "COCO"}', b"[" * 100_000])
def test_class_folders_may_have_an_index_of_their_own(own_copy, tmp_path, format_key):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (own_copy / split).mkdir()
    (tmp_path / "images/index.json").write_bytes(format_key)
    assert not is_prepared(str(tmp_path / "images"))
    assert is_prepared(str(own_copy)), "by what the index says"
    for split in ("train", "val"):
        (own_copy / split).rmdir()
    (own_copy / "index.json").write_bytes(format_key)
    assert is_prepared(str(own_copy)), "and damaged; it says so when it is opened"


def pickled_table(path: Path) -> None:
    np.save(path, np.array([{"an": "object"}], dtype=object), allow_pickle=True)


def archived_table(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, rows=np.zeros(3))


def long_table(path: Path) -> None:
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(SHARD_ROW), "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(file, header)


def nested_header(path: Path) -> None:
    header = b"(" * 9000
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize("spoil", [pickled_table, archived_table, long_table, nested_header])
def test_a_table_that_cannot_be_is_refused_in_a_sentence(own_copy, spoil):
    (table,) = own_copy.glob("train-*.npy")
    spoil(table)
    with pytest.raises(UserError, match=rf"its index is damaged \({table.name}: .*prepare or copy the data set anew"):
        open_prepared(str(own_copy))


WRONG_ROWS = {
    "shard": (8, "an image in a shard that is not there"),
    "offset": (2**62, "an image that does not lie within its shard"),
    "bytes": (-5, "an image that does not lie within its shard"),
    "label": (2, "a label beyond the 2 classes"),
    "height": (0, "an image whose sides are not 1–65535 pixels"),
    "width": (2**30, "an image whose sides are not 1–65535 pixels"),
}


@pytest.mark.parametrize(("field", "value", "message"), [(key, *value) for key, value in WRONG_ROWS.items()])
def test_a_row_that_cannot_be_is_refused_when_it_is_taken(own_copy, field, value, message):
    (path,) = own_copy.glob("train-*.npy")
    rows = np.load(path)
    rows[7][field] = value
    np.save(path, rows)
    table = table_of(own_copy)
    assert len(table.read(np.arange(7)).labels) == 7
    with pytest.raises(UserError, match=rf"its index is damaged \(train: {message}\)"):
        table.read(np.arange(5, 9))


@pytest.mark.parametrize("damage", [cut_a_shard, lose_a_shard, spoil_the_table, lose_the_table, spoil_the_index])
def test_damage_is_found_at_the_start(own_copy, tmp_path, capsys, damage):
    message = damage(own_copy)
    assert train.main([*TRAIN, "--data", str(own_copy), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_window_order_needs_prepared_data(tmp_path, capsys):
    assert train.main(["--data", "digits", "--order", "window", "--out", str(tmp_path / "out")]) == 2
    assert "--order window: needs prepared data" in capsys.readouterr().err


# ---- size --------------------------------------------------------------------------------------------------------

START_UP = """
import json, sys, time
import numpy as np, torch
from nvidia.dali import fn
import train
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.plan.training import TrainPlan
from pipeline.shards.index import is_prepared, open_prepared
from pipeline.shards.reader import ShardReader
def resident_mb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
before, started = resident_mb(), time.perf_counter()
table = open_prepared(sys.argv[1], check_shards=False).train
plan = TrainPlan(table=table, batch_size=64, crop=32, scale=(64, 64), seed=0,
                 window_shards=None if sys.argv[2] == "global" else 16)
reader = ShardReader(table, threads=None, batches_ahead=8)
loader = DaliLoader(lambda skip: plan.batches(start=0, rank=0, world_size=1, micro_batch=64, skip=skip),
                    GraphOptions(crop=32), lose=print, batch_size=64,
                    fetch=lambda batches: reader.fetch(batches, plan.read_group))
next(loader)
result = {"rows": len(table), "seconds": time.perf_counter() - started, "mb": resident_mb() - before}
started = time.process_time()  # which other programs do not lengthen
for first in range(10**6, 10**6 + 2 * 10**5, 4096):
    table._rows.take(plan.epochs_and_rows(np.arange(first, first + 4096))[1])  # there is nothing there
result |= {"plan_ms": (time.process_time() - started) / 49 / 64 * 1e3, "mb_later": resident_mb() - before}
print(json.dumps(result))
"""


def enlarge(folder: Path, count: int, order: str) -> None:
    """Make the index claim `count` training images in one shard: a sparse file, true where the first batches look."""
    description = json.loads((folder / "index.json").read_text())
    path = folder / description["tables"]["train"]
    rows = np.load(path)
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(SHARD_ROW), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * SHARD_ROW.itemsize)
    description["shard_images"]["train"] = [2048] * (count // 2048) + [count % 2048]
    description["shard_bytes"]["train"] = [description["shard_bytes"]["train"][0]] * len(
        description["shard_images"]["train"]
    )
    description["images"]["train"] = count
    (folder / "index.json").write_text(json.dumps(description))
    table = open_prepared(str(folder), check_shards=False).train
    plan = TrainPlan(
        table=table, batch_size=64, crop=32, scale=(64, 64), seed=0, window_shards=None if order == "global" else 16
    )
    _, wanted = plan.epochs_and_rows(np.arange(4096 if order == "global" else 3 * 16 * 2048))  # windows are read whole
    usable = rows[rows["shard"] == 0]
    ahead = usable[0].copy()
    ahead["bytes"] = 1
    with open(path, "r+b") as file:
        beginning = path.stat().st_size - count * SHARD_ROW.itemsize
        for n, row in enumerate(wanted.tolist()):
            os.pwrite(
                file.fileno(),
                (usable[n % len(usable)] if n < 4096 else ahead).tobytes(),
                beginning + row * SHARD_ROW.itemsize,
            )


@pytest.mark.parametrize("order", ["global", "window"])
@pytest.mark.parametrize("count", [pytest.param(1_281_167, marks=pytest.mark.slow), 1_000_000_000])
def test_start_up_memory_and_cost_do_not_grow_with_the_index(own_copy, count, order):
    """Under 3 s from opening the index to the first batch, under 300 MB above the imports, for a billion rows too."""
    enlarge(own_copy, count, order)
    done = subprocess.run(
        [sys.executable, "-c", START_UP, str(own_copy), order], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["rows"] == count
    assert result["seconds"] < 3
    assert result["mb"] < 300
    assert result["mb_later"] < 300
    assert result["plan_ms"] < 2, "of the 20 ms that decoding 64 images takes on two cores"


def test_validation_sees_each_image_once(folder):
    data = open_prepared(str(folder))
    plan = ValidationPlan(table=data.val, crop=32, scale=64)
    reader = ShardReader(data.val, threads=2, batches_ahead=2)
    batches = (batch for batch, _ in zip(plan.batches(rank=0, world_size=1, batch_size=4), range(3), strict=False))
    seen = [samples for samples, _ in reader.fetch(batches, plan.read_group)]
    rows = np.concatenate([samples.rows[samples.labels >= 0] for samples in seen])
    assert rows.tolist() == list(range(9))
