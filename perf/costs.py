"""What a training step has to compute and to move, from first principles: FLOPs and bytes of every layer, and the rest.

Costs come from the module that is trained (model/vgg.py), run once on the meta device: what changes there changes here.

FLOPs are those of convolutions and linear layers, two a multiply-add, padding included, as torch.utils.flop_counter counts
them. The gradient with respect to the images is not computed. Winograd's transform would need fewer.

Bytes are what a step of this trainer moves between memory and chip if no cache holds a layer's values until the next layer
wants them. There are two figures. Fused is the least that any step moves:
- Convolution, bias, ReLU and dropout are one kernel: ReLU and dropout move nothing of their own, neither forward nor backward.
- A forward pass of a layer reads its input and its weights once and writes its output once.
- A backward pass reads the input, the weights and the gradient of the output once, though it computes two gradients from
  them, and writes those two once.
- Max pooling writes one byte a result, which of the four it was, and its backward pass reads that instead of its input.
- Batch normalisation reads its input twice: the mean and the variance of the whole batch have to be known before the first
  value is normalised. Its backward pass reads input and gradient twice, for the same reason: two sums, then the gradient.
- Weights are float32. In half precision, autocast writes a copy of them in the forward pass, which the layers read, and the
  gradients are converted back. Everything else has the precision's size.

Unfused is what a step moves whose every operation is a kernel of its own, as in PyTorch without compilation on a GPU:
- cuDNN's convolution leaves the bias to a kernel that reads and writes the output (a linear layer's is part of its product),
  and the gradient of the bias is a sum that reads the gradient of the output.
- The gradients of input and weights are two kernels: each reads the gradient of the output.
- ReLU reads and writes its values; backward it reads its output and the gradient, and writes the gradient. Dropout does the
  same, with a mask of one byte a value. The last ReLU of a block stands behind the pooling, before a quarter of the values.
- Max pooling's indices are of 8 bytes, and its gradient is filled with zeros before it is written.
- Local response normalisation is a chain of operations in float32.
- Conversions between float32 and half precision are kernels, too.
--fuse takes some of these away, as model/vgg.py does.
torch.compile joins bias and ReLU, and their backward passes, but does not join them with cuDNN's convolutions: such a step lies
between the two figures.

Left out of both: loss, labels and the logits' conversion to float32, which are a millionth of the rest; parameters of batch
normalisation; the classifier's input in another memory layout; adding up the gradients of several passes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from engine.data import TrainingData
from engine.training.shared_layers import FC6, FC7
from model.vgg import VGG, Convolution, LocalResponseNorm, PoolThenBias
from perf.peaks import peaks_of
from pipeline.plan.samples import rescaled_sizes, source_windows

SHARED_LAYERS = (FC6, FC7)
_FLOAT32_BYTES = 4
_FUSED_INDEX_BYTES, _INDEX_BYTES = 1, 8
_MASK_BYTES = 1
# Values that F.local_response_norm's operations read and write for each value of its input, the padding of four channels apart.
# Forward: square 2, pad 2, average 2, times 2, plus 2, power 2, quotient 3.
_LRN_FORWARD_VALUES = 15
# Backward: of the quotient 14 (three quotients, a negation, a product), of the power 7, of times 2, average 2, pad 2, of the
# square 6, and two sums 6.
_LRN_BACKWARD_VALUES = 39
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "conv"),
    (nn.Linear, "linear"),
    (nn.MaxPool2d, "pool"),
    (LocalResponseNorm, "lrn"),
    (nn.BatchNorm2d, "norm"),
)


@dataclass(frozen=True)
class Work:
    """Of one kernel, or of one pass of one layer over one batch."""

    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """A layer, and the ReLU and the dropout that follow it."""

    name: str  # of the module, as in the state dict: features.0
    kind: str  # conv, linear, pool, lrn or norm
    parameters: tuple[int, ...]  # elements of its weight and its bias; nothing for a layer that has none
    forward: Work  # fused
    backward: Work
    forward_kernels: tuple[Work, ...]  # unfused
    backward_kernels: tuple[Work, ...]
    is_shared: bool = False  # a part of a layer: other ranks have the others, and no gradient of it is sent


def kind_of(module: nn.Module) -> str | None:
    """conv, linear, pool, lrn or norm; None for other modules."""
    return next((kind for type_, kind in _KINDS if isinstance(module, type_)), None)


def layer_costs(
    arch: str,
    *,
    classes: int,
    crop: int,
    batch: int,
    bytes_per_value: int,
    batch_norm: bool = False,
    fuse: str = "none",
    sharing: int = 1,
) -> list[LayerCost]:
    """The layers of a configuration in the order in which they run, for one pass forward and one backward.

    arch, classes, crop, batch_norm, fuse: as VGG takes them. batch: images in the pass. bytes_per_value: 4 for float32, 2 for
    autocast to bfloat16 or float16. sharing: ranks among which FC6 and FC7 are divided; their images are all ranks', their
    weights a rank's part. Raises ValueError as VGG does.
    """
    with torch.device("meta"):
        model = VGG(arch, classes=classes, crop=crop, batch_norm=batch_norm, fuse=fuse)
        images = torch.empty(batch, 3, crop, crop)
    layers: list[LayerCost] = []

    def record(name: str, kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, is_shared = inputs[0], sharing > 1 and name in SHARED_LAYERS
            if is_shared:
                module, x, output = _part(name, x, output, sharing)
            cost = _layer_cost(name, kind, module, x, output, bytes_per_value, is_first=not layers)
            layers.append(replace(cost, is_shared=is_shared))

        return hook

    def follow(forward_bytes: int, backward_bytes: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        """A layer that is free where it is fused into the one before. Bytes: of each of its values."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layers[-1] = replace(
                layers[-1],
                forward_kernels=(*layers[-1].forward_kernels, Work(0, forward_bytes * output.numel())),
                backward_kernels=(Work(0, backward_bytes * output.numel()), *layers[-1].backward_kernels),
            )

        return hook

    for name, module in model.named_modules():
        if kind := kind_of(module):
            module.register_forward_hook(record(name, kind))
        elif isinstance(module, nn.ReLU):
            module.register_forward_hook(follow(2 * bytes_per_value, 3 * bytes_per_value))
        elif isinstance(module, nn.Dropout):
            both = 2 * bytes_per_value + _MASK_BYTES
            module.register_forward_hook(follow(both, both))
        elif not (any(module.children()) or isinstance(module, nn.Identity)):
            raise NotImplementedError(f"the cost of {type(module).__name__} ({name}) is not known here: add it")
    with torch.no_grad():
        model(images)
    return layers


