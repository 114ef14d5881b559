"""Weights that come from elsewhere: from torchvision, from configuration A (section 3.1), from a network of other classes.

A state here is a state dict with torchvision's keys, as VGG has them. The functions do not change the states that they are
given, and share with them the tensors that stay as they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.vgg import CONFIGURATIONS, STRIDE, VGG

State = Mapping[str, Tensor]

# What torchvision's networks subtract from the pixels and then divide them by, in units of 255 (its Normalize).
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_STD = (0.229, 0.224, 0.225)

_FIRST = "features.0.weight"
_LAST = "classifier.6"
# A's first four convolutions by block and place in it: conv1_1, conv2_1, conv3_1, conv3_2.
_FIRST_FOUR_OF_A = ((1, 1), (2, 1), (3, 1), (3, 2))


class Description(NamedTuple):
    """Which network some weights belong to: the arguments of VGG."""

    arch: str
    batch_norm: bool
    classes: int
    crop: int

    def __str__(self) -> str:
        return f"{self.arch}{' with batch norm' if self.batch_norm else ''} for {self.crop} pixels"


def describe(state: State) -> Description:
    """The network that a state belongs to. A-LRN's is A's: local response normalisation has no weights.

    Raises ValueError, a sentence, where it is none of the paper's.
    """
    fc6, fc8 = state.get("classifier.0.weight"), state.get(f"{_LAST}.weight")
    if fc6 is None or fc8 is None or fc6.ndim != 2:
        raise ValueError("these are not the weights of a VGG: its fully-connected layers are missing")
    crop = STRIDE * max(1, math.isqrt(fc6.shape[1] // 512))
    shapes = _shapes(state)
    for batch_norm in (False, True):
        for arch in CONFIGURATIONS:
            if shapes == _shapes(_outline(Description(arch, batch_norm, len(fc8), crop)).state_dict()):
                return Description(arch, batch_norm, len(fc8), crop)
    raise ValueError("these are not the weights of one of the paper's configurations: their layers are different")


def from_torchvision(state: State) -> tuple[dict[str, Tensor], tuple[float, float, float]]:
    """A torchvision network's state → (a state with the same logits, the mean RGB to subtract from its pixels in 0–255).

    torchvision's networks see (pixel/255 - mean) / std = (pixel - 255·mean) / (255·std): the mean is subtracted from our
    images too, and the division goes into the first convolution. So what is padded with zeros is the same image, and the
    logits are equal at the borders too; with the mean in the bias they would not be.
    """
    weight = (state[_FIRST].double() / _divisors(state[_FIRST].device)).to(state[_FIRST].dtype)
    red, green, blue = (255 * mean for mean in TORCHVISION_MEAN)
    return {**state, _FIRST: weight}, (red, green, blue)


def to_torchvision(state: State, mean_rgb: Sequence[float]) -> tuple[dict[str, Tensor], tuple[float, float, float]]:
    """The inverse of from_torchvision: → (torchvision's state, the mean for torchvision's Normalize).

    mean_rgb: what the network was trained with, in 0–255. That mean / 255 belongs into Normalize, with torchvision's own std;
    it is TORCHVISION_MEAN, up to rounding, where the network was trained with ImageNet's.

    Keys and shapes are torchvision's for the networks that it has: A, B, D, E at 224 pixels. For another crop, its network
    has to be given the same FC6, and nn.Identity() for its average pool.
    """
    weight = (state[_FIRST].double() * _divisors(state[_FIRST].device)).to(state[_FIRST].dtype)
    red, green, blue = (value / 255 for value in mean_rgb)
    return {**state, _FIRST: weight}, (red, green, blue)


def initialise_from(model: VGG, state_of_a: State) -> list[str]:
    """Section 3.1: copy A's first four convolutions and its three fully-connected layers into a deeper network, in place.

    The other layers keep what they have. Returns the names of what was copied, in the state dict of the model.

    The text does not say which layers of the deeper network A's become. Counted from the image, A's second convolution (64 →
    128) would have to become conv1_2 (64 → 64) of B to E, which does not fit. So a layer goes to the same place of the same
    block: conv1_1, conv2_1, conv3_1 and conv3_2, whose shapes are A's in every configuration. Nor does it say anything of
    batch normalisation: that of these layers is copied with them where both networks have it. For another number of classes
    the last layer does not fit, and is not copied.

    Raises ValueError where the state is not one of A (or A-LRN), or of another crop.
    """
    source, target = describe(state_of_a), describe(model.state_dict())
    if source.arch != "A" or source.crop != target.crop:
        raise ValueError(f"these are the weights of {source}; {target} starts from those of A for {target.crop} pixels")
    origins = _convolutions(_outline(source))
    pairs = [("classifier.0", "classifier.0"), ("classifier.3", "classifier.3")]
    if source.classes == target.classes:
        pairs.append((_LAST, _LAST))
    for place, number in _convolutions(model).items():
        if place in _FIRST_FOUR_OF_A:
            pairs.append((f"features.{number}", f"features.{origins[place]}"))
            if source.batch_norm and target.batch_norm:
                pairs.append((f"features.{number + 1}", f"features.{origins[place] + 1}"))
    origin_of = dict(pairs)
    copied = {}
    for name in model.state_dict():
        layer, _, what = name.rpartition(".")
        origin = f"{origin_of.get(layer)}.{what}"
        if origin in state_of_a:
            copied[name] = state_of_a[origin]
    model.load_state_dict(copied, strict=False)
    return list(copied)


def load_all(model: VGG, state: State) -> bool:
    """Copy all weights into a network, in place. For another number of classes its last layer stays as it is.

    Returns whether the last layer stayed. Raises ValueError where the state is another network's.
    """
    source, target = describe(state), describe(model.state_dict())
    if source._replace(classes=target.classes) != target:
        raise ValueError(f"these are the weights of {source}, the network is {target}")
    if source.classes == target.classes:
        model.load_state_dict(state)
        return False
    own_last = {name: weight for name, weight in model.state_dict().items() if name.startswith(_LAST)}
    model.load_state_dict({**state, **own_last})
    return True


def _convolutions(model: VGG) -> dict[tuple[int, int], int]:
    """Block and place in it, both from 1, of every convolution → its number in the state dict."""
    numbers: dict[tuple[int, int], int] = {}
    block = place = 1
    for number, module in enumerate(model.features):
        if isinstance(module, nn.Conv2d):
            numbers[block, place] = number
            place += 1
        elif isinstance(module, nn.MaxPool2d):
            block, place = block + 1, 1
    return numbers


def _outline(description: Description) -> VGG:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return VGG(
            description.arch, classes=description.classes, crop=description.crop, batch_norm=description.batch_norm
        )


def _shapes(state: State) -> dict[str, torch.Size]:
    """Without batch normalisation's counters: networks saved by torch before 0.4.1 have none, as torchvision's own."""
    return {name: value.shape for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _divisors(device: torch.device) -> Tensor:
    """255·std of each colour, float64, in the shape in which it meets a convolution's weight [out, in, height, width]."""
    return 255 * torch.tensor(TORCHVISION_STD, dtype=torch.float64, device=device).view(1, 3, 1, 1)
