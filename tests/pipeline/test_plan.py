import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from model.weights import TORCHVISION_MEAN
from pipeline.dataset.table import FileTable
from pipeline.plan.samples import IMAGENET_MEAN_RGB, LOST_LABEL, PADDING_LABEL, rescaled_sizes
from pipeline.plan.training import IMAGENET_COLOUR_SHIFT, RandomResized, TrainPlan
from pipeline.plan.validation import ValidationPlan
from pipeline.shards.shard_table import SHARD_ROW, ShardTable
from pipeline.shards.storage import open_storage


def make_table(length: int, seed: int = 0) -> FileTable:
    """A table of images that do not exist; the label is the row's number, so that rows can be told apart."""
    generator = np.random.default_rng(seed)
    rows = np.zeros(length, dtype=[("path", "u1", (8,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
    rows["path"] = np.frombuffer(b"".join(b"%08d" % row for row in range(length)), np.uint8).reshape(length, 8)
    rows["label"] = np.arange(length)
    rows["height"], rows["width"] = generator.integers(1, 1500, size=(2, length))
    return FileTable(Path("/images"), rows)


def make_plan(length: int, batch_size: int, *, scale=(256, 512), seed: int = 0, **settings) -> TrainPlan:
    return TrainPlan(table=make_table(length), batch_size=batch_size, crop=224, scale=scale, seed=seed, **settings)


def table_of_size(length: int, height: int, width: int) -> FileTable:
    rows = np.zeros(length, dtype=[("path", "u1", (1,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
    rows["height"], rows["width"] = height, width
    return FileTable(Path("/"), rows)


def take(plan: TrainPlan, *, steps: int, world_size: int, start: int = 0, micro_batch: int | None = None):
    """The samples of the first steps: per field, an array [steps, batch_size, …], ranks side by side in rank order."""
    share = plan.batch_size // world_size
    micro_batch = micro_batch or share
    by_rank = []
    for rank in range(world_size):
        batches = plan.batches(start=start, rank=rank, world_size=world_size, micro_batch=micro_batch)
        by_rank.append([next(batches) for _ in range(steps * share // micro_batch)])
    fields = []
    for field in range(len(by_rank[0][0])):
        ranks = [np.concatenate([batch[field] for batch in batches]) for batches in by_rank]
        shaped = [values.reshape(steps, share, *values.shape[1:]) for values in ranks]
        fields.append(np.concatenate(shaped, axis=1))
    return type(by_rank[0][0])(*fields)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [23, 24, 241, 1009])
def test_every_row_once_an_epoch_over_all_ranks(length, world_size):
    plan = make_plan(length, batch_size=24)
    steps = -(-3 * length // 24)
    rows = take(plan, steps=steps, world_size=world_size).labels.ravel()
    for epoch in range(3):
        assert np.array_equal(np.sort(rows[epoch * length : (epoch + 1) * length]), np.arange(length))


def test_epochs_have_different_orders_and_different_draws():
    plan = make_plan(500, batch_size=500)
    both = take(plan, steps=2, world_size=1)
    assert np.mean(both.labels[0] == both.labels[1]) < 0.05
    order = [np.argsort(labels) for labels in both.labels]
    for field in ("flipped", "mean", "roi_start"):
        first, second = (getattr(both, field)[epoch][order[epoch]] for epoch in (0, 1))
        assert np.mean(first == second) < 0.6, field


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 12), (4, 6), (1, 3), (2, 4)])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(world_size, micro_batch):
    plan = make_plan(1009, batch_size=24)
    alone = take(plan, steps=50, world_size=1)
    shared = take(plan, steps=50, world_size=world_size, micro_batch=micro_batch)
    for name, one, other in zip(alone._fields, alone, shared, strict=True):
        assert np.array_equal(one, other), name


def test_a_plan_starts_at_any_sample():
    plan = make_plan(101, batch_size=8)
    whole = take(plan, steps=40, world_size=2)
    rest = take(plan, steps=10, world_size=4, start=30 * 8)
    for name, one, other in zip(whole._fields, whole, rest, strict=True):
        assert np.array_equal(one[30:], other), name


def test_batches_are_the_samples_of_the_blocks_before_and_after():
    """Blocks of several thousand samples are an optimisation that must not show."""
    plan = make_plan(3000, batch_size=1000)
    batches = take(plan, steps=10, world_size=1)
    direct = plan.samples(np.arange(10_000))
    assert np.array_equal(batches.labels.ravel(), direct.labels)
    assert np.array_equal(batches.mean.reshape(-1, 3), direct.mean)


def test_inputs_for_dali_have_the_promised_types():
    samples = make_plan(50, batch_size=10).samples(np.arange(10))
    expected = [np.uint8, np.int32, np.int32, np.float32, np.float32, np.bool_, np.int32]
    expected += [np.float32, np.float32, np.int64, np.int64, np.int64]
    assert [field.dtype for field in samples] == expected
    assert all(field.flags.c_contiguous for field in samples)
    assert bytes(samples.source[0]) == b"/images/%08d" % samples.labels[0]


def test_windows_equal_a_computation_one_image_at_a_time():
    """The design's formulas in plain Python with exact fractions, for rows of all shapes."""
    from fractions import Fraction
    from math import ceil, floor

    from pipeline.plan import random_numbers

    plan = make_plan(400, batch_size=400, seed=4)
    samples = plan.samples(np.arange(400))
    _, rows = plan.epochs_and_rows(np.arange(400))
    sizes = plan.table.read(rows).sizes
    u_scale, u_y, u_x, u_flip = random_numbers.uniforms(
        4, np.zeros(400, int), rows, random_numbers.PURPOSE_GEOMETRY
    ).tolist()
    for i in range(400):
        scale = 256 + int(u_scale[i] * 257)
        for axis, u in ((0, u_y[i]), (1, u_x[i])):
            size, shortest = sizes[i, axis].item(), sizes[i].min().item()
            out = floor(Fraction(size * scale, shortest) + Fraction(1, 2))
            corner = min(floor(u * (out - 223)), out - 224)
            ratio = Fraction(size, out)
            margin = 2 * max(ratio, Fraction(1)) + 1
            first = max(floor(corner * ratio - margin), 0)
            last = min(ceil((corner + 224) * ratio + margin), size)
            # Where the exact edge is a whole number, float64 may round it outwards by a pixel; never inwards.
            assert first - samples.start[i, axis] in (0, 1)
            assert samples.start[i, axis] + samples.shape[i, axis] - last in (0, 1)
            start = int(samples.start[i, axis])
            begin, end = float(corner * ratio - start), float((corner + 224) * ratio - start)
            if axis == 1 and u_flip[i] >= 0.5:
                begin, end = end, begin
            assert samples.roi_start[i, axis] == pytest.approx(begin, abs=1e-3)
            assert samples.roi_end[i, axis] == pytest.approx(end, abs=1e-3)
        assert samples.flipped[i] == (u_flip[i] >= 0.5)


def test_corners_scales_and_flips_are_uniform():
    count = 20_000
    rows = np.zeros(count, dtype=[("path", "u1", (1,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
    rows["height"], rows["width"] = 256, 256
    plan = TrainPlan(table=FileTable(Path("/"), rows), batch_size=count, crop=224, scale=(256, 256), seed=2)
    samples = plan.samples(np.arange(count))
    corners = np.rint(samples.start + np.minimum(samples.roi_start, samples.roi_end)).astype(
        int
    )  # S equals the side: the ratio is 1
    for axis in (0, 1):
        counts = np.bincount(corners[:, axis], minlength=33)
        assert len(counts) == 33, "all 33 corners of a 224 crop in 256 pixels, and no other"
        assert ((counts - count / 33) ** 2 / (count / 33)).sum() < 75  # chi-square, 32 degrees: p = 3e-5
    assert abs(samples.flipped.mean() - 0.5) < 0.015


def test_scales_cover_their_range_with_both_ends():
    plan = make_plan(5000, batch_size=5000, scale=(256, 259))
    sizes = plan.table.read(plan.epochs_and_rows(np.arange(5000))[1]).sizes
    samples = plan.samples(np.arange(5000))
    ratio = np.abs(samples.roi_end - samples.roi_start).astype(float) / 224
    shortest = sizes.argmin(axis=1)
    everyone = np.arange(5000)
    scales = np.rint(sizes[everyone, shortest] / ratio[everyone, shortest]).astype(int)
    values, counts = np.unique(scales, return_counts=True)
    assert list(values) == [256, 257, 258, 259]
    assert counts.min() > 1100


# As fb.resnet.torch publishes them, for pixels in 0–1.
PUBLISHED_VECTORS = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
PUBLISHED_VALUES = [0.2175, 0.0188, 0.0045]
OWN_SHIFT = ((30.0, 3.0, 1.0), (30.0, -3.0, 1.0), (10.0, 0.0, -5.0))


@pytest.mark.parametrize(
    ("given", "matrix"),
    [
        ({}, 255 * np.array(PUBLISHED_VECTORS) @ np.diag(PUBLISHED_VALUES)),
        ({"colour_shift": OWN_SHIFT}, np.array(OWN_SHIFT)),
    ],
)
def test_colour_shift_has_the_covariance_of_alexnets(given, matrix):
    """Shift = P·(α∘λ) with α normal of deviation 0.1: covariance P·diag((0.1·λ)²)·Pᵀ."""
    samples = make_plan(40_000, batch_size=10, **given).samples(np.arange(40_000))
    shift = np.asarray(IMAGENET_MEAN_RGB) - samples.mean.astype(float)
    expected = 0.1**2 * matrix @ matrix.T
    assert np.allclose(np.cov(shift.T), expected, atol=0.03 * expected.max())
    assert np.allclose(shift.mean(axis=0), 0, atol=0.08)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 7, 64, 101])
def test_validation_has_every_image_once_and_padding_for_the_rest(length, world_size):
    plan = ValidationPlan(table=make_table(length), crop=224, scale=256)
    steps = plan.steps(world_size=world_size, batch_size=4)
    labels = []
    for rank in range(world_size):
        batches = plan.batches(rank=rank, world_size=world_size, batch_size=4)
        labels += [next(batches).labels for _ in range(steps)]
        assert np.array_equal(next(batches).labels, labels[-steps]), "the next pass is the same"
    counted = np.concatenate(labels)
    assert np.array_equal(np.sort(counted[counted != PADDING_LABEL]), np.arange(length))
    assert len(counted) - length < 4 * world_size


def test_validation_crops_where_torchvision_does():
    from torchvision.transforms.v2.functional import center_crop

    plan = ValidationPlan(table=make_table(300), crop=224, scale=257)
    samples = next(plan.batches(rank=0, world_size=1, batch_size=300))
    sizes = plan.table.read(np.arange(300)).sizes
    outs = rescaled_sizes(sizes, np.full(300, 257))
    corners = np.rint((samples.start + samples.roi_start) * outs / sizes).astype(int)
    for corner, out in zip(corners, outs, strict=True):
        if max(out) > 3000:
            continue
        grid = torch.arange(int(out[0] * out[1])).reshape(1, *map(int, out))
        first = int(center_crop(grid, [224, 224])[0, 0, 0])
        assert tuple(corner) == divmod(first, int(out[1]))
    assert not samples.flipped.any()
    assert np.array_equal(samples.mean, np.tile(np.array(IMAGENET_MEAN_RGB, dtype=np.float32), (300, 1)))


LOST = {3, 17, 18, 19, 40, 99}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_lost_rows_are_replaced_alike_on_any_number_of_ranks(world_size):
    plan = TrainPlan(table=make_table(101), batch_size=8, crop=224, scale=(256, 512), seed=0, lost_rows=LOST)
    shown = take(plan, steps=38, world_size=world_size)
    assert np.array_equal(shown.rows, take(plan, steps=38, world_size=1).rows)
    assert not LOST & set(shown.rows.ravel())
    epoch = shown.rows.ravel()[:101]
    assert set(epoch) == set(range(101)) - LOST, "all others are still used"
    complete = take(
        TrainPlan(table=plan.table, batch_size=8, crop=224, scale=(256, 512), seed=0), steps=38, world_size=1
    )
    others = ~np.isin(complete.rows, list(LOST))
    for name, one, other in zip(shown._fields, shown, complete, strict=True):
        assert np.array_equal(one[others], other[others]), name


def test_a_rank_that_learns_of_losses_one_by_one_ends_up_with_the_same_substitutes():
    table = make_table(101)
    knowing = TrainPlan(table=table, batch_size=101, crop=224, scale=(256, 256), seed=5, lost_rows=set(range(60)))
    learning = TrainPlan(table=table, batch_size=101, crop=224, scale=(256, 256), seed=5)
    while found := set(learning.samples(np.arange(101)).rows) & knowing.lost_rows:
        learning.lost_rows.add(min(found))
    assert np.array_equal(learning.samples(np.arange(101)).rows, knowing.samples(np.arange(101)).rows)


def test_a_dead_image_is_replaced_everywhere_and_one_that_failed_once_in_that_sample_alone():
    plan = make_plan(20, batch_size=4)
    before = plan.samples(np.arange(60))
    plan.lose(plan.samples(np.array([3, 7])), np.array([True, False]))
    after = plan.samples(np.arange(60))
    dead, failed = before.rows[[3, 7]].tolist()
    assert np.flatnonzero(after.rows != before.rows).tolist() == sorted({*np.flatnonzero(before.rows == dead), 7})
    assert (after.rows == failed).sum() >= 2, "in the two other epochs"
    assert dead not in after.rows


def test_batches_of_one_window_of_shards_are_read_together():
    """Of a global order, none: each batch takes its images from anywhere."""
    assert make_plan(20, batch_size=4).read_group is None
    rows = np.zeros(20, dtype=SHARD_ROW)
    rows[:] = (0, 100, 512, 0, 300, 300)
    table = ShardTable(
        open_storage("/nowhere"),
        "train",
        rows,
        shard_images=np.array([4, 4, 4, 4, 4]),
        shard_bytes=np.full(5, 10_000),
        classes=["one"],
        is_raw=False,
    )
    plan = TrainPlan(table=table, batch_size=2, crop=224, scale=(256, 256), seed=0, window_shards=2)
    group = plan.read_group
    assert group
    groups = [group(plan.samples(np.arange(first, first + 2))) for first in range(0, 40, 2)]
    lengths = [len(list(members)) for _, members in itertools.groupby(groups)]
    assert sorted(lengths) == [2, 2, 4, 4, 4, 4], "windows of 4 or 8 images, in each of two epochs"


def test_means_are_those_of_imagenet():
    """As torchvision has them, to half a grey level, which is how far the paper's authors' are from them."""
    assert np.abs(np.array(IMAGENET_MEAN_RGB) - 255 * np.array(TORCHVISION_MEAN)).max() < 0.51


@pytest.mark.parametrize("skip", [0, 1, 5, 6, 7, 1000])
def test_skipped_batches_are_the_ones_before(skip):
    plan = make_plan(1009, batch_size=24)
    arguments = {"start": 48, "rank": 1, "world_size": 2, "micro_batch": 4}
    whole, rest = plan.batches(**arguments), plan.batches(**arguments, skip=skip)
    for _ in range(skip):
        next(whole)
    for _ in range(5):
        for one, other in zip(next(whole), next(rest), strict=True):
            assert np.array_equal(one, other)


def test_lost_validation_images_keep_their_place_under_a_label_of_their_own():
    table = make_table(21)
    plan = ValidationPlan(table=table, crop=224, scale=256, lost_rows={20})
    plan.lose(plan.samples(np.array([4, 5])), dead=np.array([True, False]))
    batches = plan.batches(rank=0, world_size=1, batch_size=8)
    labels = np.concatenate([next(batches).labels for _ in range(3)])
    expected = np.append(np.arange(21), [PADDING_LABEL] * 3)
    expected[[4, 5, 20]] = LOST_LABEL
    assert np.array_equal(labels, expected)
    again = plan.batches(rank=0, world_size=1, batch_size=8, skip=4)
    assert np.array_equal(next(again).labels, labels[8:16])


def test_a_sample_whose_window_is_lost_is_replaced_and_its_row_stays_elsewhere():
    plan = TrainPlan(table=make_table(50), batch_size=10, crop=224, scale=(256, 256), seed=0)
    before = plan.samples(np.arange(200))
    plan.lose(before.take([7, 123]), dead=np.array([False, False]))
    after = plan.samples(np.arange(200))
    assert list(np.flatnonzero(after.rows != before.rows)) == [7, 123]
    plan.lose(after.take([7]), dead=np.array([False]))
    assert plan.samples(np.arange(200)).rows[7] not in (before.rows[7], after.rows[7])


def test_the_colour_shift_knows_nothing_of_the_geometry():
    """The three normals, found again from the means, against scale, corner and flip, in ranks and in squares."""
    count = 20_000
    rows = np.zeros(count, dtype=[("path", "u1", (1,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
    rows["height"], rows["width"] = 300, 300
    table = FileTable(Path("/"), rows)
    plan = TrainPlan(table=table, batch_size=count, crop=224, scale=(256, 512), seed=2, colour_shift=OWN_SHIFT)
    samples = plan.samples(np.arange(count))
    shift = np.asarray(IMAGENET_MEAN_RGB) - samples.mean.astype(float)
    alpha = np.linalg.solve(np.array(OWN_SHIFT), shift.T) / 0.1
    assert np.allclose(alpha.std(axis=1), 1, atol=0.03)
    scales = plan.scales(np.arange(count))
    places = (
        (samples.start + np.minimum(samples.roi_start, samples.roi_end))
        / 300
        * scales[:, None]
        / (scales[:, None] - 223)
    )
    geometry = [scales, places[:, 0], places[:, 1], np.cos(2 * np.pi * places[:, 1]), np.sin(2 * np.pi * places[:, 1])]
    for normal in alpha:
        for values in (normal, normal**2):
            for decided in (*geometry, samples.flipped):
                assert abs(np.corrcoef(values, decided)[0, 1]) < 0.03, "0 ± 0.007"


def test_scale_corner_and_flip_know_nothing_of_each_other():
    count = 20_000
    rows = np.zeros(count, dtype=[("path", "u1", (1,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
    rows["height"], rows["width"] = 300, 300
    plan = TrainPlan(table=FileTable(Path("/"), rows), batch_size=count, crop=224, scale=(256, 512), seed=3)
    samples, scales = plan.samples(np.arange(count)), plan.scales(np.arange(count))
    places = (
        (samples.start + np.minimum(samples.roi_start, samples.roi_end))
        / 300
        * scales[:, None]
        / (scales[:, None] - 223)
    )
    decided = np.stack((scales, places[:, 0], places[:, 1], samples.flipped.astype(float)))
    off_diagonal = np.corrcoef(decided)[~np.eye(4, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.03, "0 ± 0.007"


def test_an_image_flipped_without_a_resize_is_mirrored_and_no_other_is():
    rows = np.zeros(400, dtype=[("path", "u1", (1,)), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")])
    rows["height"], rows["width"] = 256, 256 + np.arange(400) % 3
    plan = TrainPlan(table=FileTable(Path("/"), rows), batch_size=400, crop=224, scale=(256, 257), seed=3)
    samples, scales = plan.samples(np.arange(400)), plan.scales(np.arange(400))
    assert np.array_equal(samples.resized, scales == 257)
    assert np.array_equal(samples.mirrored == 1, samples.flipped & ~samples.resized)
    assert 50 < samples.mirrored.sum() < 150
    plain = samples.take(list(np.flatnonzero(~samples.resized)))
    assert (plain.shape == 224).all(), "the window is the crop"
    assert (plain.roi_start == 0).all()
    assert (plain.roi_end == 224).all()


def test_substitutes_are_drawn_anew_for_each_epoch_and_row_from_all_the_others():
    from scipy import stats

    epochs = 300
    plan = TrainPlan(table=make_table(41), batch_size=8, crop=224, scale=(256, 512), seed=0, lost_rows={3, 17, 18, 40})
    numbers = np.arange(41 * epochs)
    _, rows = plan.epochs_and_rows(numbers)
    shown = plan.samples(numbers).rows
    substitutes = np.stack([shown[rows == lost] for lost in sorted(plan.lost_rows)])
    assert substitutes.shape == (4, epochs)
    counts = np.delete(np.bincount(substitutes.ravel(), minlength=41), sorted(plan.lost_rows))
    assert counts.sum() == 4 * epochs
    assert stats.chisquare(counts).pvalue > 1e-4
    for one in range(4):
        assert (substitutes[one, 1:] == substitutes[one, :-1]).mean() < 0.1, "another one in the next epoch"
        for other in range(one):
            assert (substitutes[one] == substitutes[other]).mean() < 0.1, "another one for another row"
    other_seed = TrainPlan(table=plan.table, batch_size=8, crop=224, scale=(256, 512), seed=1, lost_rows={3})
    _, rows_of_other = other_seed.epochs_and_rows(numbers)
    of_other = other_seed.samples(numbers).rows[rows_of_other == 3]
    assert (of_other == substitutes[0]).mean() < 0.1


def test_the_substitutes_of_a_row_are_one_sequence_however_many_are_lost():
    """A function of seed, epoch and the row itself: its n-th number is the same whatever the ones before it have hit."""
    from pipeline.plan import random_numbers

    lost = set(range(1, 30))
    plan = TrainPlan(table=make_table(41), batch_size=8, crop=224, scale=(256, 512), seed=6, lost_rows=lost)
    numbers = np.arange(41 * 20)
    epochs, rows = plan.epochs_and_rows(numbers)
    for epoch, row, shown in zip(epochs, rows, plan.samples(numbers).rows, strict=True):
        expected, attempt = row, 0
        while expected in lost:
            u = random_numbers.uniforms(
                6, np.array([epoch]), np.array([row]), random_numbers.PURPOSE_SUBSTITUTE + attempt
            )[0, 0]
            expected, attempt = int(u * 41), attempt + 1
        assert shown == expected


def test_imagenets_colour_shift_is_what_others_publish():
    """As fb.resnet.torch and many after it write it, for pixels in 0–1: eigenvectors in columns, eigenvalues."""
    eigenvectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    eigenvalues = np.array([0.2175, 0.0188, 0.0045])
    published = eigenvectors * eigenvalues * 255
    assert np.asarray(IMAGENET_COLOUR_SHIFT) == pytest.approx(published, rel=1e-4, abs=5e-3)
    assert np.abs(eigenvectors.T @ eigenvectors - np.eye(3)).max() < 1e-3, "of length 1, and at right angles"


@pytest.mark.parametrize("skip", [1, 3, 4, 7, 9])
def test_skipped_validation_batches_are_the_ones_before_in_later_passes_too(skip):
    plan = ValidationPlan(table=make_table(20), crop=224, scale=256)
    settings = {"rank": 0, "world_size": 1, "batch_size": 5}
    whole, rest = plan.batches(**settings), plan.batches(**settings, skip=skip)
    numbers = [next(whole).numbers.tolist() for _ in range(12)]
    assert [next(rest).numbers.tolist() for _ in range(12 - skip)] == numbers[skip:]


def test_of_validation_images_that_are_all_lost_but_one_that_one_is_shown():
    plan = ValidationPlan(table=make_table(4), crop=224, scale=256, lost_rows={0, 1, 2})
    samples = plan.samples(np.arange(4))
    assert samples.rows.tolist() == [3, 3, 3, 3]
    assert samples.labels.tolist() == [LOST_LABEL, LOST_LABEL, LOST_LABEL, 3]


def test_a_files_first_pixel_is_what_says_whether_it_is_lost_altogether():
    samples = make_plan(30, batch_size=6).samples(np.arange(6))
    first = samples.first_pixels()
    assert (first.start == 0).all()
    assert (first.shape == 1).all()
    assert (first.roi_start == 0).all()
    assert (first.roi_end == 1).all()
    assert first.resized.all()
    for name in ("source", "size", "mean", "labels", "numbers", "rows"):
        assert np.array_equal(getattr(first, name), getattr(samples, name)), name
    assert [values.dtype for values in first.inputs()] == [values.dtype for values in samples.inputs()]


def test_a_plan_is_the_same_in_every_version():
    """Else a run that goes on with a newer version would show other images than the epoch that it is in has promised."""
    plan = make_plan(1000, batch_size=8, seed=3, lost_rows={7, 8, 9})
    samples = plan.samples(np.arange(995, 1005))  # of two epochs
    assert samples.rows.tolist() == [684, 616, 415, 601, 117, 671, 536, 457, 790, 638]
    assert samples.start[:, 0].tolist() == [77, 346, 43, 278, 136, 378, 447, 13, 53, 604]
    assert samples.flipped.astype(int).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 1]
    lost = plan.samples(np.flatnonzero(np.isin(plan.epochs_and_rows(np.arange(1000))[1], [7, 8, 9])))
    assert lost.rows.tolist() == [588, 415, 466]


# ---- crops of random area and shape ------------------------------------------------------------------------------


def test_random_resized_crops_change_nothing_but_the_crop():
    """Its numbers are drawn from words of their own; and each is a function of the sample's number, as all else is."""
    paper, resized = make_plan(1000, batch_size=8), make_plan(1000, batch_size=8, random_resized=RandomResized())
    numbers = np.arange(500, 1500)  # of two epochs
    one, other = paper.samples(numbers), resized.samples(numbers)
    for name in ("source", "flipped", "mean", "labels", "rows", "size"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    order = np.random.default_rng(0).permutation(1000)
    for name, given, again in zip(other._fields, other, resized.samples(numbers[order]), strict=True):
        assert np.array_equal(given[order], again), name


def test_the_window_of_a_random_resized_crop_is_the_crop_itself():
    samples = make_plan(500, batch_size=8, random_resized=RandomResized()).samples(np.arange(500))
    ends = np.stack((samples.roi_start, samples.roi_end))
    assert (ends.min(axis=0) == 0).all()
    assert np.array_equal(ends.max(axis=0), samples.shape)
    assert [field.dtype for field in samples] == [field.dtype for field in make_plan(5, 5).samples(np.arange(5))]


def test_a_random_resized_crop_knows_nothing_of_flip_and_colour_and_its_numbers_nothing_of_each_other():
    count = 20_000
    plan = TrainPlan(
        table=table_of_size(count, 400, 400),
        batch_size=count,
        crop=224,
        scale=(256, 256),
        seed=3,
        colour_shift=OWN_SHIFT,
        random_resized=RandomResized(area=(0.1, 0.5)),
    )
    samples = plan.samples(np.arange(count))
    shape = samples.shape.astype(float)
    places = samples.start / (401 - shape)
    shift = np.asarray(IMAGENET_MEAN_RGB) - samples.mean.astype(float)
    alpha = np.linalg.solve(np.array(OWN_SHIFT), shift.T)
    decided = [shape.prod(axis=1), shape[:, 0] / shape[:, 1], places[:, 0], places[:, 1], samples.flipped, *alpha]
    off_diagonal = np.corrcoef(np.stack([values.astype(float) for values in decided]))[~np.eye(8, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.03, "0 ± 0.007"


SHAPES = [(375, 500), (500, 333), (256, 256), (200, 600), (60, 300), (7, 5), (1, 1)]
OWN_CROPS = RandomResized(area=(0.25, 0.5), aspect=(1.5, 2.0))
DRAWS = [(crops, *shape, 3_000) for crops in (RandomResized(), OWN_CROPS) for shape in SHAPES]
# torchvision draws one at a time: a minute each.
MANY_DRAWS = [pytest.param(RandomResized(), *shape, 100_000, marks=pytest.mark.slow) for shape in SHAPES[:5]]


@pytest.mark.parametrize(("crops", "height", "width", "count"), [*DRAWS, *MANY_DRAWS])
def test_random_resized_crops_are_distributed_as_torchvisions(crops, height, width, count):
    """Kolmogorov-Smirnov, of what RandomResizedCrop itself draws. At 60×300 some draws fail ten times, in 7×5 few fit."""
    from scipy import stats
    from torchvision.transforms import RandomResizedCrop

    image = torch.empty(3, height, width, device="meta")
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, crops.area, crops.aspect) for _ in range(count)])
    numbers = np.arange(count)
    corners, shapes = crops.rectangles(np.full((count, 2), (height, width)), 5, numbers // 1000, numbers % 1000)
    ours = np.concatenate((corners, shapes), axis=1)

    def figures(drawn: np.ndarray) -> dict[str, np.ndarray]:
        top, left, tall, wide = drawn.T
        return {
            "height": tall,
            "width": wide,
            "area": tall * wide,
            "aspect": wide / tall,
            "top": top,
            "left": left,
            "place down": (top + 0.5) / (height - tall + 1),
            "place across": (left + 0.5) / (width - wide + 1),
        }

    for (name, one), other in zip(figures(ours).items(), figures(theirs).values(), strict=True):
        assert stats.ks_2samp(one, other, method="asymp").pvalue > 1e-4, name


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 5000), (3, 100)])
def test_where_nothing_fits_the_crop_is_torchvisions_at_the_centre(height, width):
    from torchvision.transforms import RandomResizedCrop

    crops = RandomResized()
    corners, shapes = crops.rectangles(np.array([[height, width]] * 50), 0, np.zeros(50, dtype=int), np.arange(50))
    image = torch.empty(3, height, width, device="meta")
    (expected,) = {RandomResizedCrop.get_params(image, crops.area, crops.aspect) for _ in range(20)}
    assert {(*corner, *shape) for corner, shape in zip(corners.tolist(), shapes.tolist(), strict=True)} == {expected}


def test_a_crop_is_never_empty_and_lies_within_its_image():
    table = make_table(3000)
    sizes = table.read(np.arange(3000)).sizes
    for aspect in ((3 / 4, 4 / 3), (0.01, 0.01), (100, 100), (0.01, 100)):
        crops = RandomResized(area=(1e-6, 1.0), aspect=aspect)
        corners, shapes = crops.rectangles(sizes, 0, np.zeros(3000, dtype=int), np.arange(3000))
        assert (shapes >= 1).all()
        assert (corners >= 0).all()
        assert (corners + shapes <= sizes).all()


def test_random_resized_crops_are_the_same_in_every_version():
    samples = make_plan(1000, batch_size=8, seed=3, random_resized=RandomResized()).samples(np.arange(995, 1000))
    assert samples.start.tolist() == [[38, 323], [450, 83], [24, 60], [2, 23], [46, 451]]
    assert samples.shape.tolist() == [[289, 222], [304, 251], [82, 73], [1343, 1260], [256, 218]]
