"""What a training step has to compute and to move, from first principles: FLOPs and bytes of every layer, and the rest.

Costs come from the module that is trained (model/vgg.py), run once on the meta device: what changes there changes here.

FLOPs are those of convolutions and linear layers, two a multiply-add, padding included, as torch.utils.flop_counter counts
them. The gradient with respect to the images is not computed. Winograd's transform would need fewer.

Bytes are the least that a step of this trainer moves between memory and chip if no cache holds a layer's values until the
next layer wants them:
- Convolution, bias, ReLU and dropout are one kernel: ReLU and dropout move nothing of their own, neither forward nor backward.
- A forward pass of a layer reads its input and its weights once and writes its output once.
- A backward pass reads the input, the weights and the gradient of the output once, though it computes two gradients from
  them, and writes those two once.
- Max pooling writes one byte a result, which of the four it was, and its backward pass reads that instead of its input.
- Weights are float32. In half precision, autocast writes a copy of them in the forward pass, which the layers read, and the
  gradients are converted back. Everything else has the precision's size.
- Loss, labels and the logits' conversion to float32 are left out: they are a millionth of the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model.vgg import VGG, LocalResponseNorm
from pipeline.plan import rescaled_sizes, source_windows

_FLOAT32_BYTES = 4
_POOLING_INDEX_BYTES = 1
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "conv"),
    (nn.Linear, "linear"),
    (nn.MaxPool2d, "pool"),
    (LocalResponseNorm, "lrn"),
)
_FUSED = (nn.ReLU, nn.Dropout)


@dataclass(frozen=True)
class Work:
    """Of one pass of one layer over one batch."""

    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """A layer that moves data of its own: a convolution with its bias and ReLU, say."""

    name: str
    """Of the module, as in the state dict: features.0."""
    kind: str
    """conv, linear, pool or lrn."""
    parameters: tuple[int, ...]
    """Elements of its weight and its bias; nothing for a layer that has none."""
    forward: Work
    backward: Work


def layer_costs(arch: str, *, classes: int, crop: int, batch: int, bytes_per_value: int) -> list[LayerCost]:
    """The layers of a configuration in the order in which they run, for one pass forward and one backward.

    arch, classes, crop: as VGG takes them. batch: images in the pass. bytes_per_value: 4 for float32, 2 for autocast to
    bfloat16 or float16. Raises ValueError as VGG does.
    """
    with torch.device("meta"):
        model = VGG(arch, classes=classes, crop=crop)
        images = torch.empty(batch, 3, crop, crop)
    layers: list[LayerCost] = []

    def record(name: str, kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layers.append(_layer_cost(name, kind, module, inputs[0], output, bytes_per_value, is_first=not layers))

        return hook

    for name, module in model.named_modules():
        kind = next((kind for type_, kind in _KINDS if isinstance(module, type_)), None)
        if kind:
            module.register_forward_hook(record(name, kind))
        elif not any(module.children()) and not isinstance(module, _FUSED):
            raise NotImplementedError(f"the cost of {type(module).__name__} ({name}) is not known here: add it")
    with torch.no_grad():
        model(images)
    return layers


def _layer_cost(
    name: str, kind: str, module: nn.Module, x: Tensor, y: Tensor, bytes_per_value: int, *, is_first: bool
) -> LayerCost:
    x_bytes, y_bytes = x.numel() * bytes_per_value, y.numel() * bytes_per_value
    dx_bytes = 0 if is_first else x_bytes
    parameters = tuple(parameter.numel() for parameter in module.parameters(recurse=False))
    if kind == "pool":
        index_bytes = y.numel() * _POOLING_INDEX_BYTES
        forward, backward = Work(0, x_bytes + y_bytes + index_bytes), Work(0, y_bytes + index_bytes + dx_bytes)
    elif kind == "lrn":
        forward, backward = Work(0, x_bytes + y_bytes), Work(0, x_bytes + y_bytes + dx_bytes)
    else:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        flops = 2 * y.numel() * module.weight[0].numel()
        values = sum(parameters)
        read, converted = values * bytes_per_value, 0
        if bytes_per_value != _FLOAT32_BYTES:
            converted = values * (_FLOAT32_BYTES + bytes_per_value)
        forward = Work(flops, x_bytes + read + converted + y_bytes)
        weights_for_dx = 0 if is_first else read
        backward = Work(
            flops if is_first else 2 * flops,
            x_bytes + weights_for_dx + y_bytes + dx_bytes + values * bytes_per_value + converted,
        )
    return LayerCost(name=name, kind=kind, parameters=parameters, forward=forward, backward=backward)


def optimizer_bytes(parameters: int, precision: str) -> int:
    """Bytes that fused SGD with momentum and weight decay moves in one step over so many float32 parameters.

    Weight, gradient and momentum are read, weight and momentum are written. With fp16, the loss scaler reads and writes the
    gradients once more, to find those that are not finite.
    """
    scaler_bytes = 2 * _FLOAT32_BYTES if precision == "fp16" else 0
    return parameters * (5 * _FLOAT32_BYTES + scaler_bytes)


def gradient_bytes(parameters: int, grad_compression: str) -> int:
    """Bytes of so many gradients as they travel. grad_compression: none (float32), bf16 or fp16, as train.py has it."""
    return parameters * (_FLOAT32_BYTES if grad_compression == "none" else 2)


def decoded_pixels(height: int, width: int, *, crop: int, scale: tuple[int, int]) -> float:
    """Pixels of a height×width image that the plan has decoded for one training sample, on average over its draws.

    scale: lowest and highest training scale S, as the plan draws it. The mean is taken over all S and 64 places of the crop.
    """
    lowest, highest = scale
    places = (np.arange(64) + 0.5) / 64
    means = []
    for shorter in range(lowest, highest + 1):
        sizes = np.full((len(places), 2), (height, width))
        rescaled = rescaled_sizes(sizes, np.full(len(places), shorter))
        corners = np.floor(places[:, None] * (rescaled - crop + 1)).astype(np.int64)
        shapes = source_windows(sizes, rescaled, corners, crop, flipped=np.zeros(len(places), dtype=bool))["shape"]
        means.append(shapes[:, 0].mean() * shapes[:, 1].mean())  # y and x of the corner are drawn apart
    return float(np.mean(means))
