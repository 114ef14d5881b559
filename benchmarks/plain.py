"""What everyone writes with torchvision and PyTorch, to compare with: transforms, and a training. Of this project it has only
the network."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from common.progress import say
from engine.config import Config
from engine.precision import Precision
from engine.training.assembly import network_of
from pipeline.dali.loader import Batch

Matrix = Sequence[Sequence[float]]
COLOUR_SHIFT_SIGMA = 0.1  # section 3.1 of the paper, after AlexNet
_WORKERS = 2


class ColourShift(nn.Module):
    """AlexNet's colour shift: one vector added to a [3, height, width] image."""

    def __init__(self, shift_of_alpha: Matrix) -> None:
        """shift_of_alpha: [3, 3], the eigenvectors times their eigenvalues, in 0–255 pixels."""
        super().__init__()
        self._shift_of_alpha = torch.tensor(shift_of_alpha)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + (self._shift_of_alpha @ (torch.randn(3) * COLOUR_SHIFT_SIGMA))[:, None, None]


def training_transform(config: Config, mean_rgb: Sequence[float], colour_shift: Matrix) -> v2.Compose:
    """A PIL image, or a uint8 tensor [3, h, w], → float32 [3, crop, crop]: rescaled and cropped, flipped, shifted.

    Crops are the configuration's. mean_rgb: subtracted, in 0–255. colour_shift: ColourShift's matrix. Draws from torch's
    generator.
    """
    lowest, highest = config.scale
    crops: list[nn.Module]
    if config.crop_mode == "random-resized":
        crops = [v2.RandomResizedCrop(config.crop, scale=config.area, ratio=config.aspect)]
    else:
        rescale = v2.Resize(lowest) if lowest == highest else v2.RandomShortestSize(list(range(lowest, highest + 1)))
        crops = [rescale, v2.RandomCrop(config.crop)]
    return v2.Compose(
        [
            *crops,
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32),
            ColourShift(colour_shift),
            v2.Normalize(mean=list(mean_rgb), std=list(config.std_rgb)),
        ]
    )


def validation_transform(config: Config, mean_rgb: Sequence[float]) -> v2.Compose:
    """The same without anything random: rescaled to the validation scale, the centre crop, the mean and the std taken out."""
    return v2.Compose(
        [
            v2.Resize(config.test_scale),
            v2.CenterCrop(config.crop),
            v2.ToImage(),
            v2.ToDtype(torch.float32),
            v2.Normalize(mean=list(mean_rgb), std=list(config.std_rgb)),
        ]
    )


def usual_step(
    network: nn.Module, config: Config, precision: Precision, *, fused: bool | None = None
) -> Callable[[Callable, Batch], None]:
    """The step that everyone writes; it is given the network or its compiled form, and a batch."""
    optimizer = sgd(network, config, fused=fused)
    scaler = precision.grad_scaler()

    def step(forward: Callable, batch: Batch) -> None:
        images, labels = batch
        with precision.autocast():
            loss = F.cross_entropy(forward(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def sgd(network: nn.Module, config: Config, *, fused: bool | None = None) -> torch.optim.SGD:
    """fused: None leaves torch its default, which on a GPU updates many tensors at a time; False would forbid that, too."""
    groups: list[dict] = [{"params": list(network.parameters())}]
    if config.weight_decay_on == "weights":
        decaying = {layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        others = [weight for weight in network.parameters() if weight not in decaying]
        groups = [{"params": list(decaying)}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def mixing_transform(config: Config, classes: int) -> Callable[[list], tuple[torch.Tensor, torch.Tensor]]:
    """What makes a batch of a list of samples: with torchvision's MixUp, CutMix or either, where the configuration says so."""
    wanted = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in wanted if alpha]
    if not kinds:
        return default_collate
    mix = v2.RandomChoice(kinds)
    return lambda samples: mix(*default_collate(samples))


def train_plainly(config: Config, mean_rgb: Sequence[float], colour_shift: Matrix) -> list[dict]:
    """Train with the configuration's hyper-parameters in float32, the cosine schedule. Returns the validations' results.

    As build() initialises it, the network begins with the weights that train.py's begins with. An epoch leaves out the images
    that do not fill a batch. With --ema, its average is validated. mean_rgb, colour_shift: as training_transform() takes them.
    Each result: {"epoch", "loss" (mean cross-entropy, nats), "top1" (0–1)}.
    """
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    data, batch_size = Path(config.data), config.batch_size
    training_set = ImageFolder(data / "train", training_transform(config, mean_rgb, colour_shift))
    validation_set = ImageFolder(data / "val", validation_transform(config, mean_rgb))
    training = DataLoader(
        training_set,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=_WORKERS,
        persistent_workers=True,
        multiprocessing_context="fork",
        collate_fn=mixing_transform(config, len(training_set.classes)),
    )
    validation = DataLoader(validation_set, batch_size, num_workers=_WORKERS)

    model = network_of(config, classes=len(training_set.classes), device=device)
    average = None
    if config.ema:
        average = AveragedModel(model, avg_fn=functools.partial(_average, config.ema), use_buffers=True)
    validated = average or model
    optimizer = sgd(model, config)
    warm_up, steps = round(config.warmup_epochs * len(training)), config.epochs * len(training)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    history = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        for images, labels in training:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if average:
                average.update_parameters(model)

        validated.eval()
        loss_sum, correct = 0.0, 0
        with torch.no_grad():
            for images, labels in validation:
                logits, labels = validated(images.to(device)), labels.to(device)
                loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
                correct += int((logits.argmax(dim=1) == labels).sum())
        count = len(validation_set)
        history.append({"epoch": epoch, "loss": loss_sum / count, "top1": correct / count})
        say(f"plain loop, epoch {epoch}: validation top-1 {correct / count:.2%}  loss {loss_sum / count:.3f}")
    return history


def _average(decay: float, average: torch.Tensor, weights: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """As train.py's --ema forgets the initial weights."""
    decay = min(decay, (1 + int(steps)) / (10 + int(steps)))
    return decay * average + (1 - decay) * weights
