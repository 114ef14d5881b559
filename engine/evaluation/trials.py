"""Networks tested on a data set's validation images: posteriors computed where no file has them yet, averaged, counted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from common.errors import TrainingError, UserError
from common.progress import say
from common.ranks import on_rank_0
from engine.data import Data
from engine.evaluation.inference import answers, center_crops, viewing_of
from engine.evaluation.posteriors import LOST, Hits, Weighted, count, digest, open_posteriors, pack
from engine.evaluation.protocols import PROTOCOLS, mean_over_views, parts_of
from engine.evaluation.row_files import Block, write_rows
from engine.networks import Network
from engine.precision import Precision
from model.dense import Dense
from model.vgg import VGG


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A network tested in one way."""

    network: Network
    """With its outputs in the order of the data set's classes (engine.networks.for_data)."""
    protocol: str
    """As evaluate.py's --protocol."""
    scales: tuple[int, ...]
    """Q of each rescaled image, in pixels; their posteriors are averaged."""
    flip: str = "auto"
    """As evaluate.py's --flip."""


class Evaluator:
    """Tests networks on the validation images of a data set, on any number of ranks; every rank must ask for the same."""

    def __init__(self, data: Data, *, batch_size: int, folder: Path) -> None:
        """batch_size: images of the crop's size that are computed together. folder: where posteriors are kept."""
        assert data.manifest
        self._data, self._batch_size, self._folder, self._manifest = data, batch_size, folder, data.manifest
        self._labels = data.manifest.val.read(np.arange(len(data.manifest.val))).labels
        self._digests: dict[str, str] = {}
        self._built: tuple[str, VGG] | None = None
        self._images_computed, self._seconds_computing = 0, 0.0

    @property
    def is_main(self) -> bool:
        return self._data.ranks.is_main

    @property
    def images_per_second(self) -> float | None:
        """Of all ranks, each image counted once in each pass over the set; None where nothing was computed."""
        return round(self._images_computed / self._seconds_computing, 2) if self._images_computed else None

    def check(self, trial: Trial) -> None:
        """Raise UserError unless the network takes images of the trial's scales."""
        network = trial.network
        if too_small := [scale for scale in trial.scales if scale < network.crop]:
            raise UserError(
                f"{network.name}: takes images of {network.crop} pixels at least and cannot be tested at a scale of "
                f"{too_small[0]}; give larger --scales"
            )

    def hits(self, trials: Sequence[Trial]) -> Hits:
        """Count the mean of the trials' posteriors. Raises UserError, TrainingError."""
        weights_and_paths = []
        for trial in trials:
            protocols = parts_of(trial.protocol)
            for protocol in protocols:
                for scale in trial.scales:
                    path = self._computed(trial.network, protocol, scale, trial.flip)
                    weights_and_paths.append((1 / (len(trials) * len(protocols) * len(trial.scales)), path))
        shape = self._shape(trials[0].network)
        return on_rank_0(self._data.ranks, lambda: self._count(weights_and_paths, shape))

    def _count(self, weights_and_paths: Sequence[tuple[float, Path]], shape: tuple[int, int]) -> Hits:
        parts = []
        for weight, path in weights_and_paths:
            posteriors = open_posteriors(path, shape)
            if posteriors is None:
                raise TrainingError(f"{path}: was there a moment ago and is not any more; start the same command again")
            parts.append(Weighted(weight=weight, posteriors=posteriors))
        return count(parts, self._labels, lost_before=self._manifest.val_lost)

    def _computed(self, network: Network, protocol: str, scale: int, flip: str) -> Path:
        """The file with the posteriors of one pass over the validation images, written now unless it is there."""
        flipped = PROTOCOLS[protocol].flip if flip == "auto" else flip == "on"
        ranks, shape = self._data.ranks, self._shape(network)
        path, is_there = on_rank_0(ranks, lambda: self._look_up(network, protocol, scale, flipped))
        if is_there:
            if ranks.is_main:
                say(f"{network.name}: {protocol}, Q = {scale}: from {path}")
            return path
        model = self._model(network)
        began = perf_counter()
        try:
            blocks = self._blocks(network, model, protocol, scale, flipped)
            write_rows(path, shape, np.float16, blocks, ranks, missing=LOST)
        except torch.OutOfMemoryError as error:
            if self._batch_size == 1:
                raise TrainingError(
                    "the GPU's memory is too small even for one image at a time; end what else uses it (nvidia-smi shows it), "
                    f"or compute scale {scale} with --device cpu"
                ) from error
            raise TrainingError(
                f"the GPU's memory is too small for {self._batch_size} images at a time; halve it with "
                f"--batch-size {self._batch_size // 2}"
            ) from error
        self._images_computed += len(self._labels)
        self._seconds_computing += perf_counter() - began
        return path

    def _look_up(self, network: Network, protocol: str, scale: int, flipped: bool) -> tuple[Path, bool]:
        if network.name not in self._digests:
            self._digests[network.name] = digest(network)
        mirrored, precision = "-flip" if flipped else "", self._data.precision.name
        name = f"{network.arch}-{self._digests[network.name]}-{self._manifest.fingerprint}-{protocol}-Q{scale}"
        path = self._folder / f"{name}{mirrored}-{precision}.npy"
        return path, open_posteriors(path, self._shape(network)) is not None

    def _shape(self, network: Network) -> tuple[int, int]:
        return len(self._labels), network.outputs

    def _model(self, network: Network) -> VGG:
        """The network on the device; the last one stays there, which is often the next one too."""
        if self._built is None or self._built[0] != network.name:
            self._built = None  # before the next one takes memory
            self._built = network.name, network.build(self._data.ranks.device)
        return self._built[1]

    def _blocks(self, network: Network, model: VGG, name: str, scale: int, flipped: bool) -> Iterator[Block]:
        protocol, data, viewing = PROTOCOLS[name], self._data, viewing_of(network, scale, self._batch_size)
        # Sizes change from batch to batch: to search for the fastest kernel of each would not pay.
        torch.backends.cudnn.benchmark = not protocol.whole
        batches, images = data.whole_batches(viewing, "val") if protocol.whole else center_crops(data, viewing)
        softmax = posteriors_of(Dense(model) if protocol.dense else model, data.precision)

        def compute(images: Tensor) -> Tensor:
            return pack(
                mean_over_views(softmax, protocol.views(images, network.crop), flip=flipped, pixels=viewing.pixels)
            )

        yield from answers(network, data, "val", batches, images, compute, f"{network.name}: {name}, Q = {scale}")


def posteriors_of(network: Callable[[Tensor], Tensor], precision: Precision) -> Callable[[Tensor], Tensor]:
    """A network that gives logits → one that gives posteriors, float32; NaN for an image with a logit that is not finite."""

    def compute(images: Tensor) -> Tensor:
        with precision.autocast():
            logits = network(images)
        # In float16 a logit can be -inf, too small for it, and its posterior would pass for 0.
        return torch.where(logits.isfinite().all(dim=1, keepdim=True), logits.float().softmax(dim=1), torch.nan)

    return compute
