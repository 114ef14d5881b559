"""Trained networks to use or to start from: this trainer's checkpoints, and state dicts of torchvision's and timm's."""

import contextlib
import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.progress import printable, say
from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint
from engine.config import Config, middle, parse_scale, usual_test_scale
from model.vgg import VGG
from model.weights import (
    NOT_DIVIDED,
    RGB,
    TORCHVISION_MEAN_RGB,
    TORCHVISION_STD_RGB,
    Description,
    as_float32,
    describe,
    for_std,
    initialise_from,
    load_all,
    outputs,
    reordered,
    unwrapped,
)

TORCHVISION = "torchvision:"
DESCRIPTION = "vgg-dali"
"""The key, in the metadata of a state dict that export.py has written, of its class names and mean."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A trained network."""

    name: str
    """What it was loaded from, as it was given."""
    arch: str
    batch_norm: bool
    crop: int
    """Side of the square input in pixels."""
    classes: tuple[str, ...] | None
    """Class names in label order; None where nobody says: a state dict has none."""
    mean_rgb: RGB
    """What is subtracted from the pixels (0–255) of its input."""
    std_rgb: RGB = NOT_DIVIDED
    """What they are then divided by."""
    train_scale: tuple[int, int] | None
    """Lowest and highest scale S that it was trained at, in pixels; None where nobody says, and where there was none."""
    validation_scale: int | None = None
    """The --validation-scale of its training, in pixels; None where none was given."""
    state: dict[str, torch.Tensor]
    """State dict with torchvision's keys, finite, float32, on the CPU; its input is (pixels in 0–255 − mean) / std."""

    entry: str = ""
    """Where another trainer's file has the state dict under a name, that name, as state_dict_ema."""

    @property
    def test_scale(self) -> int:
        """Q in pixels where nobody asks for another: that of its training's validations, as far as it is known."""
        if self.validation_scale:
            return self.validation_scale
        return middle(self.train_scale) if self.train_scale else usual_test_scale(self.crop)

    @property
    def outputs(self) -> int:
        """How many classes it tells apart."""
        return outputs(self.state)

    @property
    def origin(self) -> str:
        """Its name, and the entry of the file, for people."""
        return f"{self.name} ({self.entry})" if self.entry else self.name

    def for_std(self, std_rgb: RGB) -> "Network":
        """The same network for images that are divided by this std."""
        return dataclasses.replace(self, std_rgb=std_rgb, state=for_std(self.state, self.std_rgb, std_rgb))

    def build(self, device: torch.device) -> VGG:
        """The network on a device, in evaluation mode and channels_last."""
        with torch.device("meta"):  # no initial weights, which would only be overwritten
            model = VGG(self.arch, classes=self.outputs, crop=self.crop, batch_norm=self.batch_norm)
        model.to_empty(device=device).load_state_dict(self.state)
        return model.to(memory_format=torch.channels_last).eval()


def load_network(spec: str) -> Network:
    """The network in a checkpoint, spec being its path, or in a state dict of torchvision's or timm's, torchvision:PATH.

    Of a checkpoint with an average of the weights (--ema), the average. Raises UserError: no such file, or a damaged or
    foreign one.
    """
    return _from_torchvision(spec) if spec.startswith(TORCHVISION) else _from_checkpoint(spec)


def initial_network(config: Config) -> Network | None:
    """The network that --weights or --init-from names, for the run's --std; None where neither is given.

    Raises UserError as load_network does.
    """
    spec = config.weights or config.init_from
    return load_network(spec).for_std(config.std_rgb) if spec else None


def start_from(network: Network, model: VGG, config: Config, classes: Sequence[str]) -> str:
    """Give a fresh model the weights that --weights or --init-from asks for. Returns what was done, for people.

    classes: the data set's, in label order. The last layer is the network's where its classes are the same, its outputs in
    their order, and new where they are others. Raises UserError where the network's layers do not fit.
    """
    try:
        network, how = in_order_of(network, classes)
        last, why = True, f", the last layer too: {how}"
    except ValueError as error:
        last, why = False, f"the last layer is new, since {error}"
    try:
        if config.weights:
            if load_all(model, network.state, last=last):
                return f"all layers but the last are those of {network.origin}; {why}"
            return f"all layers are those of {network.origin}{why}"
        names = initialise_from(model, network.state, last=last)
        copied = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in names))
        done = f"{copied} are those of {network.origin}{why if last else ''}, the other layers are new ({config.init})"
        return done if last else f"{done}; {why}"
    except ValueError as error:
        flag = "--weights" if config.weights else "--init-from"
        raise UserError(f"{flag} {network.name}: {error}") from error


