"""What a run says: a bar or plain lines for people, metrics.jsonl and TensorBoard for programs. Rank 0 only."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.files import replacing
from common.progress import say
from engine.evaluation import Accuracy

METRICS = "metrics.jsonl"


class RunLog:
    """A context manager; each method takes plain numbers and is called only where the device was synchronised anyway."""

    def __init__(self, out: Path, *, steps_done: int, total_steps: int) -> None:
        """steps_done: of the checkpoint that this run goes on from; records after it are dropped, they will come again."""
        _drop_records_after(out / METRICS, steps_done)
        self._metrics = open(out / METRICS, "a", buffering=1)  # noqa: SIM115  # closed by __exit__
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=steps_done + 1)
        self._bar = tqdm(
            total=total_steps,
            initial=steps_done,
            unit=" steps",
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )
        self._total_steps = total_steps

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()
        self._board.close()
        self._metrics.close()

    def advance(self) -> None:
        """One step was launched: moves the bar, costs no synchronisation."""
        self._bar.update()

    def train(
        self, *, step: int, epoch: float, loss: float, lr: float, images_per_second: float, data_wait: float
    ) -> None:
        """Figures of the steps since the last call. data_wait: share of the time that the step waited for images, 0–1."""
        self._record(
            "train", step, epoch=epoch, loss=loss, lr=lr, images_per_second=images_per_second, data_wait=data_wait
        )
        text = f"loss {loss:.3f}  lr {lr:.1e}  {images_per_second:,.0f} images/s  data wait {data_wait:.0%}"
        if self._bar.disable:
            say(f"step {step:,}/{self._total_steps:,}  epoch {epoch:.2f}  {text}")
        else:
            self._bar.set_description(f"epoch {epoch:.2f}")
            self._bar.set_postfix_str(text)

    def validation(self, *, step: int, epoch: int, accuracy: Accuracy) -> None:
        """The result over the validation set after an epoch."""
        self._record("validation", step, epoch=epoch, **asdict(accuracy))
        say(
            f"epoch {epoch}: validation top-1 {accuracy.top1:.2%}  top-5 {accuracy.top5:.2%}  loss {accuracy.loss:.3f}  "
            f"({accuracy.images:,} images{f', {accuracy.lost:,} of them cannot be decoded' if accuracy.lost else ''})"
        )

    def _record(self, kind: str, step: int, **figures: float) -> None:
        self._metrics.write(json.dumps({"kind": kind, "step": step, **figures, "time": time.time()}) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def _drop_records_after(path: Path, steps_done: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= steps_done:
                kept.append(line)
        except ValueError:  # a line cut by a crash
            continue
    with replacing(path) as file:
        file.write("".join(f"{line}\n" for line in kept).encode())
