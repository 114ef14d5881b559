"""FLOPs against torch's own counter, bytes against sums by hand, decoded pixels against the plan."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model.vgg import CONFIGURATIONS, FUSIONS, VGG, Convolution, LocalResponseNorm
from perf.costs import (
    Job,
    LayerCost,
    Work,
    decoded_pixels,
    gradient_bytes,
    layer_costs,
    optimizer_bytes,
    peak_seconds_an_image,
)
from pipeline.plan.random_numbers import PURPOSE_GEOMETRY, uniforms
from pipeline.plan.samples import rescaled_sizes, source_windows


def counted_flops(arch: str, classes: int, crop: int, batch: int, batch_norm: bool) -> tuple[int, int]:
    """Forward, and forward with backward, as torch counts them on the meta device."""
    with torch.device("meta"):
        model = VGG(arch, classes=classes, crop=crop, batch_norm=batch_norm)
        images = torch.empty(batch, 3, crop, crop)
        labels = torch.empty(batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        logits = model(images)
    with FlopCounterMode(display=False) as backward:
        F.cross_entropy(logits, labels).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(("classes", "crop", "batch"), [(1000, 224, 2), (10, 64, 3)])
@pytest.mark.parametrize(("arch", "batch_norm"), [*((arch, False) for arch in CONFIGURATIONS), ("D", True)])
def test_flops_are_torchs(arch, batch_norm, classes, crop, batch):
    layers = layer_costs(arch, classes=classes, crop=crop, batch=batch, bytes_per_value=2, batch_norm=batch_norm)
    forward, backward = counted_flops(arch, classes, crop, batch, batch_norm)
    assert sum(layer.forward.flops for layer in layers) == pytest.approx(forward, rel=1e-3)
    assert sum(layer.backward.flops for layer in layers) == pytest.approx(backward, rel=1e-3)
    for layer in layers:
        assert sum(kernel.flops for kernel in layer.forward_kernels) == layer.forward.flops
        assert sum(kernel.flops for kernel in layer.backward_kernels) == layer.backward.flops


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


def test_layers_with_batch_norm_are_torchvisions():
    layers = layer_costs("D", classes=1000, crop=224, batch=1, bytes_per_value=4, batch_norm=True)
    with torch.device("meta"):
        model = torchvision.models.vgg16_bn()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert [layer.name for layer in layers if layer.kind == "norm"] == list(norms)
    assert [layer.parameters for layer in layers if layer.kind == "norm"] == [
        (module.num_features, module.num_features) for module in norms.values()
    ]
    assert sum(sum(layer.parameters) for layer in layers) == sum(weight.numel() for weight in model.parameters())


def layers_by_name(arch: str, batch: int, bytes_per_value: int, batch_norm: bool = False) -> dict[str, LayerCost]:
    layers = layer_costs(arch, classes=10, crop=32, batch=batch, bytes_per_value=bytes_per_value, batch_norm=batch_norm)
    return {layer.name: layer for layer in layers}


class BytesOfOperations(TorchDispatchMode):
    """Bytes of the tensors that each operation of PyTorch reads and writes, the same tensor read twice counted once."""

    FREE = ("view", "t", "detach", "squeeze", "unsqueeze", "expand", "empty", "empty_like", "ones_like")
    """Operations that move nothing."""

    def __init__(self, left_out: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.bytes, self._left_out = 0, (*self.FREE, *left_out)

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        if operation.__name__.partition(".")[0] not in self._left_out:
            read = {id(value): value for value in tree_leaves((arguments, named)) if isinstance(value, torch.Tensor)}
            written = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
            self.bytes += sum(value.numel() * value.itemsize for value in (*read.values(), *written))
        return result


def kernel_bytes(layers) -> int:
    return sum(kernel.bytes for layer in layers for kernel in (*layer.forward_kernels, *layer.backward_kernels))


@pytest.mark.parametrize(
    ("arch", "batch_norm", "fuse"),
    [("D", False, "none"), ("A", True, "none"), ("C", False, "none"), ("D", False, "pool"), ("C", False, "pool")],
)
def test_unfused_bytes_are_those_of_torchs_operations(arch, batch_norm, fuse):
    """On the meta device, where each operation of an eager step is seen, and then what its kernels on a GPU add to that."""
    with torch.device("meta"):
        model, images = VGG(arch, classes=10, crop=64, batch_norm=batch_norm, fuse=fuse), torch.empty(4, 3, 64, 64)
    with BytesOfOperations(left_out=("sum", "bernoulli_", "div_", "mul")) as operations:  # the meta device's dropout
        model(images).sum().backward()
    layers = layer_costs(arch, classes=10, crop=64, batch=4, bytes_per_value=4, batch_norm=batch_norm, fuse=fuse)
    expected = operations.bytes
    expected += 2 * 2 * (4 + 4 + 1) * 4 * 4096  # two dropouts, forward and backward: value in, value out, mask
    expected += (
        2 * 4 * 4 * 4096
    )  # the sums that are biases' gradients: left out above, as the loss' sum has the same name
    for layer, (name, module) in zip(convolutions(layers), convolution_modules(model), strict=True):
        assert layer.name == name
        y = 4 * 4 * module.out_channels * side(layers, name) ** 2
        # The bias: read and write the output, read its gradient; behind a pooling, reading and writing has been seen. Two kernels
        # read the gradient; of the first layer's, one.
        expected += y // 4 if module.leaves_bias else 3 * y
        expected += y if layer is not layers[0] else -4 * module.weight.numel()
    for layer in layers:
        if layer.kind == "norm":
            expected += layer.forward.bytes  # three times its values: forward it reads one more, backward two
    assert kernel_bytes(layers) == pytest.approx(expected, rel=1e-3)


def convolutions(layers: list[LayerCost]) -> list[LayerCost]:
    return [layer for layer in layers if layer.kind == "conv"]


def convolution_modules(model: torch.nn.Module) -> list[tuple[str, Convolution]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Convolution)]


def side(layers: list[LayerCost], name: str) -> int:
    """Of a layer's output at a crop of 64: halved by each pooling before it."""
    names = [layer.name for layer in layers]
    return 64 >> sum(layer.kind == "pool" for layer in layers[: names.index(name)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfused_bytes_of_local_response_normalisation(dtype):
    x = torch.empty(2, 64, 16, 16, device="meta", dtype=dtype, requires_grad=True)
    gradient = torch.empty_like(x)
    with BytesOfOperations() as operations:
        LocalResponseNorm()(x).backward(gradient)
    padded = 2 * (64 + 4) * 16 * 16 * 4  # the average's backward pass names its input and does not read it
    layers = layer_costs("A-LRN", classes=10, crop=32, batch=1, bytes_per_value=dtype.itemsize)
    (layer,) = (layer for layer in layers if layer.kind == "lrn")
    values = x.numel() / (64 * 32 * 32)
    assert values * kernel_bytes([layer]) == pytest.approx(operations.bytes - padded, rel=0.01)


def test_unfused_bytes_of_a_convolution_by_hand():
    """One of D in bfloat16, with its ReLU: 2 bytes a value, weights of 4 converted forward, their gradients backward."""
    conv = layers_by_name("D", batch=2, bytes_per_value=2)["features.12"]
    values, weights, flops = 2 * 256 * 8 * 8, 256 * 256 * 9 + 256, 2 * 2 * 256 * 8 * 8 * 256 * 9
    assert conv.forward_kernels == (
        Work(0, weights * 6),
        Work(flops, 2 * (values + weights + values)),
        Work(0, 2 * 2 * values),  # bias
        Work(0, 2 * 2 * values),  # ReLU
    )
    assert conv.backward_kernels == (
        Work(0, 3 * 2 * values),  # ReLU
        Work(0, 2 * values),  # bias
        Work(flops, 2 * (values + weights + values)),  # of the input
        Work(flops, 2 * (values + values + weights)),  # of the weights
        Work(0, weights * 6),
    )


def test_what_is_fused_moves_less():
    """pool: the bias' 3 values are 3/4. conv: bias and ReLU no more forward; the ReLU's 3 and the bias' sum stay backward."""
    plain, pool, conv = (
        {layer.name: layer for layer in layer_costs("D", classes=10, crop=32, batch=2, bytes_per_value=2, fuse=fuse)}
        for fuse in FUSIONS
    )
    for name, layer in plain.items():
        assert (pool[name].forward, pool[name].backward) == (layer.forward, layer.backward), (
            "the fused floor is of all this"
        )
        assert (conv[name].forward, conv[name].backward) == (layer.forward, layer.backward)
    values = 2 * 64 * 32 * 32  # of the first two convolutions

    def saved(fused, *names):
        return kernel_bytes(plain[name] for name in names) - kernel_bytes(fused[name] for name in names)

    assert saved(pool, "features.2", "features.3") == saved(conv, "features.2", "features.3") == 2 * 3 * values * 3 / 4
    assert saved(pool, "features.0") == 0
    assert saved(conv, "features.0") == 2 * (2 + 2) * values


def test_unfused_moves_no_less():
    for batch_norm in (False, True):
        for layer in layer_costs("A", classes=10, crop=64, batch=2, bytes_per_value=2, batch_norm=batch_norm):
            assert sum(kernel.bytes for kernel in layer.forward_kernels) >= layer.forward.bytes, layer.name
            assert sum(kernel.bytes for kernel in layer.backward_kernels) >= layer.backward.bytes, layer.name


def test_bytes_of_batch_normalisation():
    """Its input is read for the statistics and again to be normalised; so are input and gradient on the way back."""
    layers = layers_by_name("D", batch=2, bytes_per_value=2, batch_norm=True)
    norm, values = layers["features.1"], 2 * 64 * 32 * 32
    assert (norm.kind, norm.parameters) == ("norm", (64, 64))
    assert norm.forward == Work(0, 2 * 3 * values)
    assert norm.backward == Work(0, 2 * 5 * values)
    assert norm.forward_kernels == (norm.forward, Work(0, 2 * 2 * values)), "the ReLU that follows it is a kernel"
    without = layers_by_name("D", batch=2, bytes_per_value=2)["features.0"]
    assert layers["features.0"].forward == without.forward
    assert len(layers["features.0"].forward_kernels) == len(without.forward_kernels) - 1, "which follows the norm now"


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
    assert layers["features.3"].forward == Work(0, 4 * (first + pooled) + pooled)
    assert layers["features.3"].backward == Work(0, 4 * (pooled + first) + pooled)
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


def test_the_mfu_of_a_rate_of_images(monkeypatch):
    """VGG-16: 92.65 GFLOP an image (see above); 20,000 images a second on eight H100 of 989.4 TFLOP/s: 1,853 of 7,915 TFLOP/s."""
    names = iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: next(names))
    device = torch.device("cuda", 0)
    job = Job(arch="D", classes=1000, crop=224, batch=64, micro_batch=16, precision="bf16", ranks=8)
    assert peak_seconds_an_image(job, device) == pytest.approx(0.2341 / 20_000, rel=1e-3)
    tf32 = replace(job, precision="fp32", ranks=1, batch=16)
    assert peak_seconds_an_image(tf32, device) == pytest.approx(92.65e9 / 494.7e12, rel=1e-3)
    assert peak_seconds_an_image(job, device) is None, "a slice of a GPU is another device"
    assert peak_seconds_an_image(job, torch.device("cpu")) is None
