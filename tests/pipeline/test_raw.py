"""Images that are kept as pixels: batches are those of the same pixels in files that DALI and PIL decode, to the last bit."""

import functools
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from common.errors import UserError
from pipeline.dali.decoding import decode_whole
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.dataset.manifest import open_manifest
from pipeline.plan.samples import LOST_LABEL, Samples
from pipeline.plan.training import TrainPlan
from pipeline.plan.validation import ValidationPlan
from pipeline.plan.whole_images import WholePlan
from pipeline.preparation import packing, statistics
from pipeline.preparation.statistics import compute_statistics
from pipeline.shards import reader, storage
from pipeline.shards.index import FORMAT, open_prepared
from pipeline.shards.raw import Pixels, ppm, ppm_bytes
from pipeline.shards.reader import ShardReader
from pipeline.shards.shard_table import ShardTable
from tests.support.images import photo_folder, photographs
from tests.support.launch import assert_same_weights, results_of, run

TRAIN = ["--arch", "A", "--crop", "32", "--batch-size", "6", "--schedule", "step", "--lr", "0.001", "--log-every", "1"]
MEAN = np.array([1.0, 2.0, 3.0])

Plan = TrainPlan | ValidationPlan | WholePlan
Batches = Callable[[Plan], Iterator[Samples]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = photo_folder(tmp_path_factory.mktemp("photos"), train=24, val=9)
    for name in ("class0/000", "class1/001"):
        Image.open(folder / f"train/{name}.JPEG").convert("RGB").resize((50, 70)).save(folder / f"train/{name}.JPEG")
    photographs()[0].resize((1000, 90)).save(folder / "train/class1/long.png")
    return folder


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory) -> Path:
    """25 training images with a shorter side of 64 pixels in nine shards, two of them smaller, and nine for validation."""
    destination = tmp_path_factory.mktemp("prepared") / "raw"
    flags = ["--short-side", "64", "--shard-images", "3", "--format", "raw"]
    assert packing.main([str(photos), str(destination), *flags]) == 0
    return destination


