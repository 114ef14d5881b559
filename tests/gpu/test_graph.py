"""The GPU's graph against the CPU's, over photographs in every form that a data set has them in."""

import contextlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.dali.graph import GraphOptions, first_of
from pipeline.dali.loader import DaliLoader
from pipeline.dataset.manifest import open_manifest
from pipeline.plan.samples import Samples
from pipeline.plan.training import RandomResized, TrainPlan
from tests.gpu.device import DECODERS_DIFFER_BY, DECODERS_DIFFER_ON_AVERAGE_BY, DEVICE
from tests.support.images import photographs, save_variant

pytestmark = pytest.mark.gpu

CROP, SCALE = 224, 256
CPU = torch.device("cpu")
KINDS = ("plain", "4-4-4", "progressive", "grey", "cmyk", "exif", "png")
EACH = 8
"""Images of each kind; every other one has the right size already."""


def save(image: Image.Image, folder: Path, kind: str, number: int) -> None:
    path = folder / f"{kind}-{number}.JPEG"
    if kind == "png":
        image.save(path, "PNG")  # with this name, as in ImageNet
    elif kind == "4-4-4":
        image.save(path, "JPEG", quality=92, subsampling=0)
    elif kind == "progressive":
        image.save(path, "JPEG", quality=92, progressive=True)
    else:
        save_variant(image, path, variant=("plain", "", "grey", "cmyk", "exif").index(kind))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split / "class").mkdir(parents=True)
    photographs()[0].save(root / "val/class/0.JPEG")
    for kind in KINDS:
        for number in range(EACH):
            size = [int(side) for side in generator.integers(SCALE, 700, size=2)]
            if number % 2:
                size[number // 2 % 2] = SCALE
            image = photographs()[number // 2 % 2].resize((size[0], size[1]), Image.Resampling.LANCZOS)
            save(image, root / "train/class", kind, number)
    return open_manifest(root).train


@pytest.fixture(scope="module")
def samples(table) -> Samples:
    """Each image once: resized and not, mirrored and not."""
    plan = TrainPlan(table=table, batch_size=len(table), crop=CROP, scale=(SCALE, SCALE), seed=0)
    planned = plan.samples(np.arange(len(table)))
    for resized in (False, True):
        assert len(set(planned.flipped[planned.resized == resized])) == 2
    return planned


def loader_of(*batches: Samples, device: torch.device, decoder: str, share: float = 1.0, **options):
    """The batches in turn, for ever."""
    loader = DaliLoader(
        lambda skip: itertools.islice(itertools.cycle(batches), skip, None),
        GraphOptions(crop=CROP, device_id=device.index, decoder=decoder, threads=4, **options),
        lose=lambda lost, dead, reasons: pytest.fail(f"cannot be decoded: {reasons}"),
        batch_size=len(batches[0].labels),
    )
    loader.share = share
    return loader


@pytest.fixture(scope="module")
def on_cpu(samples) -> torch.Tensor:
    return next(loader_of(samples, device=CPU, decoder="cpu"))[0]


@pytest.fixture(scope="module")
def on_gpu(samples) -> torch.Tensor:
    images, labels = next(loader_of(samples, device=DEVICE, decoder="gpu"))
    assert images.device == labels.device == DEVICE
    assert np.array_equal(labels.cpu(), samples.labels)
    return images.cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_the_cpus_as_far_as_decoders_agree(table, samples, on_cpu, on_gpu, kind):
    rows = [row for row, source in enumerate(samples.source) if Path(table.name(source)).name.startswith(f"{kind}-")]
    assert len(rows) == EACH
    difference = (on_cpu[rows] - on_gpu[rows]).abs()
    for number, row in enumerate(rows):
        name = Path(table.name(samples.source[row])).name
        worst, mean = difference[number].max().item(), difference[number].mean().item()
        assert worst < DECODERS_DIFFER_BY, f"{name}: {worst:.2f} levels at most, {mean:.3f} on average"
        assert mean < DECODERS_DIFFER_ON_AVERAGE_BY, f"{name}: {worst:.2f} levels at most, {mean:.3f} on average"


def test_with_the_cpus_decoder_only_the_resize_rounds_otherwise(samples, on_cpu):
    images = next(loader_of(samples, device=DEVICE, decoder="cpu"))[0].cpu()
    difference = (on_cpu - images).abs()
    assert difference[~torch.from_numpy(samples.resized)].max() < 1e-3
    assert difference.max() < 1 + 1e-3
    assert difference.mean() < 0.05


def test_random_resized_crops_are_the_cpus_but_for_the_resizes_rounding(table):
    plan = TrainPlan(
        table=table, batch_size=len(table), crop=CROP, scale=(SCALE, SCALE), seed=0, random_resized=RandomResized()
    )
    samples = plan.samples(np.arange(len(table)))
    on_cpu, on_gpu = (next(loader_of(samples, device=device, decoder="cpu"))[0].cpu() for device in (CPU, DEVICE))
    difference = (on_cpu - on_gpu).abs()
    assert difference.max() < 1 + 1e-3
    assert difference.mean() < 0.05


def test_each_colour_is_divided_by_its_std_after_the_mean_is_subtracted(samples, on_gpu):
    std = (58.395, 2.0, 127.5)
    images = next(loader_of(samples, device=DEVICE, decoder="gpu", std_rgb=std))[0].cpu()
    assert torch.allclose(images, on_gpu / torch.tensor(std).view(3, 1, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_batch_that_both_decoders_share_is_in_order_and_each_image_its_decoders(samples, on_cpu, on_gpu, share):
    images, labels = next(loader_of(samples, device=DEVICE, decoder="split", share=share))
    assert np.array_equal(labels.cpu(), samples.labels)
    first = torch.from_numpy(first_of(len(samples.labels), share))
    difference = (images.cpu() - torch.where(first[:, None, None, None], on_cpu, on_gpu)).abs()
    assert difference.max() < DECODERS_DIFFER_BY, "the engine's share of the GPU's part is another one than alone"
    if share:
        assert difference[first].max() < 2 + 1e-3, "rounded in decoding whole images, and in the resize"
        assert difference[first].mean() < 0.05


def test_half_precision_images_are_the_same_rounded(samples, on_gpu):
    images, _ = next(loader_of(samples, device=DEVICE, decoder="gpu", half=True))
    assert images.dtype == torch.float16
    assert (images.cpu().float() - on_gpu).abs().max() <= 0.125  # one unit in the last place below 256


def test_a_fourth_channel_is_zero_and_the_others_stay(samples, on_gpu):
    images, _ = next(loader_of(samples, device=DEVICE, decoder="gpu", pad_channels=True))
    assert images.shape == (len(samples.labels), 4, CROP, CROP)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[:, :3].cpu(), on_gpu)
    assert not images[:, 3].any()


def test_batches_are_dalis_memory_in_channels_last(monkeypatch, samples):
    loader = loader_of(samples, device=DEVICE, decoder="gpu", half=True)
    outputs, run = [], loader._run

    def run_and_keep() -> tuple:
        outputs.append(run())
        return outputs[-1]

    monkeypatch.setattr(loader, "_run", run_and_keep)
    next(loader)  # what is allocated once
    before = torch.cuda.memory_allocated(DEVICE)
    images, labels = next(loader)
    assert torch.cuda.memory_allocated(DEVICE) == before, "torch allocated memory for a batch"
    for tensor, output in zip((images, labels), outputs[-1], strict=True):
        assert tensor.data_ptr() == output.as_tensor().data_ptr()
    assert images.stride() == (3 * CROP * CROP, 1, 3 * CROP, 3)
    assert images.is_contiguous(memory_format=torch.channels_last)


# ---- memory that would be used again too early -------------------------------------------------------------------


@pytest.fixture(scope="module")
def turns(table) -> list[Samples]:
    """Three batches that differ in every image: in the file or its crop. Small ones where the CPU alone makes them."""
    count = len(table) if torch.cuda.is_available() else 12
    plan = TrainPlan(table=table, batch_size=count, crop=CROP, scale=(SCALE, SCALE), seed=0)
    return [plan.samples(np.arange(count) + epoch * len(table)) for epoch in range(3)]


@pytest.fixture(scope="module")
def pixels_of(turns):
    """A function of the device: what each of the batches is, by a loader of its own that has no other in its memory."""
    known: dict[torch.device, list[torch.Tensor]] = {}

    def pixels(device: torch.device) -> list[torch.Tensor]:
        if device not in known:
            known[device] = [next(turning([batch], device))[0].cpu().clone() for batch in turns]
            for one, other in itertools.combinations(known[device], 2):
                assert (one != other).flatten(1).any(dim=1).all(), "an image is the same in two of the batches"
        return known[device]

    return pixels


def turning(batches: list[Samples], device: torch.device) -> DaliLoader:
    return loader_of(*batches, device=device, decoder="cpu" if device == CPU else "gpu")


def assert_held_batches_stay(loader, expected: list[torch.Tensor], count: int) -> None:
    """Hold so many batches at once, more than DALI prepares; then look at all of them."""
    held = [next(loader)[0] for _ in range(count)]
    assert len({images.data_ptr() for images in held}) == count
    for number, images in enumerate(held):
        assert torch.equal(images.cpu(), expected[number % len(expected)]), f"batch {number} has changed"


def assert_batches_are_complete_when_read(
    loader, expected: list[torch.Tensor], device: torch.device, count: int
) -> None:
    """On a stream of its own, while the device is kept busy: read too early, or overwritten before it is read, a batch is another
    one. Its memory is given back at once, before the device has come to read it.
    """
    on_gpu = device.type == "cuda"
    sums = []
    with torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext():
        for _ in range(count):
            if on_gpu:
                torch.cuda._sleep(10_000_000)
            images, _ = next(loader)
            sums.append(images.double().sum(dim=(1, 2, 3)))  # of each image
            del images  # DALI may use the memory again, once the sums have been made
    for number, of_images in enumerate(torch.stack(sums).cpu()):
        right = expected[number % len(expected)].double().sum(dim=(1, 2, 3))
        torch.testing.assert_close(
            of_images, right, rtol=1e-9, atol=1e-3, msg=f"batch {number} is not what it should be"
        )


@pytest.mark.parametrize("device", [CPU, DEVICE], ids=str)
def test_batches_that_are_held_stay_as_they_are(turns, pixels_of, device):
    assert_held_batches_stay(turning(turns, device), pixels_of(device), 7)


@pytest.mark.parametrize("device", [CPU, DEVICE], ids=str)
def test_batches_are_complete_when_the_next_kernel_reads_them(turns, pixels_of, device):
    assert_batches_are_complete_when_read(turning(turns, device), pixels_of(device), device, 10)


@pytest.mark.parametrize("device", [CPU], ids=str)
def test_a_batch_that_is_overwritten_would_be_noticed(turns, pixels_of, device):
    """A loader whose third and fourth batch share memory: as one that is repeated, the tests above would see nothing of it."""
    first, second, third = pixels_of(device)
    memory = torch.empty_like(third)
    labels = torch.zeros(len(third), dtype=torch.int64)

    def reusing(*batches: torch.Tensor):
        yield batches[0].clone(), labels
        yield batches[1].clone(), labels
        yield memory.copy_(batches[2]), labels
        memory.copy_(batches[0])
        yield memory.view(memory.shape)[:], labels

    with pytest.raises(AssertionError):
        assert_held_batches_stay(reusing(first, second, third), [first, second, third], 4)
    one_late = iter([(first, labels), (second, labels), (first, labels)])
    with pytest.raises(AssertionError, match="batch 2 is not"):
        assert_batches_are_complete_when_read(one_late, [first, second, third], device, 3)
