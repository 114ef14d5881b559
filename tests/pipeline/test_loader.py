import errno
import itertools
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import patience
from common.errors import DataSourceError
from pipeline.dali import recovery
from pipeline.dali.decoding import decode_whole
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader, SyntheticLoader
from pipeline.dataset.digits import digits_folder
from pipeline.dataset.manifest import open_manifest
from pipeline.plan.training import TrainPlan
from tests.support.images import photo_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan():
    table = open_manifest(digits_folder()).train
    return TrainPlan(table=table, batch_size=10, crop=32, scale=(36, 36), seed=0)


def no_loss(*_):
    pytest.fail("lost an image")


def make_loader(plan, *, start=0, prefetch=2, lose=no_loss, pad_channels=False):
    return DaliLoader(
        lambda skip: plan.batches(start=start, rank=0, world_size=1, micro_batch=plan.batch_size, skip=skip),
        GraphOptions(crop=plan.crop, prefetch=prefetch, pad_channels=pad_channels),
        lose=lose,
        batch_size=plan.batch_size,
    )


def test_digits_are_what_scikit_learn_ships():
    manifest = open_manifest(digits_folder())
    assert (len(manifest.train), len(manifest.val), manifest.quarantined) == (1437, 360, 0)
    assert manifest.classes == tuple("0123456789")


def test_batches_are_channels_last_and_labels_int64(plan):
    images, labels = next(make_loader(plan))
    assert images.shape == (10, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert np.array_equal(labels, plan.samples(np.arange(10)).labels)


def test_a_fourth_channel_of_zeros_is_added_in_dali(plan):
    plain, _ = next(make_loader(plan))
    padded, _ = next(make_loader(plan, pad_channels=True))
    assert padded.shape == (10, 4, 32, 32)
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded[:, :3], plain)
    assert not padded[:, 3].any()


def test_images_are_dalis_own_memory(plan):
    loader = make_loader(plan)
    outputs = loader._pipeline.run()
    loader._pipeline.run = lambda: outputs
    images, labels = next(loader)
    assert images.data_ptr() == outputs[0].as_tensor().data_ptr()
    assert labels.data_ptr() == outputs[1].as_tensor().data_ptr()


def test_held_batches_stay_as_they_were(plan):
    loader = make_loader(plan)
    held = [next(loader) for _ in range(8)]
    copies = [(images.clone(), labels.clone()) for images, labels in held]
    for _ in range(20):
        next(loader)
    for (images, labels), (images_before, labels_before) in zip(held, copies, strict=True):
        assert torch.equal(images, images_before)
        assert torch.equal(labels, labels_before)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_loader_starts_at_any_sample_and_goes_on_across_epochs(plan, prefetch):
    skipped = 1430  # seven samples before the first epoch's end
    loader = make_loader(plan)
    for _ in range(skipped // 10):
        next(loader)
    later = make_loader(plan, start=skipped, prefetch=prefetch)
    for _ in range(3):
        (images, labels), (same_images, same_labels) = next(loader), next(later)
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


DAMAGE = {
    "emptied": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 3),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 30),
    "removed": lambda path: path.unlink(),
    "replaced by a smaller image": lambda path: Image.new("RGB", (9, 9)).save(path),
}


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.seconds
def test_images_lost_after_the_scan_are_replaced_and_everything_else_goes_on(tmp_path, prefetch):
    folder = photo_folder(tmp_path, train=40, val=2)
    table = open_manifest(folder).train
    victims = sorted((folder / "train").rglob("*.JPEG"))[3::8]
    assert len(victims) == len(DAMAGE)
    for path, damage in zip(victims, DAMAGE.values(), strict=True):
        damage(path)
    plan = TrainPlan(table=table, batch_size=7, crop=64, scale=(64, 96), seed=0)
    lost: list[tuple[Path, bool]] = []

    def lose(samples, dead, reasons):
        assert all(reasons)
        lost.extend((Path(table.name(samples.source[i])), bool(dead[i])) for i in range(len(dead)))
        plan.lose(samples, dead)

    loader = make_loader(plan, prefetch=prefetch, lose=lose)
    batches = [next(loader) for _ in range(20)]  # three and a half epochs

    assert {path for path, _ in lost} == set(victims)
    for kind, victim in zip(DAMAGE, victims, strict=True):
        fates = [dead for path, dead in lost if path == victim]
        if kind in ("truncated", "replaced by a smaller image"):
            assert not any(fates), "some windows of it can still be decoded"
        else:
            assert fates == [True], "lost once and for all"

    # Another rank that starts later, and has met none of the losses, shows the same.
    late = TrainPlan(table=table, batch_size=7, crop=64, scale=(64, 96), seed=0)
    late_loader = make_loader(late, start=10 * 7, lose=lambda samples, dead, _: late.lose(samples, dead))
    for images, labels in batches[10:]:
        late_images, late_labels = next(late_loader)
        assert torch.equal(images, late_images)
        assert torch.equal(labels, late_labels)


def test_an_error_in_the_plan_is_not_taken_for_a_bad_image():
    def batches(skip):
        raise RuntimeError("a bug")
        yield

    loader = DaliLoader(
        batches,
        GraphOptions(crop=64),
        lose=no_loss,
        batch_size=4,
    )
    with pytest.raises(RuntimeError, match="a bug"):
        next(loader)


