"""The loaders for a loop of one's own, on the GPU."""

import itertools

import pytest
import torch

from pipeline import TrainLoader, ValidationLoader
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu

ON = pytest.mark.parametrize("device", [torch.device("cpu"), DEVICE], ids=str)


def train_loader(device: torch.device | str, **arguments) -> TrainLoader:
    return TrainLoader("digits", batch_size=256, crop=32, scale=(36, 40), device=device, **arguments)


@ON
def test_batches_come_out_on_the_device_and_resume_in_mid_epoch(device):
    loader = train_loader(device)
    batches = [batch for _ in range(2) for batch in loader]
    assert all(images.device == labels.device == device for images, labels in batches)
    resumed = train_loader(device)
    resumed.load_state_dict({"samples_seen": 3 * 256})
    found = [batch for _ in range(2) for batch in resumed]
    assert len(found) == len(batches) - 3
    for one, other in zip(itertools.chain(*found), itertools.chain(*batches[3:]), strict=True):
        assert torch.equal(one, other)


def test_half_precision_is_the_single_one_rounded():
    (single, _), (half, _) = next(iter(train_loader(DEVICE))), next(iter(train_loader(DEVICE, half=True)))
    assert half.dtype == torch.float16
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert (half.float() - single).abs().max() <= 0.125  # between 128 and 256, float16 has every eighth


@ON
def test_a_validation_has_each_image_once(device):
    loader = ValidationLoader("digits", batch_size=100, crop=32, scale=36, device=device)
    for _ in range(2):
        labels = torch.cat([labels for images, labels in loader])
        assert labels.device == device
        assert labels.bincount().sum() == loader.images == len(labels)


def test_cuda_is_the_current_gpu():
    images, _ = next(iter(train_loader("cuda")))
    assert images.device == torch.device("cuda", torch.cuda.current_device())