def for_data(network: Network, classes: Sequence[str], *, tell: bool) -> Network:
    """The network with its outputs in the order of a data set's classes; with `tell`, an assumption in that is said.

    Raises UserError where its classes are others, or where nobody can say which output is which class.
    """
    try:
        network, how = in_order_of(network, classes)
    except Undecided as error:
        raise UserError(
            f"{network.name}: {error}; name the folders so that they sort in the order of its outputs, as class01"
        ) from error
    except ValueError as error:
        raise UserError(f"{network.name}: {error}; give the data set that it was trained on") from error
    if tell and how != _SAME_CLASSES:
        say(f"{network.origin}: {how}")
    return network


class Undecided(ValueError):
    """Nobody can say which output of a network without names is which class."""


_SAME_CLASSES = "its classes are the data set's"


def in_order_of(network: Network, classes: Sequence[str]) -> tuple[Network, str]:
    """(The network with its outputs in the order of a data set's class names, how they were matched, for people).

    By name where the network has names. Where it has none, output n is the class folder n where the folders are the numbers
    from 0 on; of others it is the nth by name, as in torchvision's ImageFolder, if they cannot be counted otherwise.

    Raises ValueError, a sentence without an end, where the classes are others; Undecided where they cannot be told apart.
    """
    if network.classes is not None:
        if says := differing_classes(network.classes, classes):
            raise ValueError(says)
        place = {name: output for output, name in enumerate(network.classes)}
        order, how = [place[name] for name in classes], _SAME_CLASSES
    else:
        if network.outputs != len(classes):
            raise ValueError(f"it has {network.outputs} outputs without names, the data set has {len(classes)} classes")
        order, how = _order_without_names(classes)
    if order == list(range(len(classes))):
        return dataclasses.replace(network, classes=tuple(classes)), how
    if network.classes is not None:
        how += " in another order, and so its outputs were reordered"
    return dataclasses.replace(network, classes=tuple(classes), state=reordered(network.state, order)), how


def _order_without_names(classes: Sequence[str]) -> tuple[list[int], str]:
    """For each class the output that must be meant, and how that was found."""
    by_name = sorted(classes)
    numbers = [tuple(map(int, re.findall("[0-9]+", name))) for name in classes]
    if sorted(numbers) == [(number,) for number in range(len(classes))] and all(
        re.fullmatch("[0-9]+", c) for c in classes
    ):
        how = "it has no class names; output n is taken for the class folder n"
        if by_name != sorted(classes, key=int):
            how += ", not for the nth one by name"
        return [number for (number,) in numbers], how
    differ_in_numbers = len({re.sub("[0-9]+", "#", name) for name in classes}) == 1
    by_number = [name for _, name in sorted(zip(numbers, classes, strict=True))]
    if differ_in_numbers and (by_number != by_name or len(set(numbers)) < len(numbers)):
        raise Undecided(
            f"it has no class names, and the data set's classes come in one order by name ({_few(by_name)}) and in another by "
            f"number ({_few(by_number)})"
        )
    place = {name: output for output, name in enumerate(by_name)}
    return [place[name] for name in classes], (
        f"it has no class names; its outputs are taken for the classes sorted by name ({_few(by_name)})"
    )