def _part(name: str, x: Tensor, y: Tensor, sharing: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A rank's part of FC6 or FC7, its input and its output: FC6 is divided by outputs, FC7 by inputs."""
    inputs, outputs = x.shape[1], y.shape[1]
    if name == SHARED_LAYERS[0]:
        outputs //= sharing
    else:
        inputs //= sharing
    rows = sharing * len(x)
    return nn.Linear(inputs, outputs, device="meta"), x.new_empty(rows, inputs), y.new_empty(rows, outputs)


def _layer_cost(
    name: str, kind: str, module: nn.Module, x: Tensor, y: Tensor, bytes_per_value: int, *, is_first: bool
) -> LayerCost:
    x_bytes, y_bytes = x.numel() * bytes_per_value, y.numel() * bytes_per_value
    dx_bytes = 0 if is_first else x_bytes
    is_half = bytes_per_value != _FLOAT32_BYTES
    to_and_from_float32 = bytes_per_value + _FLOAT32_BYTES if is_half else 0
    parameters = tuple(parameter.numel() for parameter in module.parameters(recurse=False))
    if kind == "pool":
        indices = y.numel() * _FUSED_INDEX_BYTES
        forward, backward = Work(0, x_bytes + y_bytes + indices), Work(0, y_bytes + indices + dx_bytes)
        indices = y.numel() * _INDEX_BYTES
        forward_kernels = [Work(0, x_bytes + y_bytes + indices)]
        backward_kernels = [Work(0, dx_bytes), Work(0, y_bytes + indices + dx_bytes)]
        if isinstance(module, PoolThenBias):
            forward_kernels.append(Work(0, 2 * y_bytes))
            backward_kernels.insert(0, Work(0, y_bytes))
    elif kind == "lrn":
        forward, backward = Work(0, x_bytes + y_bytes), Work(0, x_bytes + y_bytes + dx_bytes)
        conversions = 2 * x.numel() * to_and_from_float32  # of the input and of the output
        forward_kernels = [Work(0, x.numel() * _LRN_FORWARD_VALUES * _FLOAT32_BYTES + conversions)]
        backward_kernels = [Work(0, x.numel() * _LRN_BACKWARD_VALUES * _FLOAT32_BYTES + conversions)]
    elif kind == "norm":
        forward, backward = Work(0, 2 * x_bytes + y_bytes), Work(0, 2 * (x_bytes + y_bytes) + dx_bytes)
        forward_kernels, backward_kernels = [forward], [backward]
    else:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        flops = 2 * y.numel() * module.weight[0].numel()
        weights = sum(parameters) * bytes_per_value
        weights_for_dx = 0 if is_first else weights
        converted = sum(parameters) * to_and_from_float32
        forward = Work(flops, x_bytes + weights + converted + y_bytes)
        backward = Work(
            flops if is_first else 2 * flops, x_bytes + weights_for_dx + y_bytes + dx_bytes + weights + converted
        )
        conversion = [Work(0, converted)] if is_half else []
        gradient_of_bias = [Work(0, y_bytes)]
        bias = [Work(0, 2 * y_bytes)] if kind == "conv" else []
        of_relu = []
        if isinstance(module, Convolution) and module.leaves_bias:
            bias = gradient_of_bias = []
        elif isinstance(module, Convolution) and module.takes_relu:
            bias, of_relu = [], [Work(0, 3 * y_bytes)]
        of_input = [] if is_first else [Work(flops, y_bytes + weights + dx_bytes)]
        forward_kernels = [*conversion, Work(flops, x_bytes + weights + y_bytes), *bias]
        backward_kernels = [
            *of_relu,
            *gradient_of_bias,
            *of_input,
            Work(flops, x_bytes + y_bytes + weights),
            *conversion,
        ]
    return LayerCost(
        name=name,
        kind=kind,
        parameters=parameters,
        forward=forward,
        backward=backward,
        forward_kernels=tuple(forward_kernels),
        backward_kernels=tuple(backward_kernels),
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one GPU trains, in the words of train.py's flags."""

    arch: str
    classes: int
    crop: int
    batch: int  # images of this GPU in one step
    micro_batch: int | None = None  # images in one pass, a divisor of `batch`; None: all
    precision: str  # bf16, fp16 or fp32
    grad_compression: str = "none"  # none, bf16 or fp16
    ranks: int = 1  # GPUs that train together
    batch_norm: bool = False
    fuse: str = "none"
    sharing: int = 1  # ranks that share FC6 and FC7 (--parallel hybrid)

    @classmethod
    def of(cls, data: TrainingData) -> "Job":
        """What each rank of a run trains, data parallel."""
        config, ranks = data.config, data.ranks
        return cls(
            arch=config.arch,
            classes=len(data.classes),
            crop=config.crop,
            batch=config.batch_size // ranks.world_size,
            micro_batch=data.micro_batch,
            precision=data.precision.name,
            grad_compression=config.grad_compression,
            ranks=ranks.world_size,
            batch_norm=config.batch_norm,
            fuse=config.fuse,
        )

    @property
    def passes(self) -> int:
        return self.batch // (self.micro_batch or self.batch)

    def layers(self) -> list[LayerCost]:
        """Costs of one pass, forward and backward. Raises ValueError as VGG does."""
        return layer_costs(
            self.arch,
            classes=self.classes,
            crop=self.crop,
            batch=self.batch // self.passes,
            bytes_per_value=4 if self.precision == "fp32" else 2,
            batch_norm=self.batch_norm,
            fuse=self.fuse,
            sharing=self.sharing,
        )


def peak_seconds_an_image(job: Job, device: torch.device) -> float | None:
    """What the FLOPs of one image, forward and backward, take on all GPUs of the job together, at the highest rate of this one.

    Times images per second, it is the MFU. None on a CPU, and on a GPU that the table does not have.
    """
    peaks = peaks_of(torch.cuda.get_device_name(device), job.precision) if device.type == "cuda" else None
    if peaks is None:
        return None
    flops = job.passes * sum(layer.forward.flops + layer.backward.flops for layer in job.layers())
    return flops / job.batch / (job.ranks * peaks.flops_per_second)


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
