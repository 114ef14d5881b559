"""Trained networks to use or to start from: this trainer's checkpoints, and torchvision's state dicts."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from engine import checkpoint as checkpoints
from engine.config import Config, parse_scale
from model.vgg import VGG
from model.weights import describe, from_torchvision, initialise_from, load_all

TORCHVISION = "torchvision:"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A trained network."""

    name: str
    """What it was loaded from, as it was given."""
    arch: str
    batch_norm: bool
    crop: int
    """Side of the square input in pixels."""
    classes: tuple[str, ...]
    """Class names in label order; torchvision's files have none: numbers from 0 on."""
    mean_rgb: tuple[float, float, float]
    """What is subtracted from the pixels (0–255) of its input."""
    train_scale: tuple[int, int] | None
    """Lowest and highest scale S that it was trained at, in pixels; None where nobody says."""
    state: dict[str, torch.Tensor]
    """State dict with torchvision's keys, on the CPU; its input is pixels in 0–255 less the mean."""

    def build(self, device: torch.device) -> VGG:
        """The network on a device, in evaluation mode and channels_last."""
        with torch.device("meta"):  # no initial weights, which would only be overwritten
            model = VGG(self.arch, classes=len(self.classes), crop=self.crop, batch_norm=self.batch_norm)
        model.to_empty(device=device).load_state_dict(self.state)
        return model.to(memory_format=torch.channels_last).eval()


def load_network(spec: str) -> Network:
    """The network in a checkpoint, spec being its path, or in a state dict of torchvision's, torchvision:PATH.

    Of a checkpoint with an average of the weights (--ema), the average. Raises UserError: no such file, or a damaged or
    foreign one.
    """
    return _from_torchvision(spec) if spec.startswith(TORCHVISION) else _from_checkpoint(spec)


def initial_network(config: Config) -> Network | None:
    """The network that --weights or --init-from names; None where neither is given. Raises UserError as load_network does."""
    spec = config.weights or config.init_from
    return load_network(spec) if spec else None


def start_from(network: Network, model: VGG, config: Config) -> str:
    """Give a fresh model the weights that --weights or --init-from asks for. Returns what was done, for people.

    Raises UserError where the network's layers do not fit.
    """
    try:
        if config.weights:
            if load_all(model, network.state):
                return (
                    f"all layers but the last are those of {network.name}; that one is new, since there are other classes "
                    f"({len(network.classes)} there)"
                )
            return f"all layers are those of {network.name}"
        copied = dict.fromkeys(name.rpartition(".")[0] for name in initialise_from(model, network.state))
        return f"{', '.join(copied)} are those of {network.name}, the other layers are new ({config.init})"
    except ValueError as error:
        flag = "--weights" if config.weights else "--init-from"
        raise UserError(f"{flag} {network.name}: {error}") from error


def _from_checkpoint(spec: str) -> Network:
    checkpoint = checkpoints.load(Path(spec))
    red, green, blue = checkpoint.mean_rgb
    return Network(
        name=spec,
        arch=checkpoint.arch,
        batch_norm=checkpoint.batch_norm,
        crop=checkpoint.crop,
        classes=tuple(checkpoint.classes),
        mean_rgb=(red, green, blue),
        train_scale=parse_scale(checkpoint.config["train_scale"]),
        state=checkpoint.ema or checkpoint.model,
    )


def _from_torchvision(spec: str) -> Network:
    path = spec.removeprefix(TORCHVISION)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        description = describe(state)
    except FileNotFoundError as error:
        raise UserError(f"{spec}: no such file") from error
    except ValueError as error:
        raise UserError(f"{spec}: {error}") from error
    except Exception as error:  # torch.load raises whatever it stumbles over
        raise UserError(f"{spec}: damaged, or not a state dict that torch.save has written") from error
    state, mean_rgb = from_torchvision(state)
    return Network(
        name=spec,
        arch=description.arch,
        batch_norm=description.batch_norm,
        crop=description.crop,
        classes=tuple(map(str, range(description.classes))),
        mean_rgb=mean_rgb,
        train_scale=None,
        state=state,
    )
