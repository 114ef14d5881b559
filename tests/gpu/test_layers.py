"""Measured layers add up to the pass that they are of, by the GPU's own clock."""

import pytest
import torch
import torch.nn.functional as F

from engine.precision import Precision, fast_format
from model.vgg import build
from perf.layers import layer_seconds
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu


def test_layers_add_up_to_a_pass():
    network = build("A", classes=1000, crop=224, dropout=0.5, init="xavier", device=DEVICE)
    images = torch.randn(64, 3, 224, 224, device=DEVICE).to(memory_format=torch.channels_last)
    labels, precision = torch.zeros(64, dtype=torch.int64, device=DEVICE), Precision(fast_format(DEVICE), "cuda")
    measured = layer_seconds(network, (images, labels), precision=precision, device=DEVICE)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        network.zero_grad(set_to_none=True)
        with precision.autocast():
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
    end.record()
    end.synchronize()
    assert sum(measured.values()) == pytest.approx(begin.elapsed_time(end) / 1e4, rel=0.1)
