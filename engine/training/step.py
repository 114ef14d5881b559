"""The training step: forward, backward, all-reduce, update. And what makes it fast: torch.compile."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.files import cache_folder
from common.progress import say
from engine.precision import Precision
from engine.training.data_parallel import average_over_ranks
from engine.training.mixing import Mixing
from engine.training.shared_layers import SharedLayers
from engine.training.weight_average import WeightAverage
from model.dropout import Dropout
from pipeline.dali.loader import Batch

_BETWEEN_STEPS, _COMPUTING, _UPDATING = range(3)


class TrainStep:
    """One optimizer step over one global batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        precision: Precision,
        passes: int,
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
        average: WeightAverage | None = None,
        shared: SharedLayers | None = None,
        dropout: Sequence[Dropout] = (),
    ) -> None:
        """model: the DDP module, or the bare one on a single rank. passes: micro-batches whose gradients are accumulated.

        label_smoothing: share of the target that goes to all classes alike. mixing: of each pass's images and targets. average:
        follows the weights. shared: the layers of the model that other ranks have parts of. dropout: the layers of the model
        that draw masks by the samples' numbers.
        """
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._precision = precision
        self._passes = passes
        self._label_smoothing = label_smoothing
        self._mixing = mixing
        self._average = average
        self._shared = shared
        self._dropout = dropout
        # Each rank's batch normalisation sees its own images: its statistics are averaged, so that they are those of all
        # images, and the ranks agree on them whenever they validate or save.
        self._statistics = [
            (layer, buffer)
            for layer in model.modules()
            for buffer in layer.buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        self._parallel = model if isinstance(model, DistributedDataParallel) else None
        counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
        # Of one type each, so that one kernel copies all of them.
        statistics = [buffer for _, buffer in self._statistics]
        self._buffers = [buffers for buffers in (statistics, counters) if buffers]
        self._buffers_before = [[buffer.clone() for buffer in buffers] for buffers in self._buffers]
        self._phase = _BETWEEN_STEPS
        self.left_alone: Sequence[Tensor] = ()
        """Weights that the next steps do not change, nor their momenta."""

    def __call__(
        self,
        batches: Iterator[Batch],
        *,
        first_sample: int = 0,
        before_gradients: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Take `passes` micro-batches and update the weights. Returns this rank's mean loss, a scalar on the device.

        The loss is that of the targets that are learned: smoothed and mixed. first_sample: the number of the first image in the
        training, of which dropout and mixing are functions; the others follow.
        before_gradients: called before the gradients travel to the other ranks; it raises where the step is to be given up.
        """
        losses = []
        for before, buffers in zip(self._buffers_before, self._buffers, strict=True):
            torch._foreach_copy_(before, buffers)
        self._phase = _COMPUTING
        for number in range(1, self._passes + 1):
            images, labels = next(batches)
            for dropout in self._dropout:
                dropout.at_sample(first_sample)
            own_share = None
            if self._mixing:  # outside of the model, whose compiled graph would be made anew for each rectangle
                images, own_share = self._mixing(images, first_sample)
            first_sample += len(images)
            if self._shared:
                self._shared.last_pass = number == self._passes
            with self._all_reduce(now=number == self._passes):
                loss = self._loss(images, labels, own_share) / self._passes
                if number == self._passes:
                    before_gradients()
                    if self._parallel and images.is_cuda:
                        # NCCL's work is queued ahead of the host: no way back, and perhaps no end.
                        self._phase = _UPDATING
                self._scaler.scale(loss).backward()
            losses.append(loss.detach())
        self._phase = _UPDATING
        if self._shared:
            self._shared.finish_gradients(scaled=self._scaler.is_enabled())
        for weight in self.left_alone:
            weight.grad = None  # computed and sent all the same: DDP's static graph has no others
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        # Those that layers keep are the same on all ranks, and their mean could be rounded.
        moving = [buffer for layer, buffer in self._statistics if layer.training]
        if moving and self._parallel:
            average_over_ranks(moving)
        if self._average:
            self._average.update()
        self._phase = _BETWEEN_STEPS
        return torch.stack(losses).sum()

    def give_up(self) -> bool:
        """After an exception: undo what an unfinished step has changed. Returns whether all is as after the last whole step."""
        if self._phase == _COMPUTING:
            self._optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffers, before in zip(self._buffers, self._buffers_before, strict=True):
                    torch._foreach_copy_(buffers, before)
            self._phase = _BETWEEN_STEPS
        return self._phase == _BETWEEN_STEPS

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """Compile; run forward and backward, without an update of weights or of batch normalisation's statistics.

        DDP chooses its buckets anew after the first backward pass or, with a static graph, the second. With these passes out
        of the way, every step of a run adds gradients up in the same order, the first step after a resume too: a resumed run
        stays bit-identical, on three ranks and more as well. An error leaves nothing behind, either.
        """
        before = [buffer.clone() for buffer in self._model.buffers()]
        try:
            for _ in range(2 if self._parallel else 1):
                self._loss(images, labels).backward()
                if self._shared:
                    self._shared.finish_gradients(scaled=False)
        finally:
            for buffer, value in zip(self._model.buffers(), before, strict=True):
                buffer.copy_(value)
            self._optimizer.zero_grad(set_to_none=True)

    def _loss(self, images: Tensor, labels: Tensor, own_share: float | None = None) -> Tensor:
        """own_share: of mixed images' own labels in their targets, as Mixing has it."""
        with self._precision.autocast():
            logits = self._model(images)
        loss_of = functools.partial(F.cross_entropy, logits.float(), label_smoothing=self._label_smoothing)
        if own_share is None:
            return loss_of(labels)
        return own_share * loss_of(labels) + (1 - own_share) * loss_of(labels.roll(1))

    def _all_reduce(self, *, now: bool) -> AbstractContextManager:
        return nullcontext() if now or not self._parallel else self._parallel.no_sync()


def compile_model(model: nn.Module, *, choice: str, mode: str, device: torch.device, is_main: bool) -> bool:
    """Compile a model in place, before DDP wraps it. choice: "auto" (on for CUDA), "on" or "off". Returns whether it was.

    Compiled inside DDP, the backward pass is cut at DDP's buckets, so that the all-reduce of FC6 starts early; and the
    state dict's keys stay as they are. Without a C++ compiler (a C compiler, for CUDA) the model stays eager, with a warning.

    What was compiled is kept in the user's cache, where a machine that shares the home finds it, and this one after it was
    started anew: torch's own place is the temporary folder. Not in OUT, which may have come from somebody else: it is code.
    """
    if choice == "off" or (choice == "auto" and device.type == "cpu"):
        return False
    compilers = ("CC", "gcc", "clang", "cc") if device.type == "cuda" else ("CXX", "g++", "clang++", "c++")
    if not any(shutil.which(os.environ.get(name, name)) for name in compilers):
        if is_main:
            say(
                f"warning: torch.compile needs a compiler ({' or '.join(compilers[1:])}) and finds none: going on without it"
            )
        return False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "torchinductor"))
    model.compile(mode=None if mode == "default" else mode)
    return True
