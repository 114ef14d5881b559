"""FLOPs against torch's own counter, bytes against sums by hand, decoded pixels against the plan."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.vgg import CONFIGURATIONS, VGG
from perf.costs import LayerCost, Work, decoded_pixels, gradient_bytes, layer_costs, optimizer_bytes
from pipeline.draws import PURPOSE_GEOMETRY, uniforms
from pipeline.plan import rescaled_sizes, source_windows


def counted_flops(arch: str, classes: int, crop: int, batch: int) -> tuple[int, int]:
    """Forward, and forward with backward, as torch counts them on the meta device."""
    with torch.device("meta"):
        model, images = VGG(arch, classes=classes, crop=crop), torch.empty(batch, 3, crop, crop)
        labels = torch.empty(batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as backward:
        F.cross_entropy(logits, labels).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(("classes", "crop", "batch"), [(1000, 224, 2), (10, 64, 3)])
@pytest.mark.parametrize("arch", CONFIGURATIONS)
def test_flops_are_torchs(arch, classes, crop, batch):
    layers = layer_costs(arch, classes=classes, crop=crop, batch=batch, bytes_per_value=2)
    forward, backward = counted_flops(arch, classes, crop, batch)
    assert sum(layer.forward.flops for layer in layers) == pytest.approx(forward, rel=1e-3)
    assert sum(layer.backward.flops for layer in layers) == pytest.approx(backward, rel=1e-3)


def test_flops_of_vgg_16():
    """30.9 GFLOP forward, three times that in training, less the gradient of the images: 2 · 64 · 27 · 224² FLOP."""
    layers = layer_costs("D", classes=1000, crop=224, batch=1, bytes_per_value=4)
    forward = sum(layer.forward.flops for layer in layers)
    backward = sum(layer.backward.flops for layer in layers)
    assert forward == pytest.approx(30.94e9, rel=1e-3)
    assert 3 * forward == pytest.approx(92.8e9, rel=1e-3)
    assert forward + backward == 3 * forward - 2 * 64 * 27 * 224**2


@pytest.mark.parametrize("arch", CONFIGURATIONS)
def test_layers_are_the_networks(arch):
    layers = layer_costs(arch, classes=10, crop=32, batch=1, bytes_per_value=4)
    with torch.device("meta"):
        model = VGG(arch, classes=10, crop=32)
    modules = dict(model.named_modules())
    assert sum(sum(layer.parameters) for layer in layers) == sum(weight.numel() for weight in model.parameters())
    assert [layer.name for layer in layers if layer.parameters] == [
        name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    assert [layer.kind for layer in layers].count("pool") == 5
    assert [layer.kind for layer in layers].count("lrn") == (arch == "A-LRN")


def layers_by_name(arch: str, batch: int, bytes_per_value: int) -> dict[str, LayerCost]:
    layers = layer_costs(arch, classes=10, crop=32, batch=batch, bytes_per_value=bytes_per_value)
    return {layer.name: layer for layer in layers}


def test_bytes_in_float32():
    layers = layers_by_name("D", batch=2, bytes_per_value=4)
    images, first = 2 * 3 * 32 * 32, 2 * 64 * 32 * 32  # values
    weights = 64 * 27 + 64
    conv = layers["features.0"]
    assert conv.forward.bytes == 4 * (images + weights + first)
    assert conv.backward.bytes == 4 * (images + first + weights)  # reads x, dy; writes dw
    weights = 64 * 64 * 9 + 64
    conv = layers["features.2"]
    assert conv.forward.bytes == 4 * (first + weights + first)
    assert conv.backward.bytes == 4 * (first + weights + first + first + weights)  # reads x, w, dy; writes dx, dw
    pooled = first // 4
    assert layers["features.4"].forward == Work(0, 4 * (first + pooled) + pooled)
    assert layers["features.4"].backward == Work(0, 4 * (pooled + first) + pooled)
    weights = 10 * 4096 + 10
    last = layers["classifier.6"]
    assert last.forward.bytes == 4 * (2 * 4096 + weights + 2 * 10)
    assert last.backward.bytes == 4 * (2 * 4096 + weights + 2 * 10 + 2 * 4096 + weights)


def test_bytes_in_half_precision():
    """Activations of 2 bytes; weights are read in float32 and written in half, gradients the other way round."""
    layers = layers_by_name("A-LRN", batch=2, bytes_per_value=2)
    first, pooled, second = 2 * 64 * 32 * 32, 2 * 64 * 16 * 16, 2 * 128 * 16 * 16
    weights = 128 * 64 * 9 + 128
    conv = layers["features.3"]
    assert conv.forward.bytes == 2 * (pooled + second) + weights * (4 + 2 + 2)
    assert conv.backward.bytes == 2 * (pooled + second + pooled) + weights * (2 + 2 + 2 + 4)
    lrn = layers["features.1.1"]
    assert lrn.forward == Work(0, 2 * (first + first))
    assert lrn.backward == Work(0, 2 * (first + first + first))


def test_bytes_of_the_rest():
    # weight, gradient and momentum read, weight and momentum written
    assert optimizer_bytes(1000, "fp32") == optimizer_bytes(1000, "bf16") == 20_000
    assert optimizer_bytes(1000, "fp16") == 28_000
    assert gradient_bytes(138_357_544, "none") == 553_430_176
    assert gradient_bytes(138_357_544, "bf16") == 276_715_088


def test_an_unknown_layer_is_refused(monkeypatch):
    class Wider(VGG):
        def __init__(self, arch: str, **settings) -> None:
            super().__init__(arch, **settings)
            self.features.append(torch.nn.Sigmoid())

    monkeypatch.setattr("perf.costs.VGG", Wider)
    with pytest.raises(NotImplementedError, match=r"Sigmoid \(features\.\d+\)"):
        layer_costs("A", classes=10, crop=32, batch=1, bytes_per_value=4)


@pytest.mark.parametrize(
    ("size", "scale"), [((375, 500), (256, 256)), ((500, 375), (256, 512)), ((256, 256), (256, 256))]
)
def test_decoded_pixels_are_the_plans(size, scale):
    """Against 20,000 draws as TrainPlan makes them."""
    count = 20_000
    u_scale, u_y, u_x, _ = uniforms(0, np.zeros(count, dtype=np.int64), np.arange(count), PURPOSE_GEOMETRY)
    scales = scale[0] + np.floor(u_scale * (scale[1] - scale[0] + 1)).astype(np.int64)
    sizes = np.full((count, 2), size)
    rescaled = rescaled_sizes(sizes, scales)
    room = rescaled - 224
    corners = np.minimum(np.floor(np.stack((u_y, u_x), axis=1) * (room + 1)).astype(np.int64), room)
    shapes = source_windows(sizes, rescaled, corners, 224, flipped=np.zeros(count, dtype=bool))["shape"]
    expected = shapes.astype(np.int64).prod(axis=1).mean()
    assert decoded_pixels(*size, crop=224, scale=scale) == pytest.approx(expected, rel=5e-3)
    if size == (256, 256):
        assert expected == 224**2, "an image of the right size is only cropped"