@pytest.fixture
def own_copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory) -> dict[str, list[Path]]:
    """Of each split, the members of its shards as files, in the order of the table."""
    root = tmp_path_factory.mktemp("members")
    found: dict[str, list[Path]] = {}
    for split in ("train", "val"):
        found[split] = []
        for shard in sorted(folder.glob(f"{split}-*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".ppm"):
                        tar.extract(member, root / split, filter="data")
                        found[split].append(root / split / member.name)
    return found


def table_of(folder: Path) -> ShardTable:
    return open_prepared(str(folder)).train


def train_plan(table: ShardTable, **arguments) -> TrainPlan:
    defaults = {"batch_size": 6, "crop": 32, "scale": (64, 64), "seed": 0}
    return TrainPlan(table=table, **{**defaults, **arguments})


def training(plan: TrainPlan, skip: int = 0, start: int = 0) -> Iterator[Samples]:
    return plan.batches(start=start, rank=0, world_size=1, micro_batch=plan.batch_size, skip=skip)


def fail(samples, dead, reasons) -> None:
    pytest.fail(f"lost an image: {reasons}")


def loader_of(plan: Plan, batches_after: Callable[[int], Iterator[Samples]], *, size: int, lose=fail) -> DaliLoader:
    """As engine/data.py has it."""
    assert isinstance(plan.table, ShardTable)
    assert plan.table.is_raw
    source = ShardReader(plan.table, threads=3, batches_ahead=2)
    return DaliLoader(
        batches_after,
        GraphOptions(crop=None if isinstance(plan, WholePlan) else plan.crop, decoder="none", threads=2),
        lose=lose,
        batch_size=size,
        fetch=lambda batches: source.fetch(batches, plan.read_group),
    )


def assert_as_decoded(
    plan: Plan, batches: Callable[[int], Iterator[Samples]], paths: list[Path], *, count: int
) -> None:
    """The plan's batches are those of the members' files, which DALI reads and decodes."""
    size = max(len(samples.labels) for samples in itertools.islice(batches(0), count))
    width = max(len(os.fsencode(path)) for path in paths)
    padded = [os.fsencode(path).replace(b"/", b"/" * (1 + width - len(os.fsencode(path))), 1) for path in paths]
    names = np.frombuffer(b"".join(padded), dtype=np.uint8).reshape(len(paths), -1)

    def from_files(skip: int) -> Iterator[Samples]:
        return (samples._replace(source=names[samples.rows]) for samples in batches(skip))

    crop = None if isinstance(plan, WholePlan) else plan.crop
    decoded = DaliLoader(from_files, GraphOptions(crop=crop, threads=2), lose=fail, batch_size=size)
    kept = loader_of(plan, batches, size=size)
    for _ in range(count):
        (images, labels), (expected, expected_labels) = next(kept), next(decoded)
        assert torch.equal(images, expected)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, expected_labels)


# ---- what is in the shards ---------------------------------------------------------------------------------------


def test_members_are_images_to_tarfile_and_pil_and_hold_the_pixels_that_were_decoded(photos, folder, files):
    originals, data = open_manifest(photos), open_prepared(str(folder))
    settings = packing.Settings(short_side="64", quality=None, shard_images=3)
    for split in ("train", "val"):
        table, source = getattr(data, split), getattr(originals, split)
        rows = table.read(np.arange(len(table)))
        assert len(files[split]) == len(table) == len(source)
        source_rows = np.array([int(path.name[:9]) for path in files[split]])
        assert sorted(source_rows.tolist()) == list(range(len(source)))
        own = source.read(source_rows)
        assert np.array_equal(own.labels, rows.labels)
        sizes = settings.sizes(own.sizes)
        assert np.array_equal(sizes, rows.sizes)
        decoded = decode_whole(source, source_rows, sizes=sizes, threads=2)
        for path, label, size, (image, _) in zip(files[split], rows.labels, sizes, decoded, strict=True):
            with Image.open(path) as found:
                assert (found.format, found.mode, found.size) == ("PPM", "RGB", (size[1], size[0]))
                assert image is not None
                assert np.array_equal(np.asarray(found), image)
            assert path.parent.name == data.classes[label]


def test_an_image_that_is_not_made_smaller_is_pils_to_the_last_bit(photos, files):
    """Through all of it, against a decoder that has nothing to do with this project."""
    (small,) = [path for path in files["train"] if path.name.endswith("-000.ppm")]
    assert np.array_equal(np.asarray(Image.open(small)), np.asarray(Image.open(photos / "train/class0/000.JPEG")))


@pytest.mark.parametrize("size", [(1, 1), (9, 10), (10, 9), (99, 100), (100, 99), (999, 1000), (1000, 999)])
def test_lengths_are_known_beforehand(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = ppm(image)
    assert ppm_bytes(np.array([size])).tolist() == [len(file)]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), image)


def test_lengths_of_sides_of_five_digits():
    sizes = np.array([(1, 9999), (1, 10_000), (65_535, 1), (12_345, 2)])
    assert ppm_bytes(sizes).tolist() == [len(ppm(np.zeros((*size, 3), dtype=np.uint8))) for size in sizes.tolist()]


def test_an_image_longer_than_the_index_has_room_for_is_named(tmp_path):
    folder = photo_folder(tmp_path / "photos", train=4, val=4)
    Image.new("RGB", (70_000, 3)).save(folder / "train/class0/long.png")
    assert packing.main([str(folder), str(tmp_path / "out"), "--format", "raw"]) == 0
    assert len(open_prepared(str(tmp_path / "out")).train) == 4
    quarantine = (tmp_path / "out/quarantine.tsv").read_text()
    assert "train/class0/long.png\ta side of more than 65,535 pixels (70000×3)" in quarantine


