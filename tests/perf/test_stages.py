"""Reading and decoding alone do what the loader does: the same bytes, the same windows, in the plan's order; and what a stage's
figures are when the storage is slow."""

import io
import itertools
import time

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.ranks import ranks_of_this_run
from engine.config import parse_args
from engine.data import TrainingData, open_training_data
from engine.precision import Precision
from perf.feeds import decoding_alone, feed_of, reading_alone
from perf.laps import MarkedBatches
from perf.stages import (
    Bench,
    open_bench,
    time_loader,
    time_reading,
    time_training,
    training_batches,
)
from perf.timing import Limits, Timing, rate_of
from pipeline.dali.opening import default_threads
from pipeline.dataset.digits import digits_folder
from pipeline.dataset.manifest import open_manifest
from pipeline.plan.samples import Samples
from pipeline.preparation.packing import Settings, prepare
from pipeline.shards.storage import FolderStorage
from tests.support.images import photo_folder
from tests.support.programs.planted import limited

FLAGS = ["--crop", "64", "--train-scale", "96-160", "--batch-size", "4", "--micro-batch", "2", "--threads", "2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"), train=7, val=1, classes=1)


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    with ranks_of_this_run("cpu") as ranks:
        prepare(photos, folder, Settings(short_side="180", quality=90, shard_images=3), threads=2, ranks=ranks)
    return folder


def data_of(folder) -> TrainingData:
    with ranks_of_this_run("cpu") as ranks:
        return open_training_data(parse_args(["--data", str(folder), *FLAGS]), ranks, Precision("fp32", "cpu"))


def planned(data: TrainingData, start: int, count: int) -> list[Samples]:
    batches = data.train_plan().batches(start=start, rank=0, world_size=1, micro_batch=data.micro_batch)
    return list(itertools.islice(batches, count))


def test_files_are_read_in_the_plans_order(photos):
    data = data_of(photos)
    read = reading_alone(data, start=3)
    for samples in planned(data, 3, 6):
        (contents,) = read()
        for index, source in enumerate(samples.source):
            with open(data.train_plan().table.name(source), "rb") as file:
                assert np.asarray(contents.at(index)).tobytes() == file.read()


def test_shards_are_read_in_the_plans_order(shards):
    data = data_of(shards)
    read = reading_alone(data, start=3)
    for samples in planned(data, 3, 6):
        got, encoded = read()
        assert np.array_equal(got.rows, samples.rows)
        for (shard, offset, length), row in zip(samples.source.tolist(), encoded, strict=True):
            with open(shards / f"train-{shard:06d}.tar", "rb") as file:
                file.seek(offset)
                assert row[:length].tobytes() == file.read(length)


@pytest.mark.parametrize(("kind", "shared"), [("photos", False), ("shards", False), ("photos", True)])
def test_windows_are_decoded_as_pil_does_and_nothing_more(kind, shared, request, tmp_path, monkeypatch):
    """shared: as --decoder split has it, both of its decoders being the CPU's here."""
    if shared:
        monkeypatch.setattr(TrainingData, "decoder", "split")
    folder = request.getfixturevalue(kind)
    data = data_of(folder)
    decode = decoding_alone(data, start=2)
    first_round = []
    for samples in planned(data, 2, 16):
        (windows,) = decode()
        for index, source in enumerate(samples.source):
            window = np.asarray(windows.at(index))
            y, x = samples.start[index]
            height, width = samples.shape[index]
            assert window.shape == (height, width, 3)
            whole = whole_image(data, folder, kind, source)
            assert np.array_equal(window, whole[y : y + height, x : x + width])
        first_round.append(np.asarray(windows.at(0)))
    again = np.asarray(decode()[0].at(0))  # 16 batches are held, and come round again
    assert np.array_equal(again, first_round[0])


def whole_image(data, folder, kind, source) -> np.ndarray:
    if kind == "photos":
        return np.asarray(Image.open(data.train_plan().table.name(source)).convert("RGB"))
    shard, offset, length = source.tolist()
    with open(folder / f"train-{shard:06d}.tar", "rb") as file:
        file.seek(offset)
        return np.asarray(Image.open(io.BytesIO(file.read(length))).convert("RGB"))


def test_an_image_that_cannot_be_decoded_is_said_in_a_sentence(tmp_path):
    folder = photo_folder(tmp_path / "photos", train=4, val=1, classes=1)
    open_manifest(folder)
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_bytes(path.read_bytes()[:2000])
    decode = decoding_alone(data_of(folder), start=0)
    with pytest.raises(UserError, match=r"cannot be decoded .*--verify decode"):
        decode()


def test_a_file_that_is_gone_is_said_in_a_sentence(tmp_path):
    folder = photo_folder(tmp_path / "photos", train=2, val=1, classes=1)
    data = data_of(folder)
    for path in (folder / "train").rglob("*.JPEG"):
        path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        decoding_alone(data, start=0)