def differing_classes(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """How a network's class names differ from a data set's, in whatever order, as a sentence; "" where they are the same."""
    only_theirs, only_ours = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    if not (only_theirs or only_ours):
        return ""
    if len(theirs) != len(ours):
        return f"it knows {len(theirs)} classes, the data set has {len(ours)}"
    # Names that look alike, an é of one or of two characters, are shown so that they do not.
    alike = {unicodedata.normalize("NFKC", name) for name in only_theirs} & {
        unicodedata.normalize("NFKC", name) for name in only_ours
    }
    show = ascii if alike else printable
    return f"it knows the classes {_few(only_theirs, show)}, the data set has {_few(only_ours, show)}"


def _few(names: Sequence[str], show: Callable[[str], str] = printable) -> str:
    shown = ", ".join(show(name) for name in names[:3])
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown


def check_weights(checkpoint: Checkpoint, path: Path) -> None:
    """Raise UserError unless a checkpoint's weights, and their average, are those of the network that it describes."""
    arch = "A" if checkpoint.arch == "A-LRN" else checkpoint.arch  # which have the same weights
    wanted = Description(arch, checkpoint.batch_norm, len(checkpoint.classes), checkpoint.crop)
    for state in (checkpoint.model, checkpoint.ema):
        if state is None:
            continue
        try:
            found = describe(state)
        except ValueError as error:
            raise UserError(f"checkpoint {path}: {error}") from error
        if found != wanted:
            raise UserError(
                f"checkpoint {path}: holds the weights of {found} and {found.classes} classes, but says that they are "
                f"those of {wanted} and {wanted.classes} classes"
            )


def _from_checkpoint(spec: str) -> Network:
    path = Path(spec)
    checkpoint = checkpoints.load(path)
    check_weights(checkpoint, path)
    try:
        state = as_float32(checkpoint.ema or checkpoint.model)
    except ValueError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
    red, green, blue = checkpoint.mean_rgb
    red_std, green_std, blue_std = checkpoint.std_rgb
    return Network(
        name=spec,
        arch=checkpoint.arch,
        batch_norm=checkpoint.batch_norm,
        crop=checkpoint.crop,
        classes=tuple(checkpoint.classes),
        mean_rgb=(red, green, blue),
        std_rgb=(red_std, green_std, blue_std),
        train_scale=_train_scale(checkpoint, path),
        validation_scale=_validation_scale(checkpoint, path),
        state=state,
    )


def _train_scale(checkpoint: Checkpoint, path: Path) -> tuple[int, int] | None:
    if checkpoint.config.get("crop_mode") == "random-resized":
        return None
    with contextlib.suppress(ValueError):
        lowest, highest = parse_scale(str(checkpoint.config.get("train_scale")))
        if checkpoint.crop <= lowest <= highest:
            return lowest, highest
    raise UserError(
        f"checkpoint {path}: its configuration names no train_scale that its network could have been trained at"
    )


def _validation_scale(checkpoint: Checkpoint, path: Path) -> int | None:
    scale = checkpoint.config.get("validation_scale")
    if scale is None or (isinstance(scale, int) and checkpoint.crop <= scale < 2**63):
        return scale
    raise UserError(
        f"checkpoint {path}: its configuration's validation_scale is not a number of pixels from its crop on"
    )


def _from_torchvision(spec: str) -> Network:
    path = Path(spec.removeprefix(TORCHVISION))
    try:
        content = checkpoints.read_file(path, else_is="a state dict that torch.save has written")
        if checkpoints.is_own(content):
            raise ValueError(f"it is a checkpoint of this trainer; give {path}, without {TORCHVISION}")
        state, entry = unwrapped(content)
        description = describe(state)
        state = as_float32(state)
        classes, mean_rgb = _described(content, description.classes) or (None, TORCHVISION_MEAN_RGB)
    except ValueError as error:
        raise UserError(f"{spec}: {error}") from error
    return Network(
        name=spec,
        arch=description.arch,
        batch_norm=description.batch_norm,
        crop=description.crop,
        classes=classes,
        mean_rgb=mean_rgb,
        std_rgb=TORCHVISION_STD_RGB,
        train_scale=None,
        state=state,
        entry=entry,
    )


def _described(content: object, outputs: int) -> tuple[tuple[str, ...] | None, RGB] | None:
    """Class names and mean of a state dict that export.py has written; None for others. Raises ValueError where they are bad."""
    metadata = getattr(content, "_metadata", None)
    described = metadata.get(DESCRIPTION) if isinstance(metadata, dict) else None
    if described is None:
        return None
    with contextlib.suppress(TypeError, ValueError, KeyError, RecursionError):
        if isinstance(described, str):  # of a safetensors file
            described = json.loads(described)
        red, green, blue = map(float, described["mean_rgb"])
        names = described["classes"] and tuple(described["classes"])
        are_names = not names or (
            len(set(names)) == len(names) == outputs and all(isinstance(name, str) for name in names)
        )
        if are_names and all(0 <= value <= 255 for value in (red, green, blue)):
            return names or None, (red, green, blue)
    raise ValueError("its class names or its mean are not those of its network; export it anew")