def test_the_two_formats_are_not_mixed_up(photos, folder, tmp_path, capsys):
    """One folder holds one of them; a version that knows only JPEGs takes it for another version's, and says so."""
    flags = [str(photos), str(folder), "--short-side", "64", "--shard-images", "3"]
    assert packing.main(flags) == 2
    assert "was prepared with --short-side 64 --format raw --shard-images 3; give" in capsys.readouterr().err
    assert packing.main([*flags, "--format", "raw"]) == 0
    assert "complete already" in capsys.readouterr().err
    assert packing.main([str(photos), str(tmp_path / "new"), "--format", "raw", "--quality", "90"]) == 2
    assert "--quality 90: --format raw has none; leave it out" in capsys.readouterr().err
    assert packing.main([str(photos), str(tmp_path / "new"), "--format", "png"]) == 2
    assert "--format: invalid choice: 'png'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    found = json.loads((folder / "index.json").read_text())["format"]
    assert found != FORMAT
    assert found.startswith("vgg-dali prepared "), "earlier versions then know whose it is"


# ---- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [(64, 64), (32, 80)])
@pytest.mark.parametrize("window_shards", [None, 3])
def test_training_batches_are_those_of_decoded_files(folder, files, scale, window_shards):
    plan = train_plan(table_of(folder), scale=scale, window_shards=window_shards)
    samples = plan.samples(np.arange(48))
    assert 10 < samples.flipped.sum() < 38
    assert samples.resized.sum() > 40 or scale == (64, 64)
    assert_as_decoded(plan, lambda skip: training(plan, skip), files["train"], count=9)  # two epochs


@pytest.mark.parametrize("scale", [64, 70])
def test_validation_batches_are_those_of_decoded_files(folder, files, scale):
    plan = ValidationPlan(table=open_prepared(str(folder)).val, crop=32, scale=scale)
    batches = functools.partial(plan.batches, rank=0, world_size=1, batch_size=4)
    assert_as_decoded(plan, lambda skip: batches(skip=skip), files["val"], count=6)


@pytest.mark.parametrize("scale", [64, 50])
def test_whole_images_are_those_of_decoded_files(folder, files, scale):
    plan = WholePlan(table=table_of(folder), scale=scale, pixels=3 * scale**2, mean_rgb=(1.0, 2.0, 3.0))
    batches = len(list(plan.batches(rank=0, world_size=1)))
    assert_as_decoded(plan, lambda skip: plan.batches(rank=0, world_size=1, skip=skip), files["train"], count=batches)


def test_a_crop_is_cut_out_of_pils_image(folder, files):
    """Without DALI's decoder on any side."""
    plan = train_plan(table_of(folder), batch_size=48)
    samples = plan.samples(np.arange(48))
    images, _ = next(loader_of(plan, lambda skip: training(plan, skip), size=48))
    images = images.permute(0, 2, 3, 1).numpy() + samples.mean[:, None, None]
    assert (~samples.resized).sum() > 40
    for n in np.flatnonzero(~samples.resized):
        y, x = samples.start[n]
        crop = np.asarray(Image.open(files["train"][samples.rows[n]]))[y : y + 32, x : x + 32].astype(int)
        assert np.abs(images[n] - (crop[:, ::-1] if samples.flipped[n] else crop)).max() < 1e-3


def test_batches_that_are_held_stay_as_they_are(folder):
    plan = train_plan(table_of(folder))
    loader = loader_of(plan, lambda skip: training(plan, skip), size=6)
    held = [next(loader) for _ in range(12)]
    again = loader_of(plan, lambda skip: training(plan, skip), size=6)
    for images, labels in held:
        same, same_labels = next(again)
        assert torch.equal(images, same)
        assert torch.equal(labels, same_labels)


def test_only_the_rows_of_windows_are_read(folder, monkeypatch):
    """And the headers, tar's too; what is narrower than its image goes through memory of its own, what is not does not."""
    asked: list[int] = []
    real = storage.FolderStorage.read

    def counted(self, name, offsets, targets) -> set[int]:
        asked.append(sum(len(target) for target in targets))
        return real(self, name, offsets, targets)

    monkeypatch.setattr(storage.FolderStorage, "read", counted)
    table = table_of(folder)
    plan = train_plan(table, batch_size=25)
    source = ShardReader(table, threads=2, batches_ahead=1)
    samples, _ = next(source.fetch(itertools.islice(training(plan), 1), plan.read_group))
    sizes = table.read(samples.rows).sizes
    headers = tarfile.BLOCKSIZE + ppm_bytes(sizes) - 3 * sizes.prod(axis=1)
    assert sum(asked) == (headers + 3 * samples.shape[:, 0] * sizes[:, 1]).sum()


