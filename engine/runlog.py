"""What a run says: a bar or plain lines for people, metrics.jsonl and dashboards for programs. Rank 0 only."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType

from torch import Tensor
from tqdm import tqdm

from common.progress import say
from engine.config import Config
from engine.confusion import draw_confusion
from engine.dashboards import TensorBoard, WandB
from engine.evaluation import Accuracy
from engine.gpu_curves import GpuCurves
from engine.pictures import as_pictures, grid
from engine.records import METRICS, drop_records_after

IMAGES_SHOWN = 32
"""Training images that a run puts on its dashboards when it starts."""
_COLUMNS = 8


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
    ) -> None:
        """steps_done: of the checkpoint that this run goes on from; records after it are dropped, they will come again.

        top1: of the last validation so far, if there was one. mean_rgb: of the images that images() gets. gpus: UUIDs of those
        whose power, utilisation and memory are recorded too; None: those that CUDA_VISIBLE_DEVICES leaves. Raises UserError
        where --wandb cannot start.
        """
        out = config.out
        self._total_steps, self._top1, self._classes, self._mean_rgb = total_steps, top1, classes, mean_rgb
        drop_records_after(out / METRICS, steps_done)
        self._first_advance: float | None = None
        self._first_step = steps_done + 1
        self._dashboards: list[TensorBoard | WandB] = [TensorBoard(config, steps_done)]
        if config.wandb:
            self._dashboards.append(WandB(config))
        self._metrics = open(out / METRICS, "a", buffering=1)  # noqa: SIM115  # closed by __exit__
        self._gpu_curves = GpuCurves(gpus)
        self._on_terminal = sys.stderr.isatty()
        # Two lines: where the run is, and its figures.
        self._bar = tqdm(
            total=total_steps,
            initial=steps_done,
            bar_format="{desc}{percentage:3.0f} % |{bar}| {n_fmt}/{total_fmt} steps{postfix}",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not self._on_terminal,
        )
        self._figures = tqdm(
            bar_format="{desc}", position=1, dynamic_ncols=True, file=sys.stderr, disable=not self._on_terminal
        )

    def __enter__(self) -> "RunLog":
        self._gpu_curves.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with ExitStack() as everything:  # one that fails does not keep the others from closing
            everything.callback(self._metrics.close)
            for dashboard in self._dashboards:
                everything.callback(dashboard.close, failed=kind is not None)
            everything.callback(self._gpu_curves.stop)
            everything.callback(self._bar.close)
            everything.callback(self._figures.close)

    def advance(self) -> None:
        """One step was launched: moves the bar, costs no synchronisation."""
        self._bar.update()
        if self._first_advance is None:
            self._first_advance = time.monotonic()

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
    ) -> None:
        """Figures of the steps since the last call.

        data_wait: share of the time that the step waited for images, 0–1. gpu_memory_gib: most that torch has held so far.
        """
        figures = {
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "images_per_second": images_per_second,
            "data_wait": data_wait,
        }
        if gpu_memory_gib is not None:
            figures["gpu_memory_gib"] = gpu_memory_gib
        self._record("train", step, **figures)
        gpus = self._gpu_curves.take_means()
        for dashboard in self._dashboards if gpus else ():
            dashboard.scalars(step, gpus)
        self._tell(step, figures)

    def _tell(self, step: int, figures: dict[str, float]) -> None:
        parts = [
            f"loss {figures['loss']:.3f}",
            f"top-1 {self._top1:.1%}" if self._top1 is not None else "",
            f"{figures['images_per_second']:,.0f} images/s",
            f"data wait {figures['data_wait']:.0%}",
            f"lr {figures['lr']:.1e}",
            f"memory {figures['gpu_memory_gib']:.1f} GiB" if "gpu_memory_gib" in figures else "",
        ]
        text, remaining = "  ".join(filter(None, parts)), self._remaining(step)
        if self._on_terminal:
            self._bar.set_description(f"epoch {figures['epoch']:.2f}", refresh=False)
            self._bar.set_postfix_str(remaining)
            self._figures.set_description_str(text)
        else:
            line = f"step {step:,}/{self._total_steps:,}  epoch {figures['epoch']:.2f}  {text}"
            say(f"{line}  {remaining}" if remaining else line)

    def _remaining(self, step: int) -> str:
        """The time that is left if the rest goes as what was done since the start: validations and checkpoints included."""
        done = step - self._first_step
        if self._first_advance is None or not done or step >= self._total_steps:
            return ""
        seconds = (time.monotonic() - self._first_advance) / done * (self._total_steps - step)
        return f"ETA {tqdm.format_interval(seconds)}"

    def images(self, *, step: int, images: Tensor) -> None:
        """What the network was shown, as a loader gives it: [n, 3 or 4, height, width]."""
        sheet = grid(as_pictures(images, self._mean_rgb), _COLUMNS)
        for dashboard in self._dashboards:
            dashboard.picture(step, "train/images", sheet)

    def validation(self, *, step: int, epoch: int, accuracy: Accuracy, confusion: Tensor | None) -> None:
        """The result over the validation set after an epoch. confusion: as evaluate() counts it, where classes are few."""
        self._top1 = accuracy.top1
        self._record("validation", step, epoch=epoch, **asdict(accuracy))
        say(
            f"epoch {epoch}: validation top-1 {accuracy.top1:.2%}  top-5 {accuracy.top5:.2%}  loss {accuracy.loss:.3f}  "
            f"({accuracy.images:,} images{f', {accuracy.lost:,} of them cannot be decoded' if accuracy.lost else ''})"
        )
        if confusion is not None:
            picture = draw_confusion(confusion.cpu().numpy(), self._classes)
            for dashboard in self._dashboards:
                dashboard.picture(step, "validation/confusion", picture)

    def _record(self, kind: str, step: int, **figures: float) -> None:
        self._metrics.write(json.dumps({"kind": kind, "step": step, **figures, "time": time.time()}) + "\n")
        for dashboard in self._dashboards:
            dashboard.scalars(step, {f"{kind}/{name}": value for name, value in figures.items()})
