"""The GPU's graph against the CPU's, over photographs in every form that a data set has them in."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.loader import DaliLoader
from pipeline.manifest import open_manifest
from pipeline.plan import Samples, TrainPlan
from tests.gpu.device import DECODERS_DIFFER_BY, DECODERS_DIFFER_ON_AVERAGE_BY, DEVICE
from tests.images import photographs, save_variant

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


def loader_of(samples: Samples, device: torch.device, *, decoder: str, half: bool = False, pad_channels: bool = False):
    return DaliLoader(
        lambda skip: iter([samples] * 100),
        lose=lambda lost, dead, reasons: pytest.fail(f"cannot be decoded: {reasons}"),
        batch_size=len(samples.labels),
        crop=CROP,
        device=device,
        decoder=decoder,
        half=half,
        threads=4,
        prefetch=2,
        pad_channels=pad_channels,
    )


@pytest.fixture(scope="module")
def on_cpu(samples) -> torch.Tensor:
    return next(loader_of(samples, CPU, decoder="cpu"))[0]


@pytest.fixture(scope="module")
def on_gpu(samples) -> torch.Tensor:
    images, labels = next(loader_of(samples, DEVICE, decoder="gpu"))
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
    images = next(loader_of(samples, DEVICE, decoder="cpu"))[0].cpu()
    difference = (on_cpu - images).abs()
    assert difference[~torch.from_numpy(samples.resized)].max() < 1e-3
    assert difference.max() < 1 + 1e-3
    assert difference.mean() < 0.05


def test_half_precision_images_are_the_same_rounded(samples, on_gpu):
    images, _ = next(loader_of(samples, DEVICE, decoder="gpu", half=True))
    assert images.dtype == torch.float16
    assert (images.cpu().float() - on_gpu).abs().max() <= 0.125  # one unit in the last place below 256


def test_a_fourth_channel_is_zero_and_the_others_stay(samples, on_gpu):
    images, _ = next(loader_of(samples, DEVICE, decoder="gpu", pad_channels=True))
    assert images.shape == (len(samples.labels), 4, CROP, CROP)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images[:, :3].cpu(), on_gpu)
    assert not images[:, 3].any()


def test_batches_are_dalis_memory_in_channels_last(monkeypatch, samples):
    loader = loader_of(samples, DEVICE, decoder="gpu", half=True)
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


def test_batches_that_are_held_stay_as_they_are(samples, on_gpu):
    loader = loader_of(samples, DEVICE, decoder="gpu")
    held = [next(loader)[0] for _ in range(6)]  # more than DALI prefetches
    assert len({images.data_ptr() for images in held}) == 6
    for images in held:
        assert torch.equal(images.cpu(), on_gpu)


def test_batches_are_complete_when_the_next_kernel_reads_them(samples, on_gpu):
    """On a stream of its own, while the device is kept busy: an image that is read too early is not the image."""
    loader, stream = loader_of(samples, DEVICE, decoder="gpu"), torch.cuda.Stream(DEVICE)
    sums = []
    with torch.cuda.stream(stream):
        for _ in range(10):
            torch.cuda._sleep(10_000_000)
            images, _ = next(loader)
            sums.append(images.double().sum())
            del images  # DALI may use the memory again, once the sum has been made
    assert torch.stack(sums).cpu().tolist() == pytest.approx([on_gpu.double().sum().item()] * 10, rel=1e-9)