@pytest.mark.parametrize("piece_bytes", [1, 10_000, 1 << 30])
def test_pieces_of_any_size_give_the_same_windows(folder, monkeypatch, piece_bytes):
    plan = train_plan(table_of(folder), window_shards=9)
    expected = windows_of(plan)
    monkeypatch.setattr(reader, "_PIECE_BYTES", piece_bytes)
    found = windows_of(plan)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def windows_of(plan: TrainPlan) -> list[np.ndarray]:
    """Of the plan's first batches."""
    assert isinstance(plan.table, ShardTable)
    source = ShardReader(plan.table, threads=2, batches_ahead=1)
    batches = source.fetch(itertools.islice(training(plan), 4), plan.read_group)
    return [window for _, pixels in batches if isinstance(pixels, Pixels) for window in pixels.windows]


def test_memory_is_used_again_but_not_before_everybody_has_let_go_of_it(folder):
    table = table_of(folder)
    source = ShardReader(table, threads=2, batches_ahead=2)
    fetched = source.fetch(training(train_plan(table)))
    _, first = next(fetched)
    assert isinstance(first, Pixels)
    held = first.windows[3]  # of a whole batch, one window
    before = held.copy()
    del first
    for _ in range(30):
        next(fetched)
    assert np.array_equal(held, before)
    free = source._pixel_reader._free
    assert 1 <= len(free) <= 4
    del fetched
    source._pool.shutdown()
    freed = len(free)
    del held
    assert len(free) == freed + 1


def test_an_image_twice_in_a_batch(folder):
    table = table_of(folder)
    plan = train_plan(table)
    samples = plan.samples(np.arange(6))
    twice = Samples(*(np.concatenate((field, field[::-1])) for field in samples))
    ((_, pixels),) = ShardReader(table, threads=2, batches_ahead=1).fetch(iter([twice]))
    assert isinstance(pixels, Pixels)
    assert all(np.array_equal(one, other) for one, other in zip(pixels.windows, pixels.windows[::-1], strict=True))


# ---- other uses --------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_files(folder, files, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_PIXELS_A_STRIP", 5000)  # of large images, a strip at a time
    found = compute_statistics(open_prepared(str(folder)), threads=2)
    moments = []
    for path in files["train"]:
        pixels = np.asarray(Image.open(path)).reshape(-1, 3).astype(np.float64)
        moments.append((pixels.mean(axis=0), pixels.T @ pixels / len(pixels)))
    mean = np.mean([first for first, _ in moments], axis=0)
    covariance = np.mean([second for _, second in moments], axis=0) - np.outer(mean, mean)
    assert found.images == 25
    assert np.allclose(found.mean_rgb, mean, rtol=1e-12)
    assert np.allclose(found.covariance, covariance, rtol=1e-9)


