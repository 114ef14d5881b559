"""The loaders for a loop of one's own: each image as often as promised, a state of one integer, any number of ranks."""

import copy
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

import pipeline
from common.errors import TrainingError, UserError
from pipeline import RandomResized, TrainLoader, ValidationLoader
from pipeline.dali.loader import Batch
from pipeline.dataset.manifest import open_manifest
from pipeline.library import IGNORED_LABEL
from pipeline.plan.training import TrainPlan
from pipeline.plan.validation import ValidationPlan
from pipeline.preparation import packing
from tests.support.images import photo_folder

IMAGES = 7
"""Of each split, every one of a class of its own: the label tells which image it is."""
UNSHIFTED = {"mean_rgb": (0.0, 0.0, 0.0), "colour_shift": ((0, 0, 0),) * 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos"), train=IMAGES, val=IMAGES, classes=IMAGES)


def train_loader(folder: Path | str, batch_size: int, **arguments) -> TrainLoader:
    return TrainLoader(folder, batch_size=batch_size, crop=32, **{"scale": (36, 64), **arguments})


def val_loader(folder: Path | str, batch_size: int, **arguments) -> ValidationLoader:
    return ValidationLoader(folder, batch_size=batch_size, crop=32, scale=36, **arguments)


def first_batches(loader: TrainLoader, count: int) -> list[Batch]:
    """The next ones, through as many epochs as they take."""
    return list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), count))