def test_synthetic_batches_look_like_real_ones():
    loader = SyntheticLoader(batch_size=4, crop=64, classes=7, device=CPU, half=False)
    images, labels = next(loader)
    assert images.shape == (4, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert labels.max() < 7
    assert next(loader)[0].data_ptr() == images.data_ptr(), "one resident batch"


# ---- storage that fails ------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """A data folder, and a plan over it."""
    folder = photo_folder(tmp_path / "photos", train=12, val=2)
    table = open_manifest(folder).train
    return folder, TrainPlan(table=table, batch_size=6, crop=32, scale=(36, 36), seed=0)


@pytest.mark.seconds
def test_a_data_folder_that_is_gone_for_a_moment_costs_no_image(photos, tmp_path, monkeypatch, capsys):
    folder, plan = photos
    monkeypatch.setattr(patience, "_FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(patience, "_warned_at", -100.0)
    expected = [images for images, _ in itertools.islice(make_loader(plan), 8)]
    loader = make_loader(plan)
    found = [next(loader)[0]]
    folder.rename(tmp_path / "away")
    threading.Timer(1.0, lambda: (tmp_path / "away").rename(folder)).start()
    found += [images for images, _ in itertools.islice(loader, 7)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert "cannot be read (No such file or directory); trying again for up to 60 s" in capsys.readouterr().err


@pytest.mark.parametrize("empty_mount_point", [False, True])
def test_a_data_folder_that_stays_away_ends_the_run_and_loses_no_image(photos, monkeypatch, empty_mount_point):
    folder, plan = photos
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.3)
    loader = make_loader(plan)
    shutil.rmtree(folder)
    if empty_mount_point:
        folder.mkdir()
    with pytest.raises(
        DataSourceError, match=rf"{folder}/.*JPEG: cannot be read \(No such file or directory\); once it can"
    ):
        list(itertools.islice(loader, 8))


def _class_by_link(folder: Path) -> Path:
    disk = folder.rename(folder.parents[2] / "disk")
    folder.symlink_to(disk)
    return disk


def _images_by_links(folder: Path) -> Path:
    disk = _class_by_link(folder)
    folder.unlink()
    folder.mkdir()
    for image in disk.iterdir():
        (folder / image.name).symlink_to(image)
    return disk


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("place", "leave"),
    [
        (lambda folder: folder.parent, _emptied),
        (lambda folder: folder, _emptied),
        (_class_by_link, _emptied),
        (_class_by_link, shutil.rmtree),
        (_images_by_links, _emptied),
        (_images_by_links, shutil.rmtree),
    ],
)
@pytest.mark.seconds
def test_a_disk_that_holds_a_part_of_the_data_may_leave_too(photos, monkeypatch, place, leave):
    """A split's own disk, a class's, or one to which links lead: gone, or an empty folder where it was mounted."""
    folder, plan = photos
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.3)
    disk = place(folder / "train/class0")
    loader = make_loader(plan)
    leave(disk)
    with pytest.raises(DataSourceError, match="cannot be read"):
        list(itertools.islice(loader, 8))


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.seconds
def test_a_file_that_the_disk_does_not_give_is_not_lost(photos, monkeypatch, error):
    """DALI says only that it failed; read again, the file says why: first by this errno, then it is there."""
    folder, plan = photos
    path = folder / "train/class0/004.JPEG"
    expected = [images for images, _ in itertools.islice(make_loader(plan), 4)]
    path.rename(folder / "elsewhere")
    asked = []

    def failing_open(name, *arguments, **keywords):
        if name == str(path):
            asked.append(name)
            if len(asked) == 1:
                raise OSError(error, os.strerror(error))
            (folder / "elsewhere").rename(path)
        return open(name, *arguments, **keywords)

    monkeypatch.setattr(recovery, "open", failing_open, raising=False)
    found = [images for images, _ in itertools.islice(make_loader(plan), 4)]
    assert len(asked) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_verifying_takes_no_image_out_for_a_disk_that_fails(photos, monkeypatch):
    folder, plan = photos
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.3)
    shutil.rmtree(folder / "train")
    with pytest.raises(DataSourceError, match="cannot be read"):
        list(decode_whole(plan.table, np.arange(12), threads=1))


def test_reading_that_fails_in_batches_alone_is_tried_again_and_then_named(photos, monkeypatch):
    _, plan = photos
    loader = make_loader(plan)

    def fail(*_):
        raise RuntimeError("Error in CPU operator `nvidia.dali.fn.io.file.read`,\nencountered:\n\nToo many open files")

    real_start = loader._start

    def start():
        real_start()
        loader._pipeline.run = fail

    monkeypatch.setattr(loader, "_start", start)
    loader._pipeline.run = fail
    with pytest.raises(DataSourceError, match=r"cannot be read in batches \(Too many open files\)"):
        next(loader)


@pytest.mark.parametrize(("half", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_noise_has_the_format_of_images(half, dtype):
    images, labels = next(SyntheticLoader(batch_size=2, crop=32, classes=10, device=CPU, half=half))
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
