"""Weights that come from elsewhere: torchvision, timm, configuration A (section 3.1), a network of other classes.

A state here is a state dict with torchvision's keys, as VGG has them. The functions do not change the states that they are
given, and share with them the tensors that stay as they are.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.progress import printable
from model.vgg import CONFIGURATIONS, LAST, STRIDE, VGG

State = Mapping[str, Tensor]
RGB = tuple[float, float, float]

# What torchvision's networks subtract from the pixels and then divide them by (its Normalize): in units of 255, and in 0–255.
TORCHVISION_MEAN: RGB = (0.485, 0.456, 0.406)
TORCHVISION_STD: RGB = (0.229, 0.224, 0.225)
TORCHVISION_MEAN_RGB: RGB = (255 * 0.485, 255 * 0.456, 255 * 0.406)
TORCHVISION_STD_RGB: RGB = (255 * 0.229, 255 * 0.224, 255 * 0.225)
NOT_DIVIDED: RGB = (1.0, 1.0, 1.0)
"""The std of a network whose images are pixels (0–255) less a mean, and no more."""

_FIRST = "features.0.weight"
# What DataParallel, DistributedDataParallel and torch.compile put into the names of what they wrap; VGG has no such parts.
_WRAPPERS = ("module", "_orig_mod")
# Entries under which other trainers save a state dict, an average of the weights before the weights themselves: it is what
# they validate, and what this project takes from its own checkpoints.
_ENTRIES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "network", "net"
)  # fmt: skip
# timm's VGGs have convolutions for FC6 and FC7, which see the whole map and then one place: flattened, their weights are ours.
_OF_TIMM = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": LAST}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
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
    if strange := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        raise ValueError(f"these are not the weights of a VGG: {printable(str(strange))} is not a tensor")
    if missing := [name for name in (_FIRST, "classifier.0.weight", f"{LAST}.weight") if name not in state]:
        no_classifier = _FIRST in state and not any(name.startswith("classifier") for name in state)
        lack = "its fully-connected layers are missing" if no_classifier else f"it has no {', '.join(missing)}"
        raise ValueError(f"these are not the weights of a VGG: {lack}")
    fc6, fc8 = state["classifier.0.weight"], state[f"{LAST}.weight"]
    if fc6.ndim != 2 or fc8.ndim != 2 or not len(fc8):
        raise ValueError("these are not the weights of a VGG: its fully-connected layers are not matrices")
    crop = STRIDE * max(1, math.isqrt(fc6.shape[1] // 512))
    shapes = _shapes(state)
    differences = {}
    for batch_norm in (False, True):
        for arch in CONFIGURATIONS:
            description = Description(arch, batch_norm, len(fc8), crop)
            wanted = _shapes(_outline(description).state_dict())
            if shapes == wanted:
                return description
            differences[description] = {name for name, _ in shapes.items() ^ wanted.items()}
    nearest = min(differences, key=lambda description: len(differences[description]))
    raise ValueError(
        "these are not the weights of one of the paper's configurations: they differ from those of "
        f"{nearest} in {_some(sorted(differences[nearest]))}"
    )


def unwrapped(content: object) -> tuple[dict[str, Tensor], str]:
    """The state in what another trainer has saved → (the state under VGG's own names, the entry that it was taken from).

    content: a state dict, or a dictionary that holds one under a usual name ("model", "state_dict", …; of several, an average
    of the weights comes first). The entry is "" for a state dict. Names lose what DataParallel, torch.compile and an enclosing
    module have put into them; timm's become torchvision's. The tensors stay as they are, but for the shape of timm's.

    Raises ValueError, a sentence, where no network of the paper's is in it.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a state dict")
    errors = []
    for entry, state in _states(content):
        try:
            plain = _plain_names(state)
            describe(plain)
        except ValueError as error:
            errors.append(error)
        else:
            return plain, entry
    raise errors[0]


def as_float32(state: State) -> dict[str, Tensor]:
    """The same state in float32, in which the networks keep their weights; counters of batches stay as they are.

    Raises ValueError, a sentence that names the tensor, unless all are dense tensors of finite floating-point numbers, in
    float32 too.
    """
    return {name: _single(name, value) for name, value in state.items()}


def _single(name: str, value: Tensor) -> Tensor:
    if not _is_dense(value):
        raise ValueError(
            f"its tensor {name} is sparse, quantised or without values; save the dense floating-point weights"
        )
    if name.endswith("num_batches_tracked"):
        return value.detach()
    if value.dtype not in _DTYPES:
        kind = str(value.dtype).removeprefix("torch.")
        raise ValueError(
            f"its tensor {name} holds {kind}, not floating-point numbers of 16, 32 or 64 bits; save the weights so"
        )
    if not is_finite(value):
        raise ValueError(f"its tensor {name} holds values that are not finite (NaN or infinity); it cannot be used")
    single = value.detach().float()
    if not is_finite(single):
        raise ValueError(f"its tensor {name} holds values beyond float32's largest, 3.4e38; it cannot be used")
    return single


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is dense and holds floating-point numbers of 16 bits or more, or counts: what networks are made of."""
    return _is_dense(value) and value.dtype in (*_DTYPES, torch.int64)


def _is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def is_finite(value: Tensor) -> bool:
    """Whether all numbers of a plain tensor are finite. Waits for its device."""
    # A sum is finite only where all that is added up is; it takes a thirtieth of the time of isfinite().all().
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def for_std(state: State, now: Sequence[float], wanted: Sequence[float]) -> dict[str, Tensor]:
    """The state of a network that gives the same logits where its images are divided by another std.

    now, wanted: what the pixels (0–255), less the mean, are divided by for R, G, B. The first convolution takes the difference
    up. So what is padded with zeros is the same image, and the logits are equal at the borders too. The same std changes no
    bit of weights in 32 bits or fewer.
    """
    weight = state[_FIRST]
    before, after = (
        torch.tensor(std, dtype=torch.float64, device=weight.device).view(1, 3, 1, 1) for std in (now, wanted)
    )
    # Weights of 16 bits become float32: rounded again, they would be others.
    single = torch.promote_types(weight.dtype, torch.float32)
    return {**state, _FIRST: (weight.double() * after / before).to(single)}


def to_torchvision(state: State, mean_rgb: Sequence[float], std_rgb: Sequence[float]) -> tuple[dict[str, Tensor], RGB]:
    """A state as torchvision's network has it: → (its state, the mean for torchvision's Normalize, with torchvision's own std).

    mean_rgb, std_rgb: what the network was trained with, in 0–255. That mean / 255 belongs into Normalize; it is
    TORCHVISION_MEAN, up to rounding, where the network was trained with ImageNet's.

    Keys and shapes are torchvision's for the networks that it has: A, B, D, E at 224 pixels. For another crop, its network
    has to be given the same FC6, and nn.Identity() for its average pool.
    """
    red, green, blue = (value / 255 for value in mean_rgb)
    return for_std(state, std_rgb, TORCHVISION_STD_RGB), (red, green, blue)


def initialise_from(model: VGG, state_of_a: State, *, last: bool = True) -> list[str]:
    """Section 3.1: copy A's first four convolutions and its three fully-connected layers into a deeper network, in place.

    The other layers keep what they have. Returns the names of what was copied, in the state dict of the model.

    The text does not say which layers of the deeper network A's become. Counted from the image, A's second convolution (64 →
    128) would have to become conv1_2 (64 → 64) of B to E, which does not fit. So a layer goes to the same place of the same
    block: conv1_1, conv2_1, conv3_1 and conv3_2, whose shapes are A's in every configuration. Nor does it say anything of
    batch normalisation: that of these layers is copied with them where both networks have it.

    last: whether the last layer is copied too: it belongs to A's classes. For another number of them it does not fit, and
    never is.

    Raises ValueError where the state is not one of A (or A-LRN), or of another crop.
    """
    source, target = describe(state_of_a), describe(model.state_dict())
    if source.arch != "A" or source.crop != target.crop:
        raise ValueError(f"these are the weights of {source}; {target} starts from those of A for {target.crop} pixels")
    origins = _convolutions(_outline(source))
    pairs = [("classifier.0", "classifier.0"), ("classifier.3", "classifier.3")]
    if last and source.classes == target.classes:
        pairs.append((LAST, LAST))
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


def load_all(model: VGG, state: State, *, last: bool = True) -> bool:
    """Copy all weights into a network, in place; without `last`, or for another number of classes, all but the last layer's.

    Returns whether the last layer stayed as it was. Raises ValueError where the state is another network's.
    """
    source, target = describe(state), describe(model.state_dict())
    if source._replace(classes=target.classes) != target:
        raise ValueError(f"these are the weights of {source}, the network is {target}")
    if last and source.classes == target.classes:
        model.load_state_dict(state)
        return False
    own_last = {name: weight for name, weight in model.state_dict().items() if name.startswith(LAST)}
    model.load_state_dict({**state, **own_last})
    return True


def outputs(state: State) -> int:
    """How many classes a network tells apart."""
    return len(state[f"{LAST}.weight"])


def reordered(state: State, order: Sequence[int]) -> dict[str, Tensor]:
    """The same network with its outputs in another order: output n is what output order[n] was."""
    return {name: value[list(order)] if name.startswith(LAST) else value for name, value in state.items()}


def _states(content: Mapping, depth: int = 2) -> Iterator[tuple[str, Mapping]]:
    """What may be a state dict: entries with a usual name, so deep, then the dictionary itself; each with its entry's name."""
    for entry in _ENTRIES if depth else ():
        if isinstance(inner := content.get(entry), Mapping):
            for deeper, state in _states(inner, depth - 1):
                yield f"{entry}.{deeper}" if deeper else entry, state
    yield "", content


def _plain_names(state: Mapping) -> dict[str, Tensor]:
    """The state under VGG's own names. Raises ValueError where two tensors would have the same, or there are two networks."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        own = ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
        if own in plain:
            raise ValueError(f"it holds {printable(own)} twice, once wrapped by another module")
        plain[own] = value
    plain.pop("n_averaged", None)  # torch's AveragedModel counts its steps beside the weights
    prefixes = [name.removesuffix(_FIRST) for name in plain if f".{name}".endswith(f".{_FIRST}")]
    if len(prefixes) > 1:
        raise ValueError(f"it holds {len(prefixes)} networks ({_some(prefixes)}); save one of them")
    if prefixes and prefixes[0]:  # the network as a part of another module, as Lightning's
        plain = {name.removeprefix(prefixes[0]): value for name, value in plain.items() if name.startswith(prefixes[0])}
    return _named_by_torchvision(plain) if "pre_logits.fc1.weight" in plain else plain


def _named_by_torchvision(state: State) -> dict[str, Tensor]:
    """A state of one of timm's VGGs as torchvision has it."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, _, what = name.rpartition(".")
        own = f"{_OF_TIMM.get(layer, layer)}.{what}"
        if own in named:
            raise ValueError(f"it holds {printable(own)} twice, once under timm's name")
        is_convolution = layer in _OF_TIMM and isinstance(value, Tensor) and value.ndim == 4 and _is_dense(value)
        named[own] = value.flatten(1) if is_convolution else value
    return named


def _some(names: Sequence[str]) -> str:
    """Some names for a sentence, not all of hundreds."""
    shown = ", ".join(printable(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


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
    """Without batch normalisation's counters of batches: files of torch before 0.4.1 have none."""
    return {name: value.shape for name, value in state.items() if not name.endswith("num_batches_tracked")}
