"""What a run says: a bar or plain lines for people, metrics.jsonl, dashboards and pictures. Rank 0 only.

None of it can end a run: what fails is warned of once, and the run goes on.
"""

import collections
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from common.files import open_own
from common.progress import Bar, clock, printable, say
from engine.config import Config
from engine.evaluation.accuracy import Accuracy
from engine.monitoring.confusion_matrix import draw_confusion
from engine.monitoring.curves import draw_curves
from engine.monitoring.dashboards import TensorBoard, WandB
from engine.monitoring.gpu_curves import GpuCurves
from engine.monitoring.memory_profile import PROFILE, STEPS, write_memory
from engine.monitoring.pictures import as_pictures, grid
from engine.monitoring.run_files import METRICS, drop_records_after

IMAGES_SHOWN = 32
"""Training images that a run puts on its dashboards when it starts."""
_COLUMNS = 8
_MOST_FAILURES = 3
"""In a row, of what is not tried again thereafter: each try may take its time."""
_FIGURES, _CURVES, _TERMINAL = METRICS, "curves.png", "the terminal"


class RunLog:
    """A context manager; each method takes plain figures and is called only where the device was synchronised anyway."""

    def __init__(
        self,
        config: Config,
        *,
        steps_done: int,
        total_steps: int,
        top1: float | None,
        classes: Sequence[str],
        mean_rgb: tuple[float, float, float],
        gpus: Sequence[str] | None,
        machine_share: float = 1.0,
    ) -> None:
        """steps_done: of the checkpoint that this run goes on from; records after it are dropped, they will come again.

        top1: of the last validation so far, if there was one. mean_rgb: of the images that images() gets. gpus: UUIDs of those
        whose power, utilisation and memory are recorded too; None: those that CUDA_VISIBLE_DEVICES leaves. machine_share:
        of the run's images, what the ranks of this machine take, 0–1. Raises UserError where --wandb cannot start.
        """
        self._out, self._std_rgb = config.out, config.std_rgb
        self._total_steps, self._top1, self._classes, self._mean_rgb = total_steps, top1, classes, mean_rgb
        self._failures: collections.Counter[str] = collections.Counter()
        self._warned: set[str] = set()
        self._first_advance: float | None = None
        self._first_step = steps_done + 1
        self._try(_FIGURES, lambda: drop_records_after(config.out / METRICS, steps_done))
        self._metrics = _Lines(config.out / METRICS)
        self._dashboards: list[TensorBoard | WandB] = []
        self._try(TensorBoard.NAME, lambda: self._dashboards.append(TensorBoard(config, steps_done)))
        if config.wandb:
            self._dashboards.append(WandB(config))
        self._gpu_curves = GpuCurves(gpus)
        self._metered_share = machine_share if gpus else None
        self._steps_to_profile = STEPS if config.profile_memory else 0
        self._on_terminal = sys.stderr.isatty()
        self._bar = Bar(total=total_steps, done=steps_done, unit="steps")

    def __enter__(self) -> "RunLog":
        self._try("the GPUs' curves", self._gpu_curves.start)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._steps_to_profile:  # the run ends before, perhaps since memory does not suffice
            self._write_memory()
        self._try(_FIGURES, self._metrics.close)
        for dashboard in self._dashboards:
            self._try(dashboard.NAME, functools.partial(dashboard.close, failed=kind is not None))
        self._try("the GPUs' curves", self._gpu_curves.stop)
        self._try(_TERMINAL, self._bar.close)

    def _try(self, what: str, action: Callable[[], object]) -> None:
        """The one place where what only shows a run may fail, in whatever way its package has."""
        if self._failures[what] >= _MOST_FAILURES and what != _FIGURES:
            return
        try:
            action()
            self._failures[what] = 0
        except Exception as error:
            self._failures[what] += 1
            if what in self._warned:
                return
            self._warned.add(what)
            cause = printable(
                " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
            )
            with contextlib.suppress(Exception):  # the terminal itself
                say(f"warning: {what} cannot be written ({cause}); the training goes on")

    def advance(self) -> None:
        """One step was launched: moves the bar, costs no synchronisation."""
        self._try(_TERMINAL, self._bar.advance)
        if self._first_advance is None:
            self._first_advance = time.monotonic()
            self._gpu_curves.count_anew()  # without the start-up
        if self._steps_to_profile:
            self._steps_to_profile -= 1
            if not self._steps_to_profile:
                self._write_memory()

    def train(
        self,
        *,
        step: int,
        epoch: float,
        loss: float,
        lr: float,
        images_per_second: float,
        data_wait: float,
        gpu_memory_gib: float | None,
        mfu: float | None = None,
        decoder_share: float | None = None,
    ) -> None:
        """Figures of the steps since the last call.

        data_wait: share of the time that the step waited for images, 0–1. gpu_memory_gib: most that torch has held so far. mfu:
        the images' FLOPs over what the GPUs could do at their highest rate, 0–1. decoder_share: of each batch, what the CPU
        decodes now, 0–1; None where it is not shared.
        """
        figures = {
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "images_per_second": images_per_second,
            "data_wait": data_wait,
        }
        if mfu is not None:
            figures["mfu"] = mfu
        if self._metered_share and (watts := self._gpu_curves.take_watts()):
            figures["images_per_joule"] = images_per_second * self._metered_share / watts
        if gpu_memory_gib is not None:
            figures["gpu_memory_gib"] = gpu_memory_gib
        if decoder_share is not None:
            figures["decoder_share"] = decoder_share
        self._record("train", step, **figures)
        if gpus := self._gpu_curves.take_means():
            self._on_dashboards(lambda dashboard: dashboard.scalars(step, gpus))
        self._try(_TERMINAL, lambda: self._tell(step, figures))

    def _tell(self, step: int, figures: dict[str, float]) -> None:
        parts = [
            f"loss {figures['loss']:.3f}",
            f"top-1 {self._top1:.1%}" if self._top1 is not None else "",
            f"{figures['images_per_second']:,.0f} images/s",
            f"MFU {figures['mfu']:.1%}" if "mfu" in figures else "",
            f"{figures['images_per_joule']:.3g} images/J" if "images_per_joule" in figures else "",
            f"data wait {figures['data_wait']:.0%}",
            f"CPU decodes {figures['decoder_share']:.0%}" if "decoder_share" in figures else "",
            f"lr {figures['lr']:.1e}",
            f"memory {figures['gpu_memory_gib']:.1f} GiB" if "gpu_memory_gib" in figures else "",
        ]
        text, remaining = "  ".join(filter(None, parts)), self._remaining(step)
        if self._on_terminal:
            self._bar.tell(label=f"epoch {figures['epoch']:.2f}", beside=remaining, below=text)
        else:
            line = f"step {step:,}/{self._total_steps:,}  epoch {figures['epoch']:.2f}  {text}"
            say(f"{line}  {remaining}" if remaining else line)

    def _remaining(self, step: int) -> str:
        """The time that is left if the rest goes as what was done since the start: validations and checkpoints included."""
        done = step - self._first_step
        if self._first_advance is None or not done or step >= self._total_steps:
            return ""
        seconds = (time.monotonic() - self._first_advance) / done * (self._total_steps - step)
        return f"ETA {clock(seconds)}"

    def images(self, *, step: int, images: Tensor) -> None:
        """What the network was shown, as a loader gives it: [n, 3 or 4, height, width]."""
        sheet = grid(as_pictures(images, self._mean_rgb, self._std_rgb), _COLUMNS)
        self._on_dashboards(lambda dashboard: dashboard.picture(step, "train/images", sheet))

    def validation(self, *, step: int, epoch: int, accuracy: Accuracy, confusion: Tensor | None) -> None:
        """The result over the validation set after an epoch. confusion: as evaluate() counts it, where classes are few."""
        self._top1 = accuracy.top1
        self._gpu_curves.count_anew()  # the next line is of training alone
        self._record("validation", step, epoch=epoch, **asdict(accuracy))
        line = (
            f"epoch {epoch}: validation top-1 {accuracy.top1:.2%}  top-5 {accuracy.top5:.2%}  loss {accuracy.loss:.3f}  "
            f"({accuracy.images:,} images{f', {accuracy.lost:,} of them cannot be decoded' if accuracy.lost else ''})"
        )
        self._try(_TERMINAL, lambda: say(line))
        if confusion is not None:
            counts = confusion.cpu().numpy()
            self._try("the picture of confusions", lambda: self._draw_confusion(step, counts))

    def _write_memory(self) -> None:
        path = self._out / PROFILE

        def write() -> None:
            write_memory(path)
            say(f"{printable(str(path))}: https://pytorch.org/memory_viz shows it")

        self._try(PROFILE, write)

    def draw_curves(self) -> None:
        """Draw OUT/curves.png."""
        self._try(_CURVES, lambda: draw_curves(self._out))

    def _draw_confusion(self, step: int, counts: np.ndarray) -> None:
        picture = draw_confusion(counts, self._classes)
        self._on_dashboards(lambda dashboard: dashboard.picture(step, "validation/confusion", picture))

    def _record(self, kind: str, step: int, **figures: float) -> None:
        line = json.dumps({"kind": kind, "step": step, **figures, "time": time.time()})
        self._try(_FIGURES, lambda: self._metrics.write(line))
        self._on_dashboards(
            lambda dashboard: dashboard.scalars(step, {f"{kind}/{name}": value for name, value in figures.items()})
        )

    def _on_dashboards(self, action: Callable[[TensorBoard | WandB], None]) -> None:
        for dashboard in self._dashboards:
            self._try(dashboard.NAME, functools.partial(action, dashboard))


class _Lines:
    """A file to which lines are added; what the disk does not take waits for the next one, so that none is lost or cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._waiting = b""

    def write(self, line: str) -> None:
        """Raises OSError; the line is kept."""
        self._waiting += f"{line}\n".encode()
        if self._descriptor is None:
            self._descriptor = open_own(self._path, os.O_WRONLY | os.O_APPEND)
        while self._waiting:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