def test_whole_images_are_resized_as_those_that_are_decoded(photos, folder, files):
    table = table_of(folder)
    sizes = table.read(np.arange(25)).sizes // 2
    images = list(decode_whole(table, np.arange(25), sizes=sizes, threads=2))
    assert [image.shape[:2] for image, _ in images if image is not None] == [tuple(size) for size in sizes.tolist()]
    for path, (image, _), size in zip(files["train"], images, sizes.tolist(), strict=True):
        reference = np.asarray(Image.open(path).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(image - reference).mean() < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("order", ["global", "window"])
def test_a_run_goes_on_bit_exactly_in_the_middle_of_an_epoch_and_a_window(folder, tmp_path, order):
    flags = [*TRAIN, "--data", str(folder), "--train-scale", "32-80", "--order", order, "--window-shards", "3"]
    assert train.main([*flags, "--steps", "5", "--out", str(tmp_path / "whole")]) == 0
    for steps in ("3", "5"):
        assert train.main([*flags, "--steps", steps, "--out", str(tmp_path / "parts")]) == 0
    assert_same_weights(tmp_path / "whole/last.pt", tmp_path / "parts/last.pt")


@pytest.mark.slow
def test_two_ranks_train_and_validate(folder, tmp_path):
    flags = [*TRAIN, "--data", str(folder), "--train-scale", "64", "--epochs", "1"]
    done = run(*flags, "--out", str(tmp_path / "two"), ranks=2)
    assert results_of(done)["epochs"] == 1


# ---- damage ------------------------------------------------------------------------------------------------------


def spoil(folder: Path, table: ShardTable, row: int, offset: int, content: bytes) -> None:
    shard, begin = table.read(np.array([row])).source[0, :2].tolist()
    with open(folder / table.shard_name(shard), "r+b") as file:
        file.seek(begin + offset)
        file.write(content)


@pytest.mark.parametrize("header", [b"P5", b"P6\n63", b"\0" * 13])
def test_an_image_with_another_header_is_replaced_and_named(own_copy, header):
    table = table_of(own_copy)
    spoil(own_copy, table, 4, 0, header)
    plan = train_plan(table)
    lost: list[tuple[str, str]] = []

    def lose(samples, dead, reasons):
        lost.extend((table.name(samples.source[n]), reason) for n, reason in enumerate(reasons))
        plan.lose(samples, dead)

    loader = loader_of(plan, lambda skip: training(plan, skip), size=6, lose=lose)
    batches = [next(loader) for _ in range(10)]
    ((name, reason),) = lost
    assert name.startswith(f"{own_copy}/train-000001.tar: class")
    assert name.endswith(".ppm")
    assert reason == "not the PPM file that the index says"
    assert plan.lost_rows == {4}
    late = train_plan(table)
    late_loader = loader_of(
        late,
        lambda skip: training(late, skip, start=30),
        size=6,
        lose=lambda samples, dead, _: late.lose(samples, dead),
    )
    for images, labels in batches[5:]:
        late_images, late_labels = next(late_loader)
        assert torch.equal(images, late_images)
        assert torch.equal(labels, late_labels)


@pytest.fixture(params=[("cat", "dog"), ("ä" * 100, "ö" * 100)], ids=["short", "long"])
def uniform(request, tmp_path) -> Path:
    """Two shards of ten training images, all of one size and so of one length; of long class names tar cuts off the end."""
    for split, number in itertools.product(("train", "val"), range(20)):
        name = request.param[number % len(request.param)]
        folder = tmp_path / "uniform" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), number, dtype=np.uint8)).save(folder / f"{number}.png")
    flags = ["--short-side", "40", "--shard-images", "10", "--format", "raw"]
    assert packing.main([str(tmp_path / "uniform"), str(tmp_path / "out"), *flags]) == 0
    return tmp_path / "out"


def damaged_of(table: ShardTable) -> dict[int, str]:
    """By row, of all the table's images."""
    plan = train_plan(table, batch_size=20)
    source = ShardReader(table, threads=1, batches_ahead=1)
    samples, pixels = next(source.fetch(itertools.islice(training(plan), 1), plan.read_group))
    assert isinstance(pixels, Pixels)
    return {int(samples.rows[index]): reason for index, reason in pixels.damaged.items()}


def test_images_of_another_shard_are_not_taken_for_those_of_the_index(uniform):
    table = table_of(uniform)
    assert damaged_of(table) == {}
    first, second = (uniform / f"train-00000{number}.tar" for number in range(2))
    content = first.read_bytes(), second.read_bytes()
    assert len(content[0]) == len(content[1])
    second.write_bytes(content[0])
    first.write_bytes(content[1])
    names = [table.classes[label] for label in table.read(np.arange(20)).labels]
    others = names[10:] + names[:10]
    found = damaged_of(table_of(uniform))
    assert set(found) == {row for row in range(20) if names[row] != others[row]}
    assert len(found) >= 4
    assert set(found.values()) == {"of another class than the index says: this is another shard"}


