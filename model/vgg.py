"""The six networks of Simonyan & Zisserman, arXiv 1409.1556: Table 1 as a table, and the module it describes."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dropout import Dropout

# Table 1 of the paper, block by block; a max-pool ends each block. An integer is a 3×3 convolution's width,
# (1, width) is a 1×1 convolution, "LRN" follows the ReLU before it.
Layer = int | tuple[int, int] | str
CONFIGURATIONS: dict[str, tuple[tuple[Layer, ...], ...]] = {
    "A": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "A-LRN": ((64, "LRN"), (128,), (256, 256), (512, 512), (512, 512)),
    "B": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "C": ((64, 64), (128, 128), (256, 256, (1, 256)), (512, 512, (1, 512)), (512, 512, (1, 512))),
    "D": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "E": ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}

STRIDE = 32
"""Five poolings halve the image: a crop is a multiple of this."""

FC_WIDTH = 4096
"""Outputs of FC6 and of FC7."""

FUSIONS = ("none", "pool", "conv")
"""Which passes over memory are saved. pool: a bias in front of a pooling is added behind it. conv: this, and the convolutions
that a ReLU follows immediately are one kernel with bias and ReLU. Batch and local response normalisation stand between."""

BLOCKS = 5
"""Of convolutions, in each configuration."""

LAST = "classifier.6"
"""The name of FC8, the layer that belongs to the classes."""


class VGG(nn.Module):
    """A configuration of the paper as torchvision lays it out: the same state-dict keys, shapes and outputs.

    The network is features → flatten → classifier. torchvision's adaptive 7×7 average pool is absent: at 224 pixels it
    is the identity, and at other crops FC6 takes the map as it is, 512·(crop/32)² inputs.
    """

    def __init__(
        self,
        arch: str,
        *,
        classes: int = 1000,
        crop: int = 224,
        dropout: float = 0.5,
        batch_norm: bool = False,
        fuse: str = "none",
    ) -> None:
        """arch: a key of CONFIGURATIONS. crop: side of the input in pixels, a multiple of 32.

        batch_norm: a batch normalisation (Ioffe & Szegedy 2015) between each convolution and its ReLU, as in torchvision's
        vgg11_bn to vgg19_bn; the paper's networks have none.

        fuse: one of FUSIONS. Neither the state dict depends on it nor, but for rounding, what is computed.

        Raises ValueError for another arch or crop.
        """
        if arch not in CONFIGURATIONS:
            raise ValueError(f"unknown architecture {arch}; choose one of {', '.join(CONFIGURATIONS)}")
        if crop < STRIDE or crop % STRIDE:
            raise ValueError(f"crop {crop} is not a multiple of {STRIDE}: VGG halves its input five times")
        super().__init__()
        self.crop = crop
        self.features = nn.Sequential(*_fused(_features(CONFIGURATIONS[arch], batch_norm=batch_norm), fuse))
        self.classifier = nn.Sequential(
            nn.Linear(512 * (crop // STRIDE) ** 2, FC_WIDTH),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(FC_WIDTH, FC_WIDTH),
            nn.ReLU(inplace=True),
            Dropout(dropout),
            nn.Linear(FC_WIDTH, classes),
        )
        self._blocks_with_kept_statistics = 0

    def freeze(self, blocks: int) -> None:
        """Train the first so many blocks of convolutions no more: they get no gradients, and keep_statistics()."""
        for layer in self._first(blocks):
            layer.requires_grad_(False)
        self.keep_statistics(blocks)

    def keep_statistics(self, blocks: int) -> None:
        """From now on, batch normalisation in the first so many blocks, and in no others, normalises with the statistics that it
        has, in training too, and does not change them."""
        self._blocks_with_kept_statistics = blocks
        self.train(self.training)

    def train(self, mode: bool = True) -> "VGG":
        """As torch's, but for what keep_statistics() says."""
        super().train(mode)
        for layer in self._first(self._blocks_with_kept_statistics):
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self

    def _first(self, blocks: int) -> nn.Sequential:
        ends = [number for number, layer in enumerate(self.features, 1) if isinstance(layer, nn.MaxPool2d)]
        return self.features[: [0, *ends][blocks]]

    def forward(self, images: Tensor) -> Tensor:
        """images: [n, 3, crop, crop], or [n, 4, crop, crop], the fourth channel zero. Returns logits [n, classes]."""
        return self.classifier(torch.flatten(self.features(images), 1))


