"""A training as everyone writes it with torchvision and PyTorch: nothing of this project in it but the network."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.usual_transforms import Matrix, training_transform, validation_transform
from common.progress import say
from engine.config import Config
from model.vgg import build

_WORKERS = 2


def train_plainly(config: Config, mean_rgb: Sequence[float], colour_shift: Matrix) -> list[dict]:
    """Train with the configuration's hyper-parameters in float32, the cosine schedule. Returns the validations' results.

    As build() initialises it, the network begins with the weights that train.py's begins with. An epoch leaves out the images
    that do not fill a batch. mean_rgb, colour_shift: as training_transform() takes them.
    Each result: {"epoch", "loss" (mean cross-entropy, nats), "top1" (0–1)}.
    """
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    data, batch_size = Path(config.data), config.batch_size
    training_set = ImageFolder(data / "train", training_transform(config.scale, config.crop, mean_rgb, colour_shift))
    validation_set = ImageFolder(data / "val", validation_transform(config.validation_scale, config.crop, mean_rgb))
    training = DataLoader(
        training_set, batch_size, shuffle=True, drop_last=True, num_workers=_WORKERS, persistent_workers=True
    )
    validation = DataLoader(validation_set, batch_size, num_workers=_WORKERS)

    model = build(
        config.arch,
        classes=len(training_set.classes),
        crop=config.crop,
        dropout=config.dropout,
        init=config.init,
        device=device,
        seed=config.seed,
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    warm_up, steps = round(config.warmup_epochs * len(training)), config.epochs * len(training)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / (warm_up + 1)
            if step < warm_up
            else 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
        ),
    )

    history = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        for images, labels in training:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()

        model.eval()
        loss_sum, correct = 0.0, 0
        with torch.no_grad():
            for images, labels in validation:
                logits, labels = model(images.to(device)), labels.to(device)
                loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
                correct += int((logits.argmax(dim=1) == labels).sum())
        count = len(validation_set)
        history.append({"epoch": epoch, "loss": loss_sum / count, "top1": correct / count})
        say(f"plain loop, epoch {epoch}: validation top-1 {correct / count:.2%}  loss {loss_sum / count:.3f}")
    return history