def test_a_shard_that_lost_its_end_costs_the_windows_that_were_there(own_copy, capsys):
    """What lies beyond the end is not shown as black; windows that are still there are shown."""
    table = table_of(own_copy)
    shard, offset, _, width, _ = table.read(np.array([5])).source[0].tolist()
    os.truncate(own_copy / table.shard_name(shard), offset + 20 + 3 * width * 50)  # a few rows are gone
    plan = train_plan(table)
    lost: list[tuple[int, int]] = []

    def ends(samples: Samples) -> np.ndarray:
        return samples.start[:, 0] + samples.shape[:, 0]

    def lose(samples, dead, reasons):
        assert not dead.any()
        assert set(reasons) == {"beyond the end of its shard"}
        lost.extend(zip(samples.rows.tolist(), ends(samples).tolist(), strict=True))
        plan.lose(samples, dead)

    loader = loader_of(plan, lambda skip: training(plan, skip), size=6, lose=lose)
    shown = []
    for _ in range(40):
        next(loader)
        assert loader.delivered
        shown += ends(loader.delivered)[loader.delivered.rows == 5].tolist()
    assert {row for row, _ in lost} == {5}
    assert min(end for _, end in lost) > 50
    assert max(shown) <= 50
    assert shown
    assert "beyond the end of the file" in capsys.readouterr().err


def test_a_shard_that_lost_a_whole_image_costs_that_image(own_copy):
    table = table_of(own_copy)
    shard, offset = table.read(np.array([5])).source[0, :2].tolist()
    os.truncate(own_copy / table.shard_name(shard), offset + 3)
    plan = train_plan(table)
    loader = loader_of(
        plan, lambda skip: training(plan, skip), size=6, lose=lambda samples, dead, _: plan.lose(samples, dead)
    )
    for _ in range(8):
        next(loader)
    assert plan.lost_rows == {5}
    assert not plan.lost_samples


def test_damaged_images_are_left_out_of_validation_statistics_and_tests(own_copy):
    data = open_prepared(str(own_copy))
    spoil(own_copy, data.val, 2, 0, b"P3")
    spoil(own_copy, data.train, 7, 0, b"P3")
    plan = ValidationPlan(table=data.val, crop=32, scale=64)
    loader = loader_of(
        plan,
        lambda skip: plan.batches(rank=0, world_size=1, batch_size=4, skip=skip),
        size=4,
        lose=lambda samples, dead, _: plan.lose(samples, dead),
    )
    labels = torch.cat([next(loader)[1] for _ in range(3)])
    assert np.flatnonzero(labels == LOST_LABEL).tolist() == [2]
    assert compute_statistics(data, threads=2).images == 24
    whole = list(decode_whole(data.train, np.arange(6, 9), threads=2))
    assert [reason for _, reason in whole] == ["", "not the PPM file that the index says", ""]
    whole_plan = WholePlan(table=data.val, scale=64, pixels=64 * 64 * 4, mean_rgb=(0.0, 0.0, 0.0))
    loader = loader_of(
        whole_plan,
        lambda skip: whole_plan.batches(rank=0, world_size=1, skip=skip),
        size=9,
        lose=lambda samples, dead, _: whole_plan.lose(samples, dead),
    )
    seen: list[int] = []
    for _ in whole_plan.batches(rank=0, world_size=1):
        if len(seen) < 8:
            seen += next(loader)[1].tolist()
    assert sorted(seen) == [0, 1, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("field", "value"),
    [("height", 65), ("height", 63), ("width", 1), ("width", 65_535), ("bytes", 1), ("bytes", 12_000)],
)
def test_a_row_whose_numbers_disagree_is_refused_when_it_is_taken(own_copy, field, value):
    (path,) = own_copy.glob("train-*.npy")
    rows = np.load(path)
    rows[7][field] = value
    np.save(path, rows)
    table = table_of(own_copy)
    assert len(table.read(np.arange(7)).labels) == 7
    with pytest.raises(
        UserError, match=r"its index is damaged \(train: an image that has not the bytes of its pixels\)"
    ):
        table.read(np.arange(5, 9))


def test_an_index_that_calls_jpegs_raw_is_refused(photos, tmp_path):
    destination = tmp_path / "jpeg"
    assert packing.main([str(photos), str(destination), "--short-side", "64"]) == 0
    description = json.loads((destination / "index.json").read_text())
    (destination / "index.json").write_text(json.dumps(description | {"format": "vgg-dali prepared raw 1"}))
    with pytest.raises(UserError, match="has not the bytes of its pixels"):
        table_of(destination).read(np.arange(3))