def joined(batches: list[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Whether they are equal to the last bit."""
    return len(one) == len(other) and all(map(torch.equal, itertools.chain(*one), itertools.chain(*other)))


# ---- epochs and their state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 8, 17])
def test_every_image_is_used_once_an_epoch_and_len_counts_the_batches(folder, batch_size):
    loader, labels = train_loader(folder, batch_size), []
    for _ in range(5):
        expected, epoch = len(loader), loader.epoch
        batches = list(loader)
        assert len(batches) == expected
        assert all(len(batch) == batch_size for _, batch in batches), "every batch is full"
        labels += joined(batches)[1].tolist()
        assert loader.epoch == len(labels) // IMAGES > epoch
        assert len(labels) - batch_size < loader.epoch * IMAGES, "no batch later than it has to be"
    for first in range(0, loader.epoch * IMAGES, IMAGES):
        assert sorted(labels[first : first + IMAGES]) == list(range(IMAGES))


def test_batches_are_those_of_the_trainers_plan(folder):
    plan = TrainPlan(table=open_manifest(folder).train, batch_size=3, crop=32, scale=(36, 64), seed=5)
    images, labels = joined(first_batches(train_loader(folder, 3, seed=5), 6))
    assert images.shape == (18, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    samples = plan.samples(np.arange(18))
    assert labels.tolist() == samples.labels.tolist()
    pixels, _ = joined(first_batches(train_loader(folder, 3, seed=5, **UNSHIFTED), 6))
    assert 0 <= pixels.min() < 50 < 200 < pixels.max() <= 255, "grey levels"
    assert torch.allclose(pixels - images, torch.from_numpy(samples.mean)[:, :, None, None], atol=1e-3)


def test_the_state_goes_on_in_mid_epoch(folder):
    expected = first_batches(train_loader(folder, 3), 8)
    for seen in range(8):
        loader, resumed = train_loader(folder, 3), train_loader(folder, 3)
        first_batches(loader, seen)
        assert loader.state_dict() == {"samples_seen": 3 * seen}
        first_batches(resumed, 2)  # a loader that is at work goes elsewhere
        resumed.load_state_dict(loader.state_dict())
        assert same(first_batches(resumed, 8 - seen), expected[seen:])


def test_the_state_counts_the_batch_that_a_loops_body_has(folder):
    loader = train_loader(folder, 3)
    for number, _ in enumerate(loader, start=1):
        assert loader.state_dict() == {"samples_seen": 3 * number}


def test_an_iteration_that_is_left_early_is_gone_on_with(folder):
    expected = list(train_loader(folder, 2))
    loader = train_loader(folder, 2)
    first = next(iter(loader))
    assert len(loader) == len(expected), "of the whole epoch"
    assert same([first, *loader], expected)


def test_another_batch_size_goes_on_with_the_same_images(folder):
    images, labels = joined(first_batches(train_loader(folder, 5), 6))
    loader = train_loader(folder, 3)
    loader.load_state_dict({"samples_seen": 5})
    assert len(loader) == 2, "the batches that begin with samples 2 and 5"
    assert same([joined(first_batches(loader, 8))], [(images[5:29], labels[5:29])])


@pytest.mark.seconds
def test_a_resnet_in_a_plain_loop_resumes_to_the_last_bit():
    def begun():
        torch.manual_seed(0)
        model = resnet18(num_classes=10).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        loader = TrainLoader("digits", batch_size=64, crop=32, scale=(36, 36), seed=1)
        loader.load_state_dict({"samples_seen": 19 * 64})  # of 1437: the third batch from here ends the epoch
        return {"model": model, "optimizer": optimizer, "loader": loader}

    def train(parts: dict, batches: int) -> None:
        for images, labels in first_batches(parts["loader"], batches):
            parts["optimizer"].zero_grad()
            cross_entropy(parts["model"](images), labels).backward()
            parts["optimizer"].step()

    whole, stopped, resumed = begun(), begun(), begun()
    train(whole, 6)
    train(stopped, 2)
    for name, part in resumed.items():
        part.load_state_dict(copy.deepcopy(stopped[name].state_dict()))
    train(resumed, 4)
    assert whole["loader"].epoch == 1
    expected, found = whole["model"].state_dict(), resumed["model"].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(stopped["model"].state_dict()["fc.bias"], expected["fc.bias"])


# ---- ranks -------------------------------------------------------------------------------------------------------


def test_two_ranks_have_the_halves_of_the_batches_of_one(folder):
    of_one = first_batches(train_loader(folder, 4), 6)
    of_two = [first_batches(train_loader(folder, 4, rank=rank, world_size=2), 6) for rank in range(2)]
    assert all(len(labels) == 2 for batches in of_two for _, labels in batches)
    assert same([joined(list(halves)) for halves in zip(*of_two, strict=True)], of_one)
    state = {"samples_seen": 4 * 3}
    later = train_loader(folder, 4, rank=1, world_size=2)
    later.load_state_dict(state)
    assert same(first_batches(later, 3), of_two[1][3:])


@pytest.mark.parametrize(("batch_size", "world_size"), [(3, 1), (4, 2), (4, 4), (9, 3), (30, 10)])
def test_ranks_validate_each_image_once(folder, batch_size, world_size):
    loaders = [val_loader(folder, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2):
        passes = [list(loader) for loader in loaders]
        assert [len(batches) for batches in passes] == [len(loader) for loader in loaders]
        labels = Counter(label for batches in passes for _, batch in batches for label in batch.tolist())
        assert labels == Counter(range(IMAGES))
    assert max(map(len, passes)) - min(map(len, passes)) <= 1
    of_one = list(val_loader(folder, batch_size))
    steps = itertools.zip_longest(*passes)
    assert same([joined([batch for batch in step if batch]) for step in steps], of_one)


def test_rank_and_world_size_are_torchs_unless_given(folder, monkeypatch):
    assert (train_loader(folder, 4).rank, train_loader(folder, 4).world_size) == (0, 1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    halves = train_loader(folder, 4), train_loader(folder, 4, rank=1, world_size=2)
    assert same(*(first_batches(loader, 2) for loader in halves))
    assert len(next(iter(train_loader(folder, 4, rank=0, world_size=1)))[1]) == 4


def test_ranks_divide_the_cores(folder, monkeypatch):
    monkeypatch.setattr(pipeline.library, "usable_cores", lambda: 8)
    assert train_loader(folder, 4)._options.threads == 9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train_loader(folder, 4)._options.threads == 3
    assert train_loader(folder, 4, threads=7)._options.threads == 7
    for wrong in ("0", "four"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", wrong)
        with pytest.raises(ValueError, match=f"LOCAL_WORLD_SIZE={wrong}: must be a whole number above 0"):
            train_loader(folder, 4)


# ---- validation --------------------------------------------------------------------------------------------------


def test_validation_is_the_trainers_less_what_fills_up(folder):
    plan = ValidationPlan(table=open_manifest(folder).val, crop=32, scale=36)
    loader = val_loader(folder, 3)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    assert joined(batches)[1].tolist() == plan.samples(np.arange(IMAGES)).labels.tolist()
    next(iter(loader))
    assert same(list(loader), batches), "every iteration is a whole pass"


def test_an_image_that_cannot_be_decoded_keeps_its_place_and_is_ignored(folder, tmp_path, capfd):
    broken = shutil.copytree(folder, tmp_path / "broken")
    loader = val_loader(broken, 3, max_bad_images=1)
    expected = list(val_loader(folder, 3))
    victim = next((broken / "val/class4").iterdir())
    os.truncate(victim, 0)
    for _ in range(2):
        found = list(loader)
        assert [labels.tolist() for _, labels in found] == [[0, 1, 2], [3, IGNORED_LABEL, 5], [6]]
        kept = joined(found)[1] != IGNORED_LABEL
        assert torch.equal(joined(found)[0][kept], joined(expected)[0][kept])
    assert capfd.readouterr().err.count(f"{victim} cannot be decoded (empty file)") == 1
    images, labels = found[1]
    logits = images.mean(dim=(2, 3)) @ torch.ones(3, IMAGES)
    assert torch.isclose(cross_entropy(logits, labels), cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    with pytest.raises(TrainingError, match="1 images cannot be decoded, more than the 0"):
        list(val_loader(broken, 3, max_bad_images=0))


def test_images_left_out_by_the_scan_are_counted(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken", ignore=shutil.ignore_patterns(".vgg-manifest"))
    shutil.copy(next((broken / "val/class4").iterdir()), broken / "val/class4/other.JPEG")
    os.truncate(broken / "val/class4/other.JPEG", 0)
    loader = val_loader(broken, 3)
    assert (loader.images, loader.left_out) == (IMAGES, 1)


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_another_image_takes_the_place_of_one_that_cannot_be_decoded(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    loader = train_loader(broken, 3, max_bad_images=1)
    os.truncate(next((broken / "train/class4").iterdir()), 0)
    labels = joined(first_batches(loader, 14))[1].tolist()
    expected = joined(first_batches(train_loader(folder, 3), 14))[1].tolist()
    assert 4 not in labels
    assert all(mine == yours for mine, yours in zip(labels, expected, strict=True) if yours != 4)


def test_after_an_error_the_loader_goes_on_at_its_state(folder):
    """Ctrl-C may come when DALI has given a batch that nobody has seen."""
    expected = first_batches(train_loader(folder, 3), 6)
    loader = train_loader(folder, 3)
    found = first_batches(loader, 2)
    at_work = loader._batches
    assert at_work

    def interrupted():
        next(at_work)
        raise KeyboardInterrupt
        yield

    loader._batches = interrupted()
    with pytest.raises(KeyboardInterrupt):
        next(iter(loader))
    assert loader.state_dict() == {"samples_seen": 6}
    assert same([*found, *first_batches(loader, 4)], expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 3, "world_size": 2}, "batch_size 3: not a multiple of 2 ranks"),
        ({"batch_size": 0}, "batch_size 0: not a multiple of 1 ranks"),
        ({"rank": 1}, r"rank 1: must be in \[0, 1\)"),
        ({"rank": -1, "world_size": 2}, r"rank -1: must be in \[0, 2\)"),
        ({"scale": (31, 64)}, r"scale \(31, 64\): must not fall, nor be below crop 32"),
        ({"scale": (64, 36)}, r"scale \(64, 36\): must not fall"),
        ({"device": "meta"}, "device meta: must be cpu or cuda"),
        ({"decoder": "gpu"}, "decoder 'gpu': needs a GPU as device"),
        ({"decoder": "split"}, "decoder 'split': must be auto, gpu or cpu"),
        ({"std_rgb": (1.0, 0.0, 1.0)}, r"std_rgb \(1.0, 0.0, 1.0\): must be above 0"),
        ({"prefetch": 0}, "prefetch 0: must be at least 1"),
        ({"threads": 0}, r"threads 0: must be in \[1, 1024\]"),
        ({"threads": 10**6}, r"threads 1000000: must be in \[1, 1024\]"),
        ({"hw_decoder_load": 2.0}, r"hw_decoder_load 2.0: must be in \[0, 1\]"),
        ({"random_resized": RandomResized(area=(0.5, 0.1))}, r"random_resized .*: area must be in \(0, 1\]"),
        ({"half": True}, "half: needs a GPU as device"),
    ],
)
def test_arguments_that_cannot_be(folder, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_loader(folder, **{"batch_size": 2, **arguments})


def test_more_that_cannot_be(folder, tmp_path):
    with pytest.raises(ValueError, match="scale 36: must not be below crop 48"):
        ValidationLoader(folder, batch_size=2, crop=48, scale=36)
    with pytest.raises(ValueError, match="samples_seen -1: must not be negative"):
        train_loader(folder, 2).load_state_dict({"samples_seen": -1})
    with pytest.raises(TypeError):
        train_loader(folder, 2).load_state_dict({"samples_seen": 1.5})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="no such folder"):
        train_loader(tmp_path / "nowhere", 2)
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'Loader'"):
        pipeline.Loader  # noqa: B018


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_prepared_data_serve_too(folder, tmp_path, kind):
    flags = ["--short-side", "36", "--format", kind]
    assert packing.main([str(folder), str(tmp_path / "prepared"), *flags]) == 0
    labels = joined(list(train_loader(str(tmp_path / "prepared"), 3, scale=(36, 36))))[1].tolist()
    assert sorted(labels[:IMAGES]) == list(range(IMAGES))
    assert sorted(joined(list(val_loader(tmp_path / "prepared", 3)))[1].tolist()) == list(range(IMAGES))


def test_the_std_divides_and_other_crops_are_the_plans(folder):
    std, crops = (2.0, 50.0, 127.5), RandomResized(area=(0.2, 0.5))
    without_scale = {"random_resized": crops, "scale": (1, 1)}  # which has no meaning then
    for loader, arguments in ((train_loader, without_scale), (val_loader, {})):
        (plain,), (divided,) = (
            list(itertools.islice(loader(folder, 7, **arguments, **of), 1)) for of in ({}, {"std_rgb": std})
        )
        torch.testing.assert_close(divided[0], plain[0] / torch.tensor(std).view(3, 1, 1), rtol=1e-5, atol=1e-5)
    plan = train_loader(folder, 7, random_resized=crops)._plan
    table = open_manifest(folder).train
    expected = TrainPlan(table=table, batch_size=7, crop=32, scale=(36, 64), seed=0, random_resized=crops).samples(
        np.arange(7)
    )
    assert np.array_equal(plan.samples(np.arange(7)).shape, expected.shape)
    usual = train_loader(folder, 7)._plan.samples(np.arange(7))
    assert not np.array_equal(usual.shape, expected.shape)