class Convolution(nn.Conv2d):
    """A convolution that may leave its bias to the pooling behind it, or take in the ReLU behind it.

    It takes images with more channels than its weight has, too: a fourth one of zeros can be faster on a GPU. The weight is
    filled up with zeros on the way; it keeps its shape, and so does its gradient.
    """

    leaves_bias = takes_relu = False

    def forward(self, images: Tensor) -> Tensor:
        """images: [n, in_channels or more, height, width]; what the channels beyond in_channels hold does not count."""
        missing = images.shape[1] - self.in_channels
        weight, bias = self.weight, self.bias
        if missing:
            weight = F.pad(weight, (0, 0, 0, 0, 0, missing))
        if not self.takes_relu:
            return self._conv_forward(images, weight, None if self.leaves_bias else bias)
        assert bias is not None
        if not images.is_meta and torch.is_autocast_enabled(images.device.type):  # which does not know this operation
            dtype = torch.get_autocast_dtype(images.device.type)
            images, weight, bias = images.to(dtype), weight.to(dtype), bias.to(dtype)
        return convolution_relu(images, weight, bias, self.kernel_size[0] // 2)


class PoolThenBias(nn.MaxPool2d):
    """max(x) + b = max(x + b), to the last bit, on a quarter of the values; b is the bias of the convolution in front of it."""

    def __init__(self, convolution: Convolution) -> None:
        super().__init__(kernel_size=2, stride=2)
        self._convolution = (
            convolution,
        )  # a module in a tuple is no part of this one: its parameters keep their names

    def forward(self, maps: Tensor) -> Tensor:
        """maps: [n, channels, height, width], without the bias. Returns [n, channels, height / 2, width / 2], with it."""
        bias = self._convolution[0].bias
        assert bias is not None
        return super().forward(maps).add_(bias.to(maps.dtype)[:, None, None])


@torch.library.custom_op("vgg_dali::convolution_relu", mutates_args=())
def convolution_relu(images: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """relu(conv2d(images, weight, bias)), of stride 1, all of one dtype; on a GPU one kernel of cuDNN's.

    torch has the kernel (torch.cudnn_convolution_relu) without a gradient, and torch.compile does not choose it.
    """
    if images.is_cuda:
        return torch.cudnn_convolution_relu(images, weight, bias, (1, 1), (padding, padding), (1, 1), 1)
    return F.conv2d(images, weight, bias, padding=padding).relu_()


@convolution_relu.register_fake
def _(images: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    return F.conv2d(images, weight, bias, padding=padding)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:  # torch calls it with these names
    images, weight, _, ctx.padding = inputs
    ctx.save_for_backward(images, weight, output)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
    images, weight, output = ctx.saved_tensors
    gradient = torch.ops.aten.threshold_backward(gradient, output, 0)  # as ReLU's own
    settings = [len(weight)], (1, 1), (ctx.padding, ctx.padding), (1, 1), False, (0, 0), 1
    mask = list(ctx.needs_input_grad[:3])
    of_images, of_weight, of_bias = torch.ops.aten.convolution_backward(gradient, images, weight, *settings, mask)
    return of_images, of_weight, of_bias, None


convolution_relu.register_autograd(_gradients, setup_context=_save_for_backward)


class LocalResponseNorm(nn.Module):
    """AlexNet's local response normalisation (Krizhevsky et al. 2012, section 3.3), across channels.

    y_c = x_c / (k + α · Σ x_j²)^β over the n channels j around c, with n=5, k=2, α=1e-4, β=0.75 (section 2.3 of the VGG
    paper). torch divides α by n, the formula does not, so torch is given n·α. Computed in float32: squares of
    activations of pixels in 0–255 overflow float16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, channels, height, width], any floating dtype; the result has the same shape and dtype."""
        return F.local_response_norm(x.float(), size=5, alpha=5 * 1e-4, beta=0.75, k=2.0).to(x.dtype)


def build(
    arch: str,
    *,
    classes: int,
    crop: int,
    dropout: float,
    init: str,
    device: torch.device,
    seed: int = 0,
    batch_norm: bool = False,
    fuse: str = "none",
) -> VGG:
    """A network with fresh weights, made and initialised on `device`, in channels_last.

    init: a key of INITIALISERS; the rest as VGG has it. The weights are a function of the seed and the kind of device. Raises
    ValueError as VGG does.
    """
    with torch.device("meta"):  # torch's own initialisation would be computed first, only to be overwritten
        model = VGG(arch, classes=classes, crop=crop, dropout=dropout, batch_norm=batch_norm, fuse=fuse)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    initialise = INITIALISERS[init]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            initialise(module.weight, generator)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # all have one
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()  # to the identity: weight 1, bias 0, running mean 0, running variance 1
    return model.to(memory_format=torch.channels_last)


def _xavier(weight: Tensor, generator: torch.Generator) -> None:
    """Glorot & Bengio 2010, uniform: what the paper's authors found after submission to need no pre-training."""
    nn.init.xavier_uniform_(weight, generator=generator)


def _normal(weight: Tensor, generator: torch.Generator) -> None:
    """Section 3.1 of the paper: normal, mean 0, variance 10⁻². Only networks as shallow as A can hope to learn from it."""
    nn.init.normal_(weight, std=math.sqrt(1e-2), generator=generator)


def _kaiming(weight: Tensor, generator: torch.Generator) -> None:
    """He et al. 2015: normal, variance 2 / inputs."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)


INITIALISERS: dict[str, Callable[[Tensor, torch.Generator], None]] = {
    "xavier": _xavier,
    "normal": _normal,
    "kaiming": _kaiming,
}


def _features(blocks: tuple[tuple[Layer, ...], ...], *, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for block in blocks:
        for layer in block:
            if layer == "LRN":
                # Joined with its ReLU, so that the layers after it keep torchvision's numbers and A's weights fit A-LRN.
                layers[-1] = nn.Sequential(layers[-1], LocalResponseNorm())
                continue
            side, width = layer if isinstance(layer, tuple) else (3, int(layer))
            layers.append(Convolution(channels, width, kernel_size=side, padding=side // 2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        # max(relu(x)) = relu(max(x)), to the last bit, and so are the gradients: behind the pooling, the ReLU of a block's last
        # convolution has a quarter of the values. Local response normalisation needs it where it is.
        place = len(layers) - isinstance(layers[-1], nn.ReLU)
        layers.insert(place, nn.MaxPool2d(kernel_size=2, stride=2))
    return layers


def _fused(layers: list[nn.Module], fuse: str) -> list[nn.Module]:
    """The same layers in the same places, of which some do what others did."""
    for place, layer in enumerate(layers):
        if not isinstance(layer, Convolution) or fuse == "none":
            continue
        if isinstance(layers[place + 1], nn.MaxPool2d):
            layers[place + 1] = PoolThenBias(layer)
            layer.leaves_bias = True
        elif isinstance(layers[place + 1], nn.ReLU) and fuse == "conv":
            layers[place + 1] = nn.Identity()
            layer.takes_relu = True
    return layers