def test_reading_needs_no_decoding(photos, tmp_path):
    """An image that cannot be decoded can be read."""
    folder = photo_folder(tmp_path / "photos", train=2, val=1, classes=1)
    data = data_of(folder)
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_bytes(b"no image")
    (contents,) = reading_alone(data, start=0)()
    assert np.asarray(contents.at(0)).tobytes() == b"no image"


@pytest.mark.parametrize(
    ("cores", "decoder", "threads"), [(2, "cpu", 3), (16, "cpu", 17), (2, "gpu", 3), (7, "gpu", 8), (16, "gpu", 8)]
)
def test_a_gpus_decoder_has_few_threads(cores, decoder, threads):
    assert default_threads(cores, decoder) == threads


# ---- slow storage ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Prepared, 10 images a shard."""
    folder = tmp_path_factory.mktemp("digits")
    with ranks_of_this_run("cpu") as ranks:
        prepare(digits_folder(), folder, Settings(short_side="36", quality=90, shard_images=10), threads=2, ranks=ranks)
    return folder


def bench_of(folder, *flags: str, seconds: float) -> Bench:
    config = parse_args(
        ["--data", str(folder), "--arch", "A", "--crop", "32", "--train-scale", "36", "--batch-size", "4", *flags]
    )
    with ranks_of_this_run("cpu") as ranks:
        return open_bench(config, ranks, Limits(seconds=seconds, steps=None))


def images_per_second(bench: Bench, timing: Timing) -> float:
    rate = rate_of(timing, images=bench.share, ranks=bench.ranks)
    assert rate.images / (timing.ended - timing.began) == pytest.approx(rate.images_per_second, rel=0.02)
    return rate.images_per_second


@pytest.mark.parametrize("flags", [(), ("--read-ahead", "40"), ("--order", "window", "--window-shards", "4")])
@pytest.mark.seconds
def test_reading_and_loader_are_as_fast_as_the_storage_however_much_lies_ready(digits, flags, monkeypatch):
    """Windows of 40 images, 10 steps, of which each comes at once; or up to 42 batches that lie ready."""
    bench = bench_of(digits, *flags, seconds=1)
    monkeypatch.setattr(FolderStorage, "read", limited(100))
    assert images_per_second(bench, time_reading(bench)) == pytest.approx(100, rel=0.05)
    timing, _ = time_loader(bench)
    assert images_per_second(bench, timing) == pytest.approx(100, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--order", "window", "--window-shards", "4")])
def test_training_waits_for_slow_storage_as_long_as_it_waits(digits, flags, monkeypatch):
    """Of the 40 ms in which the storage gives a batch, the step works for 20."""
    bench = bench_of(digits, *flags, seconds=1.5)
    monkeypatch.setattr(FolderStorage, "read", limited(100))
    batches = MarkedBatches(training_batches(bench), bench.laps)

    def step() -> None:
        next(batches)
        time.sleep(0.02)

    timing = time_training(bench, step)
    assert images_per_second(bench, timing) == pytest.approx(100, rel=0.05)
    assert timing.part("data_wait").mean() / timing.step_seconds.mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("shards", "batch", "period", "windows"),
    [
        (8, 4, 20, 1),  # 18 windows an epoch
        (7, 5, 14, 1),
        (6, 8, 15, 2),  # 7.5 steps a window
        (40, 4, 359, 4),  # 4 windows an epoch, the last one of 24 shards
        (36, 4, 90, 1),  # of 36 shards, as the others
        (144, 4, 359, 1),  # one
    ],
)
@pytest.mark.seconds
def test_a_stage_begins_a_step_before_a_windows_end_and_lasts_whole_windows(digits, shards, batch, period, windows):
    flags = ["--order", "window", "--window-shards", str(shards), "--batch-size", str(batch)]
    bench = bench_of(digits, *flags, seconds=1)
    plan, feeds = bench.data.train_plan(), [feed_of(bench.data, stage) for stage in range(4)]
    assert plan.read_group
    for feed in feeds:
        assert (feed.period, feed.windows) == (period, windows)
        begin, end = (plan.read_group(plan.samples(np.array([feed.start + n]))) for n in (batch - 1, batch))
        assert end == begin + 1
        half_a_window = min(shards, 144) * 10 / batch / 2
        assert 2 + 1 + feed.queue == pytest.approx(1 + half_a_window + 8 * (half_a_window < 4), abs=1)
    assert len({feed.start for feed in feeds}) == min(4, -(-144 // shards))


@pytest.mark.seconds
def test_without_windows_a_stage_begins_at_a_quarter_of_the_epoch(digits):
    bench = bench_of(digits, "--batch-size", "8", "--micro-batch", "4", seconds=1)
    assert [feed_of(bench.data, stage).start for stage in range(4)] == [0, 359, 718, 1077]
    assert feed_of(bench.data, 0).queue == 1 + 4, "2 and 8 micro-batches"
