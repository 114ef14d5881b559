"""What a trained network sees in image files, through the same decoder, rescale and centre crop as a validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from engine.evaluation.inference import not_finite
from engine.networks import Network
from engine.precision import Precision
from pipeline.dali.graph import GraphOptions
from pipeline.dali.loader import DaliLoader
from pipeline.dataset.headers import read_header
from pipeline.dataset.scan import build_table
from pipeline.dataset.table import FileTable
from pipeline.plan.samples import LOST_LABEL, Samples
from pipeline.plan.validation import ValidationPlan

_MOST_IN_A_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the network says of one image."""

    path: Path
    labels: list[int]
    """The likeliest classes, best first; empty where the image cannot be decoded."""
    probabilities: list[float]
    """Of these classes."""
    reason: str
    """Why it cannot be decoded, else empty."""


@torch.no_grad()
def predict(
    network: Network,
    paths: Sequence[Path],
    *,
    top: int,
    scale: int,
    device: torch.device,
    precision: Precision,
    threads: int,
) -> list[Prediction]:
    """The `top` likeliest classes of each image, in the order of the paths.

    scale: the shorter side after the rescale, in pixels, at least the network's crop. threads: DALI's CPU threads.
    Raises UserError where no image can be decoded, TrainingError where the network has no finite answer for one that can.
    """
    headers = [read_header(path) for path in paths]
    reasons = {index: header.reason for index, header in enumerate(headers) if header.reason}
    good = [index for index in range(len(paths)) if index not in reasons]
    if not good:
        raise _none_can_be_decoded(reasons, paths)
    rows = build_table([(str(paths[index].absolute())[1:], 0, headers[index]) for index in good])
    plan = ValidationPlan(table=FileTable(Path("/"), rows), crop=network.crop, scale=scale, mean_rgb=network.mean_rgb)

    def lose(samples: Samples, dead: np.ndarray, why: list[str]) -> None:
        plan.lose(samples, dead)
        reasons.update((good[row], reason) for row, reason in zip(samples.rows.tolist(), why, strict=True))
        if len(plan.lost_rows) == len(good):
            raise _none_can_be_decoded(reasons, paths)

    batch_size = min(len(good), _MOST_IN_A_BATCH)
    batches = DaliLoader(
        lambda skip: plan.batches(rank=0, world_size=1, batch_size=batch_size, skip=skip),
        GraphOptions(
            crop=network.crop,
            std_rgb=network.std_rgb,
            device_id=device.index,
            decoder="gpu" if device.type == "cuda" else "cpu",
            hw_decoder_load=0.0,  # as a validation has it: an answer must not depend on the other images (engine/data.py)
            half=precision.half_images,
            threads=threads,
        ),
        lose=lose,
        batch_size=batch_size,
    )
    model = network.build(device)
    likeliest: dict[int, tuple[list[int], list[float]]] = {}
    for step in range(plan.steps(world_size=1, batch_size=batch_size)):
        images, marks = next(batches)
        with precision.autocast():
            logits = model(images)
        best = logits.float().softmax(dim=1).topk(min(top, network.outputs), dim=1)
        finite = logits.isfinite().all(dim=1)
        shown = good[step * batch_size : (step + 1) * batch_size]  # the rows behind them fill up the batch
        for index, mark, is_finite, labels, probabilities in zip(
            shown, marks.tolist(), finite.tolist(), best.indices.tolist(), best.values.tolist(), strict=False
        ):
            if mark != LOST_LABEL:
                if not is_finite:
                    raise not_finite(network, str(paths[index]), precision)
                likeliest[index] = (labels, probabilities)
    return [
        Prediction(path=path, labels=labels, probabilities=probabilities, reason=reasons.get(index, ""))
        for index, path in enumerate(paths)
        for labels, probabilities in [likeliest.get(index, ([], []))]
    ]


def _none_can_be_decoded(reasons: dict[int, str], paths: Sequence[Path]) -> UserError:
    index, reason = min(reasons.items())
    others = f", nor can the {len(reasons) - 1} others" if len(reasons) > 1 else ""
    return UserError(f"{paths[index]}: cannot be decoded ({reason}){others}; give JPEG, PNG or other image files")
